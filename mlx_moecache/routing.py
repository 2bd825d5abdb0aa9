"""How users name a routing strategy, and what its parameters are for a given model and number of slots.

A spec is a name, alone or with parameters: "cache-prior", "cache-prior:strength=0.05,j=1". What the strategies do is in
strategies.py; its names are available here.
"""

from __future__ import annotations

from typing import Any

from .errors import UsageError
from .strategies import (
    KEYS,
    WHOLE,
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    RunningRange,
    Strategy,
    probabilities,
)

__all__ = [
    "NAMES",
    "BoundedRegret",
    "CachePrior",
    "CumulativeThreshold",
    "MassBudget",
    "MaxRank",
    "Original",
    "Price",
    "Pruning",
    "RunningRange",
    "Strategy",
    "default_strength",
    "default_top_j",
    "parse_routing",
    "probabilities",
]

DEFAULT_STRENGTH = 0.1
Values = dict[str, float]  # parameters by the names that users type

STRATEGIES: dict[str, type[Strategy]] = {
    x.name: x for x in (CachePrior, Price, MassBudget, BoundedRegret, MaxRank, CumulativeThreshold, Pruning, Original)
}
NAMES = tuple(STRATEGIES)


def default_top_j(k: int) -> int:
    """J of the paper's experiments: 2 for fine-grained models (k >= 4), 1 below, 0 if k = 1: else no bias acts."""
    return 2 if k >= 4 else min(1, k - 1)


def default_strength(slots: int, experts: int) -> float:
    """0.1 while at least a third of the experts fit, less below: with few slots quality falls off a cliff.

    In four digits, as people read and type it.
    """
    return float(f"{DEFAULT_STRENGTH * min(1.0, 3 * slots / experts):.4g}")


def parse_routing(
    routing: str | Strategy, *, strength: float | None, top_j: int | None, k: int, slots: int, experts: int
) -> Strategy:
    """The strategy that `routing` names: a name, a spec such as "cache-prior:strength=0.05,j=1", or a strategy.

    `strength` and `top_j` (None: the default for this model and number of slots) apply to names without a spec, and
    only to strategies that have such a parameter. Raises UsageError for unknown names, unknown or malformed parameters
    and values out of range.
    """
    if not isinstance(routing, str):
        if strength is not None or top_j is not None:
            raise UsageError("strength and top_j are part of a routing object; give one or the other")
        strategy: Strategy = routing
    else:
        name, _, rest = routing.partition(":")
        if name not in STRATEGIES:
            raise UsageError(f"unknown routing {name!r} (choose {', '.join(NAMES)})")
        strategy = _build(name, rest, strength, top_j, _defaults(name, k, slots, experts))
    _check_against_model(strategy, k)
    return strategy


def _build(name: str, rest: str, strength: float | None, top_j: int | None, defaults: Values) -> Strategy:
    values = _parse_spec(name, rest, defaults)
    # Strength 0 is original routing by definition, so it may be said twice.
    if name == "original" and (strength or top_j is not None):
        raise UsageError("original (exact) routing takes no strength and no top-j; leave them out")
    for key, flag, option in (("strength", "strength", strength), ("j", "top-j", top_j)):
        if option is None or name == "original":
            continue
        if key not in defaults:
            raise UsageError(f"{name} routing takes no {flag}; write for example {_example(name, defaults)}")
        if key in values:
            raise UsageError(f"{key} is given twice: in the routing spec and as an option")
        values[key] = option
    fields = {key: field for field, key in KEYS.items()}
    arguments: dict[str, Any] = {fields[key]: value for key, value in (defaults | values).items()}
    return STRATEGIES[name](**arguments)


def _defaults(name: str, k: int, slots: int, experts: int) -> Values:
    """Every parameter of the strategy `name` and its default."""
    j = default_top_j(k)
    defaults: dict[str, Values] = {
        "cache-prior": {"strength": default_strength(slots, experts), "j": j},
        "price": {"delta": 0.02, "j": min(j, 1)},
        "mass-budget": {"delta": 0.02, "j": j},
        "bounded-regret": {"swaps": 2, "epsilon": 0.02},
        "max-rank": {"j": j, "m": 2 * k},
        "cumsum": {"j": j, "p": 0.5},
        "pruning": {"k": max(1, k - 1)},
        "original": {},
    }
    return defaults[name]


def _parse_spec(name: str, rest: str, known: Values) -> Values:
    values: Values = {}
    for part in rest.split(",") if rest else []:
        key, _, text = part.partition("=")
        if key not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"unknown parameter {key!r} of routing {name!r} ({allowed})")
        if key in values:
            raise UsageError(f"{key} is given twice in routing {name!r}; leave one of them out")
        whole = _is_whole(key)
        try:
            values[key] = int(text) if whole else float(text)
        except ValueError:
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"routing parameter {key} needs {kind}, not {text!r}") from None
    return values


def _check_against_model(strategy: Strategy, k: int) -> None:
    top_j = strategy.parameters.get("j", 0)
    if top_j > k:
        raise UsageError(f"top-j must be at most the model's {k} experts per token, not {top_j}")
    if isinstance(strategy, Pruning) and strategy.experts > k:
        raise UsageError(f"pruning must keep at most the model's {k} experts per token, not {strategy.experts}")


def _is_whole(key: str) -> bool:
    return any(KEYS[field] == key for field in WHOLE)


def _example(name: str, values: Values) -> str:
    return f"{name}:" + ",".join(f"{key}={value:.4g}" for key, value in values.items())
