"""`mlx_moecache info`: its figures against the headers and against loading, the screen, the JSON object, wrong input,
and hub models, of which only config files and headers may be fetched.

Most tests call main() here. What talks to the fake hub runs in a process of its own, because huggingface_hub reads its
environment when it is imported.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from fake_hub import FakeHub
from mlx.utils import tree_flatten
from tiny_models import ALL_TYPES, build_model, tiny_config, write_checkpoint, write_weights

from mlx_moecache import system
from mlx_moecache.architectures import find
from mlx_moecache.checkpoints import hub_headers
from mlx_moecache.checkpoints.checkpoint import read_index
from mlx_moecache.console import model_headers, model_summary
from mlx_moecache.console.memory_table import _round_sizes
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.info import main
from mlx_moecache.loading import MemoryOptions, OpenedModel
from mlx_moecache.repack import main as repack

FORMAT_KEYS = {"mode", "bits", "group_size", "dtype", "weights"}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def facts(self) -> dict[str, Any]:
        assert (self.code, self.err) == (0, ""), self
        assert self.out.count("\n") == 1
        result: dict[str, Any] = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return result

    def reason(self) -> str:
        """The only line of a command that failed on wrong input."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


Run = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    # What is available changes all the time, and with it what auto means.
    monkeypatch.setattr(system, "available_memory", lambda: None)
    monkeypatch.setattr(system, "process_footprint", lambda: None)

    def run(*argv: str) -> Done:
        capsys.readouterr()  # mlx-lm prints while it quantises
        return Done(main(argv), *capsys.readouterr())

    return run


