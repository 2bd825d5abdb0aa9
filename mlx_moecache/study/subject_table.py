"""MMLU's accuracy subject by subject, for several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .results import Run
from .tasks_mmlu import MmluDocument, SubjectAccuracy, by_subject


def subjects_json(run: Run, documents: Sequence[MmluDocument]) -> dict[str, Any]:
    """subject -> n, accuracy and its standard error, of the questions that `run` has answered."""
    return {subject: asdict(a) for subject, a in _accuracies(run, documents).items()}


def subject_table(runs: Sequence[Run], documents: Sequence[MmluDocument], width: int | None = None) -> list[str]:
    """One line per subject and one column per run; below each other where `width` columns are too few for them.

    Percent of questions, ± one standard error. Empty without answered questions.
    """
    columns = [(_title(run, runs), _accuracies(run, documents)) for run in runs if run.units]
    lines = _beside(columns)
    if width is not None and any(len(line) > width for line in lines):
        lines = [line for column in columns for line in _beside([column])]
    return lines


def _accuracies(run: Run, documents: Sequence[MmluDocument]) -> dict[str, SubjectAccuracy]:
    return by_subject(documents, {u.id: u.correct for u in run.units if u.correct is not None})


def _title(run: Run, runs: Sequence[Run]) -> str:
    """Of a column; what all runs have in common is in the table of results."""
    parts = [run.routing]
    if len({r.slots for r in runs}) > 1:
        parts.append(f"{run.slots} slots")
    if len({r.eviction for r in runs}) > 1:
        parts.append(run.eviction)
    return " · ".join(parts)


def _beside(columns: Sequence[tuple[str, dict[str, SubjectAccuracy]]]) -> list[str]:
    subjects = sorted({s for _, accuracies in columns for s in accuracies})
    if not subjects:
        return []
    first = [f"{'accuracy %':{max(map(len, subjects))}}", *(f"{s:{max(map(len, subjects))}}" for s in subjects)]
    counts = [max(a[s].n for _, a in columns if s in a) for s in subjects]
    lines = [f"{start}  {n:>5}" for start, n in zip(first, ["n", *(f"{n:,}" for n in counts)], strict=True)]
    for title, accuracies in columns:
        cells = [title, *(_cell(accuracies.get(s)) for s in subjects)]
        lines = [f"{line}  {cell:>{max(map(len, cells))}}" for line, cell in zip(lines, cells, strict=True)]
    return lines


def _cell(a: SubjectAccuracy | None) -> str:
    if a is None:
        return ""
    return f"{100 * a.accuracy:.1f}" + ("" if a.stderr is None else f" ±{100 * a.stderr:.1f}")
