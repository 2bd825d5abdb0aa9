"""A bar with the metric so far, and the results file, saved now and then: what evaluate does after each unit."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..console.terminal import is_terminal
from .result_metrics import Unit
from .result_table import RunningMetric
from .results import Results, Run, save

SAVE_EVERY = 5.0  # seconds


class EvaluationProgress:
    """A bar with the metric so far, on a terminal; and the results file, saved every few seconds and at the end."""

    def __init__(self, results: Results, runs: Sequence[Run], output: Path | None, *, shown: bool) -> None:
        from tqdm import tqdm

        self._results, self._output = results, output
        self._saved = time.monotonic()
        self._sums = {id(r): RunningMetric(r.units) for r in runs}
        self._bar = tqdm(
            total=sum(r.n for r in runs),
            initial=sum(len(r.units) for r in runs),
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",  # fits in 80 columns
            disable=not (shown and is_terminal(sys.stderr)),
        )

    def count(self, run: Run, unit: Unit) -> None:
        metric = self._sums[id(run)]
        metric.add(unit)
        self._bar.set_postfix_str(f"{run.strategy} {metric}", refresh=False)
        self._bar.update()
        if self._output is not None and time.monotonic() - self._saved > SAVE_EVERY:
            save(self._results, self._output)
            self._saved = time.monotonic()

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._output is not None and any(r.units for r in self._results.runs):
            save(self._results, self._output)
