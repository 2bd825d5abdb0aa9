"""Evaluation results as text: a table with one line per run, or a list per run where the table is too wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .result_metrics import Interval, Paired, Unit
from .results import ModelFacts, Results, Run, paired

Metrics = dict[str, float | None]
Text = Callable[[Run, Metrics, Paired | None], str]  # of one cell, "" where there is nothing to show


@dataclass(frozen=True)
class _Column:
    title: str
    text: Text


def heading(results: Results) -> list[str]:
    """What was measured: model, data, settings."""
    model, data, s = results.model, results.data, results.settings
    name = model.path.rstrip("/").rpartition("/")[2] or model.path
    lines = [
        f"{name} ({model.model_type}): {model.moe_layers} layers of {model.experts} experts, {model.k} per token",
        f"{data.task} {data.path.rpartition('/')[2]} (sha256 {data.sha256[:12]})"
        + (f", windows of {s.window:,} tokens" if s.window else "")
        + (f" every {s.stride:,}" if s.window and s.stride != s.window else "")
        + (", each token scored once" if s.scored == "new" else "")
        + (f", {s.shots}-shot" if s.shots is not None else ""),
        f"bias scope {s.scope}, cache {s.initial} at the start, {s.accounting} accounting, seed {s.seed}",
    ]
    return [*lines, ""]


def table(model: ModelFacts, runs: Sequence[Run], width: int | None = None) -> list[str]:
    """Metrics of `runs`, columns that nothing is known of left out; compared with the first run of original routing.

    width: columns of the terminal, None: any. ± is one standard error, [ ] a 95 % interval, paired over units.
    """
    runs = [r for r in runs if r.units]
    base = next((r for r in runs if r.strategy == "original"), None)
    facts = [(r, r.metrics(model), _compare(base, r)) for r in runs]
    columns = _with_other_judgements([m for _, m, _ in facts])
    rows = [[c.text(*f) for c in columns] for f in facts]
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    titles = [columns[i].title for i in shown]
    cells = [[row[i] for i in shown] for row in rows]
    widths = [max(len(t), *(len(row[i]) for row in cells)) for i, t in enumerate(titles)] if cells else []
    if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
        lines = [_line(titles, widths), *(_line(row, widths) for row in cells)]
    else:
        lines = []
        label = max(map(len, titles[1:]))
        for row in cells:
            lines.append(row[0])
            lines += [f"  {t:{label}}  {text}" for t, text in zip(titles[1:], row[1:], strict=True) if text]
    return [*lines, *_notes(runs)]


class RunningMetric:
    """The metric of a run so far, updated unit by unit, in a few characters."""

    def __init__(self, units: Sequence[Unit] = ()) -> None:
        self._nll = self._tokens = self._correct = self._judged = self._misses = self._selections = 0.0
        for u in units:
            self.add(u)

    def add(self, unit: Unit) -> None:
        if unit.correct is not None:
            self._correct += unit.correct
            self._judged += 1
        elif unit.nll is not None:
            self._nll += unit.nll
            self._tokens += unit.tokens
        self._misses += unit.misses or 0
        self._selections += unit.selections or 0

    def __str__(self) -> str:
        parts = []
        if self._judged:
            parts.append(f"acc {self._correct / self._judged:.1%}")
        elif self._tokens:
            parts.append(f"ppl {math.exp(min(self._nll / self._tokens, 700)):.4g}")
        if self._selections:
            parts.append(f"miss {self._misses / self._selections:.1%}")
        return ", ".join(parts)


def _compare(base: Run | None, other: Run) -> Paired | None:
    if base is None or other is base:
        return None
    try:
        return paired(base, other)
    except UsageError:  # fewer than two units in common
        return None


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [f"FAILED: {r.failed}" for r in runs if r.failed]
    part = [r for r in runs if len(r.units) < r.n]
    if part:
        notes.append("incomplete: " + ", ".join(f"{r.routing} ({len(r.units):,} of {r.n:,})" for r in part))
    return ["", *notes] if notes else []


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()


def _with_error(name: str, scale: float, digits: int) -> Text:
    def text(run: Run, m: Metrics, p: Paired | None) -> str:
        value, error = m.get(name), m.get(f"{name}_stderr")
        if value is None:
            return ""
        shown = f"{scale * value:.{digits}f}"
        return shown if error is None else f"{shown} ±{scale * error:.{digits}f}"

    return text


def _plain(name: str, scale: float, digits: int) -> Text:
    def text(run: Run, m: Metrics, p: Paired | None) -> str:
        value = m[name]
        return "" if value is None else f"{scale * value:.{digits}f}"

    return text


def _against(pick: Callable[[Paired], Interval | None], digits: int) -> Text:
    def text(run: Run, m: Metrics, p: Paired | None) -> str:
        i = None if p is None else pick(p)
        return "" if i is None else f"{i.value:.{digits}f} [{i.low:.{digits}f} {i.high:.{digits}f}]"

    return text


def _of_texts(text: Text) -> Text:
    """Only where no questions are judged: the perplexity of a few answer tokens says little."""
    return lambda run, m, p: "" if m["accuracy"] is not None else text(run, m, p)


_COLUMNS = (
    _Column("routing", lambda run, m, p: run.routing),
    _Column("slots", lambda run, m, p: str(run.slots)),
    _Column("eviction", lambda run, m, p: run.eviction if run.eviction != "lru" else ""),
    _Column("n", lambda run, m, p: f"{len(run.units):,}"),
    _Column("perplexity", _of_texts(_with_error("perplexity", 1, 3))),
    _Column("ppl ratio", _of_texts(_against(lambda p: p.perplexity_ratio, 4))),
    _Column("accuracy %", _with_error("accuracy", 100, 1)),
    _Column("KL nats", _plain("kl", 1, 5)),
    _Column("top-1 %", _plain("top1_agreement", 100, 1)),
    _Column("miss %", _plain("miss_rate", 100, 1)),
    _Column("miss ratio", _against(lambda p: p.miss_ratio, 3)),
    _Column("Belady %", _plain("belady_miss_rate", 100, 1)),
    _Column("loads/tok", _plain("loads_per_token", 1, 2)),
    _Column("MB/tok", _plain("bytes_per_token", 1e-6, 3)),
    _Column("swap %", _plain("swapped_share", 100, 1)),
    _Column("all-hit %", _plain("all_hit_share", 100, 1)),
    _Column("life", _plain("expert_lifetime", 1, 1)),
)


def _with_other_judgements(metrics: Sequence[Metrics]) -> list[_Column]:
    """A column for each other way in which the answers were judged, after the accuracy."""
    names = sorted({n for m in metrics for n in m if n.startswith("accuracy_") and not n.endswith("stderr")})
    columns = list(_COLUMNS)
    at = 1 + next(i for i, c in enumerate(columns) if c.title.startswith("accuracy"))
    columns[at:at] = [_Column(f"{n.removeprefix('accuracy_')} %", _with_error(n, 100, 1)) for n in names]
    return columns
