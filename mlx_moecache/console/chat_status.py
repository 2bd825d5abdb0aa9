"""/cache, /memory and /show model: what the model is, what it holds, and what its expert cache did."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..budget import format_bytes
from ..errors import UsageError
from .cache_picture import BARS, UNCOUNTED, LayerPicture, cache_lines
from .chat_report import span

if TYPE_CHECKING:
    from .chat_loop import Console
    from .chat_session import ChatSession


def cache(argument: str, session: ChatSession, out: Console) -> None:
    """/cache, /cache reset."""
    experts = session.model.expert_cache
    if argument == "reset":
        experts.reset()
        out.say("the slots are empty and all counters zero: the next reply starts cold")
        return
    if argument:
        raise UsageError(f"/cache takes nothing or reset, not {argument!r}")
    layers = [
        LayerPicture(x.residents.capacity, x.num_experts, len(x.residents), x.stats.copy()) for x in experts.layers
    ]
    lines = cache_lines(
        layers,
        eviction=experts.layers[0].residents.eviction,
        slot_bytes=experts.nbytes,
        width=out.width,
        plain=not _shows(BARS + UNCOUNTED),
    )
    out.say("\n".join(lines))


def complete_cache(argument: str) -> Sequence[str]:
    return ["reset"] if "reset".startswith(argument) else []


def memory(argument: str, session: ChatSession, out: Console) -> None:
    """/memory: the parts of the plan beside what is there."""
    from .usage import memory_use

    model = session.model
    plan, conversation = model.memory_plan, session.conversation
    now = memory_use(model, conversation.kv_cache, not_charged=session.emulated.not_charged)
    rows = [
        ("weights", plan.resident, now.resident),
        ("slots", plan.slots, now.slots),
        ("KV cache", plan.kv, now.kv),
        ("transients", plan.transient, now.transients),
        ("read buffers", plan.host_buffers, now.host_buffers),
        ("sum", plan.buffers, now.measured),
    ]
    lines = [_row("", "plan", "now")]
    lines += [_row(name, format_bytes(a), format_bytes(b)) for name, a, b in rows if a or b]
    if plan.overhead:
        lines.append(_row("overhead", format_bytes(plan.overhead), ""))
    if plan.budget is not None:
        lines.append(_row("budget", format_bytes(plan.budget), ""))
    lines.append("transients, sum: at the peak so far")
    lines.append(f"KV cache: {len(conversation.tokens):,} of {conversation.max_context:,} tokens")
    if list(plan.slots_per_layer) != model.expert_cache.slots_per_layer:
        lines.append("slots: resized since that plan")
    if now.footprint is not None:
        lines.append(f"process: {format_bytes(now.footprint)} at its peak")
    if now.not_charged is not None:
        lines.append(f"  of it not charged: {format_bytes(now.not_charged)}")
    out.say("\n".join(lines))


def model_lines(session: ChatSession) -> list[str]:
    """/show model."""
    experts, conversation = session.model.expert_cache, session.conversation
    layers = experts.layers
    sizes = [x.bytes_per_expert for x in layers]
    one = format_bytes(min(sizes)) + ("" if min(sizes) == max(sizes) else f" to {format_bytes(max(sizes))}")
    everything = sum(x.bytes_per_expert * x.num_experts for x in layers)
    return [
        f"model     {session.name}",
        f"type      {type(session.model).__module__.rpartition('.')[2]}",
        f"experts   {span(experts.experts_per_layer)} in each of {len(layers)} layers",
        f"          {span([x.k for x in layers])} per token and layer",
        f"bytes     {one} per expert, all {format_bytes(everything)}",
        f"weights   {format_bytes(session.model.memory_plan.resident)} beside the experts",
        f"context   {conversation.max_context:,} tokens, {len(conversation.tokens):,} used",
        "template  " + ("the tokenizer's" if session.has_template else "none: messages are continued as plain text"),
    ]


def _row(name: str, plan: str, now: str) -> str:
    return f"{name:<13}{plan:>9}  {now:>9}".rstrip()


def _shows(text: str) -> bool:
    """True if standard output can show `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
