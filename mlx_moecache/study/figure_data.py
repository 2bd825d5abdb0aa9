"""What the figures show, from results files: which runs, the lines they form, values and intervals. Plain Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..errors import UsageError
from .result_metrics import Paired
from .results import Results, Run, paired

ORIGINAL = "original"
Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Metric:
    """A measure of quality as the figures name it."""

    name: str  # what the user writes
    field: str  # in a run's metrics
    title: str  # of the axis


METRICS = {
    m.name: m
    for m in (
        Metric("perplexity", "perplexity", "perplexity relative to exact routing"),
        Metric("kl", "kl", "KL from exact routing (nats per token)"),
        Metric("accuracy", "accuracy", "accuracy"),
        Metric("top1", "top1_agreement", "top-1 agreement with exact routing"),
    )
}


@dataclass(frozen=True)
class Point:
    """One run. `low` and `high` bound the 95 % interval of `quality`; None where it is not known."""

    value: float | None  # of the parameter that varies along the line
    miss_rate: float  # misses by k selections per token and layer
    quality: float
    low: float | None
    high: float | None
    lifetime: float | None  # tokens


@dataclass(frozen=True)
class Line:
    """The runs of one strategy and eviction policy that differ in one parameter only, ordered by it."""

    strategy: str
    eviction: str
    parameter: str | None  # that varies; None where the strategy has none
    fixed: tuple[tuple[str, float], ...]  # the other parameters, where lines of this strategy differ in them
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """Everything that was measured with one number of slots."""

    slots: int
    belady: float | None  # miss rate of the best eviction possible on the original routes
    exact: tuple[Line, ...]  # original routing, one line of one point per eviction policy
    lines: tuple[Line, ...]


def merge(files: Sequence[tuple[str, Results]]) -> Results:
    """One set of runs from several files; of equal runs the one with more units counts.

    Raises UsageError if the files are not of the same model, data and settings, for then they cannot be compared.
    """
    first_name, first = files[0]
    best: dict[tuple[str, int, str], Run] = {}
    for name, results in files:
        different = [
            *_different("model", replace(first.model, path=""), replace(results.model, path="")),
            *_different("data", replace(first.data, path=""), replace(results.data, path="")),
            *_different("settings", first.settings, results.settings),
        ]
        if different:
            raise UsageError(f"{name} and {first_name} differ in {', '.join(different)}; plot them apart")
        for run in results.runs:
            key = run.routing, run.slots, run.eviction
            if key not in best or len(run.units) > len(best[key].units):
                best[key] = run
    return replace(first, runs=list(best.values()))


def usable(results: Results) -> tuple[Results, list[str]]:
    """The results without runs that failed or were interrupted, and a line that says what was left out."""
    good = [r for r in results.runs if r.complete]
    failed = sum(r.failed is not None for r in results.runs)
    unfinished = len(results.runs) - len(good) - failed
    left_out = [f"{n} {what}" for n, what in ((unfinished, "unfinished"), (failed, "failed")) if n]
    if not good:
        raise UsageError(
            f"no run is complete ({', '.join(left_out) or 'the file is empty'}); give the same command again to go on"
        )
    return replace(results, runs=good), [f"left out: {' and '.join(left_out)} runs"] if left_out else []


def measured(results: Results) -> list[Metric]:
    """The metrics of which at least one run has a value."""
    found = [r.metrics(results.model) for r in results.runs]
    return [m for m in METRICS.values() if any(f.get(m.field) is not None for f in found)]


def panels(results: Results, metric: Metric) -> list[Panel]:
    """One panel per number of slots. Raises UsageError where the metric was not measured."""
    if metric not in measured(results):
        there = ", ".join(m.name for m in measured(results)) or "none"
        raise UsageError(f"no run has the metric {metric.name} (measured: {there})")
    exact = _exact_runs(results)
    if metric.name == "perplexity" and not exact:
        raise UsageError(
            "perplexity is shown relative to exact routing, which is not in the file; add --routing original"
        )
    made = []
    for slots in sorted({r.slots for r in results.runs}):
        here = [r for r in results.runs if r.slots == slots]
        lines = _lines(results, here, metric, exact)
        made.append(
            Panel(
                slots,
                _belady(results, here),
                tuple(x for x in lines if x.strategy == ORIGINAL),
                tuple(x for x in lines if x.strategy != ORIGINAL),
            )
        )
    return made


def miss_rates(results: Results) -> dict[str, list[tuple[int, float]]]:
    """Miss rate of original routing by number of slots: eviction policy -> (slots, miss rate), and "belady"."""
    series: dict[str, dict[int, float]] = {}
    for run in results.runs:
        found = run.metrics(results.model)
        if run.strategy == ORIGINAL and found["miss_rate"] is not None:
            series.setdefault(run.eviction, {})[run.slots] = found["miss_rate"]
    for slots in {r.slots for r in results.runs}:
        bound = _belady(results, [r for r in results.runs if r.slots == slots])
        if bound is not None:
            series.setdefault("belady", {})[slots] = bound
    return {name: sorted(points.items()) for name, points in series.items()}


def simulated_miss_rates(path: Path) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """The same from the JSON of `simulate`, of decode if there was any, and the experts per layer; UsageError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        phase = "decode" if document["trace"]["tokens"]["decode"] else "prefill"
        experts = max(layer["experts"] for layer in document["trace"]["layers"])
        series: dict[str, list[tuple[int, float]]] = {}
        for result in document["results"]:
            if result["routing"] == ORIGINAL and result[phase]["miss_rate"] is not None:
                series.setdefault(result["eviction"], []).append((result["slots"], result[phase]["miss_rate"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is not what simulate --json prints ({type(error).__name__}: {error}); simulate again"
        ) from error
    return {name: sorted(points) for name, points in series.items()}, experts


def is_simulation(path: Path) -> bool:
    """Whether a file begins as the JSON of `simulate` does; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return b'"mlx_moecache.simulation"' in file.read(100)
    except OSError:
        return False


def _exact_runs(results: Results) -> dict[int, Run]:
    """slots -> a run under original routing. Its quality depends neither on slots nor on eviction."""
    return {r.slots: r for r in reversed(results.runs) if r.strategy == ORIGINAL}


def _lines(results: Results, here: Sequence[Run], metric: Metric, exact: dict[int, Run]) -> list[Line]:
    groups: dict[tuple[str, str, tuple[tuple[str, float], ...]], list[tuple[float, Point]]] = {}
    varying = {name: _varying(r for r in results.runs if r.strategy == name) for name in {r.strategy for r in here}}
    for run in here:
        point = _point(results, run, metric, exact, varying[run.strategy])
        if point is not None:
            fixed = tuple((k, v) for k, v in run.parameters.items() if k != varying[run.strategy])
            order = point.value if point.value is not None else 0.0
            groups.setdefault((run.strategy, run.eviction, fixed), []).append((order, point))
    lines = []
    for (strategy, eviction, fixed), points in groups.items():
        # Parameters that all lines of a strategy share are noise in the legend.
        others = [f for s, _, f in groups if s == strategy]
        distinct = tuple(x for x in fixed if any(x not in other for other in others))
        ordered = tuple(p for _, p in sorted(points, key=lambda x: x[0]))
        lines.append(Line(strategy, eviction, varying[strategy], distinct, ordered))
    return lines


def _varying(runs: Iterable[Run]) -> str | None:
    """The parameter with the most values among the runs of one strategy; among equals the first that is not J."""
    values: dict[str, set[float]] = {}
    for run in runs:
        for key, value in run.parameters.items():
            values.setdefault(key, set()).add(value)
    return max(values, key=lambda key: (len(values[key]), key != "j")) if values else None


def _point(results: Results, run: Run, metric: Metric, exact: dict[int, Run], varying: str | None) -> Point | None:
    found = run.metrics(results.model)
    quality, misses = found[metric.field], _miss_rate(run, results.model.k)
    if metric.name == "kl" and run.strategy == ORIGINAL:
        quality = 0.0  # by definition, measured or not
    if quality is None or misses is None:
        return None
    low = high = None
    if metric.name == "perplexity":
        reference = exact.get(run.slots) or next(iter(exact.values()))
        comparison = _paired(reference, run)
        if comparison is None or comparison.perplexity_ratio is None:
            base = reference.metrics(results.model)["perplexity"]
            if base is None:
                return None
            quality /= base
        else:
            ratio = comparison.perplexity_ratio
            quality, low, high = ratio.value, ratio.low, ratio.high
    else:
        error = found.get(f"{metric.field}_stderr")
        if error is not None:
            low, high = quality - Z95 * error, quality + Z95 * error
    value = run.parameters.get(varying) if varying is not None else None
    return Point(value, misses, quality, low, high, found["expert_lifetime"])


def _miss_rate(run: Run, k: int) -> float | None:
    """Misses by the k selections that the model makes per token and layer, also where a strategy makes fewer (Pruning).

    So equal rates mean equal reads. Elsewhere it is the miss rate of the results.
    """
    units = [(u.misses, u.token_layers) for u in run.units]
    selections = k * sum(t or 0 for _, t in units)
    return sum(m or 0 for m, _ in units) / selections if selections and all(m is not None for m, _ in units) else None


def _paired(reference: Run, run: Run) -> Paired | None:
    if len(reference.measured & run.measured) < 2 or reference.measured != run.measured:
        return None
    return paired(reference, run)


def _belady(results: Results, here: Sequence[Run]) -> float | None:
    # All runs see the same original routes; the run under original routing comes first because its n is certain.
    ordered = sorted(here, key=lambda r: r.strategy != ORIGINAL)
    bounds = (r.metrics(results.model)["belady_miss_rate"] for r in ordered)
    return next((b for b in bounds if b is not None and math.isfinite(b)), None)


def _different(what: str, a: object, b: object) -> list[str]:
    names = [f.name for f in fields(a)]  # type: ignore[arg-type]  # a dataclass
    return [f"{what} ({name})" for name in names if getattr(a, name) != getattr(b, name)]
