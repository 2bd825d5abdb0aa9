"""/ab: the last message answered twice, by the model's own routing and by a biased one, and both compared.

Both answers begin with the same KV cache, the same experts in memory and the same random numbers, and afterwards all
of it is as it was. While they run, the KV cache of the conversation exists twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..budget import format_bytes
from ..errors import UsageError
from ..footprint import KV_STEP
from ..generation import Response, expert_cache_of, make_room
from ..routing import Strategy
from ..stats import CacheStats, PhaseStats
from .chat_routing import EXACT, biased
from .columns import column_width, side_by_side, wrap
from .interrupt import Interrupt, Interrupted
from .terminal import StatusLine

if TYPE_CHECKING:
    from .chat_loop import Console
    from .chat_session import ChatSession

SIDE_BY_SIDE = 80  # columns from which two texts fit beside each other

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One of the two."""

    routing: str  # as it would be typed; "exact", or "exact from here" after earlier biased turns
    text: str
    tokens: tuple[int, ...]  # the end token, if it came, included
    finish_reason: str  # "stop" or "length"
    tps: float | None  # tokens per second after the first one
    decode: PhaseStats

    @property
    def bytes_per_token(self) -> float | None:
        """Read per decode step; the first token comes out of prefill."""
        steps = len(self.tokens) - 1
        return self.decode.bytes_read / steps if steps > 0 else None


@dataclass(frozen=True)
class Comparison:
    """Both answers to the same message."""

    exact: Answer
    biased: Answer
    reused: int  # tokens of the prompt that the KV cache had
    read_again: int  # those that both had to compute, the last one at least
    seed: int | None  # None: nothing was drawn

    @property
    def first_difference(self) -> int | None:
        """Number of the first token that differs, from 0; None if there is none."""
        a, b = self.exact.tokens, self.biased.tokens
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return i
        return None if len(a) == len(b) else min(len(a), len(b))


def ab(session: ChatSession, out: Console) -> None:
    """The command. Ctrl-C ends it, with everything as before. Raises UsageError if there is nothing to compare."""
    with StatusLine(sys.stderr) as status, Interrupt() as interrupt:
        try:
            result = compare(session, interrupt, lambda text: status.show(text[: out.width - 1]))
        except Interrupted:
            status.clear()
            out.say("stopped; conversation, cache and routing are as before")
            return
    out.say("\n".join(comparison_lines(result, session.tokenizer.decode, out.width)))
    reader = expert_cache_of(session.model).reader
    notes = ["conversation, cache and routing are as before"]
    if reader.io_mode != "direct" and result.exact.decode.bytes_read:
        notes.append("exact ran first: the second answer may find its experts in the system's page cache")
    out.note(line for note in notes for line in wrap(note, max(20, out.width - 1)))


