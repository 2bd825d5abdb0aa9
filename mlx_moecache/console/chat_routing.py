"""/routing and /exact: which experts are preferred, from the next token on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..routing import Strategy
    from .chat_loop import Console
    from .chat_session import ChatSession

EXACT = "original"
USUAL = "cache-prior"  # for a session that began exactly

# What a number alone changes: the parameter that says how much a strategy may do.
MAIN = {
    "cache-prior": "strength",
    "price": "delta",
    "mass-budget": "delta",
    "bounded-regret": "epsilon",
    "max-rank": "m",
    "cumsum": "p",
    "pruning": "k",
}


def routing(argument: str, session: ChatSession, out: Console) -> None:
    """/routing: what is active; /routing price, /routing price:delta=0.01, /routing price 0.01, /routing 0.01."""
    if not argument:
        out.say(state(session))
        out.say(f"usage: /routing NAME, /routing NAME:PARAMETER=VALUE or /routing NUMBER; names: {', '.join(names())}")
        return
    switch(session, _spec(argument, session))
    out.say(state(session))


def exact(argument: str, session: ChatSession, out: Console) -> None:
    """/exact: to the model's own routing, and back to the biased one."""
    switch(session, biased(session) if session.model.expert_cache.strategy.name == EXACT else EXACT)
    out.say(state(session))


def biased(session: ChatSession) -> Strategy | str:
    """The biased routing: what is active, or what was before it became exact, or the usual one."""
    active: Strategy = session.model.expert_cache.strategy
    return active if active.name != EXACT else session.biased or USUAL


def switch(session: ChatSession, strategy: Strategy | str) -> None:
    """Route so from the next token on. Raises UsageError or UnsupportedModelError, and nothing has changed."""
    cache = session.model.expert_cache
    before: Strategy = cache.strategy
    cache.set_strategy(strategy)
    if before.name != EXACT:
        session.biased = before


def state(session: ChatSession) -> str:
    """What is active, in one line, and what that means for this conversation."""
    cache = session.model.expert_cache
    active: Strategy = cache.strategy
    prunes = any(active.kept(x.k) < x.k for x in cache.layers)
    if active.name == EXACT or (active.is_exact and not prunes):
        name = "" if active.name == EXACT else f" ({active.spec} changes nothing)"
        if session.conversation.is_exact:
            return f"exact: the model's own routing{name}"
        return f"exact from here{name}: earlier turns were biased; /clear starts over"
    idle = "" if cache.has_host_reads or prunes else ", without effect while all experts are in memory"
    return f"routing {active.spec}{idle}"


def names() -> Sequence[str]:
    from ..routing import NAMES

    return NAMES


def complete_routing(argument: str) -> Sequence[str]:
    return [] if " " in argument else [x for x in names() if x.startswith(argument)]


def _spec(argument: str, session: ChatSession) -> str:
    """The spec that was meant. Raises UsageError for more words than a name and a number."""
    first, *more = argument.split()
    if not more and not _is_number(first):
        return first
    if len(more) > 1 or (more and (first not in MAIN or not _is_number(more[0]))):
        raise UsageError(
            f"/routing takes a name, a number or both, not {argument!r}; write for example /routing cache-prior 0.1 "
            f"(names: {', '.join(names())})"
        )
    active = biased(session)
    usual = active if isinstance(active, str) else active.name
    name, value = (first, more[0]) if more else (usual, first)
    # The other parameters stay, if it is about the strategy that they belong to.
    others = {} if isinstance(active, str) or name != active.name else active.parameters
    parameters = {**{key: repr(x) for key, x in others.items()}, MAIN[name]: value}
    return f"{name}:" + ",".join(f"{key}={x}" for key, x in parameters.items())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
