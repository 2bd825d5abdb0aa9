"""Token generation: our own step, which states the phase of every forward pass, and streaming on top of it.

Deals in token ids, samplers and mlx-lm's KV caches; knows nothing of slots or files. Differs from mlx-lm's step in two
ways: a token is handed out before the next forward pass begins, so that the first one is not late, and looking one
token ahead is done only where no layer reads the host, since elsewhere it could not run in the background.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import GenerationResponse, maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import system
from .budget import MemoryPlan
from .errors import UsageError
from .expert_cache import ExpertCache
from .stats import CacheStats, Phase

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
CLEAR_EVERY = 256  # tokens between returning MLX's free buffers, as in mlx-lm


@dataclass
class Response(GenerationResponse):  # type: ignore[misc]  # mlx-lm is untyped
    """mlx-lm's response and the expert cache's counters since the start of this reply."""

    stats: CacheStats = field(default_factory=CacheStats)


@dataclass(frozen=True)
class StepOptions:
    """mlx-lm's options of a generation step, with the same meaning and defaults."""

    max_tokens: int = 256  # -1: no limit; 0: process the prompt only
    sampler: Sampler | None = None  # log-probabilities [1, V] -> token ids [1]; None: greedy
    logits_processors: Sequence[LogitsProcessor] = ()
    max_kv_size: int | None = None
    prompt_cache: list[Any] | None = None  # mlx-lm KV caches, updated in place
    prefill_step_size: int | None = None  # None: what the memory plan chose
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prompt_progress: Callable[[int, int], None] | None = None  # (tokens done, tokens in all)


def generate_step(prompt: mx.array, model: nn.Module, options: StepOptions) -> Iterator[tuple[int, mx.array]]:
    """Yield (token, log-probabilities [V]) for `prompt` [L], each before the next one is computed.

    The whole prompt is prefill, its last token and chunks of one token included: it is never biased. A consumer that
    stops early finds in ``prompt_cache`` the prompt and all yielded tokens but the last, or, if all experts are
    resident, up to one token more.
    Raises UsageError for an empty prompt, ReadError if expert bytes cannot be read.
    """
    if prompt.size == 0:
        raise UsageError("the prompt is empty; give at least one token")
    experts = expert_cache_of(model)
    cache = options.prompt_cache
    if cache is None:
        cache = make_prompt_cache(model, max_kv_size=options.max_kv_size)
    sampler = options.sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    before = tokens_in(cache)
    make_room(model, before + prompt.size, "prefill")
    chunk = options.prefill_step_size or model.memory_plan.prefill_step_size
    progress = options.prompt_progress or (lambda done, total: None)
    seen: mx.array | None = None  # all tokens so far, for logits processors

    def forward(tokens: mx.array) -> mx.array:
        logits: mx.array = model(tokens[None], cache=cache)
        maybe_quantize_kv_cache(cache, options.quantized_kv_start, options.kv_group_size, options.kv_bits)
        return logits

    def remember(tokens: mx.array) -> None:
        nonlocal seen
        if options.logits_processors:
            seen = tokens if seen is None else mx.concatenate([seen, tokens])

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = forward(tokens)[:, -1, :]
        remember(tokens)
        for processor in options.logits_processors:
            assert seen is not None
            logits = processor(seen, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return sampler(logprobs), logprobs.squeeze(0)

    total, done = prompt.size, 0
    progress(0, total)
    with experts.phase("prefill"):
        while total - done > 1:
            n = min(chunk, total - done - 1)
            forward(prompt[done : done + n])
            mx.eval([c.state for c in cache])
            remember(prompt[done : done + n])
            done += n
            progress(done, total)
            mx.clear_cache()
        current = step(prompt[done:])
        mx.eval(*current)
    progress(total, total)
    if options.max_tokens == 0:
        return

    n = 0
    ahead: tuple[mx.array, mx.array] | None = None
    while True:
        token, logprobs = current
        yield int(np.array(token).item()), logprobs
        n += 1
        if n == options.max_tokens:
            return
        with experts.phase("decode"):
            make_room(model, before + total + n + 1, "decode", pending=ahead or ())  # 1: the look-ahead
            current = ahead or step(token)
            _start(current)
            ahead = None
            if not experts.has_host_reads and n + 1 != options.max_tokens:
                ahead = step(current[0])
                _start(ahead)
            mx.eval(*current)
        if n % CLEAR_EVERY == 0:
            mx.clear_cache()


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Response]:
    """Stream the reply to `prompt` (text or token ids) as responses with text, rates and cache statistics.

    The last response has a finish_reason: "stop" (end of text) or "length". Raises UsageError for an empty prompt or
    max_tokens 0, ReadError if expert bytes cannot be read or a shard was changed since the model was loaded.

        for response in stream_generate(model, tokenizer, "Once upon a time", max_tokens=100):
            print(response.text, end="", flush=True)
    """
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(f"max tokens must be at least 1, or -1 for no limit, not {max_tokens}")
    if not isinstance(prompt, mx.array):
        prompt = mx.array(_token_ids(tokenizer, prompt), dtype=mx.uint32)
    options = StepOptions(
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        max_kv_size=max_kv_size,
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        prompt_progress=prompt_progress,
    )
    experts = expert_cache_of(model)
    if experts.has_host_reads:  # else nothing is read any more
        experts.reader.check_unchanged()
    before = experts.stats.copy()
    detokenizer = tokenizer.detokenizer
    prompt_tps = 0.0

    def response(text: str, token: int, logprobs: mx.array, n: int, finish: str | None) -> Response:
        return Response(
            text=text,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=prompt.size,
            prompt_tps=prompt_tps,
            generation_tokens=n,
            # The first token belongs to the prompt's time, as in mlx-lm's prompt rate.
            generation_tps=(n - 1) / (now - decode_began) if n > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish,
            stats=experts.stats - before,
        )

    began = time.perf_counter()
    make_room(model, tokens_in(prompt_cache or ()) + prompt.size, "prefill")
    with system.wired(), system.headroom(_room(model, experts, prompt_cache)):
        for n, (token, logprobs) in enumerate(generate_step(prompt, model, options), start=1):
            now = time.perf_counter()
            if n == 1:
                prompt_tps, decode_began = prompt.size / (now - began), now
            if token in tokenizer.eos_token_ids:
                detokenizer.finalize()
                yield response(detokenizer.last_segment, token, logprobs, n, "stop")
                return
            detokenizer.add_token(token)
            if n == max_tokens:
                detokenizer.finalize()
                yield response(detokenizer.last_segment, token, logprobs, n, "length")
                return
            yield response(detokenizer.last_segment, token, logprobs, n, None)


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
) -> str:
    """The whole reply to `prompt` as text; see `stream_generate` for streaming, more options and errors."""
    stream = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler)
    return "".join(r.text for r in stream)


