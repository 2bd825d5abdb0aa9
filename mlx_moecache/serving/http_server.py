"""The listening socket: a thread per connection, a limited number of them, no name service."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from typing import Any

from ..errors import UsageError

TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
)


class HttpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Binds when made, listens from ``open`` on; ``serve_forever`` and ``shutdown`` as in the standard library."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: Any, *, max_connections: int) -> None:
        """Raises UsageError if the address cannot be had."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, handler, bind_and_activate=False)  # type: ignore[arg-type]
            self.server_bind()
        except OSError as e:
            raise _cannot_listen(host, port, e) from e
        self._places = threading.BoundedSemaphore(max_connections)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def open(self) -> None:
        """Accept connections from now on. Raises UsageError if another program has begun to on this address."""
        try:
            self.server_activate()
        except OSError as e:
            raise _cannot_listen(self.server_address[0], self.port, e) from e

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for this connection, or a short refusal if there are too many."""
        if not self._places.acquire(blocking=False):
            body = b'{"error":{"message":"too many connections; try again later","type":"server_error"}}'
            try:
                request.setblocking(False)
                request.send(TOO_MANY + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            except OSError:
                pass
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours; anything else is one line."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"error: connection failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _cannot_listen(host: object, port: int, error: OSError) -> UsageError:
    why = error.strerror or error
    return UsageError(f"cannot listen on {host} port {port} ({why}); choose another --host or --port (0: any)")
