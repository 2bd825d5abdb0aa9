"""Evaluation results: one JSON file with what was measured, unit by unit, so that a run can be continued and compared.

A *run* is one routing strategy with one number of slots; a *unit* is one window of text or one question. All sums are
kept per unit; metrics are computed from them (result_metrics.py) and written beside them. Plain Python, no arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__
from ..errors import UsageError
from .result_metrics import Paired, Unit, metrics, paired_units

FORMAT = "mlx_moecache.results"
VERSION = 1
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")  # whose versions may change what is measured

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class ModelFacts:
    """The model that was measured. `path` is where it was; it does not have to be there again."""

    path: str
    model_type: str
    experts: int  # E, per MoE layer
    k: int
    moe_layers: int
    bytes_per_expert: int  # mean over layers
    config_sha256: str


@dataclass(frozen=True)
class DataFacts:
    task: str
    path: str
    sha256: str
    documents: int  # units that the data holds, before any limit


@dataclass(frozen=True)
class Settings:
    """What must be equal for two runs to be comparable; None where a task has no such setting."""

    window: int | None  # predicted tokens
    stride: int | None
    scope: str  # "all" or "decode": which tokens a strategy may bias
    accounting: str  # "engine" or "paper"
    initial: str  # contents of the cache at the start of a unit: "empty", "random" or "warm"
    limit: int | None  # units, None: all
    seed: int
    shots: int | None = None  # worked examples before a question
    max_tokens: int | None = None  # of a generated answer
    scored: str | None = None  # "new": of windows that overlap, tokens that no earlier one had; else all


@dataclass
class Run:
    """One strategy with one cache. `units` are in the order in which they were measured."""

    routing: str  # the spec: parse_routing(routing) gives the strategy again
    strategy: str
    parameters: dict[str, float]
    slots: int
    eviction: str
    n: int  # units that a complete run has
    failed: str | None = None  # why the figures must not be used
    ranges: list[list[float]] | None = None  # per layer [sum, tokens] of D after the last unit: where to continue
    caches: str | None = None  # JSON, only if they do not start empty: how the last unit left them, until n are done
    units: list[Unit] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.units) >= self.n and self.failed is None

    @property
    def measured(self) -> set[int]:
        """Ids of the units that are done."""
        return {u.id for u in self.units}

    def metrics(self, model: ModelFacts) -> dict[str, float | None]:
        """See `result_metrics.metrics`."""
        return metrics(self.units, layers=model.moe_layers, k=model.k, bytes_per_expert=model.bytes_per_expert)


@dataclass
class Results:
    """Everything in one results file."""

    model: ModelFacts
    data: DataFacts
    settings: Settings
    runs: list[Run] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    packages: dict[str, str] = field(default_factory=lambda: installed_packages())

    def find(self, routing: str, slots: int, eviction: str) -> Run | None:
        """The run of this strategy and cache, or None."""
        same = (r for r in self.runs if (r.routing, r.slots, r.eviction) == (routing, slots, eviction))
        return next(same, None)

    def find_or_append(self, run: Run) -> Run:
        """The run here with the routing, slots and eviction of `run`; if there is none, `run` itself, now added."""
        found = self.find(run.routing, run.slots, run.eviction)
        if found is None:
            self.runs.append(run)
            return run
        return found

    def check_continues(self, earlier: Results, where: str) -> None:
        """Raise UsageError, naming what differs, if the runs of `earlier` (read from `where`) do not belong to these.

        Places are not compared, contents are: a model or a data file may have moved.
        """
        differences = [
            *_differences("model", earlier.model, self.model, skip=("path",)),
            *_differences("data", earlier.data, self.data, skip=("path",)),
            *_differences("settings", earlier.settings, self.settings),
        ]
        for name in sorted({*earlier.packages, *self.packages}):
            old, new = earlier.packages.get(name), self.packages.get(name)
            if old != new:
                differences.append(f"package {name} was {old}, is {new}")
        if differences:
            raise UsageError(
                f"{where} holds results of another evaluation ({'; '.join(differences)}); "
                "give another output file or the same settings"
            )


def paired(a: Run, b: Run, *, confidence: float = 0.95) -> Paired:
    """Run b against run a, by a paired bootstrap over the units that both have; UsageError if fewer than 2."""
    return paired_units(a.units, b.units, confidence=confidence)


def installed_packages() -> dict[str, str]:
    """Versions of what computes the figures, by distribution name; a missing package is left out."""
    versions = {"mlx_moecache": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def as_json(results: Results) -> dict[str, Any]:
    """The object that `save` writes; metrics are computed anew from the units."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": results.created,
        "packages": results.packages,
        "model": asdict(results.model),
        "data": asdict(results.data),
        "settings": asdict(results.settings),
        "runs": [_run_as_json(r, results.model) for r in results.runs],
    }


def save(results: Results, path: Path) -> None:
    """Write `results`; an earlier file at `path` is replaced at once or not at all. Raises UsageError."""
    text = json.dumps(as_json(results), indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give another output file") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Results:
    """Read a results file. Raises UsageError if it is missing, not JSON, or of another format or version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; give a results file") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a results file: it is not JSON ({error}); give another file") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is not a results file of mlx_moecache; give another file")
    if data.get("version") != VERSION:
        raise UsageError(
            f"{path} is a results file of version {data.get('version')}, this mlx_moecache reads version {VERSION}; "
            "use the mlx_moecache that wrote it, or another file"
        )
    try:
        return Results(
            model=_facts(ModelFacts, data["model"]),
            data=_facts(DataFacts, data["data"]),
            settings=_facts(Settings, data["settings"]),
            runs=[_run_from_json(r) for r in data["runs"]],
            created=data["created"],
            packages=dict(data["packages"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is a damaged results file ({type(error).__name__}: {error}); measure again"
        ) from error


def _run_as_json(run: Run, model: ModelFacts) -> dict[str, Any]:
    return {
        "routing": run.routing,
        "strategy": run.strategy,
        "parameters": run.parameters,
        "slots": run.slots,
        "eviction": run.eviction,
        "n": run.n,
        "complete": run.complete,
        "failed": run.failed,
        "ranges": run.ranges,
        "caches": run.caches,  # as text, since each number would have a line of its own
        "metrics": run.metrics(model),
        "units": [{k: v for k, v in asdict(u).items() if v is not None} for u in run.units],
    }


def _run_from_json(data: dict[str, Any]) -> Run:
    return Run(
        routing=data["routing"],
        strategy=data["strategy"],
        parameters=dict(data["parameters"]),
        slots=data["slots"],
        eviction=data["eviction"],
        n=data["n"],
        failed=data.get("failed"),
        ranges=data.get("ranges"),
        caches=data.get("caches"),
        units=[_facts(Unit, u) for u in data["units"]],
    )


def _facts(cls: type[Facts], data: dict[str, Any]) -> Facts:
    """A dataclass from its JSON object; keys that are not known are an error, for they would be lost on saving."""
    return cls(**data)


def _differences(what: str, earlier: Any, now: Any, skip: Iterable[str] = ()) -> list[str]:
    changed = []
    for f in fields(now):
        old, new = getattr(earlier, f.name), getattr(now, f.name)
        if old != new and f.name not in skip:
            if f.name.endswith("sha256"):
                old, new = str(old)[:12], str(new)[:12]
            changed.append(f"{what} {f.name} was {old}, is {new}")
    return changed
