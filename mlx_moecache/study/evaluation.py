"""Measuring routing strategies on texts and questions that the model only reads, against its own, exact routing.

Each unit (a window of text, a question with its choices) is read once with original routing; these logits are shared by
all strategies. A scorer (window.py) reads a sequence as if token by token, with simulated caches. Knows tokens, logits
and sums; knows no files and does not print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MoeCacheError, UsageError
from .belady import Routes
from .question_scoring import encode_choices
from .result_metrics import Unit
from .results import Run
from .tasks import ChoiceDocument, Scope
from .text_windows import Windows

if TYPE_CHECKING:
    from .recurrence import Counts

ROWS = 128  # tokens whose log-probabilities are formed at once: [128, 152k] float32 is 78 MB

Ranges = list[tuple[float, int]]
Belady = Callable[[Routes, int], int]  # selections of a layer, slots -> fewest possible misses
OnUnit = Callable[[Run, Unit], None]


class Scorer(Protocol):
    """Reads sequences with one strategy and caches of its own; D persists from one sequence to the next."""

    ranges: Ranges  # D of each layer as (sum of ranges, tokens): the state that persists
    sequence: int  # sequences begun so far, on which contents that are drawn depend
    caches: str  # JSON: `sequence` and what warm caches hold

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
        """Logits [L, V] float32 of a new sequence.

        Tokens before `biased_from` are routed as the model does, those before `counted_from` are not counted.
        """

    def take_counts(self) -> Counts:
        """What happened since the last call, summed over layers."""

    @property
    def own_selections(self) -> Sequence[Routes]:
        """Per layer, the router's own selections in the last forward, without experts that compute nothing."""


@dataclass
class Job:
    """A run and the scorer that measures it."""

    run: Run
    scorer: Scorer


@dataclass(frozen=True)
class Span:
    """Tokens to predict: `targets[i]` after `input[first + i]`."""

    input: int  # number of the sequence
    first: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """One unit: sequences to read and what to predict in them. Several spans are choices, one of which is right."""

    id: int
    inputs: tuple[tuple[int, ...], ...]
    biased_from: int
    spans: tuple[Span, ...]
    answer: int = 0  # index of the span that is scored, the right one
    counted_from: int = 0  # tokens of a sequence before it were counted in an earlier unit


def window_readings(windows: Windows, scope: Scope) -> list[Reading]:
    """A window's last token is only predicted. Under "decode" a text is all prompt, so nothing is biased.

    Of windows that overlap, all but the first predict and count their last `stride` tokens: no token counts twice.
    """
    readings = []
    for i in range(len(windows)):
        ids = tuple(windows[i])
        biased_from = 0 if scope == "all" else len(ids)
        old = 0 if i == 0 else max(0, windows.window - windows.stride)
        readings.append(Reading(i, (ids[:-1],), biased_from, (Span(0, old, ids[1 + old :]),), counted_from=old))
    return readings


def choice_readings(tokenizer: TokenizerWrapper, documents: Sequence[ChoiceDocument], scope: Scope) -> list[Reading]:
    """Choices that differ in their last token only share one sequence. Under "decode" the context is not biased.

    Raises UsageError for a choice that adds no token.
    """
    readings = []
    for d in documents:
        inputs: dict[tuple[int, ...], int] = {}
        spans = []
        pairs = encode_choices(tokenizer, d.context, d.choices)
        for context, targets in pairs:
            number = inputs.setdefault((*context, *targets[:-1]), len(inputs))
            spans.append(Span(number, len(context) - 1, tuple(targets)))
        biased_from = 0 if scope == "all" else len(pairs[0][0])  # the same context for all
        readings.append(Reading(d.id, tuple(inputs), biased_from, tuple(spans), d.answer))
    return readings


def measure(
    jobs: Sequence[Job],
    exact: Scorer,
    readings: Sequence[Reading],
    *,
    initial: str = "empty",
    belady: Belady | None = None,
    on_unit: OnUnit = lambda run, unit: None,
) -> None:
    """Measure what the jobs' runs still lack, unit by unit; a unit is added to its run whole, or not at all.

    exact: a scorer with original routing; it may be that of one of the jobs. belady: only for caches that start empty
    and units that count all of their tokens. Runs that were interrupted go on from the D they had, and with `initial`
    "warm" from the caches. Raises MoeCacheError if logits are not finite, ReadError if experts cannot be read,
    UsageError if the results lack what a run would go on with.
    """
    measured = [job.run.measured for job in jobs]
    resumed = [False] * len(jobs)
    sequence = 0
    for reading in readings:
        pending = [i for i in range(len(jobs)) if reading.id not in measured[i]]
        if pending:
            for i in pending:  # first, since `exact` may be one of them
                if not resumed[i]:
                    resumed[i] = True
                    resume(jobs[i].run, jobs[i].scorer, initial)
            for scorer in (exact, *(jobs[i].scorer for i in pending)):
                scorer.sequence = sequence  # wherever a run goes on, and whatever others have read
            reference = _read(exact, reading)
            counts = exact.take_counts()
            routes = list(exact.own_selections) if belady is not None else []
            best: dict[int, int] = {}  # slots -> misses
            for i in pending:
                job = jobs[i]
                if belady is not None and job.run.slots not in best and len(reading.inputs) == 1:
                    best[job.run.slots] = sum(belady(r, job.run.slots) for r in routes)
                unit = _measure(job, exact, reading, reference, counts, best.get(job.run.slots))
                keep(job.run, job.scorer, initial, unit)
                on_unit(job.run, unit)
        sequence += len(reading.inputs)


