"""From sums per unit (a window of text, a question) to metrics with standard errors, and comparisons of two runs.

Ratios of sums are estimated over units: perplexity is exp(sum of NLL / predicted tokens), and its standard error comes
from the delta method with windows as the sampling units, since tokens of one window depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Array = npt.NDArray[np.float64]
DRAWS = 2000  # of the bootstrap
DRAWN_AT_ONCE = 2_000_000  # unit numbers, 16 MB


@dataclass(frozen=True)
class Unit:
    """What was measured on one window or question, summed over its tokens and MoE layers; None: not measured."""

    id: int
    tokens: int  # predicted or generated
    nll: float | None = None  # nats
    kl: float | None = None  # KL(original || biased), nats
    top1: int | None = None  # tokens whose likeliest successor is that of original routing
    selections: int | None = None
    misses: int | None = None
    loads: int | None = None
    swapped: int | None = None  # selections that are not in the router's own top-k
    token_layers: int | None = None  # (token, layer) pairs that went through a cache
    all_hit: int | None = None  # those without a miss
    lives: int | None = None  # evictions: lives of experts that ended
    life_tokens: int | None = None  # their length from insertion, in tokens
    mass_lost: float | None = None  # router mass of the own top-k less that of the chosen
    belady_misses: int | None = None  # of the best eviction possible on the original routes
    own_selections: int | None = None  # of original routing, what `belady_misses` are of; None: k per token_layers
    correct: int | None = None  # 1: the question was answered
    scores: dict[str, int] | None = None  # other ways to judge the same answer, 0 or 1, by name


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Run b against run a on the units that both have; None where one of them did not measure it."""

    units: int
    perplexity_ratio: Interval | None  # b / a
    kl_difference: Interval | None  # b - a, nats per token
    miss_ratio: Interval | None  # miss rate of b / miss rate of a
    accuracy_difference: Interval | None  # b - a


def metrics(units: Sequence[Unit], *, layers: int, k: int, bytes_per_expert: int) -> dict[str, float | None]:
    """Metrics of a run; None where nothing was measured or, for standard errors, where there are fewer than 2 units.

    perplexity = exp(sum NLL / sum tokens); kl in nats and top1_agreement as a share, per predicted token; accuracy as
    a share of questions. miss_rate, swapped_share: of selections; all_hit_share: of (token, layer) pairs; mass_lost:
    per (token, layer); loads_per_token and bytes_per_token: over all layers; expert_lifetime: tokens, completed lives;
    belady_miss_rate: of the router's own selections.
    """
    tokens = _column(units, "tokens")
    selections = _column(units, "selections")
    token_layers = _column(units, "token_layers")
    nll, nll_error = _ratio(_column(units, "nll"), tokens)
    kl, kl_error = _ratio(_column(units, "kl"), tokens)
    perplexity = _exp(nll)
    accuracy, accuracy_error = _ratio(_column(units, "correct"), np.ones(len(units)))
    loads = _share(_column(units, "loads"), token_layers, layers)
    result = {
        "perplexity": perplexity,
        "perplexity_stderr": None if perplexity is None or nll_error is None else perplexity * nll_error,
        "kl": kl,
        "kl_stderr": kl_error,
        "top1_agreement": _share(_column(units, "top1"), tokens),
        "accuracy": accuracy,
        "accuracy_stderr": accuracy_error,
        "miss_rate": _share(_column(units, "misses"), selections),
        "loads_per_token": loads,
        "expert_lifetime": _share(_column(units, "life_tokens"), _column(units, "lives")),
        "swapped_share": _share(_column(units, "swapped"), selections),
        "all_hit_share": _share(_column(units, "all_hit"), token_layers),
        "bytes_per_token": None if loads is None else loads * bytes_per_expert,
        "mass_lost": _share(_column(units, "mass_lost"), token_layers),
        "belady_miss_rate": _share(_column(units, "belady_misses"), _own_selections(units, k)),
    }
    for name in sorted({name for u in units for name in u.scores or ()}):
        values = np.array([(u.scores or {}).get(name, 0) for u in units], dtype=np.float64)
        result[f"accuracy_{name}"], result[f"accuracy_{name}_stderr"] = _ratio(values, np.ones(len(units)))
    return result


