"""What a lazily built model will need beside its experts: resident weights, KV cache, transients of a forward pass.

Everything is derived from shapes; nothing is evaluated. The MoE blocks must still be probes (see moe_block.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from . import system
from .budget import ForwardShape
from .moe_block import MoeBlock

LOGIT_COPIES = (
    6  # float32 rows of the vocabulary that sampling keeps at once: logits, log-probabilities, sorting
)
KV_GROWTH = 2  # a KV buffer that grows exists twice, keys and values of one layer
SCORE_COPIES = 3  # unfused attention: scores, masked scores, probabilities


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


def kv_cache_bytes(model: nn.Module, tokens: int, options: KVOptions, chunk: int) -> tuple[int, int]:
    """Bytes of the KV cache for `tokens` tokens, and of its largest layer, from the model's own cache classes.

    A lazy forward pass is built and thrown away: its caches have the right shapes without being computed.
    """
    cache = make_prompt_cache(model, max_kv_size=options.max_size)
    done = 0
    while done < tokens:
        n = min(chunk, tokens - done)
        model(mx.zeros((1, n), dtype=mx.int32), cache=cache)
        maybe_quantize_kv_cache(cache, options.quantized_start, options.group_size, options.bits)
        done += n
    sizes = [int(c.nbytes) for c in cache]
    return sum(sizes), max(sizes, default=0)


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


def forward_shape(
    model: nn.Module,
    config: Mapping[str, Any],
    blocks: Sequence[MoeBlock],
    *,
    context: int,
    largest_kv_layer: int,
) -> ForwardShape:
    """An upper estimate of what a forward pass over a prefill chunk keeps at once, in the widest layer."""
    text = {**config, **(config.get("text_config") or {})}
    size = activation_dtype(model).size
    D = hidden_dims(config, blocks)
    dense = max((_linear_outputs(layer) for layer in model.layers), default=0)
    # Sorted inputs, outputs of the waves, their concatenation, the unsorted result, the weighted sum's product.
    experts = max(b.k * (6 * max(D, b.output_dims) + 3 * b.inner_dims) for b in blocks)
    heads = int(text.get("num_attention_heads") or text.get("n_heads") or 1)
    vocabulary = int(text.get("vocab_size") or 0)
    return ForwardShape(
        bytes_per_token=size * (8 * D + 2 * dense + experts),
        score_bytes_per_token=4 * SCORE_COPIES * heads * context if system.on_cpu() else 0,
        fixed=4 * LOGIT_COPIES * vocabulary + KV_GROWTH * largest_kv_layer + 2**20,
    )


def _linear_outputs(layer: nn.Module) -> int:
    """Sum of the output widths of all linear layers below `layer`."""
    total = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            total += int(module.weight.shape[0])
    return total
