"""Costs that must not grow: of a token with experts and slots, and of opening a model more than its tensors do."""

from __future__ import annotations

import gc
import importlib
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_moecache.checkpoints.checkpoint import read_index
from mlx_moecache.checkpoints.expert_layout import ComponentSpec, locate_experts
from mlx_moecache.checkpoints.skeleton import write_sparse
from mlx_moecache.eviction import EVICTION, make_policy, victims
from mlx_moecache.residents import Residents
from mlx_moecache.rising_heap import RisingHeap

K = 8  # experts per token
POLICIES = list(EVICTION)


class TestVictims:
    """The structures that find victims without looking at every resident name the same ones as sorting does."""

    @pytest.mark.parametrize("name", [*POLICIES, "decay:0.1"])  # 0.1: counts are rescaled every 80 tokens
    @settings(max_examples=15)
    @given(seed=st.integers(0, 10**6), slots=st.integers(9, 90), prompt=st.sampled_from([0, 50, 40_000]))
    def test_are_those_of_the_sorted_order(self, name: str, seed: int, slots: int, prompt: int) -> None:
        rng, policy = random.Random(seed), make_policy(name)
        experts = list(range(2 * slots))
        weights = [1 / (i + 1) for i in experts]
        there: set[int] = set()
        for call in range(250):
            tokens = prompt if prompt and call % 100 == 70 else 1
            chosen = set(rng.choices(experts, weights, k=K if tokens == 1 else slots))
            if call % 60 == 0:
                rng.shuffle(weights)  # another topic
            if rng.random() < 0.3:
                there_at_all = [e for e in rng.sample(experts, 3) if e in there]
                for expert in there_at_all:
                    policy.remove(expert)
                    there.remove(expert)
            missing = [e for e in chosen if e not in there][:slots]
            n = max(0, len(there) + len(missing) - slots)
            out = victims(policy, n, frozenset(chosen))
            assert out == [e for e in policy.order() if e not in chosen][:n]
            assert victims(policy, n + 1, frozenset()) == list(policy.order())[: n + 1]
            for expert in out:
                policy.remove(expert)
                there.remove(expert)
            for expert in missing[: slots - len(there)]:
                policy.insert(expert)
                there.add(expert)
            policy.advance(tokens)
            for expert in chosen:
                policy.touch(expert, 1 if tokens == 1 else rng.randint(1, tokens))
            assert sorted(policy.order()) == sorted(there)

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("rise"), st.integers(0, 7), st.integers(1, 9)),
                st.tuples(st.just("leave or come"), st.integers(0, 7), st.integers(0, 9)),
                st.tuples(st.just("smallest"), st.integers(0, 9), st.integers(0, 7)),
                st.tuples(st.just("pop"), st.integers(0, 20), st.just(0)),
            ),
            max_size=60,
        )
    )
    def test_a_rising_heap_is_a_sorted_list(self, steps: list[tuple[str, int, int]]) -> None:
        heap, keys = RisingHeap(), dict[int, int]()

        def key_of(member: int) -> tuple[float, int]:
            return keys[member], member

        for what, a, b in steps:
            if what == "rise" and a in keys:
                keys[a] += b
            elif what == "leave or come" and a in keys:
                del keys[a]
                heap.remove(a)
            elif what == "leave or come":
                keys[a] = b
                heap.add(a, key_of(a))
            elif what == "smallest":
                assert heap.smallest(a, key_of, {b}) == [m for m in sorted(keys, key=key_of) if m != b][:a]
            elif what == "pop":
                below = {m for m, key in keys.items() if key <= a}
                assert set(heap.pop_below(a, key_of)) == below
                for member in below:
                    del keys[member]
            assert len(heap) == len(keys)

    def test_a_rising_heap_forgets_members_that_left(self) -> None:
        heap = RisingHeap()
        for i in range(10_000):
            heap.add(i, (i, i))
            if i >= 10:
                heap.remove(i - 5)
        assert len(heap._entries) < 100


class TestMask:
    @settings(max_examples=30)
    @given(seed=st.integers(0, 10**6), eviction=st.sampled_from(POLICIES))
    def test_of_residents_is_kept_up_to_date_by_everything_that_changes_them(self, seed: int, eviction: str) -> None:
        rng, r = random.Random(seed), Residents(20, 9, eviction)
        for _ in range(60):
            what = rng.random()
            if what < 0.7:
                needed = rng.sample(range(20), 5)
                r.publish(r.plan(needed))
                r.touch([(e, 1) for e in needed])
            elif what < 0.8 and len(r):
                r.drop(rng.choice(list(r.experts)))
            elif what < 0.9:
                r.resize(rng.randint(5, 20))
            elif what < 0.95:
                r.seed(rng.sample(range(20), 4))
            else:
                r.clear()
            assert np.flatnonzero(np.array(r.mask)).tolist() == sorted(r.experts)
            assert set(r.mask) <= {0.0, 1.0}


