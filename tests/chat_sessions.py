"""Chat sessions without a command around them."""

from __future__ import annotations

from pathlib import Path

from mlx_moecache.console.chat_session import ChatSession, ReplySettings
from mlx_moecache.console.emulated_run import EmulatedRun
from mlx_moecache.console.interrupt import Interrupt
from mlx_moecache.conversation import Conversation
from mlx_moecache.footprint import KV_STEP
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel


def open_session(
    folder: Path,
    *,
    slots: int | None = None,
    memory: str | None = None,
    elastic: bool = False,
    routing: str = "cache-prior:strength=0.6",
    max_context: int = 600,
    max_tokens: int = 16,
    temp: float = 0.0,
) -> ChatSession:
    """A session whose model keeps `slots` experts per layer, or stays within `memory`."""
    opened = OpenedModel(folder)
    tokenizer = opened.tokenizer()
    model = opened.load(
        MemoryOptions(slots=slots, memory=memory, max_context=max_context + KV_STEP - 1, elastic=elastic),
        CacheOptions(routing=routing),
    )
    conversation = Conversation(model, tokenizer, max_context=max_context)
    settings = ReplySettings(max_tokens=max_tokens, temp=temp, seed=3)
    return ChatSession(folder.name, folder, conversation, settings, EmulatedRun(None))


def say(session: ChatSession, text: str | None) -> str:
    """The reply to `text`."""
    return session.reply(text, lambda piece: None, Interrupt()).text
