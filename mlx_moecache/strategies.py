"""Routing strategies: how residency changes which experts are selected. Symbols are those of arXiv 2412.00099.

A strategy turns the router's scores into scores that are used for *ranking only*: the k largest are selected. Mixing
weights are always formed by the model's own code from its own, unbiased scores. Strategies work on all leading axes at
once and read nothing on the host. Symbols, all in float32:

    z [.., E]       what the model ranks its experts by: logits, or corrected scores; -inf for experts it ruled out
    p [.., E]       router mass, by which a change is priced (see `probabilities`); 0 for experts that are ruled out
    resident        [E] or [.., E], 1 for experts that are in memory before this token, else 0
    mean_range D    scalar or [.., 1], the running mean of Delta_t = max(z) - min(z), token t included
    m [.., E]       1 for favoured experts: residents, and the J best, which are kept whatever is resident

How users name strategies is in routing.py; recurrence.py has the same rankings in NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import mlx.core as mx

from .errors import UsageError

# Mass-Budget chooses among Cache-Prior at these strengths; the source gives their number and both ends.
BUDGET_STRENGTHS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class _Base:
    """What all strategies share: their name and parameters."""

    name: ClassVar[str]
    uses_residents: ClassVar[bool] = True
    uses_mass: ClassVar[bool] = False  # whether `rank` needs p

    @property
    def parameters(self) -> dict[str, float]:
        """Parameters by the names that users type."""
        return {KEYS[f.name]: getattr(self, f.name) for f in fields(self)}

    @property
    def spec(self) -> str:
        """What `parse_routing` turns into this strategy again, such as "cache-prior:strength=0.1,j=2"."""
        parameters = ",".join(f"{key}={value!r}" for key, value in self.parameters.items())
        return f"{self.name}:{parameters}" if parameters else self.name

    def kept(self, k: int) -> int:
        """How many of the model's k experts per token run."""
        return k

    def _check(self, field: str, *, least: float = 0, most: float = math.inf, usual: str) -> None:
        value, key = getattr(self, field), KEYS[field]
        if not least <= value <= most or math.isinf(value):
            name = "top-j" if key == "j" else f"{key} of {self.name}"
            number = "a whole number" if field in WHOLE else "a finite number"
            allowed = f"of at least {least}" if math.isinf(most) else f"from {least} to {most}"
            raise UsageError(f"{name} must be {number} {allowed}, not {value} (usual: {usual})")


# Field -> parameter as users type it.
KEYS = {
    "strength": "strength",
    "top_j": "j",
    "experts": "k",
    "max_rank": "m",
    "threshold": "p",
    "delta": "delta",
    "swaps": "swaps",
    "epsilon": "epsilon",
}
WHOLE = frozenset({"top_j", "experts", "max_rank", "swaps"})


@dataclass(frozen=True)
class Original(_Base):
    """The router's own top-k."""

    name = "original"
    uses_residents = False
    is_exact: ClassVar[bool] = True

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        return z


@dataclass(frozen=True)
class Pruning(_Base):
    """The best K' of the k experts run (section 4.1's baseline); weights are as the model forms them from fewer."""

    experts: int = 1  # K'

    name = "pruning"
    uses_residents = False
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check("experts", least=1, usual="one or two less than the model's experts per token")

    def kept(self, k: int) -> int:
        return min(k, self.experts)

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        return z


@dataclass(frozen=True)
class CachePrior(_Base):
    """Cache-Prior (section 3.3, Eq. 9-10): resident experts get a bonus of lambda times the mean range, in z.

    z' = z + lambda * D * m. The J best keep their lead: an expert outside has a smaller z and gets at most the same.
    """

    strength: float = 0.1  # lambda, 0 to 1 in the paper; 0 changes nothing
    top_j: int = 2  # J, experts that are selected whatever is resident

    name = "cache-prior"

    def __post_init__(self) -> None:
        self._check("strength", usual="0.05 to 0.2")
        self._check("top_j", usual="1 or 2")

    @property
    def is_exact(self) -> bool:
        return self.strength == 0

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        return z + self.strength * mean_range * favoured(z, resident, self.top_j)


@dataclass(frozen=True)
class MaxRank(_Base):
    """Max-Rank (Algorithm 1): residents among the M best of z move up behind the J best, in the order of z."""

    top_j: int = 2
    max_rank: int = 8  # M, counted from the best expert, the J best included; up to k changes nothing

    name = "max-rank"
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check("top_j", usual="1 or 2")
        self._check("max_rank", usual="twice the model's experts per token")

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        r = _positions(z)
        return _first(z, r, (r < min(self.top_j, k)) | ((r < min(self.max_rank, z.shape[-1])) & (resident > 0)))


