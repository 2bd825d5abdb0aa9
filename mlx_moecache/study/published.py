"""Hit rates to expect before anything was measured: the range of miss rates that others published.

Decode, LRU per layer. Real routing repeats itself, and by how much depends on model and text: a recorded trace that is
replayed at the planned number of slots says more than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SOURCE = "published miss rates (arXiv 2412.00099 and its authors' code, SeqMoE 2609.12978)"
LEAST_SHARE = 0.094  # below this share of experts in memory nothing is published

# (share of experts in memory, misses / selections). The least that anybody reports: Nemotron-3-Nano-30B-A3B up to an
# eighth (authors' code), SeqMoE's LRU baseline above.
_LRU_LEAST = ((0.0, 1.0), (0.094, 0.538), (0.125, 0.483), (0.15, 0.40), (0.25, 0.258), (0.35, 0.155), (0.45, 0.115))
# With cache-prior: Nemotron at a strength of 0.1, and at a half DeepSeek-V2-Lite (Table of the paper).
_PRIOR_LEAST = ((0.0, 1.0), (0.094, 0.38), (0.125, 0.327), (0.1875, 0.255), (0.25, 0.204), (0.5, 0.07))
# The most: Mixtral-8x7B with half of its experts misses 40 % and with cache-prior 21 %, where uniform random routing
# would miss 50 %. At other shares the same part of uniform routing is assumed.
_LRU_MOST = 0.40 / 0.5
_PRIOR_MOST = 0.21 / 0.5


@dataclass(frozen=True)
class HitRange:
    """Lowest and highest expected share of selections that are in memory."""

    low: float
    high: float


def expected_hits(share: float, *, cache_prior: bool) -> HitRange:
    """The published range if this share (0 to 1) of all experts is in memory."""
    if share >= 1:
        return HitRange(1.0, 1.0)
    least = _interpolate(_PRIOR_LEAST if cache_prior else _LRU_LEAST, share)
    most = max(least, (_PRIOR_MOST if cache_prior else _LRU_MOST) * (1 - share))
    return HitRange(1 - most, 1 - least)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between `points`, and from the last of them to no miss with all experts in memory."""
    path = [*points, (1.0, 0.0)]
    for (x0, y0), (x1, y1) in pairwise(path):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return 0.0
