"""From parsed flags to the library's options, for every command that loads a model."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError
from ..footprint import KVOptions, kv_cache_bytes
from ..generation import Sampler
from ..loading import CacheOptions, budget_here
from ..routing import parse_routing
from ..sampling import sampler_for
from .emulation import emulation_of


def check_before_download(args: argparse.Namespace) -> None:
    """Refuse a budget or a routing that no model could work with. Raises UsageError."""
    if args.memory is not None:
        budget_here(args.memory)
    cache = cache_options(args)
    # The model's k, which limits J, is not known yet: any will do here.
    parse_routing(cache.routing, strength=cache.strength, top_j=cache.top_j, k=2**31, slots=1, experts=1)


def cache_options(args: argparse.Namespace) -> CacheOptions:
    exact = args.exact or args.dry_run_strength is not None
    routing = "original" if exact else args.routing or CacheOptions.routing
    emulation = emulation_of(args)
    return CacheOptions(
        routing=routing,
        strength=args.strength,
        top_j=args.top_j,
        eviction=args.eviction,
        # A page cache as large as this machine's would hide the emulated flash.
        direct_io=args.direct_io or (emulation is not None and emulation.device is not None),
        flash=None if emulation is None else emulation.flash,
    )


def kv_options(args: argparse.Namespace) -> KVOptions:
    return KVOptions(
        max_size=args.max_kv_size,
        bits=args.kv_bits,
        group_size=args.kv_group_size,
        quantized_start=args.quantized_kv_start,
    )


def check_kv(model: nn.Module, kv: KVOptions) -> None:
    """Raise UsageError if this model's KV cache cannot be quantised as asked. Nothing is computed."""
    if kv.bits is None:
        return
    try:
        kv_cache_bytes(model, 1, KVOptions(bits=kv.bits, group_size=kv.group_size, quantized_start=0), 1)
    except (NotImplementedError, ValueError) as e:
        raise UsageError(
            f"this model's KV cache cannot be quantised to {kv.bits} bits in groups of {kv.group_size} ({e}); "
            "try another --kv-group-size or leave --kv-bits out"
        ) from e


def seed_of(args: argparse.Namespace) -> int:
    """The seed to use and to report; a fresh one, short enough to type, if none was given."""
    seed: int = secrets.randbelow(2**32) if args.seed is None else args.seed
    return seed


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model of this config.json knows; None if it does not say."""
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


def sampler_of(args: argparse.Namespace, tokenizer: TokenizerWrapper, vocabulary: int | None) -> Sampler:
    """What `sampler_for` makes of the flags. Raises UsageError for numbers of tokens beyond the vocabulary."""
    if vocabulary is not None and args.top_k >= vocabulary:
        raise UsageError(f"--top-k must be below this model's {vocabulary} tokens, not {args.top_k}; 0 means all")
    if vocabulary is not None and args.min_tokens_to_keep > vocabulary:
        raise UsageError(
            f"--min-tokens-to-keep must be at most this model's {vocabulary} tokens, not {args.min_tokens_to_keep}"
        )
    return sampler_for(
        tokenizer,
        temperature=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        min_tokens_to_keep=args.min_tokens_to_keep,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
    )