def keep(run: Run, scorer: Scorer, initial: str, unit: Unit) -> None:
    """Add `unit` to `run`, and what the run needs to go on after it."""
    ranges = [list(r) for r in scorer.ranges]
    caches = None if initial == "empty" or len(run.units) + 1 >= run.n else scorer.caches
    # Python looks for Ctrl-C after calls, and the only one here is the last: all of this or nothing.
    run.ranges, run.caches = ranges, caches
    run.units.append(unit)


def resume(run: Run, scorer: Scorer, initial: str) -> None:
    """Give a new scorer what that of `run` had after its last unit. Raises UsageError if this was not noted."""
    if not run.units:
        return
    if run.ranges is not None:
        scorer.ranges = [(total, int(tokens)) for total, tokens in run.ranges]
    if initial == "empty":
        return
    if run.caches is None:
        raise UsageError(
            f"the results do not say how the {initial} caches of {run.routing} with {run.slots} slots were left after "
            f"{len(run.units)} of {run.n} units, so this run cannot go on; measure anew with another --output"
        )
    scorer.caches = run.caches


def swapped_nothing(run: Run, *, scope: str, experts: int, is_exact: bool, uses_residents: bool) -> str | None:
    """Why a finished run must not be trusted: a strategy that had to act did not. None if all is well."""
    acted = any(u.swapped for u in run.units)
    if scope != "all" or is_exact or not uses_residents or run.slots >= experts or acted or not run.units:
        return None
    tokens = sum(u.tokens for u in run.units)
    return (
        f"{run.routing} with {run.slots} of {experts} experts in memory swapped no selection in {tokens:,} tokens: "
        "the bias did not reach the router or its strength is too small to matter"
    )


def compare(logits: mx.array, exact: mx.array, targets: Sequence[int]) -> tuple[float, float, int]:
    """Sums over the rows of `logits` and `exact` [L, V]: NLL of `targets`, KL(exact || logits), equal best tokens."""
    nll, kl, top1 = 0.0, 0.0, 0
    for i in range(0, len(targets), ROWS):
        a, b = _logprobs(exact[i : i + ROWS]), _logprobs(logits[i : i + ROWS])
        p = mx.exp(a)
        rows = mx.where(p > 0, p * (a - b), 0.0).sum(axis=-1)
        of_targets = mx.take_along_axis(b, mx.array(list(targets[i : i + ROWS]))[:, None], axis=-1)
        same = (a.argmax(axis=-1) == b.argmax(axis=-1)).sum()
        mx.eval(rows, of_targets, same)
        nll -= float(np.array(of_targets, dtype=np.float64).sum())
        kl += float(np.array(rows, dtype=np.float64).sum())
        top1 += int(np.array(same).item())
    return nll, kl, top1


def _measure(
    job: Job, exact: Scorer, reading: Reading, reference: list[mx.array], counts: Counts, belady: int | None
) -> Unit:
    logits, own_selections = reference, None if belady is None else counts.selections
    if job.scorer is not exact:
        logits = _read(job.scorer, reading)
        counts = job.scorer.take_counts()
    span = reading.spans[reading.answer]
    nll, kl, top1 = compare(logits[reading.answer], reference[reading.answer], span.targets)
    if not (math.isfinite(nll) and math.isfinite(kl)):
        raise MoeCacheError(
            f"the logits of unit {reading.id} with {job.run.routing} are not finite; "
            "the checkpoint may be damaged, or its numbers too large for its type"
        )
    correct = None
    if len(reading.spans) > 1:
        likelihoods = [
            -nll if i == reading.answer else -compare(x, x, s.targets)[0]
            for i, (x, s) in enumerate(zip(logits, reading.spans, strict=True))
        ]
        correct = int(int(np.argmax(likelihoods)) == reading.answer)
    return Unit(
        id=reading.id,
        tokens=len(span.targets),
        nll=nll,
        kl=kl,
        top1=top1,
        selections=counts.selections,
        misses=counts.misses,
        loads=counts.loads,
        swapped=counts.swapped,
        token_layers=counts.token_layers,
        all_hit=counts.all_hit,
        lives=counts.lives,
        life_tokens=counts.life_tokens,
        mass_lost=counts.mass_lost,
        belady_misses=belady,
        own_selections=own_selections,
        correct=correct,
    )


def _read(scorer: Scorer, reading: Reading) -> list[mx.array]:
    """Logits [targets, V] of each span, evaluated; those that nothing is predicted from are dropped at once."""
    spans: list[mx.array | None] = [None] * len(reading.spans)
    for number, tokens in enumerate(reading.inputs):
        logits = scorer.forward(tokens, biased_from=reading.biased_from, counted_from=reading.counted_from)
        for i, s in enumerate(reading.spans):
            if s.input == number:
                whole = s.first == 0 and len(s.targets) == len(tokens)
                # A slice would keep the whole alive.
                spans[i] = logits if whole else mx.contiguous(logits[s.first : s.first + len(s.targets)])
        mx.eval([x for x in spans if x is not None])
    return [x for x in spans if x is not None]


def _logprobs(logits: mx.array) -> mx.array:
    x = logits.astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)
