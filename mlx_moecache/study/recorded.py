"""A scorer whose routing is recorded in a trace, one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..routing import Original
from .belady import Routes
from .evaluation import Ranges, Scorer
from .recurrence import Counts
from .trace import TraceWriter, describe_run


class RecordedScorer:
    """Does what `scorer`, which routes as the model does, does with `model`, and records it."""

    def __init__(self, scorer: Scorer, model: nn.Module, writer: TraceWriter, *, cold: bool) -> None:
        self._scorer, self._model, self._writer, self._cold = scorer, model, writer, cold

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
        self._writer.begin_sequence(cold=self._cold)
        with self._model.expert_cache.observed_by(self._writer):
            return self._scorer.forward(tokens, biased_from=biased_from, counted_from=counted_from)

    def take_counts(self) -> Counts:
        return self._scorer.take_counts()

    @property
    def own_selections(self) -> Sequence[Routes]:
        return self._scorer.own_selections

    @property
    def ranges(self) -> Ranges:
        return self._scorer.ranges

    @ranges.setter
    def ranges(self, state: Ranges) -> None:
        self._scorer.ranges = state

    @property
    def sequence(self) -> int:
        return self._scorer.sequence

    @sequence.setter
    def sequence(self, number: int) -> None:
        self._scorer.sequence = number

    @property
    def caches(self) -> str:
        return self._scorer.caches

    @caches.setter
    def caches(self, text: str) -> None:
        self._scorer.caches = text


@contextmanager
def recorded(
    scorer: Scorer, model: nn.Module, path: Path, folder: Path, name: str, *, cold: bool
) -> Iterator[RecordedScorer]:
    """`scorer` with everything that it reads appended to the trace at `path`. Raises UsageError as TraceWriter does."""
    header = replace(describe_run(folder, name, model.expert_cache), routing=Original().spec)
    with TraceWriter(path, header) as writer:
        yield RecordedScorer(scorer, model, writer, cold=cold)