def paired_units(a: Sequence[Unit], b: Sequence[Unit], *, confidence: float = 0.95, seed: int = 0) -> Paired:
    """Compare run b with run a by a paired bootstrap over the units that both have.

    Raises UsageError if they share fewer than 2 units.
    """
    by_id = {u.id: u for u in a}
    common = [(by_id[u.id], u) for u in b if u.id in by_id]
    if len(common) < 2:
        raise UsageError(f"the two runs share {len(common)} units; an interval needs at least 2, so measure more")
    left, right = [x for x, _ in common], [y for _, y in common]
    tail = (1 - confidence) / 2
    drawn = _draws(len(common), seed)

    def interval(values: Sequence[Array | None], of: str) -> Interval | None:
        columns = [v for v in values if v is not None]
        if len(columns) < len(values):
            return None
        value = float(_combine(of, [np.array([c.sum()]) for c in columns])[0])
        spread = _combine(of, [_resampled(c, drawn) for c in columns])
        spread = spread[np.isfinite(spread)]
        if not math.isfinite(value) or not len(spread):
            return None
        low, high = np.quantile(spread, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    def both(name: str, over: str) -> list[Array | None]:
        return [_column(left, name), _column(left, over), _column(right, name), _column(right, over)]

    ones = np.ones(len(common))
    return Paired(
        units=len(common),
        perplexity_ratio=interval(both("nll", "tokens"), "exp of difference"),
        kl_difference=interval(both("kl", "tokens"), "difference"),
        miss_ratio=interval(both("misses", "selections"), "ratio"),
        accuracy_difference=interval([_column(left, "correct"), ones, _column(right, "correct"), ones], "difference"),
    )


def _combine(of: str, sums: Sequence[Array]) -> Array:
    """Compare the means sums[2] / sums[3] (run b) and sums[0] / sums[1] (run a); all [N]."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean_a, mean_b = sums[0] / sums[1], sums[2] / sums[3]
        if of == "ratio":
            return np.asarray(mean_b / mean_a)
        difference = mean_b - mean_a
        return np.asarray(np.exp(difference) if of == "exp of difference" else difference)


def _draws(n: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Unit numbers [draws, n] drawn with replacement, in pieces that fit in memory."""
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // n)
    return [rng.integers(n, size=(min(rows, DRAWS - i), n), dtype=np.int64) for i in range(0, DRAWS, rows)]


def _resampled(values: Array, drawn: Sequence[npt.NDArray[np.int64]]) -> Array:
    return np.concatenate([values[d].sum(axis=1) for d in drawn])


def _column(units: Sequence[Unit], name: str) -> Array | None:
    """One field of all units, or None if there are no units or one of them lacks it."""
    values = [getattr(u, name) for u in units]
    if not values or any(v is None for v in values):
        return None
    return np.array(values, dtype=np.float64)


def _own_selections(units: Sequence[Unit], k: int) -> Array | None:
    token_layers = _column(units, "token_layers")
    if token_layers is None:
        return None
    own = [math.nan if u.own_selections is None else u.own_selections for u in units]
    return np.where(np.isnan(own), k * token_layers, own)


def _share(part: Array | None, whole: Array | None, factor: float = 1.0) -> float | None:
    if part is None or whole is None or not whole.sum():
        return None
    return float(factor * part.sum() / whole.sum())


def _ratio(part: Array | None, whole: Array | None) -> tuple[float | None, float | None]:
    """r = sum part / sum whole, and its standard error sqrt(n / (n - 1) * sum (part - r * whole)^2) / sum whole."""
    r = _share(part, whole)
    if r is None or part is None or whole is None:
        return None, None
    n = len(part)
    if n < 2:
        return r, None
    return r, float(math.sqrt(n / (n - 1) * np.square(part - r * whole).sum()) / whole.sum())


def _exp(x: float | None) -> float | None:
    try:
        return None if x is None else math.exp(x)
    except OverflowError:  # beyond anything that means something
        return None