class TestTokenCost:
    """Times are compared, not limited: the two sizes take turns and each counts with its fastest run."""

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("missing", [0, 1, 3])
    def test_of_planning_is_the_same_for_512_experts_as_for_32(self, name: str, missing: int) -> None:
        small, large = Cache(32, 16, name), Cache(512, 256, name)
        assert ratio(lambda: large.tokens(100, missing), lambda: small.tokens(100, missing)) <= 2.0

    @pytest.mark.parametrize("name", POLICIES)
    def test_does_not_grow_with_the_length_of_the_run(self, name: str) -> None:
        fresh, old = Cache(128, 64, name), Cache(128, 64, name)
        old.tokens(20_000, 1)
        assert ratio(lambda: old.tokens(100, 1), lambda: fresh.tokens(100, 1)) <= 2.0


class Cache:
    """Residents of one layer in the steady state."""

    def __init__(self, experts: int, slots: int, eviction: str) -> None:
        self.residents = Residents(experts, slots, eviction)
        self._rng = random.Random(0)
        self.residents.seed(range(slots))
        self.tokens(4 * slots, 1)

    def tokens(self, count: int, missing: int) -> float:
        """Seconds that `count` tokens take of which each misses `missing` of its K experts."""
        r, seconds = self.residents, 0.0
        inside = list(r.experts)
        outside = [e for e in range(r.num_experts) if e not in r]
        for _ in range(count):
            needed: list[int] = []
            while len(needed) < K - missing:
                expert = self._rng.choice(inside)
                if expert in r and expert not in needed:
                    needed.append(expert)
            needed += self._rng.sample(outside, missing)
            uses = [(e, 1) for e in needed]
            began = time.perf_counter()
            loads = r.plan(needed)
            if loads:
                r.publish(loads)
            r.touch(uses)
            seconds += time.perf_counter() - began
            assert len(loads) == missing
            for x in loads:
                assert x.victim is not None
                inside[inside.index(x.victim)] = x.expert
                outside[outside.index(x.expert)] = x.victim
        return seconds


def ratio(one: Callable[[], float], other: Callable[[], float], runs: int = 25) -> float:
    """How much longer `one` takes than `other`, from the fastest of several runs in turn."""
    gc.collect()
    gc.disable()
    try:
        pairs = [(one(), other()) for _ in range(runs)]
    finally:
        gc.enable()
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


class TestOpening:
    """Checkpoints with a tensor for each expert, component and layer; the data are holes."""

    COMPONENTS = tuple(
        ComponentSpec(f"{name}.{suffix}", dtype, (8, 4))
        for name in ("gate_proj", "up_proj", "down_proj")
        for suffix, dtype in (("weight", "uint32"), ("scales", "uint8"))
    )

    def test_takes_time_and_memory_in_proportion_to_the_number_of_tensors(self, tmp_path: Path) -> None:
        few, many = tmp_path / "few", tmp_path / "many"
        count_few, count_many = (
            make_checkpoint(few, layers=7, experts=240),
            make_checkpoint(many, layers=61, experts=273),
        )
        assert (count_few, count_many) == (10_080, 99_918)

        def opening(folder: Path, layers: int, experts: int) -> float:
            began = time.perf_counter()
            index = read_index(folder)
            for layer in range(layers):
                extents = locate_experts(index, f"model.layers.{layer}.mlp.switch_mlp", self.COMPONENTS, experts)
                assert len(extents.offsets) == 6 and len(extents.offsets[0]) == experts
            return time.perf_counter() - began

        slower = ratio(lambda: opening(many, 61, 273), lambda: opening(few, 7, 240), runs=3)
        assert slower <= 2 * count_many / count_few

        tracemalloc.start()
        try:
            index = read_index(few)
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert len(index.tensors) == count_few
        assert held / count_few < 700  # bytes per tensor, its name of 50 characters included


def make_checkpoint(folder: Path, *, layers: int, experts: int) -> int:
    """One shard per layer; returns the number of tensors."""
    folder.mkdir()
    for layer in range(layers):
        tensors: dict[str, tuple[str, Sequence[int]]] = {}
        for expert in range(experts):
            for c in TestOpening.COMPONENTS:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{c.name}"
                tensors[name] = ("U32" if c.dtype == "uint32" else "U8", c.shape)
        write_sparse(folder / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors", tensors)  # type: ignore[arg-type]
    return layers * experts * len(TestOpening.COMPONENTS)


def test_the_benchmark_measures_every_policy_and_both_openings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    scale = importlib.import_module("scale")
    monkeypatch.setattr(scale, "EXPERTS", (16, 32))
    monkeypatch.setattr(scale, "OPENINGS", ((1, 3), (2, 4)))
    monkeypatch.setattr(sys, "argv", ["scale.py", "--rounds", "1"])
    scale.main()
    *table, record = capsys.readouterr().out.splitlines()
    result = json.loads(record)
    assert result["benchmark"] == "scale"
    assert {(cost["policy"], cost["misses"]) for cost in result["tokens"]} == {
        (policy, misses) for policy in POLICIES for misses in (0, 1, 4)
    }
    assert all(cost["microseconds"]["32"] > 0 for cost in result["tokens"])
    assert [opening["tensors"] for opening in result["openings"]] == [18, 48]
    assert len(table) == 2 + 12 + 3
