"""/set and /show: what may be changed between replies, and what is set now."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..budget import format_bytes
from ..errors import UsageError
from . import chat_routing, chat_status
from .arguments import did_you_mean, number, slot_counts, whole
from .chat_report import span

if TYPE_CHECKING:
    from .chat_loop import Console
    from .chat_session import ChatSession


@dataclass(frozen=True)
class Sampling:
    """A field of ReplySettings that /set changes."""

    convert: Callable[[str], Any]  # raises argparse.ArgumentTypeError
    values: str  # for its usage

    def value(self, name: str, text: str) -> Any:
        try:
            return self.convert(text)
        except argparse.ArgumentTypeError as e:
            raise UsageError(f"{name} {e} ({self.values})") from None


SAMPLING: dict[str, Sampling] = {
    "temp": Sampling(number(0), "temperature; 0 takes the likeliest token"),
    "top-p": Sampling(number(0, 1), "share of the likeliest tokens to sample from; 1: all, 0: the likeliest only"),
    "top-k": Sampling(whole(0), "number of likeliest tokens to sample from; 0: all"),
    "min-p": Sampling(number(0, 1), "drops tokens less likely than this share of the likeliest; 0: none"),
    "max-tokens": Sampling(whole(1, also=-1), "of a reply; -1: what the context has room for"),
    "seed": Sampling(whole(0, most=2**64 - 1), "of the random numbers, which begin again"),
}
NO_SYSTEM = "none"
OTHERS: dict[str, str] = {
    "system": f"/set system TEXT; {NO_SYSTEM} removes it",
    "memory": "/set memory SIZE, such as 6GB, 60% or auto: the slots that this budget leaves",
    "slots": "/set slots N, or one number for each MoE layer as in 30,28,35",
    "routing": "/set routing NAME, NAME:PARAMETER=VALUE or NUMBER",
    "verbose": "/set verbose: all statistics after a reply",
    "quiet": "/set quiet: one line of statistics after a reply",
}
SETTABLE = (*SAMPLING, *OTHERS)
SHOWN = ("model", "cache", "routing", "sampling", "system")
AT_START = ("eviction", "policy", "max-context", "direct-io", "model", "kv-bits")  # asked for, but fixed once loaded


def change(argument: str, session: ChatSession, out: Console) -> None:
    """/set NAME VALUE."""
    name, _, text = argument.partition(" ")
    text = text.strip()
    if not name:
        out.say(f"usage: /set NAME VALUE; names: {', '.join(SETTABLE)}")
        out.say("\n".join(sampling_lines(session)))
    elif name in AT_START:
        raise UsageError(
            f"{name} is fixed when the model is loaded, by a flag of chat (-h lists them); restart to change it"
        )
    elif name not in SETTABLE:
        raise UsageError(f"unknown setting {name}{did_you_mean(name, SETTABLE)} (choose {', '.join(SETTABLE)})")
    elif name in ("verbose", "quiet"):
        if text:
            raise UsageError(f"{name} takes no value, not {text!r}; type /set {name}")
        session.settings.verbose = name == "verbose"
        out.say("all statistics after each reply" if name == "verbose" else "one line of statistics after each reply")
    elif not text:
        usage = OTHERS.get(name) or f"/set {name} NUMBER: {SAMPLING[name].values}"
        out.say(f"usage: {usage}")
        if name not in ("memory", "slots"):
            out.say(_now(session, name))
    elif name in SAMPLING:
        before = _now(session, name)
        apply_text(session, name, text)
        out.say(f"{_now(session, name)}, before: {before.partition(' ')[2]}")
    elif name == "system":
        _set_system(session, text, out)
    elif name == "routing":
        chat_routing.routing(text, session, out)
    else:
        _resize(session, name, text, out)


def show(argument: str, session: ChatSession, out: Console) -> None:
    """/show WHAT."""
    if argument == "model":
        out.say("\n".join(chat_status.model_lines(session)))
    elif argument == "cache":
        chat_status.cache("", session, out)
    elif argument == "routing":
        out.say(chat_routing.state(session))
    elif argument == "sampling":
        out.say("\n".join(sampling_lines(session)))
    elif argument == "system":
        out.say(_now(session, "system"))
    else:
        raise UsageError(
            f"nothing called {argument} to show{did_you_mean(argument, SHOWN)} (choose {', '.join(SHOWN)})"
        )


def complete_set(argument: str) -> Sequence[str]:
    name, blank, text = argument.partition(" ")
    if not blank:
        return [x for x in SETTABLE if x.startswith(name)]
    return chat_routing.complete_routing(text) if name == "routing" else []


def complete_show(argument: str) -> Sequence[str]:
    return [x for x in SHOWN if x.startswith(argument)]


def sampling_lines(session: ChatSession) -> list[str]:
    """Every sampling setting; those that only a flag can set appear if they are set."""
    from .chat_session import ReplySettings

    settings = session.settings
    lines = [_now(session, name) for name in SAMPLING]
    for f in fields(ReplySettings):
        name = f.name.replace("_", "-")
        if f.name.startswith(("xtc", "min_tokens")) and getattr(settings, f.name) != f.default:
            lines.append(f"{name} {getattr(settings, f.name)} (set at the start)")
    return lines


def settings_as_text(session: ChatSession) -> dict[str, str]:
    """The sampling settings as they would be typed."""
    return {name: str(getattr(session.settings, _field(name))) for name in SAMPLING}


def apply_text(session: ChatSession, name: str, text: str) -> None:
    """Set one sampling setting. Raises UsageError, and nothing has changed."""
    if name not in SAMPLING:
        raise UsageError(f"unknown setting {name} (choose {', '.join(SAMPLING)})")
    value = SAMPLING[name].value(name, text)
    field = _field(name)
    before = getattr(session.settings, field)
    setattr(session.settings, field, value)
    try:
        session.sampler()  # checks what depends on the model
    except UsageError as e:
        setattr(session.settings, field, before)
        raise UsageError(str(e).removeprefix("--")) from None
    if name == "seed":
        session.reseed()


# ---- inside ----


def _now(session: ChatSession, name: str) -> str:
    if name == "system":
        return "system: none" if session.system is None else f"system: {session.system}"
    if name == "routing":
        return chat_routing.state(session)
    value = getattr(session.settings, _field(name))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _field(name: str) -> str:
    return name.replace("-", "_")


def _set_system(session: ChatSession, text: str, out: Console) -> None:
    if text == NO_SYSTEM:
        session.system = None
        out.say("no system prompt from the next message on")
        return
    if not session.has_template:
        raise UsageError("this model has no chat template, so a system prompt has no use; put it into your message")
    session.system = text
    out.say("new system prompt from the next message on" + ("; all before is read again then" * bool(session.messages)))


def _resize(session: ChatSession, name: str, text: str, out: Console) -> None:
    """/set memory, /set slots."""
    model = session.model
    cache = model.expert_cache
    before, plan_before = span(cache.slots_per_layer), model.memory_plan
    if name == "memory":
        try:
            cache.resize(memory=text)
        except BaseException:
            model.memory_plan = plan_before  # else /memory would show a plan that was not carried out
            raise
    else:
        try:
            slots = slot_counts(text)
        except argparse.ArgumentTypeError as e:
            raise UsageError(f"slots {e}; {OTHERS['slots']}") from None
        cache.resize(slots=slots)
    plan = model.memory_plan
    parts = [f"slots per layer {before} -> {span(cache.slots_per_layer)} of {span(cache.experts_per_layer)}"]
    parts.append(format_bytes(cache.nbytes))
    if plan.budget is not None:
        total = plan.total - plan.slots + cache.nbytes
        over = ", more than" if total > plan.budget else " of"
        parts.append(f"in all {format_bytes(total)}{over} the budget of {format_bytes(plan.budget)}")
    if model.elastic_slots is not None:
        parts.append("until the context or memory pressure moves them (--elastic)")
    out.say(", ".join(parts))
