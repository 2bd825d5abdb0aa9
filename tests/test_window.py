"""One forward pass over a text gives the selections, counts and scores of stepping through it token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from stepwise_scorer import StepwiseScorer
from tiny_models import Shelf, random_tokens, run_model, same_bits

from mlx_moecache.errors import UsageError
from mlx_moecache.layer_experts import LayerExperts
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import (
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    Strategy,
    probabilities,
)
from mlx_moecache.seam import SelectionSeam
from mlx_moecache.study.belady import belady_misses
from mlx_moecache.study.evaluation import Job, Reading, Span, measure
from mlx_moecache.study.recurrence import Counts, LayerRecurrence
from mlx_moecache.study.result_metrics import metrics
from mlx_moecache.study.results import Run
from mlx_moecache.study.window import WindowScorer

TEXT: list[int] = random_tokens(1, 48, seed=5)[0].tolist()
STRATEGIES: list[Strategy] = [
    Original(),
    CachePrior(0.2, 1),
    Price(0.1, 1),
    MassBudget(0.1, 1),
    BoundedRegret(2, 0.1),
    MaxRank(1, 8),
    CumulativeThreshold(1, 0.97),
    Pruning(2),
]
SOFTMAX, CORRECTED, LOGITS, MIXER = "qwen2_moe", "deepseek_v3", "mixtral", "phimoe"


def load(folder: Path, slots: int | None = None, routing: str | Strategy = "original") -> nn.Module:
    """All experts in memory unless `slots` says how many."""
    opened = OpenedModel(folder)
    every = max(b.num_experts for b in opened.blocks)
    return opened.load(MemoryOptions(slots=slots or every), CacheOptions(routing=routing))


def negative_log_likelihood(logits: mx.array, tokens: Sequence[int]) -> float:
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -float(mx.take_along_axis(log_p[:-1], mx.array(tokens[1:])[:, None], axis=-1).sum())


class Recorder:
    """Scores and selections per layer of a WindowScorer's last sequence."""

    def __init__(self, scorer: WindowScorer) -> None:
        self.z: list[list[np.ndarray]] = []
        self.ran: list[list[np.ndarray]] = []
        for layer in scorer._layers:
            z_of_layer: list[np.ndarray] = []
            ran_of_layer: list[np.ndarray] = []
            self.z.append(z_of_layer)
            self.ran.append(ran_of_layer)
            run = layer.recurrence.run

            def watched(z, p, own, *, biased_from=0, _run=run, _z=z_of_layer, _ran=ran_of_layer):  # type: ignore[no-untyped-def]
                trace = _run(z, p, own, biased_from=biased_from)
                _z.append(z)
                _ran.append(trace.ids)
                return trace

            layer.recurrence.run = watched  # type: ignore[method-assign]

    def selections(self) -> list[list[set[int]]]:
        return [[set(row[row >= 0].tolist()) for part in layer for row in part] for layer in self.ran]


