"""From parsed flags to a loaded model and an empty conversation, for the commands that keep one: chat and server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import DEMO, named_model
from .emulated_run import EmulatedRun
from .emulation import emulation_of
from .terminal import StatusLine, is_terminal
from .warm_start_options import WarmStart

if TYPE_CHECKING:
    from ..conversation import Conversation


@dataclass(frozen=True)
class OpenedConversation:
    """A loaded model with nothing said yet."""

    name: str  # of the model, as people call it
    folder: Path
    conversation: Conversation
    vocabulary: int | None  # tokens; None if the config does not say
    emulated: EmulatedRun
    warm: WarmStart


def open_conversation(
    args: argparse.Namespace, status: StatusLine, check: Callable[[Any], None] = lambda tokenizer: None
) -> OpenedConversation:
    """Open, plan and load; KV cache is reserved for ``args.max_context`` tokens, replies included.

    check: refuses what the tokenizer cannot do, before anything is loaded. Raises what loading raises.
    """
    from ..checkpoints.hub import resolve_model
    from ..conversation import Conversation
    from ..footprint import KV_STEP
    from ..loading import MemoryOptions, OpenedModel
    from . import options

    options.check_before_download(args)
    source, name = named_model(args.model or DEMO)
    status.clear()  # a download draws its own bars
    folder = resolve_model(source, revision=args.revision, progress=is_terminal(sys.stderr))
    status.show(f"loading {name} ...")
    opened = OpenedModel(folder, trust_remote_code=args.trust_remote_code)
    tokenizer = opened.tokenizer(extra_eos_tokens=tuple(args.extra_eos_token))
    check(tokenizer)
    kv = options.kv_options(args)
    options.check_kv(opened.model, kv)
    vocabulary = options.vocabulary_of(opened.config)
    options.sampler_of(args, tokenizer, vocabulary)  # refuses what no reply could use
    emulated = EmulatedRun(emulation_of(args))
    memory = MemoryOptions(
        memory=emulated.budget or args.memory,
        slots=args.slots,
        # A conversation that goes on ends inside of a buffer, which then grows from there: up to one step more.
        max_context=args.max_context + KV_STEP - 1,
        prefill_step_size=args.prefill_step_size,
        kv=kv,
        elastic=args.elastic,
    )
    with emulated.explained():
        model = opened.load(memory, options.cache_options(args))
    conversation = Conversation(
        model, tokenizer, max_context=args.max_context, kv=kv, prefill_step_size=args.prefill_step_size
    )
    return OpenedConversation(name, folder, conversation, vocabulary, emulated, WarmStart(args, folder, model))
