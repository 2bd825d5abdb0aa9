"""The routing strategies of strategies.py for one token, in NumPy and on the host.

The same float32 operations in the same order, so that equal scores give equal selections; only exact ties may be broken
otherwise on a device. Here the expert with the lower number comes first. Symbols as in strategies.py: z, p and resident
are [E] float32, D is a float32, k the experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..strategies import (
    BUDGET_STRENGTHS,
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    Strategy,
)

Array = npt.NDArray[np.float32]
Experts = npt.NDArray[np.intp]
PARTITION_FROM = 128
_STRENGTHS = np.array((0.0, *BUDGET_STRENGTHS), dtype=np.float32)[:, None]


def select(strategy: Strategy, z: Array, p: Array | None, resident: Array, D: np.float32, k: int) -> Experts:
    """The kept(k) experts of highest rank, best first."""
    return best(rank(strategy, z, p, resident, D, k), strategy.kept(k))


def rank(strategy: Strategy, z: Array, p: Array | None, resident: Array, D: np.float32, k: int) -> Array:
    """Ranking scores [E] of one token; the k largest are selected. p may be None for strategies that do not use it."""
    return _RANK[type(strategy)](strategy, z, p, resident, D, k)


def order(scores: Array) -> Experts:
    """Experts by descending score, equal ones by number."""
    return (-scores).argsort(kind="stable")


def best(scores: Array, n: int) -> Experts:
    """The first n of `order`. A partition is faster than a sort only where there are many experts."""
    if len(scores) < PARTITION_FROM:
        return order(scores)[:n]
    at_least = np.flatnonzero(scores >= -np.partition(-scores, n - 1)[n - 1])
    return at_least[order(scores[at_least])[:n]]


def _unchanged(s: Original | Pruning, z: Array, p: Array | None, resident: Array, D: np.float32, k: int) -> Array:
    return z


def _cache_prior(s: CachePrior, z: Array, p: Array | None, resident: Array, D: np.float32, k: int) -> Array:
    return z + np.float32(s.strength) * D * _favoured(z, resident, s.top_j)


def _max_rank(s: MaxRank, z: Array, p: Array | None, resident: Array, D: np.float32, k: int) -> Array:
    r = order(z)
    promoted = r[s.top_j : s.max_rank]
    return _first(z, r, np.concatenate([r[: s.top_j], promoted[resident[promoted] > 0]]))


def _cumsum(s: CumulativeThreshold, z: Array, p: Array, resident: Array, D: np.float32, k: int) -> Array:
    r = order(z)
    reached = p[r].cumsum()
    m = 0 if s.threshold == 0 else 1 + int((reached[:-1] < np.float32(s.threshold) * p.sum()).sum())  # M_t
    promoted = r[s.top_j : m]
    return _first(z, r, np.concatenate([r[: s.top_j], promoted[resident[promoted] > 0]]))


def _mass_budget(s: MassBudget, z: Array, p: Array, resident: Array, D: np.float32, k: int) -> Array:
    ranked = z + _STRENGTHS * D * _favoured(z, resident, s.top_j)  # [14, E]
    chosen = np.argpartition(-ranked, k - 1, axis=-1)[:, :k]
    misses = k - resident[chosen].sum(axis=-1)
    mass = p[chosen].sum(axis=-1)
    lost = mass[0] - mass
    allowed = np.flatnonzero(lost <= np.float32(s.delta))
    winner = min(allowed.tolist(), key=lambda i: (misses[i], lost[i], i))
    return _first(z, order(z), chosen[winner])


def _bounded_regret(s: BoundedRegret, z: Array, p: Array, resident: Array, D: np.float32, k: int) -> Array:
    r = order(z)
    own, others = r[:k], r[k:]
    missing = own[resident[own] == 0]
    candidates = others[(resident[others] > 0) & (z[others] > -np.inf)]
    # Of equal p the lower number goes, and comes, first.
    out = sorted(missing.tolist(), key=lambda e: (p[e], e))[: s.swaps]
    into = sorted(candidates.tolist(), key=lambda e: (-p[e], e))[: s.swaps]
    m = set(own.tolist())
    for a, b in zip(out, into, strict=False):
        if p[a] - p[b] <= np.float32(s.epsilon):
            m.remove(a)
            m.add(b)
    return _first(z, r, np.array(sorted(m)))


def _price(s: Price, z: Array, p: Array, resident: Array, D: np.float32, k: int) -> Array:
    ranked = p + np.float32(s.delta) * resident + np.float32(2) * _favoured(z, np.zeros_like(z), s.top_j)
    return np.where(z > -np.inf, ranked, np.float32(-np.inf))


_RANK: dict[type[Strategy], Callable[[Any, Array, Any, Array, np.float32, int], Array]] = {
    Original: _unchanged,
    Pruning: _unchanged,
    CachePrior: _cache_prior,
    MaxRank: _max_rank,
    CumulativeThreshold: _cumsum,
    MassBudget: _mass_budget,
    BoundedRegret: _bounded_regret,
    Price: _price,
}


def _favoured(z: Array, resident: Array, top_j: int) -> Array:
    """m [E]: 1 for residents and for the J best of z."""
    if not top_j:
        return resident
    m = resident.copy()
    if top_j == 1:
        m[z.argmax()] = 1
    else:
        m[best(z, top_j)] = 1
    return m


def _first(z: Array, r: Experts, favoured: Experts) -> Array:
    """Scores that rank `favoured` before all others, both in the order r of z; -inf where z is."""
    E = len(z)
    ranked = np.empty(E, dtype=np.float32)
    ranked[r] = np.arange(0, -E, -1)
    ranked[favoured] += E
    ranked[z == -np.inf] = -np.inf
    return ranked
