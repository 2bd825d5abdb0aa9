"""How long reads of experts take here and now: a running mean, and whether it pays to compute beside them."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.9  # weight of the past, per batch of reads
# What it costs to compute a token's experts in two parts and put them together, and to wake a thread for the reads.
# Measured with benchmarks/speed.py on two CPU cores; reads that are faster than this are waited for.
SPLIT_SECONDS = 0.3e-3


@dataclass
class ReadPace:
    """Seconds per byte of the last batches, latency included: those of one decode loop are of similar size."""

    seconds_per_byte: float = 0.0

    def observe(self, nbytes: int, seconds: float) -> None:
        """A batch of `nbytes` took `seconds`."""
        if nbytes:
            weight = 1 - MEMORY if self.seconds_per_byte else 1.0
            self.seconds_per_byte += weight * (seconds / nbytes - self.seconds_per_byte)

    def pays(self, nbytes: int) -> bool:
        """True if a batch of `nbytes` is expected to take longer than splitting the computation costs."""
        return nbytes * self.seconds_per_byte > SPLIT_SECONDS
