"""What a client is told when its request cannot be answered: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from ..errors import MoeCacheError, UsageError


class RequestError(Exception):
    """A request that gets an error instead of an answer. The message is one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """param: the field that was wrong. retry_after: seconds after which the client may try again."""
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.param, self.code = param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            kind = "authentication_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that is wrong in itself: status 400."""
    return RequestError(400, message, param=param, code=code)


def as_request_error(error: Exception) -> RequestError:
    """What a client is told of an error in the middle of its reply."""
    from ..conversation import ContextFullError

    if isinstance(error, RequestError):
        return error
    if isinstance(error, ContextFullError):
        return bad(str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return bad(str(error))
    if isinstance(error, MoeCacheError):
        return RequestError(500, str(error), code=type(error).__name__)
    detail = f": {error}" if str(error) else ""
    return RequestError(500, f"unexpected {type(error).__name__}{detail}", code="internal_error")


def shown(value: object, most: int = 60) -> str:
    """A value from a request as it may stand in a message: printable, in one line and short."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
