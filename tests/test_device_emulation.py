"""--device and --flash: a model larger than the device runs within its limit, slow flash is slow, a leak ends the run.

What needs a clean process to measure runs in one of its own, with a small made-up phone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config, write_checkpoint

from mlx_moecache import devices
from mlx_moecache.checkpoints.reader import EmulatedFlash
from mlx_moecache.console.emulation import Emulation, reserve
from mlx_moecache.devices import DEVICES, Device, Figure
from mlx_moecache.enforce import INTERPRETER, OTHER, account_of
from mlx_moecache.errors import BudgetError
from mlx_moecache.evaluate import main as evaluate
from mlx_moecache.generate import main as generate
from mlx_moecache.simulate import main as simulate
from mlx_moecache.sweep import main as sweep

STORY = "Tell me a story about a fox."
MB = 10**6
ROOM = 80 * MB  # what the made-up phone leaves beside the interpreter

# A phone of that size; with a second argument every token leaves 8 MB behind, in MLX or in Python.
CHILD = """
import sys
import mlx.core as mx
from mlx_moecache import devices, loading, system
from mlx_moecache.evaluate import main as evaluate
from mlx_moecache.generate import main as generate
from mlx_moecache.sweep import main as sweep
from mlx_moecache.console import options
command, room, leak, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
base = system.process_footprint()
size, limit, no_latency = (devices.Figure(n, "estimate: made up for a test") for n in (1e9, base + room, 0.0))
devices.DEVICES["phone"] = devices.Device("phone", "Test Phone", size, limit, size, no_latency)
kept, usual = [], options.sampler_of
def leaking(*args):
    sampler = usual(*args)
    def sample(logprobs):
        if leak == "mlx":
            kept.append(mx.ones((2_000_000,)))
            mx.eval(kept[-1])
        else:
            kept.append(bytearray(b"x" * 8_000_000))
        return sampler(logprobs)
    return sample
if leak != "none":
    options.sampler_of = leaking
