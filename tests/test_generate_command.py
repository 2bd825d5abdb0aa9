"""`mlx_moecache generate`: the reply, the statistics, the JSON object, Ctrl-C, pipes, terminals and wrong input.

Most tests call main() here; those about signals, pipes and terminals run the real command in a process of its own.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.cache_prompt
import mlx_lm.generate  # noqa: F401  # the module; the package binds the name to a function
import pytest
from faulty_reads import after_each_read
from mlx.utils import tree_flatten
from tiny_models import build_model, tiny_config, write_checkpoint, write_weights

from mlx_moecache.checkpoints.reader import BOUNCE_BYTES, BOUNCES_PER_THREAD, ExpertReader, ReadRequest
from mlx_moecache.console.interrupt import Interrupt, Interrupted
from mlx_moecache.console.report import CacheUse, MemoryUse, Reply, statistics
from mlx_moecache.console.terminal import StatusLine, make_streams_safe, write_notes
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import ReadError
from mlx_moecache.generate import main
from mlx_moecache.simulate import main as simulate
from mlx_moecache.stats import CacheStats, PhaseStats

STORY = "Tell me a story about a fox."
READ_AHEAD = 7 * 23_040  # bytes of seven experts, the buffers of look-ahead
SMALL = ["--slots", "20", "-m", "8", "-p", STORY]
STOP_AT_ONCE = ["--extra-eos-token", *map(str, range(4096))]  # every token of the demo model ends the reply


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> Done:
        gc.collect()  # models of earlier tests would count in the peak
        code = main(argv)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Run) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2, one line on stderr, nothing on stdout. Returns the line."""

    def run(*argv: str) -> str:
        done = command(*argv)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        return done.err

    return run


@pytest.fixture
def stock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """mlx-lm's own command with the same flags; returns its stdout."""

    def run(*argv: str, module: str = "mlx_lm.generate") -> str:
        monkeypatch.setattr(sys, "argv", [module, *argv])
        sys.modules[module].main()
        return capsys.readouterr().out

    return run


def copy_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, folder))


def figures(done: Done) -> dict[str, Any]:
    assert done.err == "" and done.out.count("\n") == 1
    result: dict[str, Any] = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    return result


def held_by_other_tests() -> int:
    """Bytes that models of other test files keep in this process; they count in MLX's peak."""
    gc.collect()
    return mx.get_active_memory()


# ---- the reply ----


