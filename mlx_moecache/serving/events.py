"""What happens to a request, from the thread that generates to the one that writes to the client."""

from __future__ import annotations

from dataclasses import dataclass

from ..stats import CacheStats
from .api_errors import RequestError


@dataclass(frozen=True)
class Likelihood:
    """A token as text and its log-probability."""

    token: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    chosen: Likelihood
    top: tuple[Likelihood, ...] = ()  # the likeliest first
    width: int | None = None  # characters that it adds to a completion; None: those of its text


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class Delta:
    """What one token added; parts may be empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second, None where nothing was measured."""

    waiting_seconds: float
    prompt_seconds: float | None
    decode_seconds: float | None
    prompt_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class Finished:
    """The reply is complete."""

    reason: str  # "stop", "length" or "tool_calls"
    prompt_tokens: int  # in all
    cached_tokens: int  # of these, in the KV cache already
    completion_tokens: int
    stats: CacheStats  # of this reply
    is_all_resident: bool  # nothing is counted then
    is_exact: bool  # nothing in the KV cache, earlier turns included, was computed with a changed selection
    timings: Timings


@dataclass(frozen=True)
class Failed:
    """There will be no more of the reply."""

    error: RequestError


Event = Delta | Finished | Failed