def of_the_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without its name, and without what auto means, which depends on when it is asked."""
    budgets = [row for row in facts["budgets"] if not row["label"].startswith("auto")]
    return {**facts, "model": "", "budgets": budgets}


def rows(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in facts["budgets"]}


# ---- figures ----


def test_sizes_are_those_of_the_headers(command: Run) -> None:
    facts = command("demo", "--json").facts()
    index = read_index(DEMO_MODEL)
    experts = {name: r.nbytes for name, r in index.tensors.items() if ".switch_mlp." in name}
    assert facts["bytes"]["experts"] == sum(experts.values())
    assert facts["bytes"]["per_layer"][2] == sum(n for name, n in experts.items() if ".layers.2." in name)
    assert facts["bytes"]["per_expert"] == [n // 60 for n in facts["bytes"]["per_layer"]]
    assert facts["bytes"]["total"] == sum(r.nbytes for r in index.tensors.values())
    assert facts["bytes"]["resident"] == facts["bytes"]["total"] - facts["bytes"]["experts"]
    assert facts["bytes"]["shared_experts"] == sum(r.nbytes for n, r in index.tensors.items() if "shared" in n)
    assert facts["experts_per_layer"] == [60] * 6 and facts["experts_per_token"] == [4] * 6


def test_bytes_per_token_are_those_of_the_experts_that_miss(command: Run) -> None:
    facts = command("demo", "--json", "--hit-rate", "0", "--hit-rate", "99.5", "--hit-rate", "100").facts()
    everything = sum(k * n for k, n in zip(facts["experts_per_token"], facts["bytes"]["per_expert"], strict=True))
    assert [row["hit_rate"] for row in facts["bytes_per_token"]] == [0, 0.995, 1]
    assert [row["bytes"] for row in facts["bytes_per_token"]] == [everything, round(0.005 * everything), 0]
    usual = command("demo", "--json").facts()["bytes_per_token"]
    assert [row["hit_rate"] for row in usual] == [0.5, 0.8, 0.9, 0.95]


@pytest.mark.parametrize("context", [64, 4096])
def test_each_budget_gives_the_slots_that_loading_would(context: int, command: Run) -> None:
    facts = command("demo", "--json", "--max-context", str(context)).facts()
    opened = OpenedModel(DEMO_MODEL)
    for row in facts["budgets"]:
        plan = opened.plan(MemoryOptions(memory=row["budget"], max_context=context))
        assert row["fits"] and row["slots_per_layer"] == list(plan.slots_per_layer)
        assert row["plan"] == {**plan.parts(), "total": plan.total, "prefill_step_size": plan.prefill_step_size}
        assert plan.total <= row["budget"]
    budgets = [row["budget"] for row in facts["budgets"]]
    slots = [row["slots_per_layer"][0] for row in facts["budgets"]]
    assert len(budgets) >= 5 and budgets == sorted(budgets) and slots == sorted(slots)


def test_the_smallest_budgets_are_the_smallest_to_the_byte(command: Run) -> None:
    found = rows(command("demo", "--json").facts())
    least, complete = found["smallest"], found["all experts"]
    assert least["slots_per_layer"] == [4] * 6 and complete["slots_per_layer"] == [60] * 6
    below = (f"{least['budget'] - 1}", f"{complete['budget'] - 1}")
    asked = rows(command("demo", "--json", "--memory", below[0], "--memory", below[1]).facts())
    assert asked[below[0]] == {
        "label": below[0], "budget": least["budget"] - 1, "fits": False, "slots_per_layer": None, "plan": None,
    }  # fmt: skip
    assert asked[below[1]]["slots_per_layer"] == [59] * 6


def test_budgets_that_are_asked_for_replace_the_round_ones(command: Run) -> None:
    found = rows(command("demo", "--json", "--memory", "52MB", "--memory", "10%", "--memory", "auto").facts())
    assert set(found) == {"smallest", "52MB", "10%", "auto", "all experts"}
    assert found["52MB"]["budget"] == 52_000_000


@pytest.mark.parametrize("low", [7, 49_221_376, 2_320_000_000])
@pytest.mark.parametrize("ratio", [1.001, 1.5, 8, 80])
def test_round_sizes_are_round_and_between(low: int, ratio: float) -> None:
    high = int(low * ratio)
    sizes = _round_sizes(low, high)
    assert sizes == sorted(set(sizes)) and all(low < size < high for size in sizes)
    if ratio >= 1.5 and low > 100:
        assert len(sizes) >= 4
        assert all(len(str(size).rstrip("0")) <= (2 if ratio > 2 else 3) for size in sizes), sizes


# ---- kinds of models ----


def test_dense_layers_and_shared_experts_are_told_apart(command: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("deepseek_v2"))
    facts = command(str(folder), "--json").facts()
    assert facts["layers"] == 3
    assert facts["moe_layers"] == ["model.layers.1.mlp.switch_mlp", "model.layers.2.mlp.switch_mlp"]
    index = read_index(folder)
    assert facts["bytes"]["shared_experts"] == sum(r.nbytes for n, r in index.tensors.items() if "shared" in n) > 0
    assert facts["quantisation"]["dense_mlp"][0]["weights"] == 3
    assert facts["router"]["family"] == "softmax" and facts["router"]["groups"] and facts["router"]["bias"]
    out = command(str(folder)).out
    assert "MoE layers          2 of 3\n" in out
    words = " ".join(out.split())
    assert "softmax over all experts, may rule out groups of experts; can be biased" in words


@pytest.mark.parametrize("model_type", [t for t in ALL_TYPES if find(t) is not None])
def test_every_model_type_has_a_router_in_each_moe_layer_and_adds_up(model_type: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config(model_type))
    summary = model_summary.summarise(OpenedModel(folder))
    assert sum(summary.formats["router"].values()) == len(summary.layers) > 0
    assert summary.formats["attention"] and summary.formats["embeddings"]
    assert set(summary.expert_formats) in ({"gate_proj", "up_proj", "down_proj"}, {"fc1", "fc2"})
    assert all(sum(counts.values()) == len(summary.layers) for counts in summary.expert_formats.values())
    in_headers = sum(r.nbytes for r in read_index(folder).tensors.values())
    assert in_headers <= summary.total < 1.1 * in_headers  # more: rope tables and the like
    assert summary.router.title is not None


def test_every_part_says_how_it_is_stored(command: Run, tmp_path: Path) -> None:
    def quantise(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.endswith("mlp.gate"):
            return {"group_size": 32, "bits": 8}
        if "down_proj" in path and ".layers.0." in path:
            return {"group_size": 32, "bits": 6}
        return hasattr(module, "to_quantized") and "self_attn" not in path

    folder = write_checkpoint(tmp_path / "mixed", tiny_config("qwen3_moe"), "4bit", quantise=quantise)
    stored = command(str(folder), "--json").facts()["quantisation"]

    def affine(bits: int, weights: int) -> dict[str, Any]:
        return {"mode": "affine", "bits": bits, "group_size": 32, "dtype": None, "weights": weights}

    assert stored["experts"] == {
        "gate_proj": [affine(4, 3)],
        "up_proj": [affine(4, 3)],
        "down_proj": [affine(4, 2), affine(6, 1)],
    }
    assert stored["router"] == [affine(8, 3)]
    plain = {"mode": None, "bits": None, "group_size": None, "dtype": "float32", "weights": 12}
    assert stored["attention"] == [plain]
    assert stored["embeddings"] == [affine(4, 1)]
    words = " ".join(command(str(folder)).out.split())
    assert "experts down_proj 4-bit affine, groups of 32 (2x); 6-bit affine, groups of 32 (1x) experts gate" in words


def test_layers_may_differ_in_experts_per_token(command: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("hunyuan", moe_topk=[1, 2, 2]))
    facts = command(str(folder), "--json", "--hit-rate", "0").facts()
    assert facts["experts_per_token"] == [1, 2, 2]
    assert facts["bytes_per_token"][0]["bytes"] == 5 * facts["bytes"]["per_expert"][0]
    assert rows(facts)["smallest"]["slots_per_layer"] == [1, 2, 2]
    out = command(str(folder)).out
    assert "16 per layer, 1 (in 1 layer), 2 (in 2 layers) per token" in out
    assert " 1-2 of 16 " in out


def test_block_formats_are_called_by_their_name(command: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("gpt_oss"), "mxfp4")
    assert "  experts           mxfp4, groups of 32\n" in command(str(folder)).out


def test_a_raw_hugging_face_layout_is_described_as_the_converted_one(command: Run, tmp_path: Path) -> None:
    raw = command(str(write_checkpoint(tmp_path / "raw", tiny_config("mixtral"), "raw")), "--json").facts()
    converted = command(str(write_checkpoint(tmp_path / "mlx", tiny_config("mixtral"))), "--json").facts()
    assert of_the_model(raw) == of_the_model(converted)


def test_routers_that_are_not_in_the_table_or_out_of_reach(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_summary, "find", lambda *_: None)
    assert command("demo", "--json").facts()["router"]["family"] is None
    assert "of a kind not in our table; can be biased" in command("demo").out

    class Unreachable(OpenedModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for block in self.blocks:
                block.seam = None

    monkeypatch.undo()
    monkeypatch.setattr("mlx_moecache.loading.OpenedModel", Unreachable)
    assert command("demo", "--json").facts()["router"]["bias"] is False
    assert "cannot be biased: this model runs with --exact only" in " ".join(command("demo").out.split())


# ---- what people see ----


def test_no_argument_means_the_demo_model_unless_there_is_a_folder_of_that_name(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command().out
    assert out == command("demo").out
    assert out.startswith("model               demo_model\ntype                qwen2_moe\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert "'demo' has no config.json" in command("demo").reason()


@pytest.mark.parametrize("argv", [[], ["--memory", "1MB", "--memory", "1" + "0" * 40], ["--hit-rate", "12.345"] * 13])
def test_the_screen_is_80_columns_of_plain_ascii(argv: list[str], command: Run, tmp_path: Path) -> None:
    folder = tmp_path / ("a-long-name-" * 20)[: 175 - len(f"{tmp_path}/")]
    shutil.copytree(DEMO_MODEL, folder)
    out = command(str(folder), *argv).out
    assert out.isascii() and out.replace("\n", "").isprintable()
    assert max(map(len, out.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert len(out.splitlines()) <= 36 or len(argv) > 4


def test_help_and_mistyped_flags_do_not_import_mlx() -> None:
    code = """
