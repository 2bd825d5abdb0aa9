"""What a lazily built model will need beside its experts: resident weights, KV cache, transients of a forward pass.

Everything is derived from shapes; nothing is evaluated. The MoE blocks must still be probes (see moe_block.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from . import system
from .budget import CHUNKS, SLACK, ForwardShape
from .cached_switch import WAVE_ROWS
from .kv_growth import GROWN, flat, largest_buffer
from .moe_block import MoeBlock
from .recurrent_shapes import RecurrentShape, recurrent_shape

KNOWN_CACHES = (KVCache, RotatingKVCache, ArraysCache)
KV_STEP = 256  # tokens by which mlx-lm's KV caches grow
SAMPLING_ROWS = 16  # rows of 4 bytes per vocabulary entry: logits, log-probabilities, and top-p, top-k, min-p sorting
ROUTER_ROWS = 6  # rows of 4 bytes per expert: logits, probabilities, the selection before it is cut to k, its scores
PROJECTION_COPIES = 2  # a projection and what its rotation adds, averaged over q, k, v, o
NORM_ROWS = 4  # normalised input, normalised output, what the attention returns, the new residual
HELD_ROWS = 4  # local variables of the model's layers: residual, attention output, their sum, its norm
STREAM_ROWS = 2  # of these, the residual and the sum are as wide as all residual streams
MASK_BYTES = 1  # of the causal mask, per token and key
CHUNKED_MASK_BYTES = 4 + 3  # of that of chunked attention: distances in chunks, and the masks that it is joined from
FUSED_HEADS = (64, 80, 128)  # head sizes for which Metal never makes the scores of a chunk


@dataclass(frozen=True)
class KVOptions:
    """How the KV cache is kept: mlx-lm's --max-kv-size, --kv-bits, --kv-group-size and --quantized-kv-start."""

    max_size: int | None = None  # tokens
    bits: int | None = None
    group_size: int = 64
    quantized_start: int = 5000  # tokens


def model_arrays(model: nn.Module) -> Iterator[mx.array]:
    """Every array that the module tree holds, private ones (rope tables) included; each module once."""
    for module in model.modules():
        for value in module.values():
            if isinstance(value, mx.array):
                yield value
            elif isinstance(value, dict | list | tuple) and not isinstance(value, nn.Module):
                yield from (a for _, a in tree_flatten(value) if isinstance(a, mx.array))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights that stay in memory; stripped expert tensors have none."""
    unique = {id(a): a.nbytes for a in model_arrays(model)}
    return sum(unique.values())


class KVBytes(NamedTuple):
    """Bytes of a KV cache."""

    total: int
    inside: int  # of the largest layer, what grows inside of a forward pass
    buffer: int  # the largest tensor that grows between forward passes (kv_growth.py)


def kv_cache_bytes(model: nn.Module, tokens: int, options: KVOptions, chunk: int) -> KVBytes:
    """The most bytes that the KV cache for `tokens` tokens ever has, and its largest parts.

    Lazy forward passes are built and thrown away: their caches have the right shapes without being computed. All whole
    chunks but the last are one pass, as growing buffers end up the same; what a sliding window keeps of such a pass is
    more than it ever has, so that pass does not count, and the last whole chunk is apart.
    """
    if chunk < tokens and chunk % KV_STEP and KV_STEP % chunk:
        chunk = _round_up(chunk, KV_STEP)
        tokens += KV_STEP - 1  # such chunks end inside of a buffer, which then grows from there
    whole = tokens // chunk * chunk
    lengths = [max(0, whole - chunk), min(chunk, tokens), tokens - whole if whole else 0]
    if options.bits is not None:
        first = min(_round_up(max(options.quantized_start, 1), chunk), tokens)  # the most that is there unquantised
        lengths = [0, first, tokens - first]
    cache = make_prompt_cache(model, max_kv_size=options.max_size)
    if any(isinstance(c, RotatingKVCache) for c in cache):
        lengths.append(1)  # a chunk leaves a rotating cache without room: the first single token makes it
    if lengths[0]:
        model(mx.zeros((1, lengths[0]), dtype=mx.int32), cache=cache)
    most = inside = buffer = 0
    for n in lengths[1:]:
        if n:
            model(mx.zeros((1, n), dtype=mx.int32), cache=cache)
            before = [int(c.nbytes) for c in cache]
            inside = max(inside, *(sum(int(p.nbytes) for p in flat([c]) if type(p) not in GROWN) for c in cache))
            buffer = max(buffer, *map(largest_buffer, flat(cache)))
            maybe_quantize_kv_cache(cache, options.quantized_start, options.group_size, options.bits)
            after = [int(c.nbytes) for c in cache]
            # Quantising makes the new buffers of all layers while the old ones are there.
            most = max(most, sum(after) + (sum(before) if after != before else 0))
    return KVBytes(most, inside, buffer)


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype in which the model computes: that of its norms, float32 if it has none."""
    for path, array in tree_flatten(model.parameters()):
        if "norm" in path and isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32


