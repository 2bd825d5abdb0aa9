"""Replayed routing: the demo model's router scores on text, given to the routers of a synthetic model.

Random weights route at random, and a cache in front of random routing measures nothing. So the scores z of the demo
model (6 layers, 60 experts) are recorded once, token by token, and a stand-in for each router returns those of the
current token. Mapping, for a model with E experts of which a token uses k:

layers    layer i has the scores of demo layer i mod 6; each further round of 6 is SHIFT tokens ahead in the text.
experts   E is cut into g = round(E / 60) groups (at least 1). Group j has the scores of demo layer (i + j) mod 6,
          shifted so that its ceil(k / g)-th best is 0: each group gives about k / g of a token's experts. What a
          group has beyond 60 experts gets the token's lowest score and is never selected; below 60 the first are taken.

What that means for a model with other numbers than the demo model's 60 experts, 4 of them per token:

64, 8     (OLMoE) one group: 4 of 64 experts are never selected. Ranks 5 to 8 are real scores of real text, but of a
          router that was trained to have only its first four used; they change faster from token to token.
128, 8    (Qwen3-30B-A3B) two groups of 64, the best four of each: ranks as the demo model uses them, so they change as
          slowly as its own; 8 of 128 are never selected. The groups are two layers of one text and know nothing of each
          other. The range of scores, which scales the bias, is that of both (1.16 of one's).

On text that the demo model wrote, LRU with a quarter / half / three quarters of the experts misses 39 / 12 / 2 % in
the demo model (6 layers), 44 / 15 / 2 % at 64 and top-8, 37 / 9 / 1 % at 128 and top-8. So what is measured is the
engine at reuse of this kind; the hit rates of the real models are not known from it.

The router itself still runs and its result is added with weight 0, so that no score is known before its input is.
Looking ahead (the router of layer m, called while an earlier layer runs) finds what the demo model's router m makes of
the hidden state of layer m - 1, not the scores that will come: a replay must not predict better than the model can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from held_out import text_windows
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load as load_stock

from mlx_moecache.calls import replace_call
from mlx_moecache.demo import demo_model

WINDOW = 256  # tokens that the demo model sees at once
WINDOWS = 16
SHIFT = 509  # tokens between layers that replay the same demo layer: a prime, so that it fits no window
OPENINGS = (
    "Once upon a time",
    "One day a little girl named Lily",
    "Tim had a red ball.",
    "The old man lived near the sea.",
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """N tokens of text and what the demo model's routers made of them; L demo layers, 60 experts."""

    source: str  # what the text was
    ids: npt.NDArray[np.int32]  # [N]
    z: Floats  # [L, N, 60]
    ahead: Floats  # [L, N, 60], router l on the hidden state of layer l - 1; of layer 0, z of the token before

    @property
    def tokens(self) -> int:
        return len(self.ids)


def record(folder: Path, texts: Sequence[Path], *, windows: int = WINDOWS) -> Recording:
    """The recording of the demo model on the held-out ends of `texts`, or on what it writes itself; kept in `folder`.

    Raises UsageError if the texts are too short.
    """
    source = _source(texts)
    kept = folder / kept_name(texts, windows=windows)
    if kept.exists():
        with np.load(kept) as arrays:
            return Recording(source, arrays["ids"], arrays["z"], arrays["ahead"])
    model, tokenizer = load_stock(str(demo_model()))[:2]
    if texts:
        ids = text_windows(texts, tokenizer, tail=0.03, count=windows, length=WINDOW)[:, :-1]
    else:
        ids = np.stack([_written(model, tokenizer, i) for i in range(windows)])
    parts = [_scores(model, mx.array(row)[None]) for row in ids]
    z, ahead = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    found = Recording(source, ids.ravel().astype(np.int32), z, ahead)
    folder.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial.npz")
    np.savez(partial, ids=found.ids, z=z, ahead=ahead)
    partial.replace(kept)
    return found


def kept_name(texts: Sequence[Path], *, windows: int = WINDOWS) -> str:
    """The file that keeps the recording on `texts`, named after their contents."""
    digest = hashlib.sha256(repr([windows, WINDOW, _source(texts)]).encode())
    for path in texts:
        with suppress(OSError):  # text_windows explains
            digest.update(path.read_bytes())
    return f"routing-{digest.hexdigest()[:12]}.npz"


def _source(texts: Sequence[Path]) -> str:
    return "held-out ends of " + ", ".join(p.name for p in texts) if texts else "written by the demo model, seed 0"


def _written(model: nn.Module, tokenizer: TokenizerWrapper, number: int) -> npt.NDArray[np.int32]:
    """[WINDOW] tokens of a story; where one ends, the next begins."""
    mx.random.seed(number)
    prompt = tokenizer.encode(OPENINGS[number % len(OPENINGS)])
    steps = generate_step(mx.array(prompt), model, max_tokens=WINDOW, sampler=make_sampler(temp=0.8))
    return np.array([*prompt, *(token for token, _ in steps)][:WINDOW], dtype=np.int32)