sys.exit({"generate": generate, "evaluate": evaluate, "sweep": sweep}[command](argv))
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def on_phone(*argv: str, command: str = "generate", leak: str = "none", room: int = ROOM) -> Done:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, command, str(room), leak, *argv], capture_output=True, text=True, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 MB of experts in float32."""
    config = tiny_config(
        "qwen2_moe",
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=256,
        num_hidden_layers=4,
        num_experts=24,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return write_checkpoint(tmp_path_factory.mktemp("large") / "model", config, tokenizer=True)


@pytest.fixture
def flags(large: Path) -> list[str]:
    return ["--model", str(large), "-p", STORY, "-m", "40", "--exact"]


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*argv: str) -> dict[str, Any]:
        capsys.readouterr()
        assert generate([*argv, "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


# ---- memory ----


def test_a_model_larger_than_the_device_runs_within_its_limit(
    flags: Sequence[str], figures: Callable[..., dict[str, Any]]
) -> None:
    done = on_phone(*flags, "--device", "phone", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    limit, not_charged = facts["emulation"]["limit_bytes"], facts["not_charged_bytes"]
    experts = 4 * 24 * 3 * 256 * 512 * 4
    assert facts["budget"] == limit - reserve(limit) - not_charged < ROOM < experts
    assert facts["peak_memory_bytes"] + facts["memory"]["host_buffers"] <= facts["budget"]
    assert 4 <= facts["slots_per_layer"][0] < 24 and facts["decode"]["misses"] > 0
    assert facts["emulation"]["device"] == "phone" and facts["emulation"]["page_cache_bypassed"]
    assert facts["emulation"]["not_emulated"] == ["compute speed", "memory bandwidth"]
    assert facts["text"] == figures(*flags)["text"]


def test_the_limit_counts_the_whole_process(flags: Sequence[str]) -> None:
    done = on_phone(*flags, "--device", "phone", room=-20 * MB)
    assert done.code == 2 and done.out == ""
    assert "Test Phone gives one app" in done.err and "hold interpreter and libraries" in done.err


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(flags: Sequence[str]) -> None:
    done = on_phone(*flags, "--device", "phone", room=40 * MB)
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert "error: Test Phone gives one app" in done.err and "the smallest that works is" in done.err


@pytest.mark.parametrize(("leak", "culprit"), [("mlx", "transients"), ("python", OTHER)])
def test_a_leak_ends_the_run_with_an_account_of_who_held_what(leak: str, culprit: str, flags: Sequence[str]) -> None:
    done = on_phone(*flags, "--device", "phone", leak=leak)
    assert done.code == 2
    *account, error = done.err.splitlines()
    assert error.startswith("error: ended, as Test Phone would: ")
    assert f"most above the plan: {culprit}, " in error
    assert account[0].split() == ["held", "by", "bytes", "planned"]
    named = [line[:26].rstrip() for line in account]
    assert {"weights", "slots", "KV cache", "transients", "read buffers", INTERPRETER, OTHER, "in all"} <= set(named)
    assert "Traceback" not in done.err


def test_a_leak_within_the_limit_is_nobodys_business(flags: Sequence[str]) -> None:
    """Else the test above could pass for another reason."""
    assert on_phone(*flags, "--device", "phone", leak="mlx", room=40 * 8 * MB + 3 * ROOM).code == 0


def test_an_account_names_who_is_furthest_above_the_plan() -> None:
    planned = {"resident_weights": 10, "kv_cache": 5, "transients": 4, "host_buffers": 2, "slots": 20, "overhead": 3}
    sizes = {"resident": 10, "slots": 20, "kv": 5, "host_buffers": 2, "baseline": 100}
    fine = account_of(150, planned=planned, mlx_peak=38, freed=0, footprint=139, **sizes)
    assert fine.total == 140 and fine.limit == 150
    spike = account_of(150, planned=planned, mlx_peak=80, freed=0, footprint=182, **sizes)
    assert (spike.worst.name, spike.worst.held, spike.worst.planned) == ("transients", 45, 4)
    leak = account_of(150, planned=planned, mlx_peak=38, freed=7, footprint=200, **sizes)
    assert (leak.worst.name, leak.worst.held, leak.worst.planned) == (OTHER, 53, 3)
    assert leak.total == 200
    assert len({len(line) for line in leak.lines()[:-1]}) == 1  # a table


def test_a_budget_leaves_what_the_interpreter_takes() -> None:
    emulation = Emulation(DEVICES["iphone-16-pro"], EmulatedFlash(1e9))
    assert emulation.budget(10**9) == 6 * 10**9 - reserve(6 * 10**9) - 10**9
    assert Emulation(None, EmulatedFlash(1e9)).budget(10**9) is None
    with pytest.raises(BudgetError, match="leaves nothing for a model"):
        emulation.budget(6 * 10**9)


# ---- flash ----


@pytest.mark.parametrize("flags", [["--flash", "4MB/s"], ["--flash", "1GB/s", "--flash-latency", "5ms"]])
def test_emulated_flash_slows_reads(flags: list[str], figures: Callable[..., dict[str, Any]]) -> None:
    usual = ["--slots", "12", "-p", STORY, "-m", "12", "--exact"]
    plain, slow = figures(*usual), figures(*usual, *flags)
    assert slow["text"] == plain["text"]
    assert slow["decode"]["bytes_read"] == plain["decode"]["bytes_read"] > 0
    flash = slow["emulation"]
    assert flash["device"] is None and not flash["page_cache_bypassed"] and plain["emulation"] is None
    reads = slow["decode"]["loads"] / 4  # at most 4 experts in one read
    least = slow["decode"]["bytes_read"] / flash["flash_bytes_per_second"] + reads * flash["flash_latency_seconds"]
    assert slow["decode"]["read_seconds"] >= least > 2 * plain["decode"]["read_seconds"]


@pytest.fixture
def phone(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = replace(
        DEVICES["iphone-16-pro"], name="phone", title="Test Phone", flash_speed=Figure(5e6, "estimate: slow")
    )
    monkeypatch.setitem(devices.DEVICES, "phone", made)
    return made


def test_flash_flags_replace_those_of_the_device(phone: Device, figures: Callable[..., dict[str, Any]]) -> None:
    usual = ["-p", STORY, "-m", "2", "--device", "phone"]
    own, given = (
        figures(*usual)["emulation"],
        figures(*usual, "--flash", "7MB/s", "--flash-latency", "1ms")["emulation"],
    )
    assert (own["flash_bytes_per_second"], own["flash_latency_seconds"]) == (5e6, phone.flash_latency_seconds)
    assert (given["flash_bytes_per_second"], given["flash_latency_seconds"]) == (7e6, 1e-3)
    assert own["limit_bytes"] == given["limit_bytes"] == phone.app_limit_bytes
    assert own["sources"]["flash_speed"] == "estimate: slow" and "flash_speed" in own["estimates"]


# ---- what a person sees ----


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(command: Callable[[Sequence[str]], int], *argv: str) -> str:
        capsys.readouterr()
        assert command(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("command", [generate, evaluate, sweep])
def test_flags_that_contradict_a_device_are_refused(command: Any, refused: Callable[..., str]) -> None:
    for flags, reason in (
        (["--device", "iphone-16-pro", "--memory", "4GB"], "--device iphone-16-pro and --memory: give one of them"),
        (["--device", "iphone-16-pro", "--slots", "9"], "--device iphone-16-pro and --slots: give one of them"),
        (["--device", "iphone-16-prp"], "no profile of a device 'iphone-16-prp', did you mean iphone-16-pro?"),
        (["--flash-latency", "80us"], "--flash-latency is part of an emulated flash"),
        (["--flash", "2GB"], "--flash: needs a speed such as 2GB/s"),
        (["--flash", "2GB/s", "--flash-latency", "80"], "--flash-latency: needs a time such as 100us"),
    ):
        assert reason in refused(command, *flags)


def test_the_statistics_say_what_is_emulated_and_what_is_not(phone: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(["-p", STORY, "-m", "2", "--device", "phone"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "emulated Test Phone · 6.00 GB per app · flash 5.00 MB/s + 100 us · no page cache" in lines
    assert "not emulated: compute speed, memory bandwidth" in lines
    assert generate(["-p", STORY, "-m", "2", "--flash", "2GB/s"]) == 0
    assert "emulated flash 2.00 GB/s" in capsys.readouterr().err.splitlines()


def test_an_evaluation_on_a_device_takes_the_slots_that_it_has(large: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The fox ran over the hill and did not come back. " * 20)
    flags = f"{large} --task text --data {text} --window 64 --limit 2 --routing original --device phone".split()
    done = on_phone(*flags, "--json", command="evaluate")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["emulation"]["device"] == "phone"
    assert 4 <= facts["runs"][0]["slots"] < 24 and facts["runs"][0]["complete"]
    assert "emulated Test Phone · " in on_phone(*flags, command="evaluate").err
    refused = on_phone(*flags, command="evaluate", room=25 * MB)
    assert (refused.code, refused.out) == (2, "") and "error: Test Phone gives one app" in refused.err


def test_a_sweep_on_a_device_takes_the_slots_that_it_has(large: Path, tmp_path: Path) -> None:
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("The fox ran over the hill and did not come back. " * 20)
    flags = f"{large} --task text --data {text} --window 64 --limit 2 --device phone --output {results}".split()
    flags += ["--routing", "cache-prior:strength=0.1,0.2"]
    done = on_phone(*flags, "--json", command="sweep")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["emulation"]["device"] == "phone"
    assert len(facts["runs"]) == 3 and all(4 <= r["slots"] < 24 and r["complete"] for r in facts["runs"])
    assert len({r["slots"] for r in facts["runs"]}) == 1
    done = on_phone(*flags, "--dry-run", command="sweep", room=25 * MB)
    assert (done.code, done.out) == (2, "") and "error: Test Phone gives one app" in done.err


def test_a_sweep_says_which_flash_it_emulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("The fox ran over the hill and did not come back. " * 20)
    flags = ["--task", "text", "--data", str(tmp_path / "text.txt"), "--window", "32", "--limit", "1", "--slots", "15"]
    assert sweep([*flags, "--routing", "original", "--output", str(tmp_path / "r.json"), "--flash", "2GB/s"]) == 0
    assert "emulated flash 2.00 GB/s" in capsys.readouterr().err.splitlines()


def test_a_trace_is_replayed_with_the_flash_of_a_device(
    phone: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "run.trace"
    assert generate(["-p", STORY, "-m", "12", "--exact", "--slots", "12", "--trace", str(trace)]) == 0
    capsys.readouterr()

    def replay(*flags: str) -> dict[str, Any]:
        assert simulate([str(trace), "--slots", "12", "--eviction", "lru", "--json", *flags]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    on_device = replay("--device", "phone")
    by_hand = replay("--flash", "5MB/s", "--flash-latency", "100us")
    assert on_device["results"] == by_hand["results"]
    assert on_device["results"][0]["decode"]["ms_per_token"] > 0
    assert on_device["emulation"]["title"] == "Test Phone" and replay()["emulation"] is None
