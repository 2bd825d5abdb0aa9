"""An evaluation that was interrupted ends as one that was not, whatever its caches hold at the start of a unit."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from tiny_models import Shelf, random_tokens

from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import UsageError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior, Original, parse_routing
from mlx_moecache.study.evaluation import Job, Reading, Span, measure
from mlx_moecache.study.evaluation_data import Material, Request
from mlx_moecache.study.evaluation_session import ModelOptions, Session
from mlx_moecache.study.result_metrics import Unit
from mlx_moecache.study.results import DataFacts, ModelFacts, Results, Run, Settings, load, save
from mlx_moecache.study.window import WindowScorer

SPECS = ("original", "cache-prior:strength=0.3,j=1")
UNITS = 6


class Stop(Exception):
    pass


@pytest.fixture
def model(shelf: Shelf) -> nn.Module:
    opened = OpenedModel(shelf.checkpoint("qwen2_moe"))
    return opened.load(MemoryOptions(slots=max(b.num_experts for b in opened.blocks)), CacheOptions(routing="original"))


def readings() -> list[Reading]:
    """One or two sequences each, as questions have."""
    found = []
    for i in range(UNITS):
        tokens = tuple(random_tokens(1, 17, seed=i)[0].tolist())
        inputs = (tokens[:-1],) if i % 2 else (tokens[:-1], tokens[3:-1])
        found.append(Reading(i, inputs, 0, (Span(0, 0, tokens[1:]),)))
    return found


def new_runs(eviction: str) -> list[Run]:
    return [Run(s, s.partition(":")[0], {}, 6, eviction, UNITS) for s in SPECS]


def go_on(model: nn.Module, runs: list[Run], initial: str, *, stop_after: int | None = None, **settings: Any) -> None:
    """Measure what is missing, with new scorers; an exception comes `stop_after` units."""
    jobs = [
        Job(
            r,
            WindowScorer(
                model,
                parse_routing(r.routing, strength=None, top_j=None, k=4, slots=6, experts=16),
                slots=6,
                eviction=r.eviction,
                initial=initial,
                seed=7,
                **settings,
            ),
        )
        for r in runs
    ]
    units = 0

    def count(run: Run, unit: Unit) -> None:
        nonlocal units
        units += 1
        if units == stop_after:
            raise Stop

    measure(jobs, jobs[0].scorer, readings(), initial=initial, on_unit=count)


def through_a_file(runs: list[Run], path: Path) -> list[Run]:
    facts = ModelFacts("m", "qwen2_moe", 16, 4, 3, 1, "c"), DataFacts("text", "d", "e", UNITS)
    save(Results(*facts, Settings(16, 16, "all", "engine", "warm", None, 7), runs), path)
    return load(path).runs


@pytest.mark.parametrize("accounting", ["engine", "paper"])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "decay:0.9", "lfru"])
@pytest.mark.parametrize("initial", ["empty", "random", "warm"])
def test_units_are_those_of_a_run_that_was_not_interrupted(
    model: nn.Module, tmp_path: Path, initial: str, eviction: str, accounting: str
) -> None:
    whole = new_runs(eviction)
    go_on(model, whole, initial, accounting=accounting)
    assert all(u.misses for r in whole for u in r.units) and any(u.swapped for u in whole[1].units)
    parts = new_runs(eviction)
    for after in (3, 4):  # units: once between the two runs of a reading, once between readings
        with pytest.raises(Stop):
            go_on(model, parts, initial, accounting=accounting, stop_after=after)
        parts = through_a_file(parts, tmp_path / "results.json")
    assert [len(r.units) for r in parts] == [4, 3]
    go_on(model, parts, initial, accounting=accounting)
    assert parts == whole
    assert all(r.caches is None for r in parts)  # nothing is left to go on with


def test_a_strategy_that_is_measured_later_finds_what_the_others_drew(model: nn.Module) -> None:
    together, apart = new_runs("lru"), new_runs("lru")
    go_on(model, together, "random")
    for run in apart:
        go_on(model, [run], "random")
    assert together[0] == apart[0]
    assert [u.misses for u in together[1].units] == [u.misses for u in apart[1].units]


def test_a_unit_that_was_left_out_is_measured_with_what_is_drawn_for_it(model: nn.Module) -> None:
    def scorer() -> WindowScorer:
        return WindowScorer(model, Original(), slots=6, initial="random", seed=7)

    (whole, _), (run, _), exact = new_runs("lru"), new_runs("lru"), scorer()
    measure([Job(whole, exact)], exact, readings(), initial="random")
    without = scorer()
    measure([Job(run, without)], without, [r for r in readings() if r.id != 2], initial="random")
    after = scorer()
    measure([Job(run, after)], after, readings(), initial="random")
    assert [u.id for u in run.units] == [0, 1, 3, 4, 5, 2] and run.units[-1] == whole.units[2]


def test_contents_that_are_drawn_differ_by_seed_layer_and_sequence_but_not_by_strategy(model: nn.Module) -> None:
    def drawn(strategy: Original | CachePrior, seed: int, sequence: int) -> list[list[int]]:
        scorer = WindowScorer(model, strategy, slots=6, initial="random", seed=seed)
        scorer.sequence = sequence
        return [scorer._contents(x) or [] for x in scorer._layers]

    first = drawn(Original(), 7, 2)
    assert first == drawn(CachePrior(0.3, 1), 7, 2)
    assert first[0] == np.random.default_rng((7, 0, 2)).permutation(16)[:6].tolist()
    assert len({*map(tuple, first + drawn(Original(), 8, 2) + drawn(Original(), 7, 3))}) == 9


@pytest.mark.parametrize("initial", ["random", "warm"])
def test_results_that_do_not_say_what_the_caches_held_are_not_continued(model: nn.Module, initial: str) -> None:
    runs = new_runs("lru")
    with pytest.raises(Stop):
        go_on(model, runs, initial, stop_after=4)
    runs[1].caches = None  # as earlier versions left it
    units = list(runs[1].units)
    with pytest.raises(UsageError, match=rf"how the {initial} caches of cache-prior.* after 2 of 6 .*another --output"):
        go_on(model, runs, initial)
    assert runs[1].units == units


@pytest.mark.parametrize(
    "damaged",
    ["", "[]", '{"sequence":1}', '{"sequence":1,"layers":[]}', '{"sequence":1,"layers":[{},{},{}]}'],
)
def test_damaged_notes_about_caches_are_refused(model: nn.Module, damaged: str) -> None:
    scorer = WindowScorer(model, Original(), slots=6, initial="warm")
    with pytest.raises(UsageError, match="caches of an interrupted run is damaged"):
        scorer.caches = damaged


# ---- tasks of the harness ----


class FakeTask:
    """In place of a task of lm-evaluation-harness: each document is one text."""

    documents, shots, sha256 = 4, 0, "e" * 64

    def units(self, lm: Any, *, limit: int | None, skip: set[int]) -> Iterator[Unit]:
        for i in range(self.documents):
            if i not in skip:
                lm.scorer.forward(random_tokens(1, 12, seed=i)[0].tolist())
                c = lm.scorer.take_counts()
                yield Unit(i, 12, misses=c.misses, swapped=c.swapped, life_tokens=c.life_tokens, correct=1)


@pytest.mark.parametrize("initial", ["random", "warm"])
def test_a_task_of_the_harness_goes_on_with_the_caches_it_had(monkeypatch: pytest.MonkeyPatch, initial: str) -> None:
    harness = types.ModuleType("mlx_moecache.study.harness")
    harness.MAX_LENGTH = 64  # type: ignore[attr-defined]
    harness.MoeCacheLM = lambda model, tokenizer, scope, scorer: types.SimpleNamespace(scorer=scorer)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, harness.__name__, harness)
    material = Material(Request("harness:fake", None, initial=initial), "e" * 64, "all", harness=FakeTask(), shots=0)  # type: ignore[arg-type]

    def measured(interrupted_after: int | None) -> Run:
        session = Session(DEMO_MODEL, "demo", material, ModelOptions())
        run = session.plan(SPECS[1], slots=20)

        def stop(run: Run, unit: Unit) -> None:
            if len(run.units) == interrupted_after:
                raise Stop

        if interrupted_after is not None:
            with pytest.raises(Stop):
                session.measure([run], stop)
        session.measure([run])
        return run

    assert measured(2) == measured(None)