@dataclass(frozen=True)
class CumulativeThreshold(_Base):
    """Cumulative threshold (Algorithm 2): Max-Rank whose M is, per token, the fewest best experts with P of the mass.

    M_t is the smallest m for which the p of the m best of z sum up to at least P of all p; P = 0 changes nothing.
    """

    top_j: int = 2
    threshold: float = 0.5  # P, a share of the router mass of all experts

    name = "cumsum"
    uses_mass = True

    def __post_init__(self) -> None:
        self._check("top_j", usual="1 or 2")
        self._check("threshold", most=1, usual="0.3 to 0.7")

    @property
    def is_exact(self) -> bool:
        return self.threshold == 0

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        assert p is not None
        order = mx.argsort(-z, axis=-1)
        mass_before = mx.cumsum(mx.take_along_axis(p, order, axis=-1), axis=-1, inclusive=False)
        r = _invert(order)
        enough = self.threshold * p.sum(axis=-1, keepdims=True)
        within = mx.take_along_axis(mass_before, r, axis=-1) < enough  # position r lies among the first M_t
        return _first(z, r, (r < min(self.top_j, k)) | (within & (resident > 0)))


@dataclass(frozen=True)
class MassBudget(_Base):
    """Mass-Budget (kennydd001/ervf): as few misses now as can be had for at most delta of router mass p.

    Candidates are the original selection and Cache-Prior at 13 strengths. Among those whose p sum up to at least that
    of the original less delta: fewest misses, then least mass lost, then least strength.
    """

    delta: float = 0.02  # in units of p; 0 changes nothing
    top_j: int = 2

    name = "mass-budget"
    uses_mass = True

    def __post_init__(self) -> None:
        self._check("delta", most=1, usual="0.004 to 0.02")
        self._check("top_j", usual="1 or 2")

    @property
    def is_exact(self) -> bool:
        return self.delta == 0

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        assert p is not None
        bonus = mx.array((0.0, *BUDGET_STRENGTHS)) * mean_range  # [14] or [.., 14], the first is the original
        m = favoured(z, resident, self.top_j)
        ranked = z[..., None, :] + bonus[..., None] * m[..., None, :]  # [.., 14, E]
        chosen = mx.argpartition(-ranked, kth=k - 1, axis=-1)[..., :k]
        misses = k - _gather(mx.broadcast_to(resident, z.shape), chosen).sum(axis=-1)  # [.., 14]
        mass = _gather(p, chosen).sum(axis=-1)
        lost = mass[..., :1] - mass
        misses = mx.where(lost <= self.delta, misses, mx.inf)
        lost = mx.where(misses == misses.min(axis=-1, keepdims=True), lost, mx.inf)
        best = lost.argmin(axis=-1, keepdims=True)[..., None]  # the first of equals, so the least strength
        winner = mx.take_along_axis(chosen, best, axis=-2).squeeze(-2)
        # By membership, not by the winner's ranking: equal scores could otherwise select another set than was paid for.
        return _first(z, _positions(z), mx.put_along_axis(mx.zeros_like(z), winner, mx.array(1.0), axis=-1) > 0)


@dataclass(frozen=True)
class BoundedRegret(_Base):
    """Bounded regret (k3-out-of-core): at most n missing picks give way to residents, each for at most epsilon of p.

    Greedy by regret: the weakest missing pick goes with the best resident outside the top-k, and so on. Together the
    swaps of a token give up at most n * epsilon.
    """

    swaps: int = 2  # n; 0 changes nothing
    epsilon: float = 0.02  # p of the expert given up less p of the one taken, at most

    name = "bounded-regret"
    uses_mass = True

    def __post_init__(self) -> None:
        self._check("swaps", usual="1 or 2")
        self._check("epsilon", most=1, usual="0.005 to 0.05")

    @property
    def is_exact(self) -> bool:
        return self.swaps == 0

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        assert p is not None
        r = _positions(z)
        own, here = r < k, resident > 0
        n = min(self.swaps, k, z.shape[-1])
        out, p_out = _smallest(mx.where(own & ~here, p, mx.inf), n)
        into, p_in = _smallest(mx.where(~own & here & (z > -mx.inf), -p, mx.inf), n)  # p_in is negative: p falls
        swap = p_out + p_in <= self.epsilon  # regrets only grow along the last axis, so that a prefix is taken
        m = own
        for experts, value in ((out, False), (into, True)):
            m = mx.put_along_axis(m, experts, mx.where(swap, value, mx.take_along_axis(m, experts, axis=-1)), axis=-1)
        return _first(z, r, m)


