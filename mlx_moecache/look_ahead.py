"""Look-ahead: experts that the next MoE layer will probably miss are read while this layer and attention compute.

They land in host buffers, never in slots, and are copied when the layer has asked for them: residents, their order and
every selection are those of a run without look-ahead. Reads that somebody waits for go first; what was guessed wrongly
is dropped as soon as the layer has spoken. Plain Python: what is guessed for a token comes from guess.py, whether that
pays is judged by payoff.py. A chunk of a prompt needs no guess: nearly all experts are selected by some of its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoints.read_batch import Pending
from .checkpoints.reader import ExpertReader
from .errors import ReadError
from .payoff import Payoff
from .stats import PhaseStats

if TYPE_CHECKING:
    from .guess import Guess, Guesser
    from .layer_experts import LayerExperts


MOST_BUFFERS = 16  # experts
EXPERTS_PER_BUFFER = 50  # of all layers: buffers take at most a fiftieth of what the experts take,
LAYERS_SHARE = 4  # and a quarter of the experts of a layer, which in a model of 25 layers is a hundredth
GUESSES = 2  # experts per layer for a single token, at most
SELECTIONS_PER_EXPERT = 4  # of a chunk: from here on hardly an expert is selected by none of its tokens


def buffers_for(experts: Sequence[int]) -> int:
    """How many experts may be read ahead at once in a model with so many in each layer; below 2: none."""
    buffers = min(MOST_BUFFERS, max(experts) // LAYERS_SHARE, sum(experts) // EXPERTS_PER_BUFFER)
    return buffers if buffers >= 2 else 0


@dataclass(eq=False)  # it is removed from lists, and comparing buffers would compare their bytes
class Staged:
    """An expert that is being read into a buffer before its layer has asked for it."""

    layer: LayerExperts
    expert: int
    buffer: memoryview
    pending: Pending
    released: bool = False

    def copy_to(self, slot: int) -> None:
        """Its bytes have landed."""
        for c, part in enumerate(_parts(self.layer, self.buffer)):
            self.layer.pool.view(c, slot)[:] = part


class LookAhead:
    """Of one model. Not enabled, or without payoff, it asks for no guess and reads nothing."""

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        reader: ExpertReader,
        guessers: Sequence[Guesser | None],
        *,
        buffers: int,
    ) -> None:
        """guessers: one per layer. buffers: experts of the largest layer."""
        self.enabled = True
        self.payoff = Payoff()
        self._layers, self._reader, self._guessers = layers, reader, guessers
        self._touched: list[set[int] | None] = [None] * len(layers)  # by the last chunk that touches nearly all
        size = max(x.bytes_per_expert for x in layers)
        self._buffers = [reader.reserve(size) for _ in range(buffers)]
        self._free = list(self._buffers)
        self._staged: list[Staged] = []
        self._claimed: list[Staged] = []  # that a layer is taking over
        self._dropped: list[Staged] = []  # whose buffers may still be written
        self._guessed: LayerExperts | None = None  # about which there is a guess
        self._judged = False  # there was one about the layer that reads now
        self._last: tuple[int, float] | None = None  # the layer that had the last chance, and when
        self._waited = 0.0  # seconds since then

    @property
    def is_reading(self) -> bool:
        """True if it may slow other reads down now."""
        return bool(self._staged or self._dropped)

    def guesser_after(self, number: int) -> Guesser | None:
        """Who guesses for the MoE layer after `number`, None if nobody should now."""
        if len(self._free) + len(self._staged) + len(self._dropped) < len(self._buffers):
            self._renew()  # no layer is using any now: somebody was cut off
        following = number + 1
        if following >= len(self._layers) or not self.enabled or self._layers[following].residents.is_complete:
            return None
        now = time.perf_counter()
        if self._last is not None and self._last[0] == number - 1:
            self.payoff.took(now - self._last[1] - self._waited)
        self._last, self._waited = (number, now), 0.0
        return self._guessers[following] if self.payoff.next() else None

    def begin(self, guess: Guess, stats: PhaseStats) -> None:
        """Read what is guessed and not in memory; returns at once. The reads for this layer have begun."""
        self._guessed = layer = self._layers[guess.layer]
        missing = [e for e in guess.experts() if e < layer.num_experts and e not in layer.residents]
        self._start(layer, missing[:GUESSES], stats)

    def begin_chunk(self, number: int, selections: int, stats: PhaseStats) -> None:
        """Read what MoE layer `number` will need for a chunk of so many selections; the reads before it have ended.

        Those experts that the last such chunk needed, as many as there are buffers.
        """
        if not self.enabled or number >= len(self._layers):
            return
        layer = self._layers[number]
        if layer.residents.is_complete or selections < SELECTIONS_PER_EXPERT * layer.num_experts:
            return
        likely = self._touched[number]
        experts = range(layer.num_experts) if likely is None else sorted(likely)
        self._start(layer, [e for e in experts if e not in layer.residents], stats)

    def _start(self, layer: LayerExperts, experts: Sequence[int], stats: PhaseStats) -> None:
        self._collect(stats)
        for expert in experts:
            if not self._free:
                return
            buffer = self._free.pop()
            try:
                pending = self._reader.start(layer.requests(expert, _parts(layer, buffer)), ahead=True)
            except ReadError:  # nobody needs it yet; whoever does will be told
                self._free.append(buffer)
                return
            self._staged.append(Staged(layer, expert, buffer, pending))
            stats.read_ahead += 1

    def ended(self, layer: LayerExperts, waited: float, otherwise: float) -> None:
        """`layer` waited so many seconds for its experts, and would have `otherwise` by reading all of them now."""
        self._waited += waited
        if self._judged:
            self._judged = False
            self.payoff.saved(otherwise - waited)

    def claim_chunk(self, number: int, needed: Sequence[int], selections: int, stats: PhaseStats) -> dict[int, Staged]:
        """The same for a chunk: `needed` experts of MoE layer `number`, which will be loaded in waves."""
        layer = self._layers[number]
        if selections >= SELECTIONS_PER_EXPERT * layer.num_experts:
            self._touched[number] = set(needed)
        return self.claim(layer, needed, stats)

    def claim(self, layer: LayerExperts, needed: Sequence[int], stats: PhaseStats) -> dict[int, Staged]:
        """What of the `needed` experts is being read ahead: wait for it, copy it, and give it to `release`.

        `layer` has spoken, so everything else is dropped.
        """
        self._judged, self._guessed = self._guessed is layer, None
        if self._dropped:
            self._collect(stats)  # for this phase, as far as that can be told now
        staged, self._staged = self._staged, []  # at once: an interrupt must not leave a buffer in two places
        if not staged:
            return {}
        wanted = set(needed)
        found = [s for s in staged if s.layer is layer and s.expert in wanted and not s.pending.gave_up]
        self._claimed += found
        self.release([s for s in staged if s not in found])
        stats.read_ahead_used += len(found)
        return {s.expert: s for s in found}

    def release(self, staged: Sequence[Staged]) -> None:
        """They have been copied, or will not be: their buffers may be used again once nothing lands in them."""
        for s in staged:
            if not s.released:
                s.released = True
                s.pending.drop()
                self._dropped.append(s)
                if s in self._claimed:
                    self._claimed.remove(s)

    def _renew(self) -> None:
        """Nothing is read ahead any more, and every buffer is free, whoever still thinks to have one."""
        self._reader.give_up(ahead=True)
        for s in (*self._staged, *self._claimed, *self._dropped):
            s.released = True
        self._staged, self._claimed, self._dropped = [], [], []
        self._free = list(self._buffers)

    def _collect(self, stats: PhaseStats) -> None:
        """Take back the buffers of reads that ended, and count what they brought."""
        self._reader.account()
        for s in [s for s in self._dropped if s.pending.finished]:
            self._dropped.remove(s)
            self._free.append(s.buffer)
            stats.bytes_read += s.pending.bytes_read


def _parts(layer: LayerExperts, buffer: memoryview) -> list[memoryview]:
    """Where the components of an expert lie in a buffer."""
    parts, start = [], 0
    for n in layer.extents.nbytes:
        parts.append(buffer[start : start + n])
        start += n
    return parts
