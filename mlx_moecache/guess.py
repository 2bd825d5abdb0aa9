"""What the next MoE layer's router would select if its input were this layer's: a guess of the experts to read early.

The residual stream changes little from layer to layer, so the input of one MoE layer, scaled to the norm of the next,
is close to what the next router will see. The guess is made by that router's own code through its seam, biased as it
would be; nothing of it reaches the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .calls import replace_call

if TYPE_CHECKING:
    from .moe_block import MoeBlock


@dataclass
class Guess:
    """What one MoE layer may select for a token, on the device until the host has looked."""

    layer: int  # number of the layer that it is about
    ids: mx.array  # [1, k]
    scores: mx.array  # [1, k], larger is likelier

    def experts(self) -> list[int]:
        """The likeliest first; the arrays have been evaluated."""
        ids, scores = np.array(self.ids).ravel(), np.array(self.scores).ravel()
        return [int(e) for e in ids[np.argsort(-scores, kind="stable")]]


@dataclass
class Guesser:
    """Guesses for one MoE layer. scales: weights [D] of the norms in front of its block and of that of the MoE layer
    before; without them the input is taken as it is. dims: D."""

    layer: int
    block: MoeBlock
    dims: int
    scales: tuple[mx.array, mx.array] | None

    def guess(self, x: mx.array) -> Guess | None:
        """x [.., D]: one token's input of the experts of the MoE layer before; None if it has other dimensions."""
        if x.size != self.dims:
            return None
        if self.scales is not None and all(s.size == x.size for s in self.scales):
            x = x * (self.scales[0] / self.scales[1])
        found = self.block.guess(x.reshape(1, 1, -1))
        return None if found is None else Guess(self.layer, *found)


@dataclass
class NormWatch:
    """Which norm's output went into which block, seen in one forward pass by the identity of the arrays."""

    weights: dict[int, mx.array] = field(default_factory=dict)  # [D], by the number of the MoE layer

    def guessers(self, blocks: Sequence[MoeBlock], dims: int) -> list[Guesser | None]:
        """For each MoE layer but the first, if its router can be run alone."""
        found: list[Guesser | None] = []
        for i, b in enumerate(blocks):
            both = i in self.weights and i - 1 in self.weights
            scales = (self.weights[i], self.weights[i - 1]) if both else None
            found.append(Guesser(i, b, dims, scales) if i and b.can_guess else None)
        return found


@contextmanager
def watching_norms(model: nn.Module, blocks: Sequence[MoeBlock]) -> Iterator[NormWatch]:
    """Watch the forward pass inside, which may stay unevaluated."""
    watch = NormWatch()
    # Outputs of norms by id, and their weights; the outputs are kept, so that ids stay unique.
    normed: dict[int, tuple[mx.array, mx.array]] = {}

    def leaves_norm(module: Any, args: tuple[Any, ...], output: mx.array) -> None:
        normed[id(output)] = output, module.weight

    with ExitStack() as stack:
        for module in [m for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm) and "weight" in m]:
            stack.enter_context(_watched(module, leaves_norm))
        for i, b in enumerate(blocks):

            def leaves_block(module: Any, args: tuple[Any, ...], output: Any, number: int = i) -> None:
                if args and id(args[0]) in normed:
                    watch.weights[number] = normed[id(args[0])][1]

            if b.routed is not None:
                stack.enter_context(_watched(b.routed, leaves_block))
        yield watch


@contextmanager
def _watched(module: nn.Module, seen: Callable[[nn.Module, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Tell `seen` the arguments and the output of the calls of one module."""
    cls = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        seen(self, args, output)
        return output

    replace_call(module, call)
    try:
        yield
    finally:
        module.__class__ = cls