@dataclass(frozen=True)
class Price(_Base):
    """A miss has a fixed price in router mass: resident experts get a bonus of delta, in p, so p + delta * m ranks.

    So no expert is given up for one whose p is smaller by more than delta, whatever the token's range of logits.
    """

    delta: float = 0.02  # in units of p; 0 changes nothing
    top_j: int = 1

    name = "price"
    uses_mass = True

    def __post_init__(self) -> None:
        self._check("delta", most=1, usual="0.005 to 0.05")
        self._check("top_j", usual="1 or 2")

    @property
    def is_exact(self) -> bool:
        return self.delta == 0

    def rank(self, z: mx.array, p: mx.array | None, resident: mx.array, mean_range: mx.array, k: int) -> mx.array:
        assert p is not None
        # Adding delta rounds small p to equal values. An extra 2, above any p + delta, keeps the J best ahead of those.
        ranked = p + self.delta * resident + 2.0 * favoured(z, mx.zeros_like(z), self.top_j)
        return mx.where(z > -mx.inf, ranked, -mx.inf)


Strategy = Original | Pruning | MaxRank | CumulativeThreshold | CachePrior | MassBudget | BoundedRegret | Price


def favoured(z: mx.array, resident: mx.array, top_j: int) -> mx.array:
    """m [.., E]: 1 for residents and for the J best of z. Fewer than J experts may be left: -inf stays -inf anyway."""
    m = mx.broadcast_to(resident, z.shape)
    if 0 < top_j < z.shape[-1]:
        best = mx.argpartition(-z, kth=top_j - 1, axis=-1)[..., :top_j]
        m = mx.put_along_axis(m, best, mx.array(1.0), axis=-1)
    return m


def _positions(z: mx.array) -> mx.array:
    """The place of each expert in the order of z, 0 for the best; [.., E] integers."""
    return _invert(mx.argsort(-z, axis=-1))


def _invert(order: mx.array) -> mx.array:
    return mx.argsort(order, axis=-1)


def _first(z: mx.array, r: mx.array, m: mx.array) -> mx.array:
    """Scores that rank the experts of m before all others, both in the order r of z. Distinct, so nothing ties."""
    ranked = mx.where(m, z.shape[-1], 0).astype(mx.float32) - r
    return mx.where(z > -mx.inf, ranked, -mx.inf)


def _gather(values: mx.array, experts: mx.array) -> mx.array:
    """values [.., E] at experts [.., C, K] -> [.., C, K]."""
    return mx.take_along_axis(
        mx.broadcast_to(values[..., None, :], (*experts.shape[:-1], values.shape[-1])), experts, -1
    )


def _smallest(cost: mx.array, n: int) -> tuple[mx.array, mx.array]:
    """The n experts of least cost [.., n], the cheapest first, and their costs."""
    experts = mx.argsort(cost, axis=-1)[..., :n]
    return experts, mx.take_along_axis(cost, experts, axis=-1)


def probabilities(z: mx.array, k: int, *, logits: bool, offset: mx.array | None = None) -> mx.array:
    """p [.., E] of a router that ranks by z (-inf: ruled out) and selects k experts.

    Of logits their softmax. Scores are independent of each other: their sum over all experts grows with E, while the
    mixing weights are shares of what the k best have together, and so is p. offset: the mean of the correction biases;
    a constant in them changes no selection and no weight, and in published models it exceeds the scores many times.
    """
    if logits:
        return mx.softmax(z, axis=-1, precise=True)
    s = mx.maximum(z if offset is None else z - offset, 0.0)  # a correction bias may push a score below 0
    best = mx.topk(s, min(k, s.shape[-1]), axis=-1).sum(axis=-1, keepdims=True)
    return s / mx.maximum(best, 1e-20)


class RunningRange:
    """D of one layer: the mean of the ranges of all tokens seen so far, the current one included."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = mx.array(0.0)
        self.tokens = 0

    def set(self, total: float, tokens: int) -> None:
        """Go on from a sum of ranges over `tokens` tokens that was taken earlier."""
        self.total, self.tokens = mx.array(total), tokens

    def observe(self, z: mx.array) -> mx.array:
        """Add the tokens of z [T, E] and return D (a lazy scalar). Experts at -inf were ruled out and do not count."""
        low = mx.where(z == -mx.inf, mx.inf, z)
        self.total = self.total + (z.max(axis=-1) - low.min(axis=-1)).sum()
        self.tokens += z.shape[0]
        return self.mean

    @property
    def mean(self) -> mx.array:
        """D (a lazy scalar), 0 before the first token."""
        return self.total / max(1, self.tokens)
