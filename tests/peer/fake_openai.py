"""OpenAI-compatible engines that do what a test wrote down, and the router's process-less twin in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import uvicorn

__all__ = ["FakeEngine", "Seen", "Turn", "broken", "drop", "events", "hang", "reply", "serving"]

DEADLINE_S = 10.0


class Seen(NamedTuple):
    """A request as an engine saw it."""

    path: str
    headers: dict[str, str]
    body: Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEngine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.take(Seen(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.server.next_turn()(self)

    def do_GET(self) -> None:
        reply({"object": "list", "path": self.path})(self)

    def start(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


Turn = Callable[[Handler], None]


class FakeEngine(ThreadingHTTPServer):
    """Answers each POST with the next turn, and with ``usual`` when there is none left. Thread-safe."""

    daemon_threads = True

    def __init__(self, usual: Turn, name: str = "", order: list[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.usual = usual
        self.turns: list[Turn] = []
        self.seen: list[Seen] = []
        self.asked = threading.Event()
        self.left = threading.Event()
        """Set when whoever asked has closed the connection before the answer's end."""
        self._name, self._order = name, order
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def bodies(self) -> list[Any]:
        return [seen.body for seen in self.seen]

    def take(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)
            if self._order is not None:
                self._order.append(self._name)
        self.asked.set()

    def next_turn(self) -> Turn:
        with self._lock:
            return self.turns.pop(0) if self.turns else self.usual

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is part of the play."""

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeEngine]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="fake-engine")
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join(DEADLINE_S)
            self.server_close()


def reply(body: object, status: int = 200) -> Turn:
    """Answer with JSON, or with bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def turn(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return turn


def events(chunks: list[bytes], proceed: threading.Event | None = None) -> Turn:
    """Stream events; wait for ``proceed`` after the first."""

    def turn(handler: Handler) -> None:
        handler.start("text/event-stream; charset=utf-8")
        for number, chunk in enumerate(chunks):
            handler.chunk(chunk)
            if number == 0 and proceed is not None:
                assert proceed.wait(DEADLINE_S)
        handler.chunk(b"")

    return turn


def broken(chunks: list[bytes], content_type: str = "text/event-stream") -> Turn:
    """Begin an answer and break off."""

    def turn(handler: Handler) -> None:
        handler.start(content_type)
        for chunk in chunks:
            handler.chunk(chunk)
        drop(handler)

    return turn


def drop(handler: Handler) -> None:
    """Close the connection."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(first: list[bytes] | None = None) -> Turn:
    """Say nothing, or nothing more, until the other side has closed the connection."""

    def turn(handler: Handler) -> None:
        if first:
            handler.start("text/event-stream")
            for chunk in first:
                handler.chunk(chunk)
        handler.connection.settimeout(DEADLINE_S)
        handler.close_connection = True
        with contextlib.suppress(ConnectionError):
            assert handler.connection.recv(1) == b""
        handler.server.left.set()

    return turn


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve an application from a thread; yield its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), name="router-under-test")
        thread.start()
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