import sys
from mlx_moecache.info import main
assert main(["--jsom"]) == 2
try:
    main(["-h"])
except SystemExit as e:
    assert e.code == 0
slow = [m for m in sys.modules if m.split(".")[0] in ("mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub")]
sys.exit(f"imported: {slow}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_budget_that_is_too_small_is_a_row_and_no_error(command: Run) -> None:
    line = next(line for line in command("demo", "--memory", "1MB").out.splitlines() if line.endswith("1MB"))
    assert line.split() == ["1.00", "MB", "too", "small", "1MB"]


def test_in_a_pipe_there_are_no_escapes_and_no_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache.info", "demo"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "" and "\x1b" not in done.stdout and "\r" not in done.stdout
    assert done.stdout.endswith("tokens (37.7 MB of KV cache).\n")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["/no/such/folder"], "no such folder"),
        (["demo", "--memory", "lots"], "not a memory size"),
        (["someone/else", "--memory", "0"], "more than 0"),  # before anything is fetched
        (["demo", "--hit-rate", "101"], "--hit-rate: must be between 0 and 100"),
        (["demo", "--hit-rate", "nan"], "--hit-rate: must be between 0 and 100"),
        (["demo", "--max-context", "0"], "--max-context: must be at least 1"),
        (["demo", "--revision", "main"], "only Hugging Face repos have revisions"),
        (["--model", "demo"], "the model has no flag here: mlx_moecache info MODEL"),
        (["demo", "--jsom"], "did you mean --json?"),
        (["demo", "more"], "unexpected argument 'more'"),
        ([""], "the model name is empty"),
    ],
)
def test_wrong_values_are_one_line(argv: list[str], part: str, command: Run) -> None:
    assert part in command(*argv).reason()


