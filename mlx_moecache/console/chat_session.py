"""A conversation as a person sees it: messages, a system prompt, settings, and replies to them. Prints nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import UsageError
from .chat_text import KnownTexts, Message, render
from .interrupt import Interrupt, Interrupted
from .report import CacheUse, Reply
from .thoughts import ThoughtSplitter

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..conversation import Conversation
    from ..generation import Response, Sampler
    from ..routing import Strategy
    from .emulated_run import EmulatedRun


@dataclass
class ReplySettings:
    """What a person may change between replies; names and meanings are those of the flags."""

    max_tokens: int = 1024
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int = 0
    verbose: bool = False  # all statistics after a reply instead of one line


@dataclass(frozen=True)
class Turn:
    """One reply and what the cache did for it."""

    reply: Reply  # prompt_tokens: computed; cached_tokens: those that the KV cache had
    cache: CacheUse  # counters of this reply only
    is_exact: bool  # nothing in the whole conversation was computed with a changed selection
    cut_by_context: bool  # the reply ended because no more tokens fit

    @property
    def earlier_turns_biased(self) -> bool:
        return not self.is_exact and self.cache.is_exact


class ChatSession:
    """Everything that a REPL and its commands work on. One reply at a time, on the thread that uses MLX."""

    def __init__(
        self,
        name: str,
        folder: Path,
        conversation: Conversation,
        settings: ReplySettings,
        emulated: EmulatedRun,
        *,
        system: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """name: of the model, as it was given. vocabulary: its number of tokens, if known, to check top-k against."""
        self.name, self.folder = name, folder
        self.conversation = conversation
        self.model: nn.Module = conversation.model
        self.tokenizer: TokenizerWrapper = conversation.tokenizer
        self.has_template = bool(self.tokenizer.has_chat_template)
        self.messages: list[Message] = []  # roles user and assistant; the system prompt is apart
        self.system = system
        self.settings = settings
        self.emulated = emulated
        self.vocabulary = vocabulary
        self.last_stats: Turn | None = None
        self.in_thought = False  # while a reply is written: the text at hand is reasoning
        self.attached: list[str] = []  # texts that go before the next message
        self.biased: Strategy | None = None  # the routing before it became exact
        self._known = KnownTexts()
        self.reseed()

    @property
    def was_interrupted(self) -> bool:
        """True if a person ended the last reply."""
        return self.last_stats is not None and self.last_stats.reply.finish_reason == "interrupt"

    def reseed(self) -> None:
        """Begin the random numbers of ``settings.seed`` again."""
        import mlx.core as mx

        mx.random.seed(self.settings.seed)

    def sampler(self) -> Sampler:
        """What ``settings`` say. Raises UsageError for values that this model cannot have."""
        from .options import sampler_of

        return sampler_of(argparse.Namespace(**asdict(self.settings)), self.tokenizer, self.vocabulary)

    def prompt_tokens(self) -> list[int]:
        """All tokens of the conversation up to where the reply to the last message begins.

        Raises UsageError if the chat template fails.
        """
        return self._encode(self._render())

    def clear(self) -> None:
        """Forget all messages and the KV cache; settings and system prompt stay."""
        self.messages.clear()
        self.conversation.clear()
        self._known = KnownTexts()
        self.last_stats = None

    def reply(
        self,
        user: str | None,
        write: Callable[[str], None],
        interrupt: Interrupt,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Reply:
        """Answer `user`, or again the last user message (None); `write` gets the text as it appears.

        progress: told (done, total) prompt tokens. An interrupt ends the reply; what was written of it stays in the
        conversation, as it does after an error in its middle. A message that got no word of an answer waits for
        ``reply(None)``, or gives way to the next one. Raises UsageError (ContextFullError if nothing more fits) with
        everything as it was, ReadError, and OverLimitError on an emulated device.
        """
        before = list(self.messages)
        try:
            self._ask(user)
            text = self._render()
            tokens = self._encode(text)
            responses = self.conversation.stream(
                tokens,
                max_tokens=self.settings.max_tokens,
                sampler=self.sampler(),
                prompt_progress=self._watched(progress, interrupt),
            )
        except BaseException:
            self.messages = before
            raise
        if user is not None:
            self.attached.clear()
        try:
            return self._write_reply(text, tokens, cast("Generator[Response, None, None]", responses), write, interrupt)
        finally:
            if user is None and self.messages[-1]["role"] == "user":  # no word of a new answer: keep the old one
                self.messages = before

    # ---- inside ----

    def _render(self) -> str:
        return render(self.messages, self.system, self.tokenizer, use_template=self.has_template)

    def _encode(self, text: str) -> list[int]:
        return self._known.encode(text, self.tokenizer, add_special_tokens=not self.has_template)

    def _ask(self, user: str | None) -> None:
        """Let the last message be the user's one to answer."""
        if user is None:
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if not self.messages:
                raise UsageError("there is no message to answer again yet; write one first")
            return
        if self.messages and self.messages[-1]["role"] == "user":  # it got no answer, and templates want turns
            self.messages.pop()
        self.messages.append({"role": "user", "content": "\n\n".join([*self.attached, user])})

    def _watched(self, progress: Callable[[int, int], None], interrupt: Interrupt) -> Callable[[int, int], None]:
        def watch(done: int, total: int) -> None:
            interrupt.check()
            self.emulated.check(self.model, self.conversation.kv_cache)
            progress(done, total)

        return watch

    def _write_reply(
        self,
        prompt_text: str,
        prompt: list[int],
        responses: Generator[Response, None, None],
        write: Callable[[str], None],
        interrupt: Interrupt,
    ) -> Reply:
        from .usage import cache_use

        t = self.tokenizer
        inside = t.has_thinking and prompt_text.rstrip().endswith(t.think_start)
        splitter = ThoughtSplitter(t.think_start, t.think_end, inside=inside)
        detokenizer: Any = t.detokenizer  # a second one: the first keeps for itself what an interrupt leaves in it
        stats_before = self.model.expert_cache.stats.copy()
        written: list[str] = []
        last: Response | None = None
        finish = "error"

        def show(pieces: list[tuple[str, bool]]) -> None:
            for piece, self.in_thought in pieces:
                write(piece)

        try:
            for last in responses:
                if last.token not in t.eos_token_ids:
                    detokenizer.add_token(last.token)
                written.append(last.text)
                show(splitter.feed(last.text))
                self.emulated.check(self.model, self.conversation.kv_cache)
                if interrupt.requested:
                    break
            finish = "interrupt" if last is None or last.finish_reason is None else last.finish_reason
        except Interrupted:
            finish = "interrupt"
        finally:
            responses.close()
            if last is not None and last.finish_reason is None:
                detokenizer.finalize()
                written.append(detokenizer.text[len("".join(written)) :])
                show(splitter.feed(written[-1]))
            show(splitter.rest())
            self.in_thought = False
            reply = Reply(
                "".join(written),
                finish,
                prompt_tokens=len(prompt) - self.conversation.reused,
                cached_tokens=self.conversation.reused,
                generated_tokens=0 if last is None else last.generation_tokens,
                prompt_tps=None if last is None else last.prompt_tps,
                decode_tps=last.generation_tps if last is not None and last.generation_tokens > 1 else None,
            )
            self._record(reply, prompt_text, prompt, list(detokenizer.tokens))
            use = cache_use(self.model)
            self.last_stats = Turn(
                reply,
                replace(use, stats=use.stats - stats_before),
                self.conversation.is_exact,
                cut_by_context=finish == "length"
                and len(prompt) + reply.generated_tokens >= self.conversation.max_context,
            )
        return reply

    def _record(self, reply: Reply, prompt_text: str, prompt: list[int], tokens: list[int]) -> None:
        if reply.generated_tokens:
            self.messages.append({"role": "assistant", "content": reply.text})
            if self.has_template:  # else a reply may have begun in the middle of a word
                self._known.add(prompt_text + reply.text, prompt + tokens)
