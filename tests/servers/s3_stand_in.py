"""A stand-in for an S3 store that misbehaves in ways a real one can't be made to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]
"""Answers one request for an object."""

_EMPTY_LIST = b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>'


def error(status: int, code: str) -> Answer:
    """Answer everything with one S3 error."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda request: reply(request, status, body)


def reply(
    request: BaseHTTPRequestHandler, status: int, body: bytes = b"", length: int | None = None, **headers: str
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@contextlib.contextmanager
def stand_in(answer: Answer, *, takes_probe: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yield the endpoint of a store, and the requests for blocks that it has seen.

    It lists an empty bucket and takes the probe, so that a tier opens; ``answer`` is for the blocks, and for
    the probe if that is not taken.
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "list-type" in self.path:
                reply(self, 200, _EMPTY_LIST)
            elif takes_probe and self.path.endswith("kvferry-probe"):
                reply(self, 200 if self.command == "PUT" else 204, ETag='"0"')
            else:
                seen.append(self.command)
                with contextlib.suppress(ConnectionError):
                    answer(self)

        do_GET = do_PUT = do_HEAD = do_DELETE = serve  # noqa: N815  # the base class's names

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, address: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="s3-stand-in", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