def compare(session: ChatSession, interrupt: Interrupt, progress: Progress = lambda text: None) -> Comparison:
    """Answer the last message exactly and with the biased routing; everything is then as it was, whatever happens.

    Raises UsageError if there is no message yet or both answers must be the same, Interrupted, ReadError, and
    OverLimitError on an emulated device.
    """
    prompt = _last_prompt(session)
    cache, conversation = expert_cache_of(session.model), session.conversation
    _check_memory(session, len(prompt))
    start = _State(session)
    answers: list[Answer] = []
    elastic = session.model.elastic_slots
    try:
        if elastic is not None:
            elastic.beside = -(-len(conversation.tokens) // KV_STEP) * KV_STEP
        cache.set_strategy(biased(session))
        other = cache.strategy
        moves = elastic is not None  # so that not all need stay in memory
        if not cache.has_host_reads and not moves and all(other.kept(x.k) == x.k for x in cache.layers):
            raise UsageError(
                "all experts are in memory, so both answers would be the same; /set slots N keeps fewer of them"
            )
        for strategy in (EXACT, other):
            if answers:
                start.put_back()
            cache.set_strategy(strategy)
            answers.append(_answer(session, prompt, interrupt, progress))
        reused = conversation.reused
    finally:
        if elastic is not None:
            elastic.beside = 0
        start.put_back()
        cache.set_strategy(start.strategy)
    seed = session.settings.seed if session.settings.temp > 0 else None
    return Comparison(answers[0], answers[1], reused, len(prompt) - reused, seed)


class _State:
    """Everything that answering changes: KV cache, experts in memory, counters, slots, random numbers."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._cache = expert_cache_of(session.model)
        self.strategy: Strategy = self._cache.strategy
        self._conversation = session.conversation.snapshot()
        self._contents = self._cache.contents()
        self._slots = self._cache.slots_per_layer
        self._stats = self._cache.stats.copy()
        self._layer_stats: list[CacheStats] = [x.stats.copy() for x in self._cache.layers]
        self._random = np.array(_random_key())

    def put_back(self) -> None:
        cache = self._cache
        self._session.conversation.restore(self._conversation)
        # The answer's KV cache is gone now. Elastic slots have followed it, and know the way back.
        make_room(self._session.model, len(self._conversation.tokens), "decode")
        if cache.slots_per_layer != self._slots:
            cache.resize(slots=self._slots)
        cache.restore(self._contents)
        cache.stats = self._stats.copy()
        for layer, stats in zip(cache.layers, self._layer_stats, strict=True):
            layer.stats = stats.copy()
        _random_key()[:] = mx.array(self._random)  # in place, as the list itself cannot be assigned to


def _random_key() -> mx.array:
    """MLX's random numbers follow from this one array."""
    key: mx.array = mx.random.state[0]  # type: ignore[index]
    return key


def _check_memory(session: ChatSession, prompt: int) -> None:
    """Raise UsageError if a budget was given and the KV cache does not fit twice into what is reserved for it.

    Elastic slots give way to both, as far as the longest context that they were planned for.
    """
    conversation, plan = session.conversation, session.model.memory_plan
    held = sum(int(c.nbytes) for c in conversation.kv_cache)
    if plan.budget is None or not conversation.tokens:
        return
    most = session.settings.max_tokens
    longest = conversation.max_context if most == -1 else min(prompt + most, conversation.max_context)
    step = held // -(-len(conversation.tokens) // KV_STEP)
    needed = held + -(-longest // KV_STEP) * step
    if conversation.kv.bits and prompt < conversation.kv.quantized_start <= len(conversation.tokens):
        needed = held + plan.kv  # the other one begins unquantised
    elastic = session.model.elastic_slots
    reserved = plan.kv if elastic is None else elastic.stages[-1].prefill.kv
    if needed > reserved:
        raise UsageError(
            f"/ab has the conversation's KV cache twice, which takes {format_bytes(needed, up=True)}, and "
            f"{format_bytes(reserved)} are reserved for it; /clear shortens the conversation, /set max-tokens the "
            "answers, or start with a larger --max-context"
        )


def _last_prompt(session: ChatSession) -> list[int]:
    """Tokens of the conversation up to the last reply, which is left out."""
    messages = session.messages
    if not messages:
        raise UsageError("there is no message to answer again yet; write one first")
    with _messages(session, messages[:-1] if messages[-1]["role"] == "assistant" else messages):
        return session.prompt_tokens()


@contextmanager
def _messages(session: ChatSession, messages: list[dict[str, str]]) -> Iterator[None]:
    before, session.messages = session.messages, messages
    try:
        yield
    finally:
        session.messages = before


def _answer(session: ChatSession, prompt: Sequence[int], interrupt: Interrupt, progress: Progress) -> Answer:
    """One answer with the routing that is set."""
    conversation = session.conversation
    routing = expert_cache_of(session.model).strategy
    name = "exact" if routing.name == EXACT else routing.spec
    text: list[str] = []
    tokens: list[int] = []
    last: Response | None = None

    def check(done: int, total: int) -> None:
        interrupt.check()
        session.emulated.check(session.model, conversation.kv_cache)
        if 0 < done < total - 1:
            progress(f"{name}: reading the prompt, {done:,} of {total:,} tokens")

    session.reseed()
    responses = cast(
        "Generator[Response, None, None]",
        conversation.stream(
            prompt, max_tokens=session.settings.max_tokens, sampler=session.sampler(), prompt_progress=check
        ),
    )
    try:
        for last in responses:
            text.append(last.text)
            tokens.append(last.token)
            interrupt.check()
            session.emulated.check(session.model, conversation.kv_cache)
            progress(f"{name}: {len(tokens):,} tokens")
    finally:
        responses.close()
    assert last is not None
    if routing.name == EXACT and not conversation.is_exact:
        name = "exact from here"
    tps = last.generation_tps if last.generation_tokens > 1 else None
    return Answer(name, "".join(text), tuple(tokens), str(last.finish_reason), tps, last.stats.decode)


# ---- showing ----


def comparison_lines(result: Comparison, decode: Callable[[list[int]], str], width: int) -> list[str]:
    """Both answers beside each other, or one after the other on a narrow terminal, and what differs."""
    wide = width >= SIDE_BY_SIDE
    column = column_width(width) if wide else max(20, width - 1)
    texts = [
        [*wrap(a.routing, column), "", *wrap(a.text.strip("\n"), column), ""] for a in (result.exact, result.biased)
    ]
    figures = [[x for part in _figures(a) for x in wrap(part, column)] for a in (result.exact, result.biased)]
    if wide:
        lines = [*side_by_side(texts[0], texts[1], width), *side_by_side(figures[0], figures[1], width)]
    else:
        lines = [*texts[0], *figures[0], "", *texts[1], *figures[1]]
    facts = [
        _difference(result, decode),
        f"both after the same {result.reused:,} tokens; {result.read_again:,} read again"
        + ("" if result.seed is None else f", seed {result.seed}"),
    ]
    return [*lines, "", *(x for fact in facts for x in wrap(fact, max(20, width - 1)))]


def _figures(answer: Answer) -> list[str]:
    decode, n = answer.decode, len(answer.tokens)
    lines = [f"{n:,} token{'' if n == 1 else 's'}" + (" (cut)" if answer.finish_reason == "length" else "")]
    if answer.tps is not None:
        lines.append(f"{answer.tps:.1f} tok/s")
    if decode.hit_rate is not None:
        lines.append(f"{decode.hit_rate:.1%} hit")
    if answer.bytes_per_token is not None:
        lines.append(f"{format_bytes(round(answer.bytes_per_token))}/token read")
    if not answer.routing.startswith("exact"):
        lines.append(f"{decode.swapped_share:.1%} swapped")
    return lines


def _difference(result: Comparison, decode: Callable[[list[int]], str]) -> str:
    i = result.first_difference
    if i is None:
        return f"no difference: the same {len(result.exact.tokens):,} tokens"

    def token(answer: Answer) -> str:
        return repr(decode([answer.tokens[i]])) if i < len(answer.tokens) else "the end"

    return f"first difference: token {i + 1:,}, {token(result.exact)} and {token(result.biased)}"
