"""The operation server: metrics, health and the status page over HTTP, read-only.

``/metrics`` for Prometheus, ``/healthz`` (the index thread answers) and ``/readyz`` (and lets clients in) for
supervisors, ``/status.json`` and the page at ``/`` that shows it. There is no authentication and nothing can be
changed; by default it listens on this machine only.

Who owns what
  * Thread ``kvferry-http`` runs the event loop; requests that need the status are answered on the loop's
    worker threads, because the index thread may take its time.
  * Thread ``kvferry-history`` samples the status for the page's charts.
  * The status is asked for by one of them at a time and kept for ``_FRESH_S``: many readers cost as much as one.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvferry.connector.address import is_loopback
from kvferry.connector.errors import ClosedError, ConfigError
from kvferry.connector.server.exporting import Scraper
from kvferry.connector.server.history import INTERVAL_S, History, document
from kvferry.connector.server.status import ServerStatus

__all__ = ["OperationServer"]

_FRESH_S = 0.25
_WAIT_S = 10.0
_START_S = 10.0
_MAX_CONNECTIONS = 64
_KEEP_ALIVE_S = 10
_BACKLOG = 64
_ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_Endpoint = Callable[[Request], Response]


class OperationServer:
    """Serves metrics, health and the status page.

    Args:
        address: ``host:port``, with the port 0 for any free one; an IPv6 host in brackets.
        status: Returns the server's status; called from this server's threads, one at a time. May raise
            ``TimeoutError`` or ``ClosedError``.
        logger: Where problems are reported.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, address: str, status: Callable[[], ServerStatus], logger: logging.Logger) -> None:
        self._host, self._wanted_port = _host_and_port(address)
        self._logger = logger
        self._source = _Fresh(status)
        self._scraper = Scraper(self._source.get)
        self._history = History()
        self._is_stopping = threading.Event()
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._threads: list[threading.Thread] = []

    @property
    def port(self) -> int:
        """The port it listens on; the configured one before ``start``."""
        return self._socket.getsockname()[1] if self._socket is not None else self._wanted_port

    @property
    def url(self) -> str:
        """Where the status page is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Listen and begin to answer. Returns when a connection would be answered.

        Raises:
            ConfigError: The address cannot be had.
        """
        self._socket = self._listen()
        if not is_loopback(self._host):
            self._logger.warning(
                "the status page on %s is read-only, but whoever reaches it can read it: it has no authentication",
                self._host,
            )
        config = uvicorn.Config(
            self._application(),
            access_log=False,
            h11_max_incomplete_event_size=16 << 10,
            http="h11",
            lifespan="off",
            limit_concurrency=_MAX_CONNECTIONS,
            log_config=None,
            log_level=logging.WARNING,
            loop="asyncio",
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        for name, work in (("kvferry-http", self._serve), ("kvferry-history", self._sample)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        deadline = time.monotonic() + _START_S
        while not self._server.started and self._threads[0].is_alive() and time.monotonic() < deadline:
            self._is_stopping.wait(0.01)

    def close(self, deadline: float) -> None:
        """End both threads and free the port. Idempotent, also before ``start``.

        Args:
            deadline: Monotonic time to be done by; a thread that is not is logged and left behind.
        """
        self._is_stopping.set()
        if self._server is not None:
            self._server.should_exit = True
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._logger.warning("thread %s did not end in time; left behind", thread.name)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if self._socket is not None:
            self._socket.close()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self._wanted_port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(
                "server.http",
                f"cannot listen on {self._host} port {self._wanted_port}: {error.strerror or error}",
                'choose another address, or "" for no status page',
            ) from error

    def _serve(self) -> None:
        assert self._server is not None
        assert self._socket is not None
        try:
            self._server.run(sockets=[self._socket])
        except Exception:  # boundary: the cache goes on without its status page
            self._logger.exception("the status page's server ended")

    def _sample(self) -> None:
        while not self._is_stopping.is_set():
            with contextlib.suppress(TimeoutError, ClosedError):  # a gap in the charts
                self._history.take(self._source.get())
            self._is_stopping.wait(INTERVAL_S)

    def _application(self) -> Starlette:
        routes = [
            Route("/metrics", _with_status(self._metrics)),
            Route("/healthz", _with_status(self._healthz)),
            Route("/readyz", _with_status(self._readyz)),
            Route("/status.json", _with_status(self._status_json)),
            *(Route(path, _asset(*asset)) for path, asset in _ASSETS.items()),
        ]
        guard = Middleware(_Guard, is_local=is_loopback(self._host))
        return Starlette(routes=routes, middleware=[guard])

    def _metrics(self, request: Request) -> Response:
        body, content_type = self._scraper.scrape(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    def _healthz(self, request: Request) -> Response:
        self._source.get()
        return _text("ok\n")

    def _readyz(self, request: Request) -> Response:
        status = self._source.get()
        if status.is_ready and not status.is_draining:
            return _text("ready\n")
        return _text("draining\n" if status.is_draining else "starting\n", HTTPStatus.SERVICE_UNAVAILABLE)

    def _status_json(self, request: Request) -> Response:
        try:
            since = int(request.query_params.get("since", "0"))
        except ValueError:
            return _text("since: expected a whole number\n", HTTPStatus.BAD_REQUEST)
        found = document(self._source.get(), self._history.report(since))
        return Response(msgspec.json.encode(found), media_type="application/json")


class _Fresh:
    """A status that is asked for at most once in ``_FRESH_S``, by one thread at a time.

    A failure is as good as an answer for so long: who waits behind a stuck index thread does not wait for it again.
    """

    def __init__(self, status: Callable[[], ServerStatus]) -> None:
        self._status = status
        self._lock = threading.Lock()
        self._last: ServerStatus | TimeoutError | ClosedError | None = None
        self._asked = 0.0

    def get(self) -> ServerStatus:
        """Return the status; raise what asking for it raised."""
        if not self._lock.acquire(timeout=_WAIT_S):
            raise TimeoutError("somebody else waits for the index thread already")
        try:
            if self._last is None or time.monotonic() - self._asked > _FRESH_S:
                self._last = self._ask()
                self._asked = time.monotonic()
            if isinstance(self._last, ServerStatus):
                return self._last
            raise self._last
        finally:
            self._lock.release()

    def _ask(self) -> ServerStatus | TimeoutError | ClosedError:
        try:
            return self._status()
        except (TimeoutError, ClosedError) as error:
            return error


class _Guard:
    """Puts the same headers on every answer, and on this machine's own address refuses foreign names.

    A web page elsewhere may let its own name point to 127.0.0.1 in order to read what listens there.
    """

    def __init__(self, app: ASGIApp, is_local: bool) -> None:
        self._app = app
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app: ASGIApp = self._app
        if self._is_local and not _is_own_name(Headers(scope=scope).get("host", "")):
            app = _text("this address answers to localhost and to IP addresses\n", HTTPStatus.BAD_REQUEST)
        await app(scope, receive, send_with_headers)


def _with_status(endpoint: _Endpoint) -> _Endpoint:
    """Answer 503 where the index thread does not answer."""

    def answer(request: Request) -> Response:
        try:
            return endpoint(request)
        except (TimeoutError, ClosedError) as error:
            return _text(f"the index thread does not answer: {error}\n", HTTPStatus.SERVICE_UNAVAILABLE)

    return answer


def _asset(name: str, media_type: str) -> _Endpoint:
    body = importlib.resources.files("kvferry.connector.server").joinpath("page", name).read_bytes()

    def answer(request: Request) -> Response:
        return Response(body, headers={"Content-Type": media_type})

    return answer


def _text(text: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return PlainTextResponse(text, status)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise ConfigError("server.http", f"{address!r} is not host:port", "write 127.0.0.1:9464")
    return host, int(port)


def _is_own_name(host_header: str) -> bool:
    try:
        name = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    return name in ("", "localhost") or _ip_address(name) is not None


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
