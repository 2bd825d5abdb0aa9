"""One request after another through the model: prompt, KV cache, sampling, reply. On the thread that uses MLX."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors

from ..console.usage import memory_use
from ..sampling import sampler_for
from .continuation import Continuation
from .engine_state import EngineState
from .events import Delta, Event, Finished, Likelihood, Timings, TokenLogprob, ToolCall
from .prompts import Prompts
from .reply_text import Marks, Piece, ReplyText
from .requests import Request, Sampling

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..generation import LogitsProcessor, Response, Sampler
    from .live import LiveView


@dataclass
class _Reply:
    """A reply while it is made."""

    text: ReplyText
    continuation: Continuation | None  # of a completion; a chat's reply stands alone
    tokens: list[int] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # as the model wrote it, marks included
    tool_text: list[str] = field(default_factory=list)
    made_tool_call: bool = False
    last: Response | None = None


class Engine:
    """The model and one conversation, whose KV cache a request uses as far as its prompt begins in the same way."""

    def __init__(
        self,
        conversation: Conversation,
        prompts: Prompts,
        *,
        live: LiveView | None = None,
        check: Callable[[], None] = lambda: None,
        before_use: Callable[[], None] = lambda: None,
    ) -> None:
        """check: called after each token and prompt chunk; what it raises ends the reply. before_use: before each."""
        self._conversation, self._prompts = conversation, prompts
        self._model, self._tokenizer = conversation.model, conversation.tokenizer
        self._live, self._check, self._before_use = live, check, before_use
        self._counts = {"prompt": 0, "cached": 0, "completion": 0}
        self._seconds = {"prompt": 0.0, "decode": 0.0}
        self._last_tps: float | None = None
        t = self._tokenizer
        self._marks = Marks(
            (t.think_start, t.think_end) if t.has_thinking and t.think_end else None,
            (t.tool_call_start, t.tool_call_end or "") if t.has_tool_calling else None,
        )

    def reply(self, request: Request, watch: Callable[[], None], waited: float) -> Iterator[Event]:
        """Yield what each token adds and, at the end, what it took.

        watch: called where the reply can be given up; what it raises ends it. waited: seconds in line. Raises
        RequestError and MoeCacheErrors; the engine can go on with the next request in each case.
        """
        prompt = self._prompts.of(request)
        self._before_use()
        talk, kv = self._conversation, self._conversation.kv_cache
        before = self._model.expert_cache.stats.copy()
        in_reasoning = self._marks.reasoning is not None and (prompt.text or "").rstrip().endswith(
            self._marks.reasoning[0]
        )
        marks = self._marks if request.kind == "chat" else Marks()
        if not request.tools:
            marks = Marks(marks.reasoning)
        reply = _Reply(
            ReplyText(marks, request.stop, in_reasoning=in_reasoning),
            Continuation(self._tokenizer, prompt.tokens) if request.kind == "text" else None,
        )

        def progress(done: int, total: int) -> None:
            watch()
            self._check()
            if self._live is not None:
                self._live.read(done, total, kv)

        if request.sampling.seed is not None:
            mx.random.seed(request.sampling.seed % 2**64)
        responses = cast(
            "Generator[Response, None, None]",
            talk.stream(
                prompt.tokens,
                max_tokens=request.max_tokens,
                sampler=self._sampler(request.sampling),
                logits_processors=_processors(request),
                prompt_progress=progress,
            ),
        )
        if self._live is not None:
            self._live.began()
        began = time.perf_counter()
        first = now = began
        try:
            for reply.last in responses:
                now = time.perf_counter()
                first = now if reply.last.generation_tokens == 1 else first
                yield from self._token(request, reply, reply.last)
                if self._live is not None:
                    self._live.wrote(reply.last, kv)
                if reply.text.stopped:
                    break
                watch()
                self._check()
        finally:
            responses.close()
            self._account(reply, len(prompt.tokens), first - began, now - first)
            if self._live is not None:
                self._live.ended(kv)
        last = reply.last
        assert last is not None  # a stream without an error has at least one response
        if last.finish_reason is not None:
            self._prompts.remember(prompt, "".join(reply.written), reply.tokens)
        rest = self._delta(request, reply, reply.text.rest(), ())
        if rest != Delta():
            yield rest
        n = last.generation_tokens
        yield Finished(
            reason=_reason(reply, last),
            prompt_tokens=len(prompt.tokens),
            cached_tokens=talk.reused,
            completion_tokens=n,
            stats=self._model.expert_cache.stats - before,
            is_all_resident=not self._model.expert_cache.has_host_reads,
            is_exact=talk.is_exact,
            timings=Timings(
                waiting_seconds=waited,
                prompt_seconds=first - began,
                decode_seconds=now - first if n > 1 else None,
                prompt_tps=last.prompt_tps,
                decode_tps=last.generation_tps if n > 1 else None,
            ),
        )

    def recover(self) -> None:
        """After an error that nobody foresaw: begin with an empty KV cache."""
        self._conversation.clear()

    def state(self) -> EngineState:
        """What was done so far and what is held now."""
        cache = self._model.expert_cache
        return EngineState(
            cache.stats.copy(),
            self._counts["prompt"],
            self._counts["cached"],
            self._counts["completion"],
            self._seconds["prompt"],
            self._seconds["decode"],
            self._last_tps,
            memory_use(self._model, self._conversation.kv_cache, not_charged=None),
            sum(cache.slots_per_layer),
            sum(cache.experts_per_layer),
        )

    # ---- inside ----

    def _token(self, request: Request, reply: _Reply, response: Response) -> Iterator[Delta]:
        is_end = response.token in self._tokenizer.eos_token_ids
        if not is_end:
            reply.tokens.append(response.token)
        text, behind = response.text, reply.continuation
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.top_logprobs is not None and not is_end:
            logprobs = (self._likelihoods(response, request.top_logprobs, behind.shown if behind else self._alone),)
        if behind is not None:
            text = behind.add(None if is_end else response.token, text, is_last=response.finish_reason is not None)
            logprobs = tuple(replace(x, width=behind.width) for x in logprobs)
        reply.written.append(text)
        delta = self._delta(request, reply, reply.text.feed(text), logprobs)
        if delta != Delta():
            yield delta

    def _delta(self, request: Request, reply: _Reply, pieces: list[Piece], logprobs: tuple[TokenLogprob, ...]) -> Delta:
        content, reasoning, calls = [], [], []
        for part, text in pieces:
            if part == "content":
                content.append(text)
            elif part == "reasoning":
                reasoning.append(text)
            elif part == "tool":
                reply.tool_text.append(text)
            else:
                written, reply.tool_text = "".join(reply.tool_text), []
                made = self._tool_calls(written, request)
                calls += made
                # What is no call, such as one that was cut off, is shown as it is and not lost.
                content += [] if made else [written]
        reply.made_tool_call |= bool(calls)
        return Delta("".join(content), "".join(reasoning), tuple(calls), logprobs)

    def _tool_calls(self, text: str, request: Request) -> list[ToolCall]:
        try:
            parsed = self._tokenizer.tool_parser(text, list(request.tools))
            return [
                ToolCall(
                    call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
                    call["name"],
                    json.dumps(call["arguments"], ensure_ascii=False),
                )
                for call in (parsed if isinstance(parsed, list) else [parsed])
            ]
        except Exception:  # one parser per family of models, each of which fails in its own way on what is no call
            return []

    def _alone(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

    def _likelihoods(self, response: Response, top: int, shown: Callable[[int], str]) -> TokenLogprob:
        # response.logprobs is [V]; bfloat16 has no NumPy type.
        logprobs = np.array(response.logprobs.astype(mx.float32))
        best: list[int] = []
        if top:
            best = np.argpartition(-logprobs, top - 1)[:top].tolist()
            best.sort(key=lambda t: -logprobs[t])

        def likelihood(token: int) -> Likelihood:
            return Likelihood(shown(token), max(float(logprobs[token]), -9999.0))

        return TokenLogprob(likelihood(response.token), tuple(likelihood(t) for t in best))

    def _sampler(self, s: Sampling) -> Sampler:
        return sampler_for(
            self._tokenizer,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            min_tokens_to_keep=s.min_tokens_to_keep,
            xtc_probability=s.xtc_probability,
            xtc_threshold=s.xtc_threshold,
        )

    def _account(self, reply: _Reply, prompt_tokens: int, prompt_seconds: float, decode_seconds: float) -> None:
        n = 0 if reply.last is None else reply.last.generation_tokens
        if n:
            self._counts["prompt"] += prompt_tokens - self._conversation.reused
            self._counts["cached"] += self._conversation.reused
        self._counts["completion"] += n
        self._seconds["prompt"] += prompt_seconds
        self._seconds["decode"] += decode_seconds
        if reply.last is not None and n > 1:
            self._last_tps = reply.last.generation_tps


def _processors(request: Request) -> list[LogitsProcessor]:
    p = request.penalties
    if not p.any:
        return []
    made: list[LogitsProcessor] = make_logits_processors(
        logit_bias=dict(p.logit_bias) or None,
        repetition_penalty=p.repetition or None,
        repetition_context_size=p.repetition_context,
        presence_penalty=p.presence or None,
        presence_context_size=p.repetition_context,
        frequency_penalty=p.frequency or None,
        frequency_context_size=p.repetition_context,
    )
    return made


def _reason(reply: _Reply, last: Response) -> str:
    if reply.made_tool_call:
        return "tool_calls"
    return "stop" if reply.text.stopped or last.finish_reason is None else last.finish_reason