class TestAgainstStepping:
    @pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
    @pytest.mark.parametrize(("model_type", "slots"), [(SOFTMAX, 8), (CORRECTED, 6), (LOGITS, 4), (MIXER, 5)])
    def test_selections_counts_and_perplexity_are_those_of_stepping(
        self, shelf: Shelf, model_type: str, slots: int, strategy: Strategy
    ) -> None:
        if isinstance(strategy, Pruning) and model_type in (LOGITS, MIXER):
            strategy = Pruning(1)
        folder = shelf.checkpoint(model_type)
        stepwise = StepwiseScorer(folder, strategy, slots=slots)
        window = WindowScorer(load(folder), strategy, slots=slots)
        recorder = Recorder(window)
        expected, logits = stepwise.forward(TEXT), window.forward(TEXT)
        assert np.isfinite(np.array(logits)).all()

        # From equal scores follow equal selections: replay the scores that stepping saw.
        replayed = [
            LayerRecurrence(x.num_experts, x.k, slots, strategy).run(scores, _probabilities(scores, x), own)
            for x, scores, own in zip(stepwise.cache.layers, stepwise.scores, _own(stepwise), strict=True)
        ]
        for trace, ran in zip(replayed, stepwise.selections, strict=True):
            assert [set(a) for a in trace.ids.tolist()] == [set(b) for b in ran.tolist()]

        stepped = [[set(row) for row in ran.tolist()] for ran in stepwise.selections]
        mine = recorder.selections()
        assert mine == stepped  # rounding of the last bits swaps nothing in these texts
        a, b = negative_log_likelihood(logits, TEXT), negative_log_likelihood(expected, TEXT)
        assert a == pytest.approx(b, rel=1e-5)
        ours, theirs = window.take_counts(), stepwise.take_counts()
        lost, lost_too = ours.mass_lost, theirs.mass_lost
        ours.mass_lost = theirs.mass_lost = 0.0
        assert ours == theirs
        assert lost == pytest.approx(lost_too, abs=1e-4)
        if not strategy.is_exact and not isinstance(strategy, Pruning):
            assert ours.swapped > 0

    def test_identity_experts_take_no_slots(self, shelf: Shelf) -> None:
        folder = shelf.saved("longcat_flash")
        for strategy in (Original(), CachePrior(0.3, 1)):
            stepwise, window = StepwiseScorer(folder, strategy, slots=5), WindowScorer(load(folder), strategy, slots=5)
            expected, logits = stepwise.forward(TEXT), window.forward(TEXT)
            assert float(mx.abs(logits - expected).max()) < 1e-3
            ours, stats = window.take_counts(), stepwise.cache.stats.decode
            assert (ours.selections, ours.misses, ours.swapped) == (stats.selections, stats.misses, stats.swapped)
            assert 0 < ours.selections < 48 * 4 * ours.token_layers

    @pytest.mark.parametrize("strategy", [x for x in STRATEGIES if not x.is_exact], ids=lambda s: s.name)
    def test_what_runs_on_the_device_is_what_the_recurrence_chose(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
    ) -> None:
        ran: list[np.ndarray] = []
        original = SelectionSeam.argpartition

        def watched(seam: SelectionSeam, a: mx.array, kth: int = 0, axis: int = -1) -> mx.array:
            chosen = original(seam, a, kth, axis)
            ran.append(np.array(chosen[..., : kth + 1] if kth >= 0 else chosen[..., kth:]))
            return chosen

        monkeypatch.setattr(SelectionSeam, "argpartition", watched)
        scorer = WindowScorer(load(shelf.checkpoint(SOFTMAX)), strategy, slots=6)
        recorder = Recorder(scorer)
        ran.clear()  # of the load-time self-test
        scorer.forward(TEXT)
        on_device = [[set(row) for row in part.reshape(-1, part.shape[-1]).tolist()] for part in ran]
        assert on_device == recorder.selections()

    @pytest.mark.parametrize("slots", [4, 16])
    def test_original_routing_is_one_pass_of_stock(self, shelf: Shelf, slots: int) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        scorer = WindowScorer(load(folder), Original(), slots=slots)
        expected = run_model(shelf.stock(folder), mx.array([TEXT]), [len(TEXT)])[0]
        assert same_bits(scorer.forward(TEXT), expected)
        counts = scorer.take_counts()
        assert counts.swapped == 0 and counts.misses > 0

    def test_a_full_cache_is_exact_under_any_strategy(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        scorer = WindowScorer(load(folder), CachePrior(1.0, 1), slots=16)
        expected = run_model(shelf.stock(folder), mx.array([TEXT]), [len(TEXT)])[0]
        assert same_bits(scorer.forward(TEXT), expected)
        assert scorer.take_counts().swapped == 0

    @pytest.mark.parametrize("real", [4, 9, 16])
    def test_what_the_model_really_holds_does_not_matter(self, shelf: Shelf, real: int) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        a = WindowScorer(load(folder), CachePrior(0.2, 1), slots=8)
        b = WindowScorer(load(folder, real, CachePrior(0.3, 2)), CachePrior(0.2, 1), slots=8)
        assert same_bits(a.forward(TEXT), b.forward(TEXT))
        assert a.take_counts() == b.take_counts()


class TestScope:
    def test_tokens_before_biased_from_are_exact_and_warm_the_cache(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        strategy = CachePrior(0.5, 1)
        scorer, stepwise = WindowScorer(load(folder), strategy, slots=6), StepwiseScorer(folder, strategy, slots=6)
        logits, expected = scorer.forward(TEXT, biased_from=20), stepwise.forward(TEXT, biased_from=20)
        stock = run_model(shelf.stock(folder), mx.array([TEXT]), [20, 28])[0]
        assert same_bits(logits[:20], stock[:20])
        assert not same_bits(logits[20:], stock[20:])
        ours, theirs = scorer.take_counts(), stepwise.take_counts()
        assert (ours.misses, ours.swapped, ours.selections) == (theirs.misses, theirs.swapped, theirs.selections)
        assert float(mx.abs(logits - expected).max()) < 1e-3

    def test_biased_from_the_end_on_is_exact(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        scorer = WindowScorer(load(folder), CachePrior(0.5, 1), slots=6)
        exact = WindowScorer(load(folder), Original(), slots=6)
        assert same_bits(scorer.forward(TEXT, biased_from=len(TEXT)), exact.forward(TEXT))
        assert scorer.take_counts().misses == exact.take_counts().misses


class TestSequences:
    def test_every_sequence_begins_empty_while_the_mean_range_persists(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        scorer = WindowScorer(load(folder), CachePrior(0.2, 1), slots=8)
        scorer.forward(TEXT[:24])
        first, ranges = scorer.take_counts(), scorer.ranges
        assert first.tokens == 24 and ranges[0][1] == 24
        scorer.forward(TEXT[24:])
        assert scorer.ranges[0][1] == 48
        resumed = WindowScorer(load(folder), CachePrior(0.2, 1), slots=8)
        resumed.ranges = ranges
        resumed.forward(TEXT[24:])
        assert resumed.take_counts() == scorer.take_counts()
        assert resumed.ranges == scorer.ranges

    @pytest.mark.parametrize("initial", ["empty", "random", "warm"])
    def test_initial_contents(self, shelf: Shelf, initial: str) -> None:
        model = load(shelf.checkpoint(SOFTMAX))
        scorer = WindowScorer(model, Original(), slots=8, initial=initial, seed=3)
        misses = []
        for _ in range(2):
            scorer.forward(TEXT)
            misses.append(scorer.take_counts().misses)
        if initial == "warm":
            assert misses[1] < misses[0]
        elif initial == "empty":
            assert misses[1] == misses[0]
        else:
            assert len(set(misses)) == 2  # drawn anew for each sequence

    def test_own_selections_are_the_routers(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        scorer = WindowScorer(load(folder), CachePrior(0.5, 1), slots=5)
        scorer.forward(TEXT)
        exact = WindowScorer(load(folder), Original(), slots=5)
        exact.forward(TEXT)
        assert [x.shape for x in scorer.own_selections] == [(48, 4)] * 3
        assert np.array_equal(scorer.own_selections[0], exact.own_selections[0])  # later layers see other inputs

    def test_experts_that_compute_nothing_are_not_in_own_selections_and_the_bound_is_one(self, shelf: Shelf) -> None:
        model = load(shelf.saved("longcat_flash"))
        scorer = WindowScorer(model, Original(), slots=5)
        reading = Reading(0, (tuple(TEXT[:-1]),), 0, (Span(0, 0, tuple(TEXT[1:])),))
        run = Run("original", "original", {}, 5, "lru", 1)
        measure([Job(run, scorer)], scorer, [reading], belady=belady_misses)
        (unit,) = run.units
        real = [x.num_experts for x in model.expert_cache.layers]
        routes = scorer.own_selections
        assert all(e < n for rows, n in zip(routes, real, strict=True) for row in rows for e in row)
        assert sum(len(row) for rows in routes for row in rows) == unit.selections == unit.own_selections
        assert unit.selections is not None and unit.token_layers is not None and unit.misses is not None
        assert unit.selections < unit.token_layers * model.expert_cache.layers[0].k
        assert unit.belady_misses is not None and 0 < unit.belady_misses <= unit.misses
        m = metrics(run.units, layers=len(real), k=4, bytes_per_expert=1)
        assert m["belady_miss_rate"] == pytest.approx(unit.belady_misses / unit.selections)

    @pytest.mark.parametrize("biased_from", [0, 30, 48])
    def test_tokens_that_do_not_count_change_nothing_but_the_counts(self, shelf: Shelf, biased_from: int) -> None:
        model = load(shelf.checkpoint(SOFTMAX))
        new = WindowScorer(model, CachePrior(0.2, 1), slots=8)
        whole, start = (WindowScorer(model, CachePrior(0.2, 1), slots=8) for _ in range(2))
        logits = new.forward(TEXT, biased_from=biased_from, counted_from=20)
        assert same_bits(logits, whole.forward(TEXT, biased_from=biased_from))
        start.forward(TEXT[:20], biased_from=biased_from)
        counted, of_start, of_all = new.take_counts(), start.take_counts(), whole.take_counts()
        assert counted.tokens == 28 and counted.token_layers == 3 * 28
        for f in fields(Counts):  # equal but for the rounding of a shorter pass
            assert getattr(counted, f.name) == pytest.approx(
                getattr(of_all, f.name) - getattr(of_start, f.name), abs=1e-4
            )
        new.forward(TEXT)
        assert new.take_counts().tokens == 48  # it was for that sequence alone

    def test_the_model_works_as_before_afterwards(self, shelf: Shelf) -> None:
        folder = shelf.checkpoint(SOFTMAX)
        model = load(folder, 6, "original")
        WindowScorer(model, CachePrior(0.5, 1), slots=5).forward(TEXT)
        lengths = [20] + [1] * 8
        tokens = random_tokens(1, 28)
        assert same_bits(run_model(model, tokens, lengths), run_model(shelf.stock(folder), tokens, lengths))
        assert model.expert_cache.stats.swapped == 0


def test_wrong_settings_are_refused(shelf: Shelf) -> None:
    model = load(shelf.checkpoint(SOFTMAX))
    for wrong, message in (
        ({"slots": 3}, "slots must be from 4"),
        ({"slots": [8, 8]}, "3 MoE layers"),
        ({"slots": 8, "initial": "hot"}, "choose empty, random, warm"),
        ({"slots": 8, "accounting": "other"}, "choose engine, paper"),
        ({"slots": 8, "eviction": "fifo"}, "fifo"),
    ):
        with pytest.raises(UsageError, match=message):
            WindowScorer(model, Original(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one token"):
        WindowScorer(model, Original(), slots=8).forward([])


def _own(stepwise: StepwiseScorer) -> list[np.ndarray]:
    return [np.asarray(x, dtype=np.intp) for x in stepwise.own_selections]


def _probabilities(z: np.ndarray, layer: LayerExperts) -> np.ndarray:
    bias = getattr(layer.seam.owner, "e_score_correction_bias", None) if layer.seam is not None else None
    offset = None if bias is None else mx.array(bias).mean()
    return np.array(probabilities(mx.array(z), layer.k, logits=bias is None, offset=offset))