def test_broken_folders_are_refused_by_name(command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    shard = folder / "model.safetensors"
    assert "is not a folder" in command(str(shard)).reason()
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard}: truncated, 1 bytes are missing" in command(str(folder)).reason()
    shard.unlink()
    assert f"{folder}: no model*.safetensors here" in command(str(folder)).reason()
    (folder / "config.json").unlink()
    assert "has no config.json" in command(str(folder)).reason()


def test_a_dense_model_is_refused_as_by_loading(command: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 257,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder = write_weights(tmp_path / "dense", config, dict(tree_flatten(build_model(config).parameters())), shards=1)
    assert "no routed experts" in command(str(folder)).reason()


# ---- the hub ----

WORKER = """
import contextlib, io, json, sys
from mlx_moecache.checkpoints.hub import resolve_model
from mlx_moecache.info import main as info

def download(argv):
    print(resolve_model(argv[1]))
    return 0

for line in sys.stdin:
    argv = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = (download if argv[0] == "download" else info)(argv)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FIRST_BYTES = 100_001  # what huggingface_hub asks for at once, in the hope that the header ends there


class Client:
    """Runs commands in one process with a Hugging Face cache `home`; temporary folders must be gone after each."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        self.home = home
        self._temporary = home / "temporary"
        self._temporary.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))}
        kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
        changes = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "TMPDIR": str(self._temporary), **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**kept, **changes}, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, *argv: str) -> Done:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(argv) + "\n")
        self._process.stdin.flush()
        done = Done(*json.loads(self._process.stdout.readline()))
        assert list(self._temporary.glob("mlx_moecache-*")) == []
        return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo_files() -> dict[str, bytes]:
    return contents(DEMO_MODEL)


@pytest.fixture(scope="module")
def running_hub() -> Iterator[FakeHub]:
    with FakeHub({}) as running:
        yield running


@pytest.fixture
def hub(running_hub: FakeHub) -> FakeHub:
    running_hub.forget_requests()
    return running_hub


