"""How many MoE layers to run before the host looks at what they selected. Plain Python, no arrays.

Looking after each layer costs a host read each time. Looking once after `span` layers costs one, but a layer that
missed an expert, and all that followed it, ran in vain and must run again (optimistic.py). Which is cheaper depends on
how often a layer finds all of its experts in memory, and on what a host read costs beside a layer's computation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

LONGEST = 64  # layers
WORTH = 0.95  # another span must promise to cost less than this share of looking after every layer
MEMORY = 0.95  # weight of the past in the running mean of hits, per token
REVISE = 16  # tokens between choices


def expected(longest: int, all_hit: float) -> tuple[list[float], list[float]]:
    """For groups of 0, 1, .. `longest` layers, each of which misses with 1 - `all_hit`: host reads, layers run in vain.

    A group is read once. If its t-th layer is the first that missed, layers t to the last ran in vain; that layer then
    runs with its experts in memory, and those after it are a group of their own.
    """
    reads, vain = [0.0], [0.0]
    for r in range(1, longest + 1):
        read, lost, still = 1.0, 0.0, 1.0 - all_hit  # still: the probability that layer t is the first that missed
        for t in range(1, r + 1):
            read += still * reads[r - t]
            lost += still * (r - t + 1 + vain[r - t])
            still *= all_hit
        reads.append(read)
        vain.append(lost)
    return reads, vain


def best_span(all_hit: float, host_read: float, compute: float, layers: int) -> int:
    """The span with the smallest expected cost per layer. host_read, compute: seconds, the latter of one layer."""
    reads, vain = expected(min(LONGEST, layers), all_hit)
    best, least = 1, WORTH * (host_read + compute)
    for span in range(2, len(reads)):
        cost = compute + (reads[span] * host_read + vain[span] * compute) / span
        if cost < least:
            best, least = span, cost
    return best


@dataclass
class SpanChooser:
    """Chooses a span from what the last tokens hit and cost."""

    layers: int  # partly resident MoE layers
    host_read: float  # seconds, measured on this machine
    span: int = 1
    all_hit: float = 0.0  # share of layers without a miss
    compute: float = 0.0  # seconds of one layer; a median, since whoever uses the tokens may pause between two
    _computes: list[float] = field(default_factory=list, repr=False)  # since the last choice
    _tokens: int = field(default=0, repr=False)

    def observe(self, missed: int, run: int, host_reads: int, seconds: float) -> None:
        """One token: layers that missed, layers run (those run again count again), host reads, and seconds without
        waiting for experts."""
        compute = max(0.0, seconds - host_reads * self.host_read) / max(1, run)
        self._tokens += 1
        weight = max(1 - MEMORY, 1 / self._tokens)
        self.all_hit += weight * (1 - missed / self.layers - self.all_hit)
        self._computes.append(compute)
        if self._tokens % REVISE == 0:
            self.compute, self._computes = median(self._computes), []
            self.span = best_span(self.all_hit, self.host_read, self.compute, self.layers)
