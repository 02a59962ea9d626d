"""The operation server over real HTTP: what each address answers, to whom, and that it never hangs on the index."""

from __future__ import annotations

import itertools
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from importlib import resources

import pytest
from status_kit import HOSTILE, get, pool, serving, status

from kvferry.connector.errors import ClosedError, ConfigError
from kvferry.connector.server.http import OperationServer
from kvferry.connector.server.status import ServerStatus

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def running() -> Iterator[int]:
    """The port of one server for all tests that only ask."""
    with serving(lambda: status(10, pool(10, tenant=HOSTILE))) as server:
        yield server.port


def test_metrics_are_prometheus_text() -> None:
    with serving(lambda: status(10)) as server:
        code, headers, body = get(server.port, "/metrics")
    assert (code, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b'kvferry_loaded_blocks_total{model="9f3c21ab",tenant="",tier="disk"} 400.0' in body


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({}, 200, b"ready\n"),
        ({"is_ready": False}, 503, b"starting\n"),
        ({"is_ready": False, "is_draining": True}, 503, b"draining\n"),
    ],
)
def test_ready_means_that_clients_are_let_in(changes: dict[str, bool], code: int, text: bytes) -> None:
    with serving(lambda: status(10, **changes)) as server:
        assert get(server.port, "/readyz")[::2] == (code, text)
        assert get(server.port, "/healthz")[::2] == (200, b"ok\n")


@pytest.mark.parametrize("error", [TimeoutError("within 5 s"), ClosedError("it has ended")])
def test_an_index_thread_that_does_not_answer_is_unhealthy(error: Exception) -> None:
    def stuck() -> ServerStatus:
        raise error

    with serving(stuck) as server:
        for path in ("/healthz", "/readyz", "/metrics", "/status.json"):
            code, _, body = get(server.port, path)
            assert code == 503
            assert str(error) in body.decode()
        assert get(server.port, "/")[0] == 200


def test_many_readers_ask_the_index_thread_as_often_as_one() -> None:
    asked: list[float] = []
    entered = threading.Barrier(9)

    def source() -> ServerStatus:
        asked.append(time.monotonic())
        return status(10)

    def read(port: int) -> None:
        entered.wait(DEADLINE_S)
        get(port, "/status.json")

    with serving(source) as server:
        readers = [threading.Thread(target=read, args=(server.port,)) for _ in range(8)]
        for reader in readers:
            reader.start()
        entered.wait(DEADLINE_S)
        for reader in readers:
            reader.join(DEADLINE_S)
    assert len(asked) < 6
    assert all(later - earlier > 0.2 for earlier, later in itertools.pairwise(asked))


def test_the_status_holds_the_history_since_what_one_has() -> None:
    steps = iter(range(10, 10_000))
    with serving(lambda: status(next(steps))) as server:
        for step in (5, 6, 7):
            server._history.take(status(step))
        found = json.loads(get(server.port, "/status.json")[2])
        assert found["status"]["pools"][0]["counters"]["tiers"]["disk"]["breaker"] == "closed"
        assert found["lookups"] == found["status"]["requests"]["Lookup"]
        assert all(bound is not None for bound, _ in found["status"]["lookup_seconds"])
        count = found["history"]["count"]
        assert len(found["history"]["times"]) == count >= 3
        newer = json.loads(get(server.port, f"/status.json?since={count - 1}")[2])["history"]
        assert len(newer["times"]) == newer["count"] - count + 1
        assert get(server.port, "/status.json?since=x")[0] == 400
        assert get(server.port, f"/status.json?since={'9' * 5000}")[0] == 400
        assert get(server.port, "/status.json?since=-99999999999")[0] == 200


def test_samples_are_taken_without_anybody_asking() -> None:
    taken = threading.Event()

    def source() -> ServerStatus:
        taken.set()
        return status(10)

    with serving(source):
        assert taken.wait(DEADLINE_S)


# The page


def test_the_page_comes_with_all_it_needs_and_nothing_from_elsewhere() -> None:
    with serving(lambda: status(10)) as server:
        code, headers, body = get(server.port, "/")
        assert (code, headers["content-type"]) == (200, "text/html; charset=utf-8")
        page = body.decode()
        needed = re.findall(r'(?:src|href)="([^"]+)"', page)
        needed += re.findall(r'from "\./([^"]+)"', get(server.port, "/page.js")[2].decode())
        assert {"page.js", "charts.js", "page.css"} <= set(needed)
        for name in needed:
            assert get(server.port, f"/{name}")[0] == 200
    for asset in resources.files("kvferry.connector.server").joinpath("page").iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", asset.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, asset.name


def test_the_page_writes_no_markup() -> None:
    for name in ("page.js", "charts.js"):
        source = resources.files("kvferry.connector.server").joinpath("page", name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", source)
    html = resources.files("kvferry.connector.server").joinpath("page", "index.html").read_text()
    assert not re.search(r"<script>|<style| style=| on\w+=", html), "the policy forbids these"


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/healthz", "/page.js", "/nowhere"])
def test_every_answer_has_the_strict_headers(running: int, path: str) -> None:
    _, headers, _ = get(running, path)
    policy = headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


# Who may ask what


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(running: int, method: str) -> None:
    assert get(running, "/status.json", method)[0] == 405
    assert get(running, "/status.json", "HEAD")[::2] == (200, b"")


@pytest.mark.parametrize("path", ["/../status.json", "/page/../http.py", "/%2e%2e/http.py", "/docs", "//"])
def test_only_what_is_named_is_served(running: int, path: str) -> None:
    assert get(running, path)[0] == 404


def test_a_foreign_name_for_this_machine_is_refused() -> None:
    """Else a web page whose own name points to 127.0.0.1 could read the status in a browser here."""
    with serving(lambda: status(10)) as server:
        for host in ("localhost:9464", "127.0.0.1", "[::1]:9464", "10.0.0.7"):
            assert get(server.port, "/healthz", Host=host)[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "["):
            assert get(server.port, "/status.json", Host=host)[0] == 400


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = OperationServer(f"127.0.0.1:{port}", lambda: status(10), logging.getLogger())
        with pytest.raises(
            ConfigError, match=f"server.http: cannot listen on 127.0.0.1 port {port}: .* in use"
        ):
            server.start()
        server.close(time.monotonic())


@pytest.mark.parametrize(
    "address", ["", "9464", ":9464", "localhost", "localhost:", "localhost:x", "h:65536"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.http: .* is not host:port"):
        OperationServer(address, lambda: status(10), logging.getLogger())


def test_beyond_this_machine_it_says_that_anybody_can_read(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda: status(10), "0.0.0.0:0") as server:
        assert get(server.port, "/healthz", Host="cache.example")[0] == 200
    assert "no authentication" in caplog.text


def test_on_this_machine_it_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda: status(10)) as server:
        get(server.port, "/healthz")
    assert caplog.text == ""


def test_after_close_nothing_of_it_runs() -> None:
    before = {thread.name for thread in threading.enumerate()}
    with serving(lambda: status(10)) as server:
        names = {thread.name for thread in threading.enumerate()}
        assert {"kvferry-http", "kvferry-history"} <= names
        port = server.port
        get(port, "/healthz")
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith("kvferry")}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    server.close(time.monotonic())


def test_clients_beyond_the_limit_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.connector.server.http._MAX_CONNECTIONS", 4)
    with serving(lambda: status(10)) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        end = time.monotonic() + DEADLINE_S
        while get(server.port, "/healthz")[0] != 503:
            assert time.monotonic() < end
        for one in idle:
            one.close()
        while get(server.port, "/healthz")[0] != 200:
            assert time.monotonic() < end
