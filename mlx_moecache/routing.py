"""Routing strategies: how residency changes which experts are selected. Symbols are those of arXiv 2412.00099.

A strategy turns the router's scores into scores that are used for *ranking only*; the mixing weights are always formed
by the model's own code from its own, unbiased scores. Symbols: z router logits (or the quantity by which the model
ranks its experts) [.., E] in float32, k experts per token, m mask of favoured experts, lambda the strength, J the
number of protected top experts, Delta_t = max(z) - min(z) the range of token t, D the running mean of the ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .errors import UsageError

DEFAULT_STRENGTH = 0.1


@dataclass(frozen=True)
class Original:
    """The router's own top-k."""

    @property
    def name(self) -> str:
        return "original"


@dataclass(frozen=True)
class CachePrior:
    """Cache-Prior (section 3.3, Eq. 9-10): resident experts get a bonus of lambda times the mean range."""

    strength: float = DEFAULT_STRENGTH  # lambda, 0 to 1 in the paper; 0 changes nothing
    top_j: int = 2  # J, experts that are selected whatever is resident

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UsageError(
                f"strength must be a finite number of at least 0, not {self.strength} (usual: 0.05 to 0.2)"
            )
        if self.top_j < 0:
            raise UsageError(f"top-j must be at least 0, not {self.top_j} (usual: 1 or 2)")

    @property
    def name(self) -> str:
        return "cache-prior"

    def rank(self, z: mx.array, resident: mx.array, mean_range: mx.array) -> mx.array:
        """z' = z + lambda * D * m, with m = 1 for resident experts and for the J best of z.

        The J best keep their lead: an expert outside has a smaller z and gets at most the same bonus.

        z: [.., E] float32. resident: [E] float32, 1 for resident experts. mean_range: scalar D. Returns [.., E].
        """
        m = mx.broadcast_to(resident, z.shape)
        if 0 < self.top_j < z.shape[-1]:
            best = mx.argpartition(-z, kth=self.top_j - 1, axis=-1)[..., : self.top_j]
            m = mx.put_along_axis(m, best, mx.array(1.0), axis=-1)
        return z + self.strength * mean_range * m


Strategy = Original | CachePrior


class RunningRange:
    """D of one layer: the mean of the ranges of all tokens seen so far, the current one included."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = mx.array(0.0)
        self.tokens = 0

    def observe(self, z: mx.array, dropped: mx.array | None = None) -> mx.array:
        """Add the tokens of z [T, E] and return D (a lazy scalar). `dropped` marks experts that were ruled out."""
        high = low = z
        if dropped is not None:
            high, low = mx.where(dropped, -mx.inf, z), mx.where(dropped, mx.inf, z)
        self.total = self.total + (high.max(axis=-1) - low.min(axis=-1)).sum()
        self.tokens += z.shape[0]
        return self.total / self.tokens


def default_top_j(k: int) -> int:
    """J of the paper's experiments: 2 for fine-grained models (k >= 4), 1 below."""
    return 2 if k >= 4 else 1


def default_strength(slots: int, experts: int) -> float:
    """0.1 while at least a third of the experts fit, less below: with few slots quality falls off a cliff."""
    return DEFAULT_STRENGTH * min(1.0, 3 * slots / experts)


def parse_routing(
    routing: str | Strategy, *, strength: float | None, top_j: int | None, k: int, slots: int, experts: int
) -> Strategy:
    """The strategy that `routing` names: a name, a spec such as "cache-prior:strength=0.05,j=1", or a strategy.

    `strength` and `top_j` (None: the default for this model and number of slots) apply to names without a spec.
    Raises UsageError for unknown names, unknown or malformed parameters and values out of range.
    """
    if not isinstance(routing, str):
        if strength is not None or top_j is not None:
            raise UsageError("strength and top_j are part of a routing object; give one or the other")
        strategy: Strategy = routing
    else:
        name, _, rest = routing.partition(":")
        values = _parse_spec(name, rest)
        if name not in NAMES:
            raise UsageError(f"unknown routing {name!r} (choose {', '.join(NAMES)})")
        if name == "original":
            # Strength 0 is original routing by definition, so it may be said twice.
            if values or strength or top_j is not None:
                raise UsageError("original (exact) routing takes no strength and no top-j; leave them out")
            return Original()
        strategy = CachePrior(
            strength=_pick("strength", values, strength, default_strength(slots, experts)),
            top_j=int(_pick("j", values, top_j, default_top_j(k))),
        )
    if isinstance(strategy, CachePrior) and strategy.top_j > k:
        raise UsageError(f"top-j must be at most the model's {k} experts per token, not {strategy.top_j}")
    return strategy


NAMES = ("cache-prior", "original")
_PARAMETERS: dict[str, Callable[[str], float]] = {"strength": float, "j": int}


def _parse_spec(name: str, rest: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for part in rest.split(",") if rest else []:
        key, _, text = part.partition("=")
        if key not in _PARAMETERS:
            raise UsageError(f"unknown parameter {key!r} of routing {name!r} (allowed: {', '.join(_PARAMETERS)})")
        try:
            values[key] = _PARAMETERS[key](text)
        except ValueError:
            raise UsageError(f"routing parameter {key} needs a number, not {text!r}") from None
    return values


def _pick(key: str, spec: dict[str, float], option: float | None, default: float) -> float:
    if key in spec and option is not None:
        raise UsageError(f"{key} is given twice: in the routing spec and as an option")
    return spec.get(key, default if option is None else option)
