"""`mlx_moecache plan`: its figures against loading, simulating and the emulated device, the screen, exit codes, wrong
input, and hub models, of which no weights may be fetched."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config, write_checkpoint

from mlx_moecache import devices, system
from mlx_moecache.budget import OVERHEAD, parse_memory
from mlx_moecache.checkpoints.checkpoint import INDEX_NAME
from mlx_moecache.console.emulation import reserve
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.devices import DEVICES, Figure
from mlx_moecache.generate import main as generate
from mlx_moecache.loading import MemoryOptions, OpenedModel
from mlx_moecache.plan import main
from mlx_moecache.simulate import main as simulate
from mlx_moecache.study.published import LEAST_SHARE, expected_hits

STORY = "Tell me a story about a fox."
PER_TOKEN = 6 * 4 * 23_040  # bytes of the experts that one token of the demo model uses
SMALL = ("--memory", "14MB", "--max-context", "256")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def facts(self) -> dict[str, Any]:
        assert self.err == "" and self.out.count("\n") == 1, self
        result: dict[str, Any] = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return result


Run = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> Done:
        capsys.readouterr()
        return Done(main(argv), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return OpenedModel(DEMO_MODEL)


# ---- figures ----


def test_the_plan_is_that_of_loading(command: Run, opened: OpenedModel) -> None:
    facts = command("demo", *SMALL, "--json").facts()
    plan = opened.plan(MemoryOptions(memory="14MB", max_context=256))
    assert facts["slots_per_layer"] == list(plan.slots_per_layer)
    assert facts["plan"] == {**plan.parts(), "total": plan.total, "prefill_step_size": plan.prefill_step_size}
    assert facts["share_in_memory"] == plan.slots_per_layer[0] / 60 and facts["runs"]


def test_the_smallest_budget_is_the_smallest_to_the_byte(command: Run) -> None:
    least = command("demo", *SMALL, "--json").facts()["smallest_budget"]
    assert command("demo", "--memory", f"{least}", "--max-context", "256").code == 0
    below = command("demo", "--memory", f"{least - 1}", "--max-context", "256", "--json")
    assert below.code == 1
    facts = below.facts()
    assert not facts["runs"] and facts["smallest_budget"] == least == sum(facts["smallest_plan"].values())
    assert facts["plan"] is None and facts["slots_per_layer"] is None and facts["expectations"] == []


def test_a_device_plans_what_a_run_on_it_gets(
    command: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(system, "process_footprint", lambda: 50_000_000)
    monkeypatch.setattr(system, "peak_footprint", lambda: 50_000_000)
    limit = 50_000_000 + 20_500_000 + 8_800_000 + OVERHEAD
    made = replace(DEVICES["iphone-16-pro"], name="phone", app_limit=Figure(limit, "estimate: small"))
    monkeypatch.setitem(devices.DEVICES, "phone", made)
    facts = command("demo", "--device", "phone", "--max-context", "30", "--json").facts()
    assert facts["budget"] == limit - reserve(limit) - 50_000_000
    assert facts["plan"]["host_buffers"] > 0  # reads past the page cache need buffers
    assert facts["emulation"]["limit_bytes"] == limit and "app_limit" in facts["emulation"]["estimates"]
    capsys.readouterr()
    gc.collect()  # a model of an earlier test that goes away meanwhile would be counted as ours
    generate(["-p", STORY, "-m", "19", "--device", "phone", "--json"])  # 11 tokens and 19
    run = json.loads(capsys.readouterr().out)
    assert (run["budget"], run["plan"]["slots"]) == (facts["budget"], facts["plan"]["slots"])


def test_another_machine_is_planned_by_its_ram(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "process_footprint", lambda: 50_000_000)
    facts = command("demo", "--sim-memory", "8GB", "--json").facts()
    assert facts["budget"] == parse_memory("auto", physical=8 * 10**9, recommended=None, baseline=50_000_000)
    assert command("demo", "--sim-memory", "60MB").code == 1


def test_reads_follow_from_the_hit_rates(command: Run) -> None:
    facts = command(
        "demo", *SMALL, "--flash", "2GB/s", "--flash-latency", "100us", "--compute-ms", "8", "--json"
    ).facts()
    assert [e["routing"] for e in facts["expectations"]] == ["original", "cache-prior"]
    assert "published miss rates" in facts["hit_rates_from"]
    for e in facts["expectations"]:
        for i in range(2):
            hit, read = e["hit_rate"][i], e["bytes_per_token"][i]
            assert read == pytest.approx((1 - hit) * PER_TOKEN)
            assert e["reading_layers_per_token"][i] == pytest.approx(6 * (1 - hit**4))
            seconds = read / 2e9 + 1e-4 * e["reading_layers_per_token"][i]
            assert e["read_seconds_per_token"][i] == pytest.approx(seconds)
            assert e["seconds_per_token"][i] == pytest.approx(seconds + 8e-3)
    original, prior = facts["expectations"]
    assert all(a <= b for a, b in zip(original["hit_rate"], prior["hit_rate"], strict=True))


def test_without_a_flash_speed_there_are_no_times(command: Run) -> None:
    facts = command("demo", *SMALL, "--json").facts()
    assert facts["emulation"] is None
    assert all(e["read_seconds_per_token"] is e["seconds_per_token"] is None for e in facts["expectations"])
    assert "unknown without the speed of the disk" in command("demo", *SMALL).out


def test_a_trace_says_what_the_simulator_says(command: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(tmp_path / "run.trace")
    assert generate(["-p", STORY, "-m", "30", "--exact", "--slots", "20", "--trace", trace]) == 0
    flash = ("--flash", "1GB/s", "--flash-latency", "50us")
    facts = command("demo", "--memory", "11MB", "--max-context", "256", "--trace", trace, *flash, "--json").facts()
    slots = facts["slots_per_layer"][0]
    assert 4 <= slots < 60 and "run.trace" in facts["hit_rates_from"]
    routings = ["--routing", "original", "--routing", "cache-prior"]
    assert simulate([trace, "--slots", str(slots), "--eviction", "lru", *routings, *flash, "--json"]) == 0
    replayed = [r["decode"] for r in json.loads(capsys.readouterr().out)["results"]]
    for e, r in zip(facts["expectations"], replayed, strict=True):
        assert e["hit_rate"][0] == e["hit_rate"][1] == pytest.approx(1 - r["miss_rate"])
        assert e["bytes_per_token"][0] == pytest.approx(r["bytes_per_token"])
        assert e["read_seconds_per_token"][0] * 1000 == pytest.approx(r["ms_per_token"])
    assert [e["exact"] for e in facts["expectations"]] == [True, False]


def test_a_trace_of_another_model_is_refused(command: Run, tmp_path: Path) -> None:
    trace = str(tmp_path / "run.trace")
    assert generate(["-p", STORY, "-m", "3", "--exact", "--slots", "20", "--trace", trace]) == 0
    other = write_checkpoint(tmp_path / "olmoe", tiny_config("olmoe"), tokenizer=True)
    done = command(str(other), "--memory", "30MB", "--max-context", "32", "--trace", trace)
    if done.code == 0:  # all experts in memory: the trace was not looked at
        least = command(str(other), "--max-context", "32", "--json").facts()["smallest_budget"]
        done = command(str(other), "--memory", str(least), "--max-context", "32", "--trace", trace)
    assert done.code == 2 and "is of a model with 6 MoE layers of 60 experts" in done.err


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_experts_in_memory_never_mean_fewer_expected_hits(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for prior in (False, True):
        fewer, more = expected_hits(low, cache_prior=prior), expected_hits(high, cache_prior=prior)
        assert 0 <= fewer.low <= fewer.high <= 1
        assert fewer.low <= more.low + 1e-9 and fewer.high <= more.high + 1e-9


def test_the_published_rates_are_within_the_range() -> None:
    """Miss rates with half of the experts, and of Nemotron at its shares, as the reference lists them."""
    for lru, prior in ((0.35, 0.16), (0.28, 0.07), (0.22, 0.09), (0.40, 0.21)):
        for miss, is_prior in ((lru, False), (prior, True)):
            r = expected_hits(0.5, cache_prior=is_prior)
            assert r.low - 1e-9 <= 1 - miss <= r.high + 1e-9
    for capacity, lru, prior in ((12, 0.538, 0.38), (16, 0.483, 0.327), (32, 0.3372, 0.2038), (64, 0.1603, 0.0838)):
        for miss, is_prior in ((lru, False), (prior, True)):
            r = expected_hits(capacity / 128, cache_prior=is_prior)
            assert r.low - 2e-3 <= 1 - miss <= r.high + 2e-3, (capacity, is_prior, r)
    assert 0.09 < LEAST_SHARE < 0.1


# ---- what a person sees ----


@pytest.mark.parametrize(
    "flags",
    [
        (),
        SMALL,
        ("--memory", "2MB"),
        ("--device", "iphone-17-pro"),
        (*SMALL, "--flash", "2GB/s", "--compute-ms", "8"),
        ("--sim-memory", "16GB", "--max-context", "100000"),
    ],
    ids=" ".join,
)
def test_the_answer_is_one_screen_of_80_columns(flags: tuple[str, ...], command: Run) -> None:
    done = command("demo", *flags)
    lines = done.out.splitlines()
    assert done.err == "" and len(lines) <= 24
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    verdict = next(line for line in lines if line.startswith("verdict"))
    assert ("it does not run" in verdict, "it runs" in verdict) == (done.code == 1, done.code == 0)


def test_a_model_that_does_not_run_is_answered_with_what_would(command: Run) -> None:
    done = command("demo", "--memory", "6MB", "--max-context", "1024")
    assert done.code == 1
    assert "MB are missing" in done.out and "smallest budget" in done.out and "KV 9.44 MB" in done.out
    assert "it would run on" in done.out and "iphone-13-pro" in done.out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--device", "iphone-16-prp"], "no profile of a device 'iphone-16-prp', did you mean iphone-16-pro?"),
        (["--device", "iphone-16-pro", "--memory", "4GB"], "--device iphone-16-pro and --memory: give one of them"),
        (["--device", "iphone-16-pro", "--sim-memory", "4GB"], "--device iphone-16-pro and --sim-memory: give one"),
        (["--memory", "4GB", "--sim-memory", "8GB"], "--memory and --sim-memory: give one of them"),
        (["--memory", "lots"], "'lots' is not a memory size"),
        (["--sim-memory", "60%"], "--sim-memory is the RAM of another machine, a size such as 16GB, not '60%'"),
        (["--sim-memory", "x"], "'x' is not a memory size"),
        (["--compute-ms", "5"], "--compute-ms is part of the predicted time"),
        (["--flash-latency", "5us"], "--flash-latency is part of an emulated flash"),
        (["--trace", "missing.trace"], "no trace at missing.trace"),
        (["--trace", __file__, "--memory", "100MB"], "is not a trace; give a file that was recorded with --trace"),
        (
            ["--max-context", "3000000000"],
            "max context must be at least 1 token and at most 1,073,741,824",
        ),
        (["--max-context", "0"], "--max-context: must be at least 1, not 0"),
        (["--model", "demo"], "--model: the model has no flag here"),
        (["--bogus"], "unknown flag --bogus"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags: list[str], reason: str, command: Run) -> None:
    done = command("demo", *flags)
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert reason in done.err


def test_a_model_that_is_not_there_is_an_error_not_a_no(command: Run, tmp_path: Path) -> None:
    assert command(str(tmp_path / "nowhere")).code == 2


def test_both_ways_to_call_it_answer_alike() -> None:
    flags = ["demo", *SMALL]
    ways = [[sys.executable, "-m", "mlx_moecache.plan", *flags], [sys.executable, "-m", "mlx_moecache", "plan", *flags]]
    done = [subprocess.run(way, capture_output=True, text=True, timeout=120) for way in ways]
    assert [(d.returncode, d.stderr) for d in done] == [(0, ""), (0, "")]
    assert done[0].stdout == done[1].stdout and "\x1b" not in done[0].stdout


def test_help_and_wrong_flags_do_not_import_mlx() -> None:
    code = """
