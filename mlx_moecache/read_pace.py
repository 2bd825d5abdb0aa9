"""How long reading and computing experts take here and now: running means, and whether doing both at once pays."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.9  # weight of the past, per batch
# What it costs to compute a token's experts in two parts and put them together, and to wake a thread for the reads.
# Measured with benchmarks/speed.py on two CPU cores.
SPLIT_SECONDS = 0.4e-3


@dataclass
class ReadPace:
    """Seconds per byte of the last reads, latency included, and of computing with experts; 0: not known yet.

    The batches of one decode loop are of similar size.
    """

    read_per_byte: float = 0.0
    compute_per_byte: float = 0.0

    def observe(self, nbytes: int, seconds: float) -> None:
        """A batch of `nbytes` was read in `seconds`."""
        self.read_per_byte = _mean(self.read_per_byte, nbytes, seconds)

    def observe_compute(self, nbytes: int, seconds: float) -> None:
        """Experts of `nbytes` were computed for a token in `seconds`."""
        self.compute_per_byte = _mean(self.compute_per_byte, nbytes, seconds)

    def pays(self, missing: int, present: int) -> bool:
        """True if computing with `present` bytes of experts while `missing` bytes are read saves more than it costs."""
        computing = self.compute_per_byte * present if self.compute_per_byte else float("inf")
        return min(missing * self.read_per_byte, computing) > SPLIT_SECONDS


def _mean(before: float, nbytes: int, seconds: float) -> float:
    if not nbytes:
        return before
    weight = 1 - MEMORY if before else 1.0
    return before + weight * (seconds / nbytes - before)
