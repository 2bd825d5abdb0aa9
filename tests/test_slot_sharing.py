"""Miss curves of traces: what a replay would count, and halves that are held out from each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_traces import E, K, scored, traced

from mlx_moecache.console.arguments import slot_counts
from mlx_moecache.simulate import main
from mlx_moecache.study.simulator import replay_layer, starts_of
from mlx_moecache.study.slot_sharing import halves, lines, share
from mlx_moecache.study.trace import Trace, read_trace

Command = Callable[..., tuple[int, str, str]]
ROWS = st.lists(st.permutations(range(E)).map(lambda p: p[:K]), min_size=2, max_size=40)


def whole(folder: Path) -> Trace:
    return read_trace(folder / "t.trace")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(ROWS, st.sets(st.integers(1, 39), max_size=3))
def test_one_pass_counts_what_a_replay_of_every_size_counts(
    tmp_path: Path, rows: list[list[int]], sequences: set[int]
) -> None:
    layer = traced(tmp_path, rows, sequences=sorted(sequences))
    (found,) = halves(whole(tmp_path), "lru")
    for slots in range(K, E):
        counts = replay_layer(layer, slots, "lru", starts_of(layer, slots, "empty"))
        assert found.training.misses[slots] + found.held_out.misses[slots] == counts.decode.misses
    assert found.training.misses[E] == found.held_out.misses[E] == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(ROWS)
def test_other_policies_are_replayed(tmp_path: Path, rows: list[list[int]]) -> None:
    layer = traced(tmp_path, rows)
    (found,) = halves(whole(tmp_path), "lfu")
    for slots in range(K, E):
        counts = replay_layer(layer, slots, "lfu", starts_of(layer, slots, "empty"))
        assert found.training.misses[slots] + found.held_out.misses[slots] == counts.decode.misses


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(ROWS)
def test_both_ways_agree_half_by_half(tmp_path: Path, rows: list[list[int]]) -> None:
    from mlx_moecache.study.slot_sharing import _lru_misses, _replayed_misses

    layer = traced(tmp_path, rows)
    fast, slow = _lru_misses(layer, "lru", 7, True), _replayed_misses(layer, "lru", 7, True)
    assert [half[K:] for half in fast] == [half[K:] for half in slow]


def test_prefill_warms_the_cache_and_does_not_count(tmp_path: Path) -> None:
    trace = scored(tmp_path, [5, *[1] * 30, 4, *[1] * 30])
    for layer, found in zip(trace.layers, halves(trace, "lru"), strict=True):
        assert found.selections == 30 * K
        counts = replay_layer(layer, E - 1, "lru", starts_of(layer, E - 1, "empty"))
        assert found.training.misses[E - 1] + found.held_out.misses[E - 1] == counts.decode.misses


def test_a_text_that_begins_near_the_middle_is_not_cut(tmp_path: Path) -> None:
    rows = [[0, 1, 2]] * 20 + [[3, 4, 5]] * 30
    traced(tmp_path, rows, sequences=[20])
    (found,) = halves(whole(tmp_path), "lru")
    assert found.selections == 30 * K
    assert found.training.misses[K] == found.held_out.misses[K] == K  # each text loads its own three, once


def test_slots_are_judged_on_the_second_half(tmp_path: Path) -> None:
    """Layer 0 uses three experts, layer 1 many, in both halves: slots move to layer 1 and that helps."""
    from made_traces import shared

    rng = np.random.default_rng(0)
    shared(tmp_path, [[[0, 1, 2], rng.permutation(E)[:K].tolist()] for _ in range(200)])
    layers = halves(read_trace(tmp_path / "shared.trace"), "lru")
    result = share(layers, 5)
    assert result.allocated == (3, 6) and result.helps and result.chosen == result.allocated
    assert result.allocated_misses < result.equal_misses == sum(x.held_out.misses[5] for x in layers)
    text = "\n".join(lines([result]))
    assert "--slots 3,6" in text and "fewer" in text


def test_what_loses_on_the_second_half_is_not_recommended(tmp_path: Path) -> None:
    from made_traces import shared

    rng = np.random.default_rng(0)
    many = [rng.permutation(E)[:K].tolist() for _ in range(200)]
    selected = [[[0, 1, 2], row] for row in many[:100]] + [[row, [0, 1, 2]] for row in many[100:]]
    shared(tmp_path, selected)
    result = share(halves(read_trace(tmp_path / "shared.trace"), "lru"), 5)
    assert result.allocated == (3, 6) and not result.helps and result.chosen == result.equal == (5, 5)
    text = "\n".join(lines([result]))
    assert "keep equal counts" in text and "--slots" not in text


@pytest.mark.parametrize("slots", [K, E])
def test_the_extremes_leave_nothing_to_share(tmp_path: Path, slots: int) -> None:
    trace = scored(tmp_path, [1] * 50)
    result = share(halves(trace, "lru"), slots)
    assert result.allocated == result.equal and not result.helps
    assert "the same" in "\n".join(lines([result]))


class TestTheCommand:
    @pytest.fixture
    def command(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
        def run(*argv: str | Path) -> tuple[int, str, str]:
            code = main([str(a) for a in argv])
            return (code, *capsys.readouterr())

        return run

    def test_it_prints_slots_that_generate_takes(self, tmp_path: Path, command: Command) -> None:
        from made_traces import shared

        rng = np.random.default_rng(0)
        shared(tmp_path, [[[0, 1, 2], rng.permutation(E)[:K].tolist()] for _ in range(200)])
        code, out, err = command(tmp_path / "shared.trace", "--slots", "5", "--allocate")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == "tiny: 2 MoE layers, 10 experts, 3 per token"
        assert lines[4].startswith("equal      5 per layer") and lines[5].startswith("allocated  3 to 6 per layer")
        assert lines[6].split() == ["--slots", "3,6"] and max(map(len, lines)) <= 79
        assert slot_counts("3,6") == (3, 6)

    def test_json_holds_the_misses_of_each_layer(self, tmp_path: Path, command: Command) -> None:
        trace = scored(tmp_path, [6, *[1] * 60])
        code, out, _ = command(trace.path, "--slots", "4,6", "--allocate", "--json", "--eviction", "lfu")
        result = json.loads(out)
        assert code == 0 and result["eviction"] == "lfu" and len(result["results"]) == 2
        for r in result["results"]:
            for way in ("equal", "allocated"):
                assert sum(r[way]["layers"]) == r[way]["misses"] and len(r[way]["slots"]) == 2
            assert r["helps"] == (r["allocated"]["misses"] < r["equal"]["misses"])

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--shared-pool"], "--shared-pool has no use"),
            (["--routing", "cache-prior"], "--routing has no use"),
            (["--flash", "1GB/s"], "--flash has no use"),
            (["--eviction", "lru,lfu"], "one eviction policy"),
            (["--eviction", "belady"], "belady"),
            (["--slots", "2"], "slots must be from 3"),
        ],
    )
    def test_what_has_no_use_is_refused(self, tmp_path: Path, command: Command, flags: list[str], message: str) -> None:
        code, out, err = command(scored(tmp_path, [1] * 5).path, "--allocate", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
