"""Counters of the expert cache: one small dataclass per phase, copied and subtracted to account for one reply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

Phase = Literal["prefill", "decode"]


@dataclass
class PhaseStats:
    """What happened in one phase (prefill or decode), summed over tokens and MoE layers that are partly resident.

    A *selection* is one (token, layer, expert). It is a *hit* if the expert was resident when its layer ran, judged
    for all selections of a call at once, before anything is loaded. Layers whose experts are all resident do not
    look at their selections and count nothing.
    """

    selections: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0  # experts read; at decode equal to misses, in prefill an expert is read once for many tokens
    bytes_read: int = 0
    read_seconds: float = 0.0  # wall time in which experts were being read
    swapped: int = 0  # selections that routing changed: not among the router's own top-k
    evictions: int = 0  # experts that gave their slot to one that was read
    host_reads: int = 0  # times a layer brought its selections to the host, which ends the device's run-ahead
    wait_seconds: float = 0.0  # wall time in which nothing could be computed until experts had been read
    read_ahead: int = 0  # experts whose reads began before their layer had selected
    read_ahead_used: int = 0  # of them, those that it then missed
    host_wait_seconds: float = 0.0  # wall time of these, including whatever was still to be computed before them

    @property
    def hit_rate(self) -> float | None:
        """hits / selections, None before the first selection."""
        return self.hits / self.selections if self.selections else None

    @property
    def swapped_share(self) -> float:
        return self.swapped / self.selections if self.selections else 0.0

    def add(self, more: PhaseStats) -> None:
        """Count `more` as well. Spelled out: this runs in every layer of every token."""
        self.selections += more.selections
        self.hits += more.hits
        self.misses += more.misses
        self.loads += more.loads
        self.bytes_read += more.bytes_read
        self.read_seconds += more.read_seconds
        self.swapped += more.swapped
        self.evictions += more.evictions
        self.host_reads += more.host_reads
        self.wait_seconds += more.wait_seconds
        self.host_wait_seconds += more.host_wait_seconds
        self.read_ahead += more.read_ahead
        self.read_ahead_used += more.read_ahead_used

    def __sub__(self, earlier: PhaseStats) -> PhaseStats:
        return PhaseStats(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass
class CacheStats:
    """Counters of prefill and decode apart: prefill touches nearly every expert, so one mixed figure misleads."""

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)

    @property
    def swapped(self) -> int:
        return self.prefill.swapped + self.decode.swapped

    def of(self, phase: Phase) -> PhaseStats:
        """The counters of one phase."""
        return self.decode if phase == "decode" else self.prefill

    def copy(self) -> CacheStats:
        return CacheStats(PhaseStats(**asdict(self.prefill)), PhaseStats(**asdict(self.decode)))

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        return CacheStats(self.prefill - earlier.prefill, self.decode - earlier.decode)
