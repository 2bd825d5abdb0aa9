"""`mlx_moecache doctor`: every check passes here, and fails when what it is there for is broken on purpose."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from faulty_reads import after_each_read

from mlx_moecache import doctor, system
from mlx_moecache.checkpoints import direct_io, reader
from mlx_moecache.checkpoints.reader import ReadRequest
from mlx_moecache.console import doctor_device, doctor_model
from mlx_moecache.console.doctor_check import Check, run_check, without_folders
from mlx_moecache.console.doctor_model import Difference, parting, state_of_peak
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generation import StepOptions, generate_step

MB = 2**20
TINY = doctor.Sizes(exact=(12, 4), soak=12, host_reads=20, file=4 * MB, budget=(40, 4))
NAMES = ["device", "exact", "slots", "host read", "cold read", "budget"]


def quiet(text: str) -> None:
    pass


@pytest.fixture
def corrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """corrupt(n): the n-th read and all later ones bring some wrong bytes."""

    def start(first: int) -> None:
        def wrong(n: int, requests: Sequence[ReadRequest]) -> None:
            if n >= first:
                requests[0].view[:64] = b"\x55" * 64

        after_each_read(monkeypatch, wrong)

    return start


# ---- exact ----


def test_logits_and_tokens_equal_those_of_mlx_lm() -> None:
    check = doctor_model.check_exact(DEMO_MODEL, *TINY.exact, quiet)
    assert check.state == "ok"
    assert check.text == (
        "logits bit-identical to mlx-lm's with 4 and 30 of 60 slots, tokens equal (12 + 4)"
        if system.on_cpu()
        else check.text
    )
    assert check.figures["tokens_equal"] is True


def test_wrong_bytes_make_wrong_logits(corrupt: Callable[[int], None]) -> None:
    corrupt(3)
    check = doctor_model.check_exact(DEMO_MODEL, *TINY.exact, quiet)
    assert check.failed
    assert re.match(r"logits NOT EQUAL \(up to .* apart\) to mlx-lm's with 4 of 60 slots$", check.text)
    json.dumps(check.figures, allow_nan=False)


def test_another_token_is_found_though_logits_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(prompt: mx.array, model: Any, options: StepOptions) -> Iterator[tuple[int, mx.array]]:
        for n, (token, logprobs) in enumerate(generate_step(prompt, model, options)):
            yield (token + 1 if n == 2 else token), logprobs

    monkeypatch.setattr(doctor_model, "generate_step", another)
    check = doctor_model.check_exact(DEMO_MODEL, *TINY.exact, quiet)
    assert check.failed and check.text == "tokens differ from mlx-lm's from number 3 on with 4 of 60 slots"


def test_parting_is_the_first_difference() -> None:
    assert parting([1, 2, 3], [1, 2, 3]) is None
    assert parting([1, 5, 3], [1, 2, 3]) == 1


@pytest.mark.parametrize(
    ("error", "on_cpu", "state", "text"),
    [
        (0.0, True, "ok", "bit-identical"),
        (1e-4, True, "FAILED", "equal within rounding (up to 1.0e-04 of 4.0 apart)"),
        (1e-4, False, "ok", "equal within rounding (up to 1.0e-04 of 4.0 apart)"),
        (0.5, False, "FAILED", "NOT EQUAL (up to 5.0e-01 of 4.0 apart)"),
        (float("nan"), False, "FAILED", "NOT EQUAL (up to inf of 4.0 apart)"),
        (float("inf"), True, "FAILED", "NOT EQUAL (up to inf of 4.0 apart)"),
    ],
)
def test_a_gpu_may_round_and_the_cpu_may_not(
    error: float, on_cpu: bool, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "on_cpu", lambda: on_cpu)
    want = np.array([[0, 4]], np.float32)
    found = Difference.of(want + np.array([[error, 0]], np.float32), want)
    assert (found.state, str(found)) == (state, text)


def test_equal_nans_are_not_equal_logits() -> None:
    logits = np.array([[1, np.nan]], np.float32)
    assert Difference.of(logits, logits).state == "FAILED"


# ---- slots ----


def test_slots_equal_the_shard_after_evictions() -> None:
    check = doctor_model.check_slots(DEMO_MODEL, TINY.soak, quiet)
    assert check.state == "ok", check
    assert check.figures["tokens"] == TINY.soak and int(check.figures["evictions"] or 0) > 10


def test_a_corrupted_slot_is_found(corrupt: Callable[[int], None]) -> None:
    corrupt(40)
    check = doctor_model.check_slots(DEMO_MODEL, TINY.soak, quiet)
    assert check.failed
    assert re.match(
        r"slot \d of model\.layers\.\d\.mlp\.switch_mlp does not hold the bytes of expert \d+ after", check.text
    )


def test_bytes_that_only_the_device_sees_wrong_are_found(
    corrupt: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(30)
    monkeypatch.setattr(doctor_model, "_broken_slot", lambda cache, checksums: None)
    monkeypatch.setattr(Difference, "state", "ok")
    check = doctor_model.check_slots(DEMO_MODEL, TINY.soak, quiet)
    assert check.failed and check.text.startswith("the device sees other bytes in ")


def test_outputs_that_leave_the_twin_are_found(corrupt: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(40)
    monkeypatch.setattr(doctor_model, "_broken_slot", lambda cache, checksums: None)
    check = doctor_model.check_slots(DEMO_MODEL, TINY.soak, quiet)
    assert check.failed
    assert check.text.startswith("logits ") and "to those with all experts in memory after token" in check.text


# ---- budget ----


def test_the_peak_is_within_the_budget() -> None:
    check = doctor_model.check_budget(DEMO_MODEL, *TINY.budget, quiet)
    assert check.state == "ok", check
    peak, budget = check.figures["peak_bytes"], check.figures["budget_bytes"]
    assert isinstance(peak, int) and isinstance(budget, int)
    assert 0.7 * budget < peak <= budget
    assert check.figures["slots"] == 30


def test_a_leak_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    publish, kept = ExpertCache._publish, []

    def leaking(self: ExpertCache, *arguments: Any) -> None:
        publish(self, *arguments)
        kept.append(mx.zeros(2**16))
        mx.eval(kept[-1])

    monkeypatch.setattr(ExpertCache, "_publish", leaking)
    check = doctor_model.check_budget(DEMO_MODEL, *TINY.budget, quiet)
    assert check.failed
    assert re.match(r"[\d.]+ [KM]B over the budget: peak [\d.]+ MB of [\d.]+ MB ", check.text)


def test_whole_pages_are_a_warning_and_more_is_not() -> None:
    assert [state_of_peak(peak, 100, 10) for peak in (100, 101, 110, 111)] == ["ok", "warning", "warning", "FAILED"]
    assert state_of_peak(101, 100, 0) == "FAILED"


# ---- the machine ----


def test_a_mac_without_its_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "on_cpu", lambda: True)
    assert doctor_device.check_device("linux").state == "ok"
    assert doctor_device.check_device("darwin").state == "warning"


def test_a_host_read_is_timed() -> None:
    check = doctor_device.check_host_read(50)
    median, longest = check.figures["median_seconds"], check.figures["longest_seconds"]
    assert isinstance(median, float) and isinstance(longest, float)
    assert check.state != "FAILED" and 0 < median <= longest


def test_slow_host_reads_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = mx.eval

    def slow(*arrays: mx.array) -> None:
        time.sleep(0.002)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", slow)
    check = doctor_device.check_host_read(5)
    assert check.state == "warning" and "; slow: " in check.text


def test_a_wrong_result_of_a_host_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "zeros", lambda n: mx.full(n, 2.0))
    assert doctor_device.check_host_read(5).text == "adding 1 5 times gave 7"


def cold(folder: Path) -> Check:
    check = doctor_device.check_cold_read(folder, 4 * MB, quiet)
    assert list(folder.iterdir()) == []
    return check


def test_a_cold_read_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    check = cold(tmp_path)
    assert not check.failed
    assert (check.figures["bytes"], check.figures["wrong_pieces"]) == (4 * MB, 0)
    speed = check.figures["bytes_per_second"]
    assert isinstance(speed, float) and f"{speed / 1e9:.2f} GB/s" in check.text


def test_wrong_bytes_of_a_cold_read_fail(tmp_path: Path, corrupt: Callable[[int], None]) -> None:
    corrupt(1)
    check = cold(tmp_path)
    assert check.failed and check.text.startswith("1 pieces differ from what was written")


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 15 * MB})
    monkeypatch.setattr(doctor_device.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(doctor_device, "_write_random", lambda *arguments: pytest.fail("a file was written"))
    check = cold(tmp_path)
    assert check.state == "warning"
    assert check.text == "not measured: 15.7 MB free, wanted 16.8 MB for a file of 4.19 MB"


def test_a_disk_that_fills_up_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    check = cold(tmp_path)
    assert (check.state, check.text) == ("warning", "not measured: cannot write a file: No space left on device")


def test_reads_through_the_page_cache_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "open_shards", lambda paths, *, direct: direct_io.open_shards(paths, direct=False))
    check = cold(tmp_path)
    assert check.state == "warning" and "this came from memory" in check.text
    assert check.figures["io_mode"] == "buffered"


def test_a_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_device, "SLOW_DISK", 1e10)
    monkeypatch.setattr(doctor_device, "MEMORY_SPEED", 1e12)
    assert "slow, tokens will wait" in cold(tmp_path).text


def test_a_very_slow_disk_does_not_hold_the_report_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_device, "LONGEST", 0.0)
    monkeypatch.setattr(doctor_device, "BATCH", 1)
    assert cold(tmp_path).figures["bytes"] == doctor_device.PIECE


# ---- reports ----


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot open {DEMO_MODEL}/model.safetensors: gone", "cannot open model.safetensors: gone"),
        (f"{Path.home()}/My Models/a b.bin", "My Models/a b.bin"),
        ("in '/opt/some where/x'", "in 'some where/x'"),
        ("/etc/passwd, /var/lib/x", "passwd, x"),
        ("0.31 GB/s of 60/60", "0.31 GB/s of 60/60"),
        ("model.layers.0/mlp", "model.layers.0/mlp"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_reports_name_no_folders(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_an_error_in_a_check_is_a_finding() -> None:
    def broken() -> Check:
        raise RuntimeError("[metal] no device\n/Users/jo/x.metal")

    check = run_check("exact", broken)
    assert (check.name, check.state, check.text) == ("exact", "FAILED", "RuntimeError: [metal] no device x.metal")


# ---- the command ----


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QUICK", TINY)


def lines_of(out: str) -> list[tuple[str, str, str]]:
    """(state, name, text) of every check."""
    rows = re.findall(r"^(ok|warning|FAILED) +((?:\w+ )*\w+)  +(\S.*)$", out, re.MULTILINE)
    assert [name for _, name, _ in rows] == NAMES, out
    return rows


def test_the_quick_report(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache.doctor", "--quick", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    first, second, *_, last = done.stdout.splitlines()
    assert re.match(r"mlx_moecache \S+ doctor --quick, ", first)
    assert re.match(r"python [\d.]+, mlx [\d.]+, mlx-lm [\d.]+, ", second)
    assert {name: state for state, name, _ in lines_of(done.stdout) if name != "cold read"} == {
        name: "ok" for name in NAMES if name != "cold read"
    }
    assert re.match(r"all 6 checks passed(, 1 with a warning \(cold read\))?, \d+ s$", last)
    assert done.stdout.isascii()
    for place in (tmp_path, Path.home(), Path.cwd(), DEMO_MODEL.parent):
        assert str(place) not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_json_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--quick", "--json", "--folder", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    facts = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert facts["passed"] is True and facts["quick"] is True
    assert [c["name"] for c in facts["checks"]] == NAMES
    assert facts["packages"]["mlx"] and facts["version"]
    assert all(c["state"] in ("ok", "warning") and c["seconds"] >= 0 for c in facts["checks"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["lines", "json"])
def test_wrong_reads_end_with_code_1_and_the_other_checks_run(
    flags: list[str], capsys: pytest.CaptureFixture[str], corrupt: Callable[[int], None], tmp_path: Path
) -> None:
    corrupt(5)
    assert doctor.main(["--quick", "--folder", str(tmp_path), *flags]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    if flags:
        facts = json.loads(out)
        assert facts["passed"] is False
        states = {c["name"]: c["state"] for c in facts["checks"]}
    else:
        states = {name: state for state, name, _ in lines_of(out)}
        assert re.search(r"^3 of 6 checks FAILED \(exact, slots, cold read\); please report these lines, ", out, re.M)
    assert {name for name, state in states.items() if state == "FAILED"} == {"exact", "slots", "cold read"}


def test_a_folder_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--folder", str(tmp_path / "gone")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --folder ") and err.count("\n") == 1


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_removes_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: Any) -> int:
        assert list(tmp_path.glob("*/random"))
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_device, "_read_back", interrupted)
    monkeypatch.setattr(doctor_model, "check_exact", lambda *arguments: Check("exact", "ok", ""))
    monkeypatch.setattr(doctor_model, "check_slots", lambda *arguments: Check("slots", "ok", ""))
    assert doctor.main(["--quick", "--folder", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []
