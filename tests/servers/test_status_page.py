"""The status page in a real browser: what it shows, that it asks nobody else, and that names of others stay text."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from html import unescape
from pathlib import Path

import msgspec
import pytest
from status_kit import HOSTILE, disk_counters, pool, serving, status

from kvferry.connector.server.http import OperationServer
from kvferry.connector.server.status import ConnectionStatus, ServerStatus

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 120.0
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
"""Without these a browser talks to its maker's hosts."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


class Browser:
    """Shows a page once, from an empty profile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._visits = 0

    def visit(self, port: int, *options: str, seconds: float = 5.0) -> str:
        """Return the document after so many seconds of the page's own time."""
        self._visits += 1
        command = [
            str(CHROMIUM), *QUIET, f"--user-data-dir={self._folder / str(self._visits)}",
            f"--virtual-time-budget={round(seconds * 1000)}", "--enable-logging=stderr", *options,
            f"http://127.0.0.1:{port}/",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=True)
        said = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
        assert [
            line for line in said if "503" not in line
        ] == []  # scripts failed, or the policy forbade something
        return done.stdout.decode()

    def dom(self, port: int, seconds: float = 5.0) -> str:
        return self.visit(port, "--dump-dom", seconds=seconds)

    def picture(self, port: int, width: int, height: int, *options: str) -> bytes:
        path = self._folder / f"{self._visits}.png"
        self.visit(port, f"--screenshot={path}", f"--window-size={width},{height}", *options)
        return path.read_bytes()


@pytest.fixture(autouse=True)
def _no_answer_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own time runs faster than the server's."""
    monkeypatch.setattr("kvferry.connector.server.http._FRESH_S", 0.0)


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


def text_of(dom: str) -> str:
    """What a reader sees."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dom)))


def element_of(dom: str, id: str) -> str:
    found = re.search(rf'id="{id}"[^>]*>(.*?)</(?:span|p|section)>', dom, re.DOTALL)
    assert found is not None
    return found[1]


def aged(server: OperationServer, samples: Sequence[ServerStatus]) -> None:
    for sample in samples:
        server._history.take(sample)


@pytest.fixture
def served() -> Iterator[OperationServer]:
    with serving(lambda: status(60)) as server:
        aged(server, [status(step) for step in range(1, 60)])
        yield server


def test_it_shows_the_server_its_pools_and_its_connections(browser: Browser, served: OperationServer) -> None:
    dom = browser.dom(served.port)
    text = text_of(dom)
    assert element_of(dom, "badge") == "ready"
    assert "version 0.1.0" in text
    assert "default tenant · model 9f3c21ab" in text
    for shown in ("vllm-0", "vllm-1", "vllm-2", "7.42 GiB", "95 % of 7.81 GiB", "86 % of 64 GiB", "working"):
        assert shown in text
    assert "420 never stored" in text
    assert "nothing yet" not in re.sub(r'<div class="nothing" hidden[^>]*>.*?</div>', "", dom)


def test_the_charts_have_lines(browser: Browser, served: OperationServer) -> None:
    dom = browser.dom(served.port)
    titles = re.findall(r"<h3>(.*?)</h3>", dom)
    assert titles == ["Requests", "Lookup answered within, 99 %", "Hit rate", "Read", "Written", "Fill"]
    lines = re.findall(r'<path d="([^"]+)" style="stroke: ?var\(--series-\d\)', dom)
    assert len(lines) == 10  # one for the server's, one per tier for the pool's
    assert all(line.count("L") > 50 for line in lines)
    labels = re.findall(r'aria-label="([^"]+, now [^"]+)"', dom)
    assert "Hit rate, now 65 %" in labels
    assert "Requests, now 470/s" in labels


def test_it_goes_on_reading(browser: Browser) -> None:
    steps = iter(range(10, 100_000))
    asked = threading.Event()

    def source() -> ServerStatus:
        step = next(steps)
        if step > 12:
            asked.set()
        return status(step)

    with serving(source) as server:
        browser.dom(server.port, seconds=9.0)
    assert asked.is_set()


def test_names_of_others_stay_text(browser: Browser) -> None:
    tier = disk_counters()
    hostile = pool(60, tenant=HOSTILE, disk=tier, **{f"{HOSTILE}'\"": tier})
    hostile.problems.append(f"tier {HOSTILE} cannot be opened")
    connection = ConnectionStatus(
        engine=HOSTILE, tenant=HOSTILE, fingerprint=HOSTILE, mode=HOSTILE, connected_s=1.0, requests=1
    )
    told = status(
        60,
        hostile,
        connections=[connection],
        refused_connections={HOSTILE: 1},
        version=HOSTILE,
        server_id="x",
    )
    with serving(lambda: told) as server:
        dom = browser.dom(server.port)
    assert "<title>kvferry</title>" in dom
    assert dom.count("<script") == 1
    assert "<img" not in dom
    assert text_of(dom).count(HOSTILE) >= 8


def test_what_needs_attention_stands_out(browser: Browser) -> None:
    tier = disk_counters()
    tier.breaker = "open"
    served = msgspec.structs.replace(
        pool(60, disk=tier), dead_writers=1, problems=["tier 'redis' cannot be opened"]
    )
    with serving(lambda: status(60, served, is_ready=False, is_draining=True)) as server:
        dom = browser.dom(server.port)
    assert element_of(dom, "badge") == "draining"
    assert '<span class="chip bad" title="circuit breaker: open">paused</span>' in dom
    assert "1 engine gone while a process may still write" in text_of(dom)
    assert "tier 'redis' cannot be opened" in text_of(dom)


def test_a_server_that_goes_away_is_missed(browser: Browser) -> None:
    asked: list[None] = []

    def source() -> ServerStatus:
        asked.append(None)
        if len(asked) > 3:
            raise TimeoutError("stuck")
        return status(60)

    with serving(source) as server:
        server._is_stopping.set()  # no samples of its own
        dom = browser.dom(server.port, seconds=20.0)
    assert re.fullmatch(r"server away, last seen \d\d:\d\d:\d\d", element_of(dom, "badge"))
    assert '<body class="away">' in dom
    assert "default tenant" in text_of(dom), "what was seen last stays"


def test_a_server_without_pools_says_so(browser: Browser) -> None:
    empty = msgspec.structs.replace(status(1, connections=[], requests={}, lookup_seconds=[]), pools=[])
    with serving(lambda: empty) as server:
        text = text_of(browser.dom(server.port))
    assert "No pool yet" in text
    assert "No engine is connected." in text


def test_it_asks_nobody_but_the_server(browser: Browser, served: OperationServer, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    browser.visit(served.port, "--dump-dom", f"--log-net-log={log}")
    origin = f"http://127.0.0.1:{served.port}"
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {event["url"] for event in events if "url" in event and event.get("initiator") == origin}
    assert {f"{origin}/page.js", f"{origin}/charts.js", f"{origin}/page.css"} <= asked
    assert {url for url in asked if not url.startswith(f"{origin}/")} == set()


@pytest.mark.parametrize(("width", "height"), [(1240, 900), (500, 1800)])
def test_it_is_drawn_in_light_and_in_dark(
    browser: Browser, served: OperationServer, width: int, height: int
) -> None:
    light = browser.picture(served.port, width, height)
    dark = browser.picture(served.port, width, height, "--blink-settings=preferredColorScheme=0")
    for picture in (light, dark):
        assert struct.unpack(">II", picture[16:24]) == (width, height)
    assert light != dark
