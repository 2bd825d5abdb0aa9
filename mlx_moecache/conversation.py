"""A KV cache that outlives a reply: the next prompt is computed only from where it differs from what the cache holds.

Deals in token ids; knows nothing of messages, templates or terminals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, can_trim_prompt_cache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import UsageError
from .footprint import KVOptions
from .generation import LogitsProcessor, Response, Sampler, expert_cache_of, stream_generate


class ContextFullError(UsageError):
    """A conversation leaves no room for even one token of a reply."""

    def __init__(self, tokens: int, max_context: int) -> None:
        super().__init__(
            f"the context is full: the conversation has {tokens:,} tokens, and {max_context:,} were reserved for it "
            "and its reply; shorten it, or start with a larger --max-context"
        )
        self.tokens, self.max_context = tokens, max_context


@dataclass(frozen=True)
class Snapshot:
    """What a conversation holds, to come back to. The arrays are copied when one of the two is written to."""

    kv_cache: tuple[Any, ...]
    tokens: tuple[int, ...]
    first_biased: int | None


class Conversation:
    """One KV cache and the tokens in it, kept between replies. One reply at a time, on the thread that uses MLX."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        max_context: int,
        kv: KVOptions = KVOptions(),  # noqa: B008  # frozen
        prefill_step_size: int | None = None,
    ) -> None:
        """max_context: tokens of prompt and reply together. prefill_step_size: None: what the memory plan chose."""
        self.model, self.tokenizer = model, tokenizer
        self.max_context = max_context
        self.kv = kv
        self.prefill_step_size = prefill_step_size
        self.kv_cache: list[Any] = make_prompt_cache(model, max_kv_size=kv.max_size)
        self.tokens: list[int] = []  # what the KV cache holds, also after an interrupted reply
        self.reused = 0  # tokens of the last prompt that were in the KV cache
        self._first_biased: int | None = None  # position of the first token computed with a swapped selection

    @property
    def is_exact(self) -> bool:
        """True if no token in the KV cache was computed with a swapped selection or fewer experts."""
        return self._first_biased is None

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        prompt_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Response]:
        """Stream the reply to `prompt`, all tokens of the conversation so far; as `stream_generate` otherwise.

        What the KV cache has of it is not computed again. max_tokens: -1 for what fits; what does not fit is cut off.
        The iterator may be closed early. Raises ContextFullError if not even one token fits, UsageError for an empty
        prompt, ReadError if expert bytes cannot be read: `tokens` is what the KV cache holds in each case.
        """
        if not prompt:
            raise UsageError("the prompt is empty; give at least one token")
        room = self.max_context - len(prompt)
        if room < 1:
            raise ContextFullError(len(prompt), self.max_context)
        most = room if max_tokens == -1 else min(max_tokens, room)
        return self._stream(list(prompt), most, sampler, logits_processors, prompt_progress)

    def clear(self) -> None:
        """Forget everything; the old KV cache is released before the new one grows."""
        self.kv_cache.clear()
        self.kv_cache += make_prompt_cache(self.model, max_kv_size=self.kv.max_size)
        self.tokens = []
        self._first_biased = None

    def snapshot(self) -> Snapshot:
        return Snapshot(tuple(copy.deepcopy(self.kv_cache)), tuple(self.tokens), self._first_biased)

    def restore(self, s: Snapshot) -> None:
        """Hold exactly what was held at `s`, which stays usable."""
        self.kv_cache.clear()
        self.kv_cache += copy.deepcopy(list(s.kv_cache))
        self.tokens = list(s.tokens)
        self._first_biased = s.first_biased

    # ---- inside ----

    def _stream(
        self,
        prompt: list[int],
        max_tokens: int,
        sampler: Sampler | None,
        logits_processors: Sequence[LogitsProcessor],
        prompt_progress: Callable[[int, int], None] | None,
    ) -> Iterator[Response]:
        self.reused = self._keep(_common_prefix(self.tokens, prompt[:-1]))  # the last one gives the logits
        experts = expert_cache_of(self.model)
        prunes = any(experts.strategy.kept(x.k) < x.k for x in experts.layers)
        fed = list(prompt)  # all that may be in the KV cache
        swapped = 0
        at_rest = True  # all layers hold the same tokens

        def progress(done: int, total: int) -> None:
            nonlocal at_rest
            at_rest = True
            if prompt_progress is not None:
                prompt_progress(done, total)
            at_rest = False

        responses = cast(
            "Generator[Response, None, None]",
            stream_generate(
                self.model,
                self.tokenizer,
                prompt[self.reused :],
                max_tokens=max_tokens,
                sampler=sampler,
                logits_processors=[_with_prefix(p, prompt[: self.reused]) for p in logits_processors],
                prompt_cache=self.kv_cache,
                prefill_step_size=self.prefill_step_size,
                kv_bits=self.kv.bits,
                kv_group_size=self.kv.group_size,
                quantized_kv_start=self.kv.quantized_start,
                prompt_progress=progress,
            ),
        )
        try:
            for response in responses:
                at_rest = True
                if self._first_biased is None and (
                    response.stats.swapped > swapped or (prunes and response.generation_tokens > 1)
                ):
                    # The token before this one was computed last, and made the swap.
                    self._first_biased = len(prompt) + response.generation_tokens - 2
                swapped = response.stats.swapped
                fed.append(response.token)
                yield response
                at_rest = False
            at_rest = True
        finally:
            responses.close()
            self._settle(fed, at_rest)

    def _keep(self, n: int) -> int:
        """Trim the KV cache to its first `n` tokens, or empty it if it cannot be trimmed; returns what is left.

        What a longer conversation has quantised is of no use to one that is still too short for it.
        """
        is_quantised_early = n < self.kv.quantized_start and _is_quantised(self.kv_cache)
        if n == len(self.tokens) and not is_quantised_early:
            return n
        if n == 0 or is_quantised_early or not _can_trim(self.kv_cache):
            self.clear()
            return 0
        for c in self.kv_cache:
            c.trim(len(self.tokens) - n)
        self._cut(n)
        return n

    def _settle(self, fed: list[int], at_rest: bool) -> None:
        """Make `tokens` true after a reply. An error inside of a forward pass leaves some layers a step ahead."""
        held = [n for c in self.kv_cache for n in _lengths(c)]
        plain = len(held) == sum(len(_parts(c)) for c in self.kv_cache)
        if not held or (not at_rest and not plain):
            self.clear()
            return
        n = min(held)
        if n < max(held):
            if not _can_trim(self.kv_cache):
                self.clear()
                return
            for part in (p for c in self.kv_cache for p in _parts(c)):
                part.trim(part.offset - n)
        self.tokens = fed
        self._cut(n)

    def _cut(self, n: int) -> None:
        del self.tokens[n:]
        if self._first_biased is not None and self._first_biased >= n:
            self._first_biased = None


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _with_prefix(processor: LogitsProcessor, prefix: Sequence[int]) -> LogitsProcessor:
    """`processor`, told of all tokens of the conversation and not only of those that were computed now."""
    if not prefix:
        return processor
    head = mx.array(list(prefix), dtype=mx.uint32)
    return lambda tokens, logits: processor(mx.concatenate([head, tokens]), logits)


def _parts(cache: Any) -> Sequence[Any]:
    """The caches that one layer keeps; mlx-lm's CacheList has several."""
    return cast("Sequence[Any]", getattr(cache, "caches", (cache,)))


def _lengths(cache: Any) -> list[int]:
    """Tokens in each part of a layer's cache that counts them; state-space layers do not."""
    return [int(p.offset) for p in _parts(cache) if hasattr(p, "offset")]


def _is_quantised(caches: Sequence[Any]) -> bool:
    return any(isinstance(p, QuantizedKVCache) for c in caches for p in _parts(c))


def _can_trim(caches: Sequence[Any]) -> bool:
    # A chunked cache that has dropped its beginning says that it can be trimmed, but lacks what it would need then.
    parts = [p for c in caches for p in _parts(c)]
    return can_trim_prompt_cache(caches) and not any(getattr(p, "start_position", 0) for p in parts)
