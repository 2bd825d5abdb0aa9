"""The runs of a sweep: lists of parameter values, what is measured by default, and in which order. Knows no files.

The order is coarse to fine, so that a sweep that ends early has something to say about every strategy: original routing
first, then the middle value of every strategy, then both ends, then what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from ..errors import UsageError
from ..eviction import make_policy
from ..routing import Original, Strategy, parse_routing

POINTS = 6  # per strategy in the default grid
SHARES = (0.25, 0.5, 0.75)  # of the experts, the default numbers of slots
# Default values by strategy and parameter, the weakest first; those that depend on the model are in `default_families`.
DEFAULTS = (
    ("cumsum:p", (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)),
    ("cache-prior:strength", (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)),
    ("mass-budget:delta", (0.004, 0.01, 0.02, 0.05, 0.1, 0.2)),
    ("bounded-regret:epsilon", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
    ("price:delta", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
)

Family = tuple[str, ...]  # specs of one strategy that differ in one parameter, in its order


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep."""

    strategy: Strategy
    slots: int
    eviction: str

    @property
    def text(self) -> str:
        return f"{self.strategy.spec}, {self.slots} slots, {self.eviction}"


def expand(routing: str) -> list[Family]:
    """The specs that "cache-prior:strength=0.05,0.1,j=1,2" stands for: a family over the parameter with most values,
    one for each combination of the others. Raises UsageError for a value that belongs to no parameter.
    """
    name, _, rest = routing.partition(":")
    lists: list[tuple[str, list[str]]] = []
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if equals:
            lists.append((key, [value]))
        elif lists:
            lists[-1][1].append(part)
        else:
            raise UsageError(f"--routing {routing}: {part!r} belongs to no parameter; write {name}:NAME=VALUE,VALUE")
    if not lists:
        return [(name,)]
    longest = max(range(len(lists)), key=lambda i: len(lists[i][1]))
    keys = [key for key, _ in lists]
    others = [values if i != longest else [""] for i, (_, values) in enumerate(lists)]
    families = []
    for fixed in product(*others):
        specs = []
        for value in lists[longest][1]:
            values = [value if i == longest else v for i, v in enumerate(fixed)]
            specs.append(f"{name}:" + ",".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)))
        families.append(tuple(specs))
    return families


def default_families(*, k: int, experts: int) -> list[Family]:
    """Every strategy over its parameter, for a model with `k` of `experts` experts per token."""
    fewer = range(k - 1, 0, -1)
    ranks = sorted({round(k * (experts / k) ** (i / POINTS)) for i in range(1, POINTS + 1)} - {k})
    families = [
        tuple(f"pruning:k={n}" for n in fewer[:: max(1, -(-len(fewer) // POINTS))]),
        tuple(f"max-rank:m={m}" for m in ranks),
        *(tuple(f"{name}={value}" for value in values) for name, values in DEFAULTS),
    ]
    return [f for f in families if f]


def parse_slots(text: str, experts: int) -> list[int]:
    """Numbers of slots from "15,30,45" or shares of the experts such as "50%". Raises UsageError."""
    numbers = []
    for part in text.split(","):
        share = part.strip().endswith("%")
        try:
            value = float(part.strip().rstrip("%")) if share else int(part)
        except ValueError:
            raise UsageError(f"--slots needs whole numbers or shares such as 15,30 or 25%,50%, not {part!r}") from None
        number = (value / 100 * experts) if share else value
        if not 0.5 <= number <= experts:  # also refuses nan
            raise UsageError(f"--slots must be from 1 to this model's {experts} experts per layer, not {part.strip()}")
        numbers.append(round(number))
    return list(dict.fromkeys(numbers))


def default_slots(*, k: int, experts: int) -> list[int]:
    return list(dict.fromkeys(max(k, round(share * experts)) for share in SHARES))


def check(routings: Sequence[str], evictions: Sequence[str]) -> None:
    """Refuse what no model could make sense of. Raises UsageError."""
    for routing in routings:
        for spec in (s for family in expand(routing) for s in family):
            # The model's k, which limits J, is not known yet: any will do here.
            parse_routing(spec, strength=None, top_j=None, k=2**31, slots=1, experts=1)
    for eviction in evictions:
        make_policy(eviction)


def make_grid(
    families: Sequence[Family], slots: Sequence[int], evictions: Sequence[str], *, k: int, experts: int
) -> list[list[GridRun]]:
    """Blocks of runs, each to be finished before the next; within one, all strategies go over the data together.

    Original routing is always there, for all others are judged against it. A strategy whose parameters change nothing
    (strength 0) is original routing and not measured again. Raises UsageError for specs that do not fit the model.
    """
    blocks = [[GridRun(Original(), s, e) for s in slots for e in evictions]]
    seen = set(blocks[0])
    levels: list[list[str]] = []
    for family in families:
        for depth, indices in enumerate(coarse_to_fine(len(family))):
            if depth == len(levels):
                levels.append([])
            levels[depth] += [family[i] for i in indices]
    for specs in levels:
        block = []
        for s, spec, eviction in product(slots, specs, evictions):
            strategy = parse_routing(spec, strength=None, top_j=None, k=k, slots=s, experts=experts)
            run = GridRun(Original() if strategy.is_exact else strategy, s, eviction)
            if run not in seen:
                seen.add(run)
                block.append(run)
        if block:
            blocks.append(block)
    return blocks


def coarse_to_fine(n: int) -> list[list[int]]:
    """0 .. n - 1 in levels: the middle, both ends, then the middle of every gap that is left, again and again."""
    levels = [[n // 2], sorted({0, n - 1} - {n // 2})] if n else []
    done = sorted(i for level in levels for i in level)
    while len(done) < n:
        level = [(a + b) // 2 for a, b in pairwise(done) if b - a > 1]
        levels.append(level)
        done = sorted(done + level)
    return [level for level in levels if level]