import sys
from mlx_moecache import plan
assert plan.main(["--bogus"]) == 2
assert plan.main(["--device", "toaster"]) == 2
sys.exit(any(m.split(".")[0] in ("mlx", "mlx_lm", "transformers") for m in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


# ---- the hub ----


def test_no_weights_are_downloaded(tmp_path: Path, command: Run) -> None:
    files = {f.name: f.read_bytes() for f in DEMO_MODEL.iterdir() if f.is_file()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    with FakeHub({"org/model": {"main": files}}) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        argv = [sys.executable, "-m", "mlx_moecache.plan", "org/model", *SMALL, "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment)
        sent = hub.sent["model.safetensors"]
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    local = command("demo", *SMALL, "--json").facts()
    assert facts | {"model": ""} == local | {"model": ""} and facts["model"] == "org/model"
    assert math.isclose(sent, 100_001) and sent < len(files["model.safetensors"]) / 50
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_an_index_with_a_side_file_changes_nothing_before_or_after_the_download(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "made", tiny_config("qwen3_5_moe"), tokenizer=True)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["mtp.fc.weight"] = "mtp.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    plan = ["plan", "org/model", *SMALL, "--json"]
    reply = ["generate", "--model", "org/model", *SMALL[:2], "-p", "hi", "-m", "2"]
    with FakeHub({"org/model": {"main": files}}) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

        def run(argv: list[str]) -> str:
            command = [sys.executable, "-m", f"mlx_moecache.{argv[0]}", *argv[1:]]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout

        before = run(plan)
        run(reply)
        assert json.loads(run(plan))["plan"] == json.loads(before)["plan"] is not None
