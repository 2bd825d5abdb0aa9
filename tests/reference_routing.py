"""Cache-Prior and the mixing weights of seven routers in plain NumPy, from their definitions, token by token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from mlx_lm.models import phimoe

Vector = npt.NDArray[np.float64]


def softmax(z: Vector) -> Vector:
    e = np.exp(z - z.max())
    return e / e.sum()


def order(z: Vector) -> list[int]:
    """Experts by descending score, equal ones by number."""
    return sorted(range(len(z)), key=lambda e: (-z[e], e))


def token_range(z: Vector, allowed: Collection[int]) -> float:
    """Delta of one token: the difference between the best and the worst score of the experts that may be selected."""
    scores = [z[e] for e in allowed]
    return float(max(scores) - min(scores))


def inclusive_mean(ranges: Sequence[float]) -> float:
    """D: the mean of the ranges of all tokens up to and including the current, the last one given."""
    return sum(ranges) / len(ranges)


def cache_prior(
    z: Vector, k: int, resident: Collection[int], mean_range: float, strength: float, top_j: int, allowed: Sequence[int]
) -> tuple[list[int], float]:
    """The k experts by biased rank, best first, and by how much the last of them is ahead of the next expert."""
    protected = sorted(allowed, key=lambda e: (-z[e], e))[:top_j]
    ranked = np.full(len(z), -np.inf)
    for e in allowed:
        ranked[e] = z[e] + strength * mean_range * (e in resident or e in protected)
    best = order(ranked)
    return best[:k], float(ranked[best[k - 1]] - ranked[best[k]])


def allowed_experts(z: Vector, config: Mapping[str, Any]) -> list[int]:
    """All experts, or those of the best groups where the model selects groups first (deepseek_v2)."""
    experts = len(z)
    if config.get("topk_method") != "group_limited_greedy":
        return list(range(experts))
    size = experts // config["n_group"]
    groups = sorted(range(config["n_group"]), key=lambda g: -max(z[g * size : (g + 1) * size]))
    return [e for g in sorted(groups[: config["topk_group"]]) for e in range(g * size, (g + 1) * size)]


def mixing_weights(model_type: str, z: Vector, chosen: Sequence[int], config: Mapping[str, Any]) -> Vector:
    """The weight of each of the `chosen` experts, in their order, from the router's unbiased logits z."""
    p = softmax(z)
    plain_phimoe = model_type == "phimoe" and not hasattr(phimoe, "sparsemixer")  # mlx-lm before 0.32.1
    if model_type in ("mixtral", "gpt_oss") or plain_phimoe:
        return softmax(z[list(chosen)])
    if model_type == "phimoe":
        return _sparsemixer(z, chosen, jitter=0.01)
    weights = p[list(chosen)]
    if config.get("norm_topk_prob") and model_type in ("qwen3_moe", "olmoe"):
        weights = weights / weights.sum()
    if model_type == "deepseek_v2":
        weights = weights * config["routed_scaling_factor"]
    return weights


def _sparsemixer(z: Vector, chosen: Sequence[int], jitter: float) -> Vector:
    """Round j: a softmax over the experts near the j-th chosen one or above it, without those of earlier rounds."""
    weights = []
    for j, expert in enumerate(chosen):
        kept = [
            e
            for e in range(len(z))
            if e not in chosen[:j] and not (z[expert] - z[e]) / max(abs(z[e]), z[expert]) > 2 * jitter
        ]
        weights.append(np.exp(z[expert]) / sum(np.exp(z[e]) for e in kept))
    return np.array(weights)


def max_rank(z: Vector, k: int, resident: Collection[int], top_j: int, most: int) -> list[int]:
    """Max-Rank, as its pseudocode says: the J best, then residents among the M best, then the rest."""
    r = order(z)
    head = r[:top_j]
    promoted = [e for e in r[top_j:most] if e in resident]
    return (head + promoted + [e for e in r if e not in head + promoted])[:k]


def cumulative_threshold(
    z: Vector, p: Vector, k: int, resident: Collection[int], top_j: int, threshold: float
) -> list[int]:
    """Max-Rank with the fewest best experts whose p sum up to at least the threshold."""
    r = order(z)
    m = next((m for m in range(len(r) + 1) if sum(p[e] for e in r[:m]) >= threshold), len(r))
    return max_rank(z, k, resident, top_j, m)


def mass_budget(
    z: Vector,
    p: Vector,
    k: int,
    resident: Collection[int],
    mean_range: float,
    strengths: Sequence[float],
    delta: float,
    top_j: int,
    allowed: Sequence[int],
) -> list[int]:
    """Of the original and Cache-Prior at `strengths`: within the budget, fewest misses, least mass lost, weakest."""
    own, _ = cache_prior(z, k, resident, mean_range, 0.0, top_j, allowed)
    best = (sum(e not in resident for e in own), 0.0, 0.0, own)
    for strength in strengths:
        chosen, _ = cache_prior(z, k, resident, mean_range, strength, top_j, allowed)
        lost = sum(p[e] for e in own) - sum(p[e] for e in chosen)
        if lost <= delta:
            best = min(best, (sum(e not in resident for e in chosen), lost, strength, chosen))
    return best[3]


def bounded_regret(
    z: Vector, p: Vector, k: int, resident: Collection[int], swaps: int, epsilon: float, allowed: Sequence[int]
) -> list[int]:
    """Swap the pair of least regret, a missing pick for a resident outside, as often as that is allowed."""
    chosen = order(z)[:k]
    for _ in range(swaps):
        pairs = [
            (p[a] - p[b], a, b)
            for a in chosen
            for b in allowed
            if a not in resident and b in resident and b not in chosen
        ]
        if not pairs or min(pairs)[0] > epsilon:
            break
        _, a, b = min(pairs)
        chosen = [e for e in chosen if e != a] + [b]
    return chosen


def price(
    z: Vector, p: Vector, k: int, resident: Collection[int], delta: float, top_j: int, allowed: Sequence[int]
) -> list[int]:
    """The k best by probability, of which residents and the J best of z have delta more."""
    protected = order(z)[:top_j]
    return sorted(allowed, key=lambda e: (-(p[e] + delta * (e in resident or e in protected)), e))[:k]
