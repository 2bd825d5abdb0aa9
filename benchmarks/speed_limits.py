"""How fast could it be? The limit of a token from parts that were measured in the same rounds.

Three controls run beside what is compared:

resident   a slot for every expert: no host reads, nothing is read. T_res.
dense      the same with experts that compute nothing: attention, routers, shared experts, head. T_dense.
looking    all slots but one: every layer reads the host and hardly anything is read. T_look, its waiting left out.

So, per token of L layers with k experts each,

compute of n experts    C(n) = n / k x (T_res - T_dense) / L
one host read           H = (T_look - T_res) / host reads per token of `looking`; it includes our Python. 0 where the
                        interval over rounds contains 0: what may be noise must not excuse a slow token.
reads of n experts      R(n): the reader alone, median of one call per round (emulated flash included)

    limit = T_dense + sum over layers of max(C(hits), R(misses)) + H x host reads

with the hits and misses that each layer of each token had. *over the limit* is (token - host reads) / (limit - host
reads), which should be at most 1.1. The limit leaves out what cannot be hidden: experts that were missing are computed
after they came. `with late experts` adds C(misses). *Overlap* is how much of what reads and computation could share
they do share: (one after the other - token) / (one after the other - limit), where the first is T_dense + sum of
C(hits) + R(misses) + C(misses) + host reads, and the limit is the one with late experts.

Not all of the excess is the engine's. Where reads are slow the processor idles, and what it computes next is slower:
its core was halted, its caches were used by others. So the resident control runs once more, stopped before the experts
of each layer for as long as the compared side waited there, and again stopped but not waiting: I is the difference per
token, the waits themselves left out. *over with idle waits* is (token - host reads) / (limit - host reads + I). Like H,
I is 0 where its interval contains 0. The target is for the figure without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from common import Array, Estimate, bootstrap
from speed_rounds import Round
from speed_setup import DENSE, Configuration

RESIDENT = Configuration("control: resident", slots="all")
DENSE_ONLY = Configuration("control: dense", slots="all", routing=DENSE)
LOOKING = Configuration("control: looking", slots="all-1", engine=(("span", "1"), ("lookahead", "off")))
CONTROLS = (RESIDENT, DENSE_ONLY, LOOKING)
LEAST_TO_HIDE = 0.02  # of the token: below it, overlap is noise


@dataclass(frozen=True)
class Parts:
    """Seconds per token, medians over rounds."""

    dense: float
    experts: float  # all k of all layers
    host_read: float  # of one
    layers: int
    k: int

    def compute(self, experts: Array) -> Array:
        """Seconds for so many experts of one layer."""
        return experts / self.k * (self.experts / self.layers)


@dataclass(frozen=True)
class Limit:
    """Seconds per token; intervals over rounds."""

    host: float
    limit: float
    with_late_experts: float
    in_turn: float  # one after the other
    over: Estimate  # (token - host) / (limit - host)
    over_with_late: Estimate
    overlap: Estimate | None  # None: next to nothing to hide
    idle: float | None = None  # what idle waits cost beside the waits; None: there were none
    over_with_idle: Estimate | None = None  # (token - host) / (limit - host + idle)


def parts(rounds: Sequence[Round], *, layers: int, k: int) -> Parts:
    """Of rounds in which the controls ran."""

    def seconds(name: str) -> Array:
        return np.array([r.decode[name].seconds / r.decode[name].tokens for r in rounds])

    resident, dense = seconds(RESIDENT.text), seconds(DENSE_ONLY.text)
    looks = [r.decode[LOOKING.text] for r in rounds]
    waited = np.array([s.stats.wait_seconds / s.tokens for s in looks])
    host_reads = sum(s.stats.host_reads for s in looks) / sum(s.tokens for s in looks)
    looking = bootstrap(seconds(LOOKING.text) - waited - resident, lambda x: float(np.median(x)))
    return Parts(
        dense=float(np.median(dense)),
        experts=max(0.0, float(np.median(resident - dense))),
        host_read=looking.value / max(1.0, host_reads) if looking.low > 0 else 0.0,
        layers=layers,
        k=k,
    )


def limit(rounds: Sequence[Round], name: str, known: Parts, *, host_read: float = 0.0) -> Limit:
    """The limit of side `name`, each of whose host reads is `host_read` seconds longer than the device makes it."""
    known = replace(known, host_read=known.host_read + host_read)
    reads = np.array([0.0, *np.median([r.reads.get(name, (0.0,) * known.k) for r in rounds], axis=0)])
    rows = np.array([_row(r, name, known, reads) for r in rounds])  # [rounds, 5]
    idle, with_idle = _idle(rows, [r.idle.get(name) for r in rounds])
    token, late, turn = rows[:, 0], rows[:, 3], rows[:, 4]
    medians = np.median(rows, axis=0)
    overlap = None
    if np.median(turn - late) > LEAST_TO_HIDE * np.median(token):
        overlap = bootstrap(rows, lambda x: float((x[:, 4] - x[:, 0]).sum() / (x[:, 4] - x[:, 3]).sum()))
    return Limit(
        host=float(medians[1]),
        limit=float(medians[2]),
        with_late_experts=float(medians[3]),
        in_turn=float(medians[4]),
        over=bootstrap(rows, lambda x: float(np.median((x[:, 0] - x[:, 1]) / (x[:, 2] - x[:, 1])))),
        over_with_late=bootstrap(rows, lambda x: float(np.median((x[:, 0] - x[:, 1]) / (x[:, 3] - x[:, 1])))),
        overlap=overlap,
        idle=idle,
        over_with_idle=with_idle,
    )


def _idle(rows: Array, excess: Sequence[float | None]) -> tuple[float | None, Estimate | None]:
    """What idle waits cost per token, and the time over the limit with it. excess: None in rounds without a wait."""
    if all(x is None for x in excess):
        return None, None
    both = np.column_stack([rows, [x or 0.0 for x in excess]])
    found = bootstrap(both[:, 5], lambda x: float(np.median(x)))
    if found.low <= 0:
        both[:, 5] = 0.0

    def over(x: Array) -> float:  # one round's excess is too noisy to divide by: the median of all
        return float(np.median((x[:, 0] - x[:, 1]) / (x[:, 2] - x[:, 1] + np.median(x[:, 5]))))

    return float(np.median(both[:, 5])), bootstrap(both, over)


def _row(r: Round, name: str, known: Parts, reads: Array) -> tuple[float, float, float, float, float]:
    """Seconds per token of one round: token, host reads, limit, limit with late experts, one after the other."""
    s = r.decode[name]
    calls = np.array(s.calls, dtype=float).reshape(-1, 2)
    hits, misses = known.compute(calls[:, 0]), known.compute(calls[:, 1])
    read = reads[calls[:, 1].astype(int)]
    resident = known.experts - (hits + misses).sum() / s.tokens  # of layers that say nothing, as all is there
    host = known.host_read * s.stats.host_reads / s.tokens
    base = known.dense + max(0.0, resident) + host
    least = base + np.maximum(hits, read).sum() / s.tokens
    return (
        s.seconds / s.tokens,
        host,
        least,
        least + misses.sum() / s.tokens,
        base + (hits + read + misses).sum() / s.tokens,
    )
