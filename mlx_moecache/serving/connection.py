"""One client's socket: reads that end at a deadline however slowly bytes drip in, whole bodies, departures."""

from __future__ import annotations

import io
import re
import select
import socket
import time
from email.message import Message
from typing import TYPE_CHECKING

from .api_errors import RequestError, bad, shown

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DRAIN_BYTES = 16 << 20  # read and thrown away after a refused body, so that the client sees the answer
DRAIN_SECONDS = 1.0


class TimedReader(io.RawIOBase):
    """Bytes from a socket until ``deadline``, in seconds of time.monotonic; then TimeoutError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = time.monotonic()

    def allow(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0 or not select.select([self._connection], [], [], left)[0]:
            raise TimeoutError("the client was too slow")
        return self._connection.recv_into(buffer)


def body_length(headers: Message, most: int) -> int:
    """How long the body is going to be. Raises RequestError if that is not said once and plainly, or is too much."""
    if headers.get_all("Transfer-Encoding"):
        raise RequestError(411, "Transfer-Encoding is not supported; send the body with a Content-Length")
    lengths = headers.get_all("Content-Length") or []
    if not lengths:
        raise RequestError(411, "the body has no Content-Length; send one")
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,15}", lengths[0].strip()):
        raise bad(f"Content-Length must be one whole number, not {shown(', '.join(lengths))}")
    length = int(lengths[0])
    if length > most:
        message = f"the body has {length:,} bytes, and {most:,} are allowed (--max-request-bytes)"
        raise RequestError(413, message, code="request_too_large")
    return length


def read_body(stream: io.BufferedReader, length: int) -> bytes:
    """Exactly `length` bytes. Raises RequestError (400) if there are fewer, (408) if they do not come in time."""
    try:
        body = stream.read(length)
    except TimeoutError:
        raise RequestError(408, "the body did not arrive in time; send the request again") from None
    if len(body) < length:
        raise bad(f"the body ended after {len(body):,} of {length:,} bytes")
    return body


def is_gone(connection: socket.socket) -> bool:
    """True if the client has closed its side. It is given no benefit of a half-closed connection."""
    try:
        if not select.select([connection], [], [], 0)[0]:
            return False
        return connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def drain(connection: socket.socket) -> None:
    """Say that no more will be sent and throw away what still comes: closing at once would discard our answer."""
    until, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
    try:
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            if not select.select([connection], [], [], seconds)[0]:
                return
            n = len(connection.recv(1 << 16))
            if n == 0:
                return
            left -= n
    except (OSError, ValueError):
        return
