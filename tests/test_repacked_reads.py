"""The benchmark of repacked reads in a tiny setting: it runs, its record parses, and what it counts is right."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import expert_reads
import repacked_reads


def test_it_compares_both_layouts_at_three_temperatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(expert_reads, "HIDDEN", 512)
    monkeypatch.setattr(expert_reads, "INTERMEDIATE", 384)
    argv = ["repacked_reads.py", "--folder", str(tmp_path), "--gb", "0.04", "--rounds", "2"]
    for more in ([], ["--aligned-slots"]):  # the second time with the files of the first
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        repacked_reads.main()
        *lines, last = capsys.readouterr().out.splitlines()
        record = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert record["benchmark"] == "repacked_reads" and len(lines) >= 4 + 3 * 5
        assert [r["temperature"] for r in record["results"]] == ["direct", "cold", "warm"]
        assert record["aligned_slots"] == bool(more)
        for result in record["results"]:
            one = result["batches"][0]
            assert one["reads_per_expert"] == {"stock": 9, "repacked": 1}
            assert all(b["ratio"]["min"] > 0 for b in result["batches"])


def test_no_expert_is_drawn_twice_in_a_run() -> None:
    calls = repacked_reads.draw(random.Random(1), layers=3, per_call=7, calls=12)
    drawn = [(layer, expert) for layer, placed in calls for expert, _ in placed]
    assert len(calls) == 12 and len(set(drawn)) == len(drawn) == 84
    assert all(len({slot for _, slot in placed}) == 7 for _, placed in calls)