def _scores(model: nn.Module, ids: mx.array) -> tuple[Floats, Floats]:
    """z and ahead [L, T, E] of the demo model for `ids` [1, T]."""
    layers = model.model.layers
    h = model.model.embed_tokens(ids)
    mask = create_attention_mask(h, None)
    z: list[mx.array] = []
    ahead: list[mx.array] = []
    for i, layer in enumerate(layers):
        h = h + layer.self_attn(layer.input_layernorm(h), mask, None)
        x = layer.post_attention_layernorm(h)
        z.append(layer.mlp.gate(x)[0])
        if i == 0:
            ahead.append(mx.concatenate([z[0][:1], z[0][:-1]]))
        if i + 1 < len(layers):
            after = layers[i + 1]
            ahead.append(after.mlp.gate(after.post_attention_layernorm(h))[0])
        h = h + layer.mlp(x)
    return np.array(mx.stack(z).astype(mx.float32)), np.array(mx.stack(ahead).astype(mx.float32))


def mapped(scores: Floats, layer: int, experts: int, k: int) -> Floats:
    """[N, E] for `layer` of a model with `experts`, from the demo model's [L, N, 60], as the module says."""
    demo_layers, _, width = scores.shape
    shift = -SHIFT * (layer // demo_layers)
    if experts <= width:
        found: Floats = np.roll(scores[layer % demo_layers], shift, axis=0)[:, :experts].copy()
        return found
    groups = max(1, round(experts / width))
    share, best = -(-k // groups), []
    for j in range(groups):
        further = shift - SHIFT * ((layer % demo_layers + j) // demo_layers)
        z = np.roll(scores[(layer + j) % demo_layers], further, axis=0)
        if groups > 1:
            z = z - np.sort(z, axis=-1)[:, -share, None]
        best.append(z)
    lowest = np.concatenate(best, axis=-1).min(axis=-1, keepdims=True)
    sizes = [experts // groups + (j < experts % groups) for j in range(groups)]
    columns = [
        np.concatenate([z[:, :size], np.repeat(lowest, max(0, size - width), axis=-1)], axis=-1)
        for z, size in zip(best, sizes, strict=True)
    ]
    return np.concatenate(columns, axis=-1)


class Clock:
    """Where in the text a model is: `base` where its context began, `position` of the forward pass under way."""

    def __init__(self) -> None:
        self.base = self.position = 0
        self.layer = -1  # of the model, under way


class ReplayedGate(nn.Module):  # type: ignore[misc]
    """Stands in for the router of one layer: x [.., D] -> the recorded scores [.., E] of its tokens."""

    def __init__(self, gate: nn.Module, clock: Clock, layer: int, z: Floats, ahead: Floats) -> None:
        super().__init__()
        self.gate = gate
        # Arrays as attributes would count as parameters, that is as weights of the model.
        self.replay = _Replay(clock, layer, mx.array(z), mx.array(ahead))

    def __call__(self, x: mx.array) -> mx.array:
        own: mx.array = self.gate(x)
        return self.replay.rows(own.size // own.shape[-1]).reshape(own.shape).astype(own.dtype) + 0 * own


class _Replay:
    def __init__(self, clock: Clock, layer: int, z: mx.array, ahead: mx.array) -> None:
        self.clock, self.layer, self.z, self.ahead = clock, layer, z, ahead

    def rows(self, count: int) -> mx.array:
        """[count, E] from the current position on; the text begins anew where it ends."""
        source = self.ahead if self.layer > self.clock.layer >= 0 else self.z
        start, n = self.clock.position % len(source), len(source)
        if start + count <= n:
            return source[start : start + count]
        return source[mx.arange(start, start + count) % n]


def install(model: nn.Module, recording: Recording, k: int) -> Clock:
    """Replace the routers of `model` (built, not necessarily loaded); its context begins at `Clock.base`."""
    clock = Clock()
    for i, block in enumerate(_routed(model)):
        rows = block.gate.weight.shape[0]
        z, ahead = (mapped(x, i, rows, k) for x in (recording.z, recording.ahead))
        block.gate = ReplayedGate(block.gate, clock, i, z, ahead)
    layers = list(model.layers)
    for i, layer in enumerate(layers):
        before_call(layer, lambda args, kwargs, i=i: setattr(clock, "layer", i))

    def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache") or (args[1] if len(args) > 1 else None)
        clock.position = clock.base + (int(cache[0].offset) if cache else 0)
        clock.layer = -1

    before_call(model, begin)
    return clock


def _routed(model: nn.Module) -> Iterator[Any]:
    return (layer.mlp for layer in model.layers if "gate" in layer.mlp and "switch_mlp" in layer.mlp)


def before_call(module: nn.Module, what: Any) -> None:
    """Run what(args, kwargs) before each call of `module`; Python looks __call__ up on the class."""
    cls = type(module)
    original = cls.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        what(args, kwargs)
        return original(self, *args, **kwargs)

    replace_call(module, call)