@pytest.fixture(scope="module")
def client(running_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One client for all tests, each of which has repos of its own."""
    with Client(running_hub.url, tmp_path_factory.mktemp("home")) as running:
        yield running


def test_of_a_repo_only_config_and_header_bytes_are_fetched(
    hub: FakeHub, client: Client, demo_files: dict[str, bytes], command: Run
) -> None:
    hub.repos["org/headers"] = {"main": demo_files}
    facts = client("org/headers", "--json").facts()
    assert of_the_model(facts) == of_the_model(command("demo", "--json").facts())
    assert facts["model"] == "org/headers"
    assert hub.sent["model.safetensors"] == FIRST_BYTES < len(demo_files["model.safetensors"]) / 50
    assert {request.range for request in hub.downloads("model.safetensors")} == {"bytes=0-100000"}
    assert set(hub.sent) == {"config.json", "generation_config.json", "model.safetensors"}
    assert not list(client.home.glob("**/models--org--headers/**/*.safetensors"))


def test_a_long_header_is_fetched_whole_and_from_every_shard(
    hub: FakeHub, client: Client, command: Run, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("olmoe"), shards=2)
    files = contents(folder)
    for shard in SHARDS:  # the header may hold any blanks
        length = int.from_bytes(files[shard][:8], "little")
        header = files[shard][8 : 8 + length] + b" " * 300_000
        files[shard] = len(header).to_bytes(8, "little") + header + files[shard][8 + length :]
    hub.repos["org/long"] = {"main": files}
    facts = client("org/long", "--json").facts()
    assert of_the_model(facts) == of_the_model(command(str(folder), "--json").facts())
    for shard in SHARDS:
        assert hub.sent[shard] == FIRST_BYTES + int.from_bytes(files[shard][:8], "little")


def test_of_a_repacked_copy_the_headers_of_the_expert_shards_are_fetched(
    hub: FakeHub, client: Client, command: Run, tmp_path: Path
) -> None:
    assert repack(["demo", str(tmp_path / "copy")]) == 0
    command()  # drops what repack printed
    hub.repos["org/copy"] = {"main": contents(tmp_path / "copy")}
    facts = client("org/copy", "--json").facts()
    assert of_the_model(facts) == of_the_model(command(str(tmp_path / "copy"), "--json").facts())
    assert not list(client.home.glob("**/models--org--copy/**/*.safetensors"))


def test_a_revision_is_respected_and_a_branch_that_moved_is_seen(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    few = contents(write_checkpoint(tmp_path / "few", tiny_config("olmoe", num_experts=8)))
    many = contents(write_checkpoint(tmp_path / "many", tiny_config("olmoe", num_experts=12)))
    hub.repos["org/moves"] = {"main": few, "many": many}

    def experts(*argv: str) -> int:
        return int(client("org/moves", "--json", *argv).facts()["experts_per_layer"][0])

    commit = hub.commit("org/moves", "many")
    assert [experts("--revision", "many"), experts("--revision", commit), experts()] == [12, 12, 8]
    hub.repos["org/moves"] = {"main": many}
    assert experts() == 12
    assert "has no revision 'few'" in client("org/moves", "--revision", "few").reason()


def test_a_downloaded_model_is_read_from_the_cache_also_without_the_hub(
    hub: FakeHub, client: Client, demo_files: dict[str, bytes]
) -> None:
    hub.repos["org/whole"] = hub.repos["org/part"] = {"main": demo_files}
    before = of_the_model(client("org/whole", "--json").facts())
    assert client("download", "org/whole").code == client("org/part").code == 0
    hub.forget_requests()
    # From here on the cache has all of org/whole, the config of org/part, and nothing of org/other.
    assert of_the_model(client("org/whole", "--json").facts()) == before
    with Client(hub.url, client.home, HF_HUB_OFFLINE="1") as offline:
        assert of_the_model(offline("org/whole", "--json").facts()) == before
        assert "HF_HUB_OFFLINE forbids" in offline("org/part").reason()
        assert "HF_HUB_OFFLINE forbids" in offline("org/other").reason()
    assert hub.downloads() == []
    with Client("http://127.0.0.1:9", client.home) as unreachable:
        assert of_the_model(unreachable("org/whole", "--json").facts()) == before
        assert "cannot reach http://127.0.0.1:9" in unreachable("org/part").reason()


def test_what_the_hub_refuses_is_explained(hub: FakeHub, client: Client, demo_files: dict[str, bytes]) -> None:
    config = demo_files["config.json"]
    shard = demo_files["model.safetensors"]
    repos = {
        "org/gated": demo_files,
        "org/no-shards": {"config.json": config, "model.gguf": b"x", "sub/model.safetensors": shard},
        "org/no-config": {"model.safetensors": shard},
        "org/short": {"config.json": config, "model.safetensors": b"1234"},
        "org/no-header": {"config.json": config, "model.safetensors": b"\xff" * 500},
        "org/no-json": {"config.json": config, "model.safetensors": (5).to_bytes(8, "little") + b"hello"},
        "org/broken": {"config.json": b"{", "model.safetensors": shard},
    }
    hub.repos.update({name: {"main": files} for name, files in repos.items()})
    hub.gated.add("org/gated")
    assert "is gated: accept the licence" in client("org/gated").reason()
    assert "has no model*.safetensors files" in client("org/no-shards").reason()
    assert "has no config.json" in client("org/no-config").reason()
    for name in ("org/short", "org/no-header", "org/no-json"):
        assert f"a header of '{name}' cannot be read" in client(name).reason()
    assert "org/broken" in client("org/broken").reason()
    hub.repos["org/cut"] = {"main": demo_files}
    hub.cut_once("model.safetensors", after=1000)
    assert "the connection was lost" in client("org/cut").reason()
    hub.failing["org/gated"] = 503
    assert "answered 503" in client("org/gated").reason()


def test_errors_name_the_repo_and_never_the_temporary_folder(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "raw", tiny_config("gpt_oss"), "raw")
    hub.repos["org/raw"] = {"main": contents(folder)}
    own_code = {**json.loads((folder / "config.json").read_text()), "model_file": "own.py"}
    code = b"raise RuntimeError('the code of the repo ran')"
    hub.repos["org/own-code"] = {
        "main": {**contents(folder), "config.json": json.dumps(own_code).encode(), "own.py": code}
    }
    needs_conversion, refused = client("org/raw").reason(), client("org/own-code").reason()
    trusted = client("org/own-code", "--trust-remote-code").reason()
    assert "mlx_lm.convert --hf-path org/raw --mlx-path mlx_model" in needs_conversion
    assert "--trust-remote-code" in refused
    assert "the code of the repo ran" in trusted
    for line in (needs_conversion, refused, trusted):
        assert "mlx_moecache-" not in line and "org/" in line


def test_ctrl_c_leaves_no_temporary_folder(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {"model.safetensors": {"a": ("F32", (2,))}}
    found = hub_headers.RepoHeaders("org/x", (DEMO_MODEL / "config.json",), shards)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(hub_headers, "resolve_headers", lambda *_, **__: found)

    def interrupted(folder: Path, **_: Any) -> None:
        assert list(tmp_path.iterdir()) == [folder]
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_moecache.loading.OpenedModel", interrupted)
    assert command("org/x") == Done(130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_progress_bar_is_asked_for_on_a_terminal_but_not_with_json(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def resolve(*_: Any, progress: bool, **__: Any) -> Path:
        asked.append(progress)
        return DEMO_MODEL

    monkeypatch.setattr(hub_headers, "resolve_headers", resolve)
    monkeypatch.setattr(model_headers, "is_terminal", lambda stream: True)
    assert main(["org/x"]) == 0 and main(["org/x", "--json"]) == 0
    assert asked == [True, False]


def test_json_keys_are_stable(command: Run) -> None:
    facts = command("demo", "--json").facts()
    assert list(facts) == [
        "model", "model_type", "layers", "moe_layers", "experts_per_layer", "experts_per_token", "shared_experts",
        "router", "quantisation", "bytes", "bytes_per_token", "max_context", "budgets", "version",
    ]  # fmt: skip
    assert list(facts["router"]) == ["family", "title", "groups", "bias", "note"]
    assert list(facts["bytes"]) == ["per_expert", "per_layer", "experts", "shared_experts", "resident", "total"]
    assert list(facts["budgets"][0]) == ["label", "budget", "fits", "slots_per_layer", "plan"]
    assert all(set(entry) == FORMAT_KEYS for entry in facts["quantisation"]["attention"])
    assert math.isclose(facts["bytes_per_token"][0]["hit_rate"], 0.5)