@pytest.mark.parametrize(
    "flags",
    [
        ["-p", STORY],
        ["-p", r"Once upon\na\ttime", "--ignore-chat-template"],
        ["-p", STORY, "--system-prompt", "You are brief.", "--prefill-response", "The little fox"],
        ["-p", STORY, "--temp", "0.9", "--top-p", "0.9", "--top-k", "50", "--min-p", "0.01", "--seed", "7"],
        ["-p", STORY, "--temp", "1", "--seed", "3", "--xtc-probability", "0.5", "--xtc-threshold", "0.05"],
        ["-p", STORY, "--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "4"],
        ["-p", STORY * 4, "--max-kv-size", "16", "--prefill-step-size", "5"],
        ["-p", STORY, "--extra-eos-token", "the", "13", "--chat-template-config", '{"unused": 1}'],
    ],
    ids=lambda flags: " ".join(f for f in flags if f.startswith("--")) or "plain",
)
def test_an_exact_reply_is_that_of_mlx_lm_generate(flags: list[str], command: Run, stock: Callable[..., str]) -> None:
    ours = command(*flags, "-m", "12", "--slots", "15", "--exact", "--verbose", "False")
    theirs = stock(*flags, "-m", "12", "--model", str(DEMO_MODEL), "--verbose", "False")
    assert ours == Done(0, theirs, "")


def test_a_saved_prompt_cache_is_continued_as_mlx_lm_does(
    command: Run, stock: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    saved = str(tmp_path / "saved.safetensors")
    prefix = ["--prompt", "There was a fox who", "--prompt-cache-file", saved]
    stock(*prefix, "--model", str(DEMO_MODEL), module="mlx_lm.cache_prompt")
    flags = ["--prompt", " lived in a red house.", "--prompt-cache-file", saved, "-m", "10"]
    theirs = stock(*flags, "--verbose", "F")
    assert command(*flags, "--slots", "15", "--exact", "--verbose", "F") == Done(0, theirs, "")

    result = figures(command(*flags, "--slots", "15", "--json", "--model", os.path.relpath(DEMO_MODEL)))
    assert result["cached_tokens"] > 0
    kv_of_what_is_needed = result["plan"]["kv_cache"]
    more = figures(command(*flags[:-1], "600", "--slots", "15", "--json", *STOP_AT_ONCE))
    assert more["plan"]["kv_cache"] > kv_of_what_is_needed

    assert figures(command(*flags, "--slots", "15", "--json", "--model", "demo"))["cached_tokens"] > 0
    assert "was made with the model" in refused(*flags, "--model", "someone/else")
    assert "leave it out" in refused(*flags, "--max-kv-size", "100")
    assert "no prompt cache file" in refused(*flags[:2], "--prompt-cache-file", str(tmp_path / "none"))
    weights = str(DEMO_MODEL / "model.safetensors")
    assert "not a prompt cache" in refused(*flags[:2], "--prompt-cache-file", weights)


def test_a_prompt_beyond_the_length_that_the_tokenizer_names_is_read_without_a_warning() -> None:
    text = "Once upon a time there was a fox. " * 250
    argv = ["-p", text, "--slots", "60", "-m", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache.generate", *argv], capture_output=True, text=True, timeout=100
    )
    assert json.loads(done.stdout)["prompt_tokens"] > 2048 and done.stderr == ""


def test_demo_names_the_bundled_model_unless_a_folder_has_that_name(
    command: Run, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, named = (figures(command(*SMALL, "--exact", "--json", *m)) for m in ([], ["--model", "demo"]))
    assert named["model"] == plain["model"] == "demo_model" and named["text"] == plain["text"]
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "'demo' has no config.json" in refused(*SMALL, "--model", "demo")
    assert figures(command(*SMALL, "--json"))["model"] == "demo_model"


def test_kv_cache_is_reserved_for_prompt_and_reply_only(command: Run) -> None:
    flags = ["--json", "--slots", "8", "-p", "a", *STOP_AT_ONCE]
    few, many = (figures(command(*flags, "-m", m))["plan"]["kv_cache"] for m in ("1", "1000"))
    assert many == 4 * few  # KV caches grow in steps of 256 tokens


def test_no_limit_needs_a_bounded_kv_cache(command: Run, refused: Callable[..., str]) -> None:
    assert "--max-kv-size" in refused("-p", STORY, "-m", "-1")
    done = command("-p", STORY, "-m", "-1", "--max-kv-size", "64", "--slots", "20", *STOP_AT_ONCE)
    assert (done.code, done.out) == (0, "\n")


# ---- statistics ----


def test_statistics_go_to_stderr_and_only_the_reply_to_stdout(command: Run) -> None:
    done = command(*SMALL)
    assert done.code == 0
    assert done.out.endswith("\n") and "hit" not in done.out and "\x1b" not in done.out + done.err
    tokens, experts, cache, memory, plan, rest = done.err.splitlines()
    rate, share, size = r"[\d,.]+ tok/s", r"[\d.]+% hit \([\d,]+/[\d,]+\)", r"[\d.]+ [KMG]?B"
    swaps = r"([\d.]+% of selections swapped|nothing swapped: exact)"
    for line, pattern in (
        (tokens, rf"8 tokens \(cut at --max-tokens\) · {rate} · prompt {rate} \(\d+ tokens\) · peak {size}"),
        (experts, rf"experts  {share} decode · {size}/token read · {share} prefill · [\d.e-]+ GB/s"),
        (cache, rf"cache    20/60 per layer, lru · cache-prior λ=0.1 J=2, {swaps}"),
        (memory, rf"memory   weights {size} \+ slots {size} \+ KV {size} \+ transients {size} \+ read buffers 161 KB"),
        (plan, rf"plan     {size} and {size} overhead · measured {size} \([\d.]+ of it\) · process {size}"),
        (rest, rf"not charged: interpreter and libraries {size}"),
    ):
        assert re.fullmatch(pattern, line), line


def test_the_word_exact_stands_for_the_original_routing(command: Run) -> None:
    done = command(*SMALL, "--exact", "--eviction", "lfu")
    assert done.err.splitlines()[2] == "cache    20/60 per layer, lfu · exact"


def test_all_resident_is_said_and_has_no_percentages(command: Run) -> None:
    done = command("-m", "4", "-p", STORY, "--memory", "2GB")
    assert done.err.splitlines()[1] == "experts  all resident (60/60 per layer) · exact"
    assert "%" not in done.err and "· budget 2.00 GB" in done.err


def test_direct_io_counts_its_buffers_and_reports_what_it_used(command: Run) -> None:
    result = figures(command(*SMALL, "--direct-io", "--json"))
    assert result["io_mode"] != "buffered"
    bounces = BOUNCES_PER_THREAD * 4 * BOUNCE_BYTES if result["io_mode"] == "direct" else 0
    assert result["memory"]["host_buffers"] == bounces + READ_AHEAD
    assert (result["io_note"] is None) == (result["io_mode"] in ("direct", "nocache"))


def test_slots_may_differ_from_layer_to_layer(command: Run) -> None:
    result = figures(command("-m", "8", "-p", STORY, "--slots", "20,25,30,60,20,8", "--exact", "--json"))
    assert result["slots_per_layer"] == [20, 25, 30, 60, 20, 8]
    assert result["text"] == figures(command("-m", "8", "-p", STORY, "--slots", "60", "--exact", "--json"))["text"]
    assert result["plan"]["slots"] == result["memory"]["slots"]


def test_slots_for_another_number_of_layers_are_refused(refused: Callable[..., str]) -> None:
    assert "3 slot counts do not fit this model, which has 6 MoE layers" in refused("--slots", "20,30,40", "-p", STORY)
    assert "3 slots per layer are too few" in refused("--slots", "20,20,20,3,20,20", "-p", STORY)


def test_elastic_slots_say_how_often_they_moved_and_reply_as_before(command: Run) -> None:
    argv = ["-m", "40", "-p", STORY, "--exact", "--json", "--memory", "9MB"]
    done = subprocess.run(  # a process of its own: in this one, memory that other tests left would be used again
        [sys.executable, "-m", "mlx_moecache.generate", *argv, "--elastic"], capture_output=True, text=True, timeout=100
    )
    result, plain = json.loads(done.stdout), figures(command(*argv))
    assert result["text"] == plain["text"] and plain["resizes"] is None
    assert set(result["resizes"]) <= {"context", "room", "pressure", "calm"}
    assert result["measured_bytes"] <= 9_000_000
    assert result["footprint_bytes"] > result["not_charged_bytes"]


def test_elastic_slots_need_a_budget(refused: Callable[..., str]) -> None:
    assert "--slots and --elastic" in refused("--slots", "20", "--elastic", "-p", STORY)


def test_json_is_one_object_whose_figures_agree(command: Run) -> None:
    held = held_by_other_tests()
    result = figures(command(*SMALL, "--json", "--strength", "0.9", "--top-j", "1", "--seed", "5"))
    text = command(*SMALL, "--strength", "0.9", "--top-j", "1", "--verbose", "F").out
    assert result["text"] == text.removesuffix("\n")
    assert (result["finish_reason"], result["generated_tokens"], result["seed"]) == ("length", 8, 5)
    assert (result["routing"], result["strength"], result["top_j"]) == ("cache-prior", 0.9, 1)
    assert result["slots_per_layer"] == [20] * 6 and result["experts_per_layer"] == [60] * 6
    assert result["model"] == "demo_model" and result["eviction"] == "lru" and result["budget"] is None
    assert result["prompt_tps"] > 0 and result["decode_tps"] > 0
    memory = result["memory"]
    assert sum(memory.values()) - memory["host_buffers"] == result["peak_memory_bytes"]
    assert memory["slots"] == result["plan"]["slots"] and memory["kv_cache"] == result["plan"]["kv_cache"]
    assert result["plan"]["total"] == sum(result["plan"][part] for part in (*memory, "overhead"))
    assert result["peak_memory_bytes"] - held <= result["plan"]["total"]
    per_expert = result["plan"]["slots"] // 120
    for phase, rows in (("prefill", result["prompt_tokens"]), ("decode", 7)):
        counts = result[phase]
        assert counts["hits"] + counts["misses"] == counts["selections"] == rows * 6 * 4
        assert counts["hit_rate"] == pytest.approx(counts["hits"] / counts["selections"])
        assert counts["bytes_read"] == counts["loads"] * per_expert
    assert result["decode"]["bytes_per_token"] == pytest.approx(result["decode"]["bytes_read"] / 7)
    assert result["prefill"]["swapped"] == 0 < result["decode"]["swapped"]
    assert result["exact"] is False


def test_json_leaves_what_was_not_measured_null(command: Run) -> None:
    result = figures(command("--json", "-m", "1", "-p", STORY, "--slots", "4", "--exact"))
    unknown = ("decode_tps", "strength", "top_j", "budget")
    assert [result[k] for k in unknown] == [None] * 4
    assert result["decode"]["hit_rate"] is None and result["decode"]["bytes_per_token"] is None
    assert result["exact"] is True and result["routing"] == "original"


def test_a_trace_is_recorded_and_replayed_to_the_same_counts(
    command: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = str(tmp_path / "routing.trace")
    facts = json.loads(command(*SMALL, "--exact", "--trace", trace, "--json").out)
    assert facts["exact"]
    assert simulate([trace, "--slots", "20", "--eviction", "lru", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["results"][0]["decode"]
    assert (replayed["selections"], replayed["misses"]) == (facts["decode"]["selections"], facts["decode"]["misses"])
    again = json.loads(command(*SMALL, "--trace", trace + "2", "--json").out)
    assert not again["exact"]
    assert (tmp_path / "routing.trace2").stat().st_size > 0


def test_a_trace_of_another_run_is_not_overwritten(command: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    trace = tmp_path / "routing.trace"
    command(*SMALL, "--exact", "--trace", str(trace))
    before = trace.read_bytes()
    assert "trace of another run" in refused(*SMALL, "--trace", str(trace))
    assert trace.read_bytes() == before
    trace.write_text("notes")
    assert "not a trace" in refused(*SMALL, "--trace", str(trace))
    assert trace.read_text() == "notes"
    assert "cannot write the trace" in refused(*SMALL, "--trace", str(tmp_path / "no" / "x"))


def test_a_dry_run_replies_exactly_and_says_what_the_bias_would_do(command: Run, refused: Callable[..., str]) -> None:
    plain = command(*SMALL, "--exact")
    dry = command(*SMALL, "--dry-run-strength", "0.5")
    assert dry.out == plain.out
    assert re.search(
        r"dry run  cache-prior:strength=0.5,j=2 would have swapped [\d.]+% of selections and saved \d+% of", dry.err
    )
    facts = json.loads(command(*SMALL, "--dry-run-strength", "0.5", "--json").out)
    estimate, decode = facts["dry_run"], facts["decode"]
    assert facts["exact"] and estimate["swapped"] > 0
    # The shadow cache of exact routing meets what the real one met.
    assert (estimate["selections"], estimate["misses_exact"]) == (decode["selections"], decode["misses"])
    assert estimate["saved"] == estimate["misses_exact"] - estimate["misses_biased"] > 0
    none = json.loads(command(*SMALL, "--dry-run-strength", "0", "--json").out)["dry_run"]
    assert (none["swapped"], none["saved"]) == (0, 0)
    assert "there is nothing to swap" in command("--slots", "60", "-m", "4", "--dry-run-strength", "0.5").err
    assert "leaves routing exact" in refused("--dry-run-strength", "0.1", "--routing", "price")


def test_without_a_seed_sampling_reports_the_one_it_drew(command: Run) -> None:
    sampled = [*SMALL, "--temp", "1", "--json"]
    first, second = figures(command(*sampled)), figures(command(*sampled))
    assert first["seed"] != second["seed"]
    again = command(*SMALL, "--temp", "1", "--seed", str(first["seed"]))
    assert again.out == first["text"] + "\n"
    assert again.err.splitlines()[0].endswith(f"seed {first['seed']}")


def test_end_of_text_is_not_called_a_cut(command: Run) -> None:
    result = figures(command(*SMALL, "--json", *STOP_AT_ONCE))
    assert (result["finish_reason"], result["generated_tokens"], result["text"]) == ("stop", 1, "")
    assert command(*SMALL, *STOP_AT_ONCE).err.startswith("1 token · prompt")


def test_differing_slots_bytes_and_thousands_are_written_for_people() -> None:
    decode = PhaseStats(13_416, 9_566, 3_850, 3_850, bytes_read=168_100_000, read_seconds=0.2, swapped=1_342)
    cache = CacheUse(
        CacheStats(decode=decode),
        (12, 16),
        (64, 64),
        "lru",
        "cache-prior",
        {"strength": 0.05, "j": 2},
        False,
        "fadvise",
        "no direct I/O here",
    )
    reply = Reply("...", "interrupt", 1_200, 300, 42, 210.84, 31.44)
    memory = MemoryUse(3_120_000_000, 10**9, 15 * 10**8, 10**8, 2_000_000, None)

    class Plan:
        budget, buffers, overhead = 4_000_000_000, 3_900_000_000, 0

    assert statistics(reply, memory, cache, Plan(), seed=None) == [  # type: ignore[arg-type]
        "42 tokens (interrupted) · 31.4 tok/s · prompt 210.8 tok/s (1,200 tokens after 300 saved) · peak 3.12 GB",
        "experts  71.3% hit (9,566/13,416) decode · 4.10 MB/token read · 0.84 GB/s",
        "cache    12-16/64 per layer, lru · cache-prior λ=0.05 J=2, 10.0% of selections swapped",
        "memory   weights 1.00 GB + slots 1.50 GB + KV 100 MB + transients 520 MB + read buffers 2.00 MB "
        "· budget 4.00 GB",
        "plan     3.90 GB · measured 3.12 GB (0.80 of it)",
        "no direct I/O here",
    ]


# ---- wrong input ----


@pytest.mark.parametrize("flags", [["-p", ""], ["-p", "-"], ["-p", "\udcff"], ["-p", "x", "--system-prompt", "\udcff"]])
def test_an_empty_or_broken_prompt_is_refused_before_the_model_is_looked_at(
    flags: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    line = refused(*flags, "--model", "/no/such/folder")
    assert "empty" in line or "not UTF-8" in line


def test_standard_input_is_the_prompt(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
    assert command("-p", "-", "-m", "8", "--slots", "20").out == command(*SMALL).out


def test_standard_input_that_is_not_text_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "not UTF-8" in refused("-p", "-")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--memory", "lots"], "'lots' is not a memory size; write 4GB"),
        (["--memory", "0"], "more than 0"),
        (["--slots", "3"], "use --slots 4 or more"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--model", "someone/else", "--memory", "lots"], "not a memory size"),  # before any download
        (["--model", "someone/else", "--routing", "cache"], "unknown routing 'cache' (choose cache-prior, price, "),
        (["--routing", "cache-prior:strength=0.1", "--strength", "0.2"], "given twice"),
        (["--top-j", "5"], "at most the model's 4"),
        (["--top-k", "4096"], "--top-k must be below"),
        (["--temp", "1", "--min-p", "0.5", "--min-tokens-to-keep", "5000"], "--min-tokens-to-keep must be at most"),
        (
            ["--max-tokens", "3000000000"],
            "max context must be at least 1 token and at most 1,073,741,824",
        ),
        (["--trace", "x", "--warm-start"], "leave one of them out"),
        (["--revision", "main"], "only Hugging Face repos have revisions"),
        (["--kv-bits", "4", "--kv-group-size", "128"], "try another --kv-group-size"),
        (["--chat-template-config", "{"], "is not JSON"),
        (["--chat-template-config", "[1]"], "must be a JSON object"),
        (["--ignore-chat-template", "--system-prompt", "x"], "--ignore-chat-template turns off"),
        (["--ignore-chat-template", "--prefill-response", "x"], "--ignore-chat-template turns off"),
        (["--extra-eos-token", "no such token"], "not a token"),
        (["--adapter-path", "x"], "mlx_lm.fuse"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_one_line(flags: list[str], part: str, refused: Callable[..., str]) -> None:
    assert part in refused("-p", STORY, *flags)


def test_a_budget_that_is_too_small_names_the_smallest_and_that_one_works(
    command: Run, refused: Callable[..., str]
) -> None:
    line = refused("-p", STORY, "-m", "4", "--memory", "1MB")
    match = re.search(r"the smallest that works is ([\d.]+ [KMG]B) \(.*resident weights .*: 4 slots per layer\)", line)
    assert match, line
    held = held_by_other_tests()
    result = figures(command("-p", STORY, "-m", "4", "--memory", match[1], "--json"))
    assert min(result["slots_per_layer"]) >= 4
    assert result["peak_memory_bytes"] - held + result["memory"]["host_buffers"] <= result["budget"]
    number, unit = match[1].split()
    assert "smallest that works" in refused("-p", STORY, "-m", "4", "--memory", f"{float(number) * 0.99}{unit}")


def test_a_truncated_shard_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "demo")
    shard = folder / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    assert "model.safetensors" in refused("-p", STORY, "--model", str(folder))


def test_a_missing_shard_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("olmoe"), shards=2, tokenizer=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused("-p", STORY, "--model", str(folder))


def test_a_hard_limit_of_open_files_that_is_too_low_for_mlx_lm_is_explained() -> None:
    code = """
import resource, sys
from mlx_moecache.generate import main
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
except ValueError:
    sys.exit(main(["--slots", "20", "-m", "2", "-p", "fox"]))
sys.exit("this user may raise hard limits")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "may raise" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert "a hard limit of at least 4,096 open files" in done.stderr


def test_a_dense_model_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 257,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    weights = dict(tree_flatten(build_model(config).parameters()))
    folder = write_weights(tmp_path / "dense", config, weights, shards=1, tokenizer=True)
    assert "no routed experts" in refused("-p", STORY, "--model", str(folder))


def test_flags_for_a_chat_template_that_is_not_there_are_refused(
    command: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_config("qwen2_moe"), tokenizer=True)
    assert "has no chat template" in refused("-p", STORY, "--model", str(folder), "--system-prompt", "x")
    done = command("-p", STORY, "--model", str(folder), "-m", "3", "--slots", "4")
    assert done.code == 0 and done.out.endswith("\n")


def test_a_failed_read_ends_the_line_of_the_reply_first(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = 0

    def fails_later(n: int, requests: Sequence[ReadRequest]) -> None:
        if n > first + 60:
            raise ReadError("the disk is gone; check it")

    after_each_read(monkeypatch, fails_later)
    done = command("-p", STORY, "--slots", "4", "--exact", "-m", "40")
    assert done.code == 2
    assert len(done.out) > 3 and done.out.endswith("\n")
    assert done.err == "error: the disk is gone; check it\n"
    first = 61
    assert command("-p", STORY, "--slots", "4", "--exact", "-m", "40", "--json") == Done(2, "", done.err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("boom"), 1, "error: unexpected RuntimeError: boom (--debug shows where)\n"),
        (MemoryError(), 2, "error: out of memory; use fewer --slots or a smaller --memory\n"),
        (
            ValueError("not allowed to raise maximum limit"),  # from Python's setrlimit
            2,
            "error: mlx-lm needs a hard limit of at least 4,096 open files; raise it (ulimit -Hn shows it)\n",
        ),
        (
            RuntimeError("[malloc] Unable to allocate 9 bytes."),
            2,
            "error: out of memory: [malloc] Unable to allocate 9 bytes.; use fewer --slots or a smaller --memory\n",
        ),
        (PermissionError(13, "Permission denied", "a/file"), 2, "error: a/file: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_whatever_happens_there_is_no_traceback(
    error: BaseException, code: int, line: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ExpertReader, requests: Sequence[Any], **how: bool) -> None:
        raise error

    monkeypatch.setattr(ExpertReader, "start", fail)
    assert command(*SMALL) == Done(code, "", line)


@pytest.mark.parametrize("error", [RuntimeError("boom"), ReadError("boom")])
def test_debug_adds_the_traceback(error: Exception, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ExpertReader, requests: Sequence[Any], **how: bool) -> None:
        raise error

    monkeypatch.setattr(ExpertReader, "start", fail)
    done = command(*SMALL, "--debug")
    assert done.out == "" and done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("error: ") and "boom" in done.err.splitlines()[-1]


# ---- terminals, pipes, signals ----


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "dim"), [(None, True), ("", True), ("1", False)])
def test_notes_are_dim_on_a_terminal_unless_no_color_is_set(
    no_color: str | None, dim: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal, file = Terminal(), io.StringIO()
    write_notes(["a", "b"], terminal)
    write_notes(["a", "b"], file)
    assert terminal.getvalue() == ("\x1b[2ma\nb\x1b[0m\n" if dim else "a\nb\n")
    assert file.getvalue() == "a\nb\n"


def test_the_status_line_leaves_nothing_behind() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with StatusLine(stream) as status:
            status.show("loading a model")
            status.show("reading")
    with StatusLine(Terminal(), enabled=False) as status:
        status.show("never")
    screen = list(" " * 20)
    column = 0
    for character in terminal.getvalue():
        if character == "\r":
            column = 0
        else:
            screen[column] = character
            column += 1
    assert "".join(screen).strip() == "" and column == 0
    assert file.getvalue() == ""


def test_characters_that_the_encoding_lacks_do_not_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    make_streams_safe()
    print("café", file=sys.stdout, flush=True)
    write_notes(["1 token · λ=0.1"], sys.stdout)
    assert raw.getvalue() == b"caf?\n1 token | lambda=0.1\n"


def test_an_interrupt_between_prefill_chunks_ends_without_a_reply(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(self: StatusLine, text: str) -> None:
        if text.startswith("reading the prompt"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StatusLine, "show", show)
    before = signal.getsignal(signal.SIGINT)
    done = command("-p", STORY * 3, "--slots", "8", "--prefill-step-size", "4")
    assert done.code == 130 and done.out == ""
    assert done.err.startswith("0 tokens (interrupted) · prompt (")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_interrupt_is_a_request_and_an_ignored_one_stays_ignored() -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            interrupt.check()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_interrupt_ends_the_process_at_once() -> None:
    code = """
from mlx_moecache.console.command import run
from mlx_moecache.console.interrupt import Interrupt
import time
def body():
    with Interrupt() as interrupt:
        print("ready", flush=True)
        while not interrupt.requested:
            time.sleep(0.01)
        print("once", flush=True)
        time.sleep(60)
run(body)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=allow_sigint
    )
    assert process.stdout is not None
    for word in ("ready\n", "once\n"):
        assert process.stdout.readline() == word
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def allow_sigint() -> None:
    """Children of a shell's background job ignore SIGINT; the commands under test must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_terminal(argv: Sequence[str], interrupt_when: Callable[[bytes], bool]) -> tuple[int, str, int]:
    """Run the command on a pseudo-terminal and send one SIGINT when its output fits: exit code, output, reads."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_moecache.generate", *argv],
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=allow_sigint,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": ""},
    )  # fmt: skip
    os.close(theirs)
    output, reads, sent = b"", 0, False
    try:
        for _ in range(6000):
            if not select.select([ours], [], [], 0.01)[0]:
                continue
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                piece = b""
            if not piece:
                break
            output, reads = output + piece, reads + 1
            if not sent and interrupt_when(output):
                process.send_signal(signal.SIGINT)
                sent = True
        return process.wait(timeout=20), output.decode(), reads
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_ends_the_reply_after_the_token_and_statistics_follow() -> None:
    argv = ["--slots", "20", "-m", "2000", "-p", STORY]
    reply = re.compile(rb" \r(\S[^\r]{20})")  # behind the blanks that wipe the status line
    code, output, reads = on_terminal(argv, lambda output: reply.search(output) is not None)
    assert code == 130
    assert output.startswith("\rloading ...\r") and "Traceback" not in output
    text, _, notes = output.rpartition(" \r")[2].partition("\r\n\x1b[2m")
    assert len(text) > 20
    assert re.match(r"\d+ tokens \(interrupted\) · ", notes)
    assert notes.endswith("\x1b[0m\r\n")
    assert reads > 5, "the reply did not appear bit by bit"


def test_ctrl_c_while_loading_is_one_line() -> None:
    code, output, _ = on_terminal(["-p", STORY], lambda output: b"loading" in output)
    # Where the signal hits C code that runs Python code, Python ends by the signal itself; shells show 130 for both.
    assert code in (130, -signal.SIGINT)
    assert output.rpartition("\r ")[2].strip() == "interrupted"


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_moecache", "generate", "--slots", "20", "-m", "500", "-p", STORY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_in_a_pipe_and_without_unicode_there_are_no_escapes_and_no_status() -> None:
    command = [sys.executable, "-m", "mlx_moecache.generate", *SMALL]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=True)
    assert done.stdout.endswith(b"\n") and done.stdout.isascii()
    assert b"cache-prior lambda=0.1 J=2" in done.stderr
    assert not {0x1B, 0x0D} & {*done.stdout, *done.stderr}
    assert len(done.stderr.splitlines()) == 6


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is a Linux device")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_moecache"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")