def expert_cache_of(model: nn.Module) -> ExpertCache:
    """The cache of a model that `load` returned. Raises UsageError for other models."""
    cache = getattr(model, "expert_cache", None)
    if not isinstance(cache, ExpertCache):
        raise UsageError("this model has no expert cache; load it with mlx_moecache.load")
    return cache


def tokens_in(cache: Sequence[Any]) -> int:
    """Tokens that KV caches hold; caches without a length, as of state-space layers, do not count."""
    return max((int(getattr(c, "offset", 0)) for c in cache), default=0)


def make_room(model: nn.Module, context: int, phase: Phase, *, pending: Sequence[mx.array] = ()) -> None:
    """Let an elastic model adjust its slots to a KV cache of `context` tokens; others stay as they are.

    pending: arrays that are still computed, maybe from the slots.
    """
    elastic = getattr(model, "elastic_slots", None)
    if elastic is not None:
        elastic.adjust(context, phase, lambda: mx.eval(*pending))


def _room(model: nn.Module, experts: ExpertCache, cache: Sequence[Any] | None) -> int | None:
    """Bytes that a reply may use beside weights and slots before MLX should wait; None if no budget was given."""
    plan: MemoryPlan = model.memory_plan
    elastic = getattr(model, "elastic_slots", None) is not None
    if not elastic and list(plan.slots_per_layer) != experts.slots_per_layer:  # resized by slots
        return None
    room = plan.room_beside(experts.nbytes)
    return None if room is None else max(0, room - sum(int(c.nbytes) for c in cache or ()))


def _start(arrays: Sequence[mx.array]) -> None:
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]


def _token_ids(tokenizer: TokenizerWrapper, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    # A chat template may have written the beginning-of-text token already.
    add_special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=add_special)
    return ids
