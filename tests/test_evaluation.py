"""The library half of evaluation: what is read, compared and counted, with scorers that need no model."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from stepwise_scorer import StepwiseScorer

from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import MoeCacheError
from mlx_moecache.loading import OpenedModel
from mlx_moecache.routing import CachePrior, Original, Price, Strategy
from mlx_moecache.study.evaluation import Job, Reading, Span, choice_readings, compare, measure, swapped_nothing
from mlx_moecache.study.evaluation import window_readings as readings_of
from mlx_moecache.study.recurrence import Counts, LayerRecurrence, over_layers
from mlx_moecache.study.results import Run
from mlx_moecache.study.tasks import ChoiceDocument
from mlx_moecache.study.text_windows import cut

V = 50


class NoisyScorer:
    """Logits that depend on the tokens, on D and, by `noise`, on the strategy; every token-layer has one swap."""

    def __init__(self, noise: float = 0.0, routes: Sequence[npt.NDArray[np.int32]] = ()) -> None:
        self.noise, self.own_selections = noise, list(routes)
        self.ranges: list[tuple[float, int]] = [(0.0, 0), (0.0, 0)]
        self.sequence, self.caches = 0, ""
        self.read: list[tuple[tuple[int, ...], int]] = []
        self._counts = Counts()

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
        self.read.append((tuple(tokens), biased_from))
        D = self.ranges[0][0]
        self.ranges = [(total + sum(tokens), n + len(tokens)) for total, n in self.ranges]
        rng = np.random.default_rng(list(tokens))
        logits = 3 * rng.normal(size=(len(tokens), V)) + self.noise * (1 + D % 7) * rng.normal(size=(len(tokens), V))
        self._counts += Counts(tokens=len(tokens), token_layers=2 * len(tokens), selections=8 * len(tokens), misses=3)
        self._counts.swapped += int(self.noise > 0)
        return mx.array(logits.astype(np.float32))

    def take_counts(self) -> Counts:
        taken, self._counts = self._counts, Counts()
        return taken


def make_run(name: str = "original", slots: int = 4, n: int = 5) -> Run:
    return Run(name, name, {}, slots, "lru", n)


def text_readings(n: int = 5, scope: str = "all") -> list[Reading]:
    ids = np.random.default_rng(3).integers(0, V, size=8 * n + 1).tolist()
    return readings_of(cut("text", lambda text: ids, window=8), "all" if scope == "all" else "decode")


def reference(logits: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], ...]:
    a = exact - np.log(np.exp(exact.astype(np.float64)).sum(-1, keepdims=True))
    b = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    return a, b


# ---- comparing logits ----


def test_nll_kl_and_agreement_are_those_written_out_also_over_many_rows() -> None:
    rng = np.random.default_rng(0)
    exact, logits = (3 * rng.normal(size=(300, V)).astype(np.float32) for _ in range(2))
    logits[::2] = exact[::2]
    targets = rng.integers(0, V, size=300).tolist()
    a, b = reference(logits, exact)
    nll, kl, top1 = compare(mx.array(logits), mx.array(exact), targets)
    assert nll == pytest.approx(-b[np.arange(300), targets].sum(), rel=1e-6)
    assert kl == pytest.approx((np.exp(a) * (a - b)).sum(), rel=1e-5)
    assert top1 == (a.argmax(-1) == b.argmax(-1)).sum() and 150 <= top1 < 300


def test_tokens_that_a_model_rules_out_do_not_spoil_the_kl() -> None:
    logits = mx.array([[0.0, 1.0, -float("inf")]])
    nll, kl, top1 = compare(logits, logits, [1])
    assert (kl, top1) == (0.0, 1) and nll == pytest.approx(np.log(1 + np.exp(-1)))


# ---- what is read ----


def test_a_window_predicts_every_token_but_its_first_and_never_reads_its_last() -> None:
    reading = text_readings()[1]
    assert reading.spans == (Span(0, 0, reading.spans[0].targets),)
    assert reading.inputs[0][1:] == reading.spans[0].targets[:-1] and len(reading.inputs[0]) == 8
    assert reading.biased_from == 0


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 1), (8, 7), (8, 8), (8, 11)])
def test_of_windows_that_overlap_each_token_is_predicted_and_counted_once(window: int, stride: int) -> None:
    ids = list(range(100))
    readings = readings_of(cut("text", lambda text: ids, window=window, stride=stride), "all")
    predicted, counted = [], []
    for i, r in enumerate(readings):
        (span,), (tokens,) = r.spans, r.inputs
        assert tokens == tuple(ids[i * stride : i * stride + window])  # all of them are read, as context
        assert [tokens[span.first + j] + 1 for j in range(len(span.targets))] == list(span.targets)
        predicted += span.targets
        counted += tokens[r.counted_from :]
    assert predicted == [x + 1 for x in counted]
    if stride <= window:
        assert predicted == list(range(1, len(predicted) + 1))
    else:
        assert len(predicted) == len(set(predicted)) == window * len(readings)


def test_a_unit_counts_its_new_tokens_only() -> None:
    ids = np.random.default_rng(3).integers(0, V, size=21).tolist()
    readings = readings_of(cut("text", lambda text: ids, window=8, stride=4), "all")
    counted: list[int] = []

    class Counting(NoisyScorer):
        def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
            counted.append(len(tokens) - counted_from)
            return super().forward(tokens, biased_from=biased_from, counted_from=counted_from)

    run, scorer = make_run("a", n=4), Counting(0.1)
    measure([Job(run, scorer)], scorer, readings)
    assert [u.tokens for u in run.units] == counted == [8, 4, 4, 4]
    # Logits depend on the window that they were read in, the noise on D, the sum of the tokens read before.
    before = NoisyScorer(0.1)
    for r, u in zip(readings, run.units, strict=True):
        logits = np.array(before.forward(r.inputs[0]), dtype=np.float64)[-u.tokens :]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = ids[4 * r.id + 8 - u.tokens + 1 : 4 * r.id + 9]
        assert u.nll == pytest.approx(-logprobs[np.arange(u.tokens), targets].sum(), rel=1e-5)


def test_under_decode_a_text_is_all_prompt_and_of_a_question_only_choices_are_biased() -> None:
    assert all(r.biased_from >= len(r.inputs[0]) for r in text_readings(scope="decode"))
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    document = ChoiceDocument(7, "What is red?\nAnswer:", (" a fox", " a big garden"), 1)
    (r,) = choice_readings(tokenizer, [document], "decode")
    assert r.biased_from == len(tokenizer.encode(document.context)) == r.spans[0].first + 1


def test_choices_of_one_token_share_one_sequence_and_others_have_their_own() -> None:
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    letters = ChoiceDocument(0, "Question\nAnswer:", (" A", " B", " C", " D"), 2)
    longer = ChoiceDocument(1, "Question\nAnswer:", (" a fox", " a big garden"), 1)
    one, two = choice_readings(tokenizer, [letters, longer], "all")
    assert (len(one.inputs), len(two.inputs), one.answer, two.answer, two.id) == (1, 2, 2, 1, 1)
    for r, d in ((one, letters), (two, longer)):
        for span, choice in zip(r.spans, d.choices, strict=True):
            whole = (*r.inputs[span.input], span.targets[-1])
            assert tokenizer.decode(whole) == d.context + choice
            assert whole[span.first + 1 :] == span.targets


# ---- measuring ----


def test_exact_logits_of_a_unit_are_computed_once_for_all_strategies() -> None:
    exact, first, second = NoisyScorer(), NoisyScorer(0.1), NoisyScorer(0.2)
    runs = [make_run(), make_run("a"), make_run("b")]
    measure([Job(r, s) for r, s in zip(runs, (exact, first, second), strict=True)], exact, text_readings())
    assert [len(s.read) for s in (exact, first, second)] == [5, 5, 5]
    assert [u.kl for u in runs[0].units] == [0.0] * 5 and [u.top1 for u in runs[0].units] == [8] * 5
    kl = [sum(u.kl or 0 for u in r.units) for r in runs]
    assert 0 < kl[1] < kl[2]


def test_units_hold_what_the_scorer_counted_in_them_alone() -> None:
    run, scorer = make_run("a"), NoisyScorer(0.1)
    exact = NoisyScorer()
    measure([Job(run, scorer)], exact, text_readings())
    assert [(u.id, u.tokens, u.selections, u.misses, u.swapped) for u in run.units] == [
        (i, 8, 64, 3, 1) for i in range(5)
    ]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_an_interrupted_evaluation_keeps_whole_units_and_goes_on_to_the_same_figures(after: int) -> None:
    def jobs(runs: list[Run]) -> list[Job]:
        return [Job(r, NoisyScorer(noise)) for r, noise in zip(runs, (0.1, 0.3), strict=True)]

    whole = [make_run("a"), make_run("b")]
    measure(jobs(whole), NoisyScorer(), text_readings())
    parts = [make_run("a"), make_run("b")]
    units = 0

    def stop(run: Run, unit: object) -> None:
        nonlocal units
        units += 1
        if units == after:
            raise Stop

    with pytest.raises(Stop):
        measure(jobs(parts), NoisyScorer(), text_readings(), on_unit=stop)
    assert sum(len(r.units) for r in parts) == after
    again = jobs(parts)
    measure(again, NoisyScorer(), text_readings())
    assert parts == whole  # D went on where it was, else the noise would differ
    reread = sum(len(j.scorer.read) for j in again)  # type: ignore[attr-defined]
    assert reread == 10 - after


def test_complete_runs_read_nothing() -> None:
    run = make_run("a")
    measure([Job(run, NoisyScorer(0.1))], NoisyScorer(), text_readings())
    exact, scorer = NoisyScorer(), NoisyScorer(0.1)
    measure([Job(run, scorer)], exact, text_readings())
    assert exact.read == scorer.read == [] and len(run.units) == 5


def test_belady_is_computed_on_the_original_routes_for_each_number_of_slots() -> None:
    routes = [np.array([[0, 1]]), np.array([[2, 3]])]
    seen: list[tuple[int, int]] = []

    def belady(selections: npt.NDArray[np.int32], slots: int) -> int:
        seen.append((int(selections[0, 0]), slots))
        return slots

    runs = [make_run("a", 4), make_run("b", 4), make_run("c", 8)]
    jobs = [Job(r, NoisyScorer(0.1, [np.array([[9, 9]])])) for r in runs]
    measure(jobs, NoisyScorer(routes=routes), text_readings(1), belady=belady)
    assert seen == [(0, 4), (2, 4), (0, 8), (2, 8)]
    assert [r.units[0].belady_misses for r in runs] == [8, 8, 16]


def test_the_likeliest_choice_is_the_answer_and_the_right_one_is_scored() -> None:
    rng = np.random.default_rng(5)
    readings = []
    for i in range(40):
        context = tuple(rng.integers(0, V, size=4).tolist())
        spans = tuple(Span(0, 3, (int(t),)) for t in rng.choice(V, size=4, replace=False))
        readings.append(Reading(i, (context,), 0, spans, answer=i % 4))
    run, exact = make_run("a"), NoisyScorer()
    measure([Job(run, NoisyScorer(0.2))], exact, readings)
    for r, u in zip(readings, run.units, strict=True):
        # D, which the noise depends on, is the sum of the tokens read before.
        before = NoisyScorer(0.2)
        before.ranges = [(float(sum(sum(x.inputs[0]) for x in readings[: r.id])), 0)] * 2
        logits = np.array(before.forward(r.inputs[0]))[3]
        targets = [s.targets[0] for s in r.spans]
        assert u.correct == int(np.argmax(logits[targets]) == r.answer)
        nll = np.log(np.exp(logits.astype(np.float64)).sum()) - logits[targets[r.answer]]
        assert u.nll == pytest.approx(nll, rel=1e-5) and u.tokens == 1
    assert 0 < sum(u.correct or 0 for u in run.units) < 40


def test_logits_that_are_not_finite_are_an_error_that_names_unit_and_routing() -> None:
    class Broken(NoisyScorer):
        def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
            return super().forward(tokens) * float("nan")

    run = make_run("price")
    with pytest.raises(MoeCacheError, match="unit 0 with price are not finite"):
        measure([Job(run, Broken(0.1))], NoisyScorer(), text_readings())
    assert run.units == []


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, True),
        ({"scope": "decode"}, False),
        ({"is_exact": True}, False),
        ({"uses_residents": False}, False),
        ({"experts": 4}, False),  # as many as there are slots
    ],
)
def test_a_strategy_that_had_to_swap_and_did_not_fails(change: dict[str, object], fails: bool) -> None:
    run = make_run("price")
    measure([Job(run, NoisyScorer(0.0))], NoisyScorer(), text_readings())
    facts = {"scope": "all", "experts": 8, "is_exact": False, "uses_residents": True, **change}
    assert (swapped_nothing(run, **facts) is not None) == fails  # type: ignore[arg-type]
    measure([Job(other := make_run("price"), NoisyScorer(0.1))], NoisyScorer(), text_readings())
    assert swapped_nothing(other, **facts) is None  # type: ignore[arg-type]


# ---- the yardstick ----


@pytest.mark.parametrize("strategy", [Original(), CachePrior(0.2, 1), Price(0.05, 1)])
def test_the_stepwise_scorer_agrees_with_the_recurrence_on_its_own_scores(strategy: Strategy) -> None:
    scorer = StepwiseScorer(DEMO_MODEL, strategy, slots=12)
    ids = OpenedModel(DEMO_MODEL).tokenizer().encode("Once upon a time, there was a fox in a garden. It was red.")
    layers = [LayerRecurrence(60, 4, 12, strategy) for _ in range(6)]
    for biased_from in (0, 9):
        scorer.forward(ids, biased_from=biased_from)
        seen = scorer.take_counts()
        for layer, z, own, ran in zip(layers, scorer.scores, scorer.own_selections, scorer.selections, strict=True):
            layer.reset_cache()
            p = np.exp(z - z.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            trace = layer.run(z, p, own, biased_from=biased_from)
            assert [set(row) for row in trace.ids.tolist()] == [set(row) for row in ran.tolist()]
        counted = over_layers([x.counts for x in layers])
        for layer in layers:
            layer.counts = Counts()
        lost, counted.mass_lost = counted.mass_lost, seen.mass_lost
        assert counted == seen and lost == pytest.approx(seen.mass_lost, abs=1e-4)
    scorer.close()
