"""OpenAI's response bodies: whole replies, stream chunks, usage. Plain Python."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..stats import PhaseStats
from .events import Delta, Finished, TokenLogprob, ToolCall
from .requests import Kind

DONE = b"data: [DONE]\n\n"
PHASE = (
    *("selections", "hits", "misses", "hit_rate", "swapped", "swapped_share"),
    *("loads", "bytes_read", "read_seconds", "wait_seconds"),
)


def event_line(body: dict[str, Any]) -> bytes:
    """One Server-Sent Event."""
    return b"data: " + to_json(body) + b"\n\n"


def to_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


@dataclass
class Reply:
    """The bodies of one reply, which share its id and time."""

    kind: Kind
    model: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _calls: int = 0  # tool calls so far
    _offset: int = 0  # characters that the tokens with log-probabilities made so far, also those held back

    def first_chunk(self) -> dict[str, Any] | None:
        """What begins a stream: the role, in a chat."""
        return None if self.kind == "text" else self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """What one token added."""
        if self.kind == "text":
            logprobs = text_logprobs(delta.logprobs, self._offset) if delta.logprobs else None
            self._offset += sum(map(_width, delta.logprobs))
            return self._chunk(delta.content, logprobs, None)
        made: dict[str, Any] = {}
        if delta.content:
            made["content"] = delta.content
        if delta.reasoning:
            made["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            calls = _tool_calls(delta.tool_calls)
            made["tool_calls"] = [{"index": self._calls + i, **call} for i, call in enumerate(calls)]
            self._calls += len(calls)
        return self._chunk(made, chat_logprobs(delta.logprobs) if delta.logprobs else None, None)

    def last_chunk(self, end: Finished) -> dict[str, Any]:
        return self._chunk("" if self.kind == "text" else {}, None, end.reason)

    def usage_chunk(self, end: Finished) -> dict[str, Any]:
        """What follows the last chunk where usage was asked for."""
        return {**self._head("chunk"), "choices": [], "usage": usage(end)}

    def whole(self, deltas: Sequence[Delta], end: Finished) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        content = "".join(d.content for d in deltas)
        logprobs = [x for d in deltas for x in d.logprobs]
        choice: dict[str, Any] = {"index": 0, "finish_reason": end.reason, "logprobs": None}
        if self.kind == "text":
            choice["text"] = content
            choice["logprobs"] = text_logprobs(logprobs, 0) if logprobs else None
        else:
            calls = _tool_calls([c for d in deltas for c in d.tool_calls])
            reasoning = "".join(d.reasoning for d in deltas)
            message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
            if reasoning:
                message["reasoning_content"] = reasoning
            if calls:
                message["tool_calls"] = calls
            choice["message"] = message
            choice["logprobs"] = chat_logprobs(logprobs) if logprobs else None
        return {**self._head("whole"), "choices": [choice], "usage": usage(end)}

    def _chunk(
        self, content: str | dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        key = "text" if self.kind == "text" else "delta"
        choice = {"index": 0, key: content, "logprobs": logprobs, "finish_reason": reason}
        body = {**self._head("chunk"), "choices": [choice]}
        return {**body, "usage": None} if self.include_usage else body

    def _head(self, form: str) -> dict[str, Any]:
        if self.kind == "text":
            prefix, name = "cmpl", "text_completion"
        else:
            prefix, name = "chatcmpl", "chat.completion" + (".chunk" if form == "chunk" else "")
        return {"id": f"{prefix}-{self._id}", "object": name, "created": self.created, "model": self.model}


def usage(end: Finished) -> dict[str, Any]:
    """Tokens as OpenAI counts them, what the expert cache did for this reply, and how long it took."""
    prefill, decode = end.stats.prefill, end.stats.decode
    steps = end.completion_tokens - 1  # the first token comes out of the prompt
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        "expert_cache": {
            "exact": end.is_exact,
            "all_resident": end.is_all_resident,
            "hit_rate": decode.hit_rate,
            "bytes_per_token": decode.bytes_read / steps if steps > 0 else None,
            "swapped_share": decode.swapped_share,
            "decode": _phase(decode),
            "prefill": _phase(prefill),
        },
        "timings": asdict(end.timings),
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}

    return {
        "content": [
            {
                **one(x.chosen.token, x.chosen.logprob),
                "top_logprobs": [one(y.token, y.logprob) for y in x.top],
            }
            for x in tokens
        ],
        "refusal": None,
    }


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """offset: characters of the reply before the first of `tokens`."""
    offsets = []
    for x in tokens:
        offsets.append(offset)
        offset += _width(x)
    return {
        "tokens": [x.chosen.token for x in tokens],
        "token_logprobs": [x.chosen.logprob for x in tokens],
        "top_logprobs": [{y.token: y.logprob for y in x.top} for x in tokens],
        "text_offset": offsets,
    }


def models(model: str, created: int, max_context: int) -> dict[str, Any]:
    return {"object": "list", "data": [one_model(model, created, max_context)]}


def one_model(model: str, created: int, max_context: int) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "mlx_moecache",
        "max_context": max_context,
    }


def _width(token: TokenLogprob) -> int:
    return len(token.chosen.token) if token.width is None else token.width


def _phase(stats: PhaseStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in PHASE}


def _tool_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