def hidden_dims(config: Mapping[str, Any], blocks: Sequence[MoeBlock]) -> int:
    """D, the width of the residual stream."""
    for scope in (config, config.get("text_config") or {}):
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(scope.get(name), int):
                return int(scope[name])
    return blocks[0].output_dims


def estimate(
    model: nn.Module,
    config: Mapping[str, Any],
    blocks: Sequence[MoeBlock],
    kv: KVOptions,
    *,
    context: int,
    chunk: int | None,
    prompt: int | None = None,
) -> tuple[int, ForwardShape]:
    """Bytes of the KV cache for `context` tokens, and the forward pass.

    chunk: tokens, None if any of CHUNKS. prompt: tokens of the only prompt, None if there may be any, and several.
    """
    shortest, longest = (min(c, context) for c in ((chunk, chunk) if chunk else (CHUNKS[-1], CHUNKS[0])))
    least = kv_cache_bytes(model, context, kv, shortest)
    caches = list(flat(make_prompt_cache(model, max_kv_size=kv.max_size)))
    window = kv.max_size if all(type(c) is RotatingKVCache for c in caches) else None
    most = least if shortest == longest else kv_cache_bytes(model, context, kv, longest)
    growth = -(-max(0, most.total - least.total) // max(1, longest - shortest))

    def shape(tokens: int, inside: int) -> ForwardShape:
        size = _round_up(tokens, KV_STEP)
        made = forward_shape(
            model,
            config,
            blocks,
            context=tokens,
            kv_copy=0 if size == KV_STEP else inside,  # the old buffers, and the zeros that are put behind them
            kv_growth_per_token=growth,
            quantized_kv=kv.bits is not None,
            window=window,
        )
        return replace(made, kv_buffer=least.buffer * (size - KV_STEP) // size)

    whole = shape(context, least.inside)
    if not all(type(c) in (KVCache, RotatingKVCache) for c in caches):
        return least.total, replace(whole, overlaps=not all(type(c) in KNOWN_CACHES for c in caches))
    if prompt is None or prompt >= context:
        return least.total, whole
    # Until the prompt has been read, the KV cache and what attention sees are those of the prompt.
    first = [kv_cache_bytes(model, prompt, kv, min(c, prompt)) for c in (shortest, longest)]
    prefill = shape(prompt, max(x.inside for x in first))
    reply = max(0, least.total - max(x.total for x in first))
    plain = kv.bits is None and all(type(c) is KVCache for c in caches)
    return least.total, replace(
        prefill,
        decode=whole.decode,
        decode_ahead=whole.decode_ahead,
        decode_growth=whole.decode_growth,
        array=whole.array,
        prompt=prompt,
        kv_reply=reply,
        kv_buffer=whole.kv_buffer,
        step=KV_STEP if plain else 0,
        kv_step=kv_cache_bytes(model, KV_STEP, kv, KV_STEP).total if plain else 0,
    )


def forward_shape(
    model: nn.Module,
    config: Mapping[str, Any],
    blocks: Sequence[MoeBlock],
    *,
    context: int,
    kv_copy: int,
    kv_growth_per_token: int = 0,
    quantized_kv: bool = False,
    window: int | None = None,
) -> ForwardShape:
    """What a forward pass keeps at once beside weights and KV cache, from the shapes of the widest layer.

    MLX frees an array when its last reader has run, but it makes up to some fifty arrays ahead of those, so that each
    stage is charged with all that it makes. context: tokens that a query sees. kv_copy: bytes of the old buffer while
    a layer's KV cache grows. window: keys that every layer keeps, None: all. kv_growth_per_token: bytes by which
    sliding-window caches grow with each token of a chunk.
    """
    text = {**config, **(config.get("text_config") or {})}
    size = activation_dtype(model).size
    D = hidden_dims(config, blocks)
    heads = int(text.get("num_attention_heads") or text.get("n_heads") or text.get("num_heads") or 1)
    vocabulary = int(text.get("vocab_size") or 0)
    indexed, idle = _indexer(model, context, size)
    widths = [_widths(layer, blocks, idle) for layer in model.layers]
    attention = max((sum(outside) for outside, inside in widths if inside is not None), default=0)
    attention = attention or max((sum(outside) for outside, _ in widths), default=0)  # experts in layers of their own
    dense = max((sum(outside if inside is None else inside) for outside, inside in widths), default=0)
    names = {name for layer in model.layers for _, module in layer.named_modules() for name in module}
    query_norms = int(any("q_norm" in n or "query_layernorm" in n for n in names))  # queries and keys, once more
    scores, expanded = _scores(names, text, heads, size, quantized_kv)
    norms = NORM_ROWS * D

    def widest(per_block: Callable[[MoeBlock], int]) -> int:
        return max(per_block(b) for b in blocks)

    # Expert outputs times their weights may be float32 whatever the model computes in.
    combine = size * (norms + dense) + widest(lambda b: b.k * b.output_dims) * (size + 4)
    mamba2 = bool(text.get("mamba_num_heads") or text.get("mamba_n_heads"))
    recurrent = recurrent_shape(model, size, mamba2=mamba2)
    mask = CHUNKED_MASK_BYTES if text.get("attention_chunk_size") else MASK_BYTES
    key = scores + mask + indexed
    attended = max(context * key, recurrent.token, _gathered(text, heads))
    held = size * HELD_ROWS * D + 4 * ROUTER_ROWS * widest(lambda b: b.num_experts) + kv_growth_per_token
    held += recurrent.held + size * STREAM_ROWS * D * (_streams(model) - 1)
    shape = ForwardShape(
        held=held,
        attention=size * (norms + (PROJECTION_COPIES + query_norms) * attention) + attended,
        attention_fixed=kv_copy + context * expanded + recurrent.fixed,
        square=recurrent.square,
        held_square=recurrent.held_square,
        combine=combine,
        outputs=size * widest(lambda b: b.k * b.output_dims),
        # Rows are gathered, gathered again in the switch's own order, and its outputs put back into ours.
        pair=size * widest(lambda b: 2 * D + 3 * b.inner_dims + 2 * b.output_dims),
        k=widest(lambda b: b.k),
        wave_pairs=WAVE_ROWS,
        experts=size * widest(lambda b: b.k * (D + 2 * b.inner_dims + 2 * b.output_dims + _beside(b, D))),
        decode=0,
        decode_ahead=0,
        decode_growth=kv_copy,
        array=max(
            (context if window is None else min(context, window + CHUNKS[0])) * max(scores, indexed),
            size * widest(lambda b: b.k * max(D, b.inner_dims, b.output_dims)),
        ),
        kv_copy=kv_copy,
        keys=context,
        key=key if attended == context * key else 0,
        row=size * max(D, *(w for outside, _ in widths for w in outside)) if recurrent == RecurrentShape() else 0,
        window=window,
    )
    layer = shape.transient(1, complete=True) - SLACK
    kept = 2 * size * sum(b.k * b.output_dims for b in blocks)  # until the layer's next host read
    return replace(shape, decode=layer + kept + 4 * SAMPLING_ROWS * vocabulary, decode_ahead=layer)


def _indexer(model: nn.Module, context: int, size: int) -> tuple[int, set[int]]:
    """Sparse attention picks keys by scores of its own: their bytes per query and key, and the ids of idle layers.

    Heads' scores, their sum, the order of the keys, and two more masks; nothing but keys while all would be picked.
    """
    indexers = [m for m in model.modules() if "wq_b" in m and hasattr(m, "index_topk")]
    if all(context <= m.index_topk for m in indexers):
        return 0, {id(m[name]) for m in indexers for name in ("wq_b", "weights_proj")}
    return max((m.n_heads + 1) * size + 4 + 2 * MASK_BYTES for m in indexers), set()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _beside(block: MoeBlock, D: int) -> int:
    """What the experts make per pair beyond plain gated ones, whose activation is one compiled kernel.

    The biases of each projection are gathered per pair; other activations are charged as a wave is.
    """
    switch = block.switch
    plain = isinstance(switch, SwitchGLU) and type(switch.activation) is SwiGLU
    biased = any(c.name.endswith(".bias") for c in block.components)
    return (0 if plain else D + block.inner_dims) + (2 * block.inner_dims + block.output_dims if biased else 0)


def _streams(model: nn.Module) -> int:
    """Residual streams: hyper-connections (DeepSeek 4.1) keep several."""
    return max((m.hc for m in model.modules() if isinstance(getattr(m, "hc", None), int)), default=1)


def _gathered(text: Mapping[str, Any], heads: int) -> int:
    """Bytes per token where each query gathers keys of its own (DeepSeek 4.1): rows, joined, in float32, and scores."""
    if "compress_ratios" not in text:
        return 0
    picked = int(text.get("index_topk") or 0) if any(text["compress_ratios"]) else 0
    return 4 * 3 * (int(text.get("sliding_window") or 0) + picked) * (int(text.get("head_dim") or 0) + heads)


def _widths(layer: nn.Module, blocks: Sequence[MoeBlock], idle: set[int]) -> tuple[list[int], list[int] | None]:
    """Outputs per token of the linear layers in `layer`: outside of its MoE block, and inside (None: it has none).

    idle: ids of modules whose outputs nothing uses.
    """
    mine = {id(m) for m in layer.modules()}
    inner = [b.block for b in blocks if id(b.block) in mine and b.block is not layer]
    inside = {id(m) for block in inner for m in block.modules()}
    found: tuple[list[int], list[int]] = [], []
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and id(module) not in idle:
            found[id(module) in inside].append(int(module.weight.shape[0]))
    return found[0], found[1] if inner else None


def _scores(names: set[str], text: Mapping[str, Any], heads: int, size: int, quantized_kv: bool) -> tuple[int, int]:
    """Bytes that attention keeps for each key: per query, and once per layer. names: of all parts of the layers.

    Unfused attention makes its scores once (masking and softmax work in place); sinks are joined to them and cut off
    again, three arrays in all. Absorbed latent attention adds rotary scores, and expands keys and values.
    """
    absorbed = "embed_q" in names
    query = value = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // heads)
    if "kv_lora_rank" in text:
        query = int(text.get("qk_nope_head_dim") or 0) + (0 if absorbed else int(text.get("qk_rope_head_dim") or 0))
        value = int(text.get("v_head_dim") or 0)
    fused = not system.on_cpu() and not quantized_kv and query == value and query in FUSED_HEADS
    copies = 0 if fused else 3 if any("sink" in n for n in names) else 1
    if not absorbed:
        return copies * heads * size, 0
    return (copies + 1) * heads * size, heads * (query + value) * size
