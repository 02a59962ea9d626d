"""``kvferry top``: one readable frame at every width, and a clear line where there is no server."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console
from status_kit import HOSTILE, disk_counters, pool, serving, status

from kvferry.connector.cli import main
from kvferry.connector.cli.top import fetch, frame, sparkline
from kvferry.connector.errors import KVFerryError
from kvferry.connector.server.history import History, StatusDocument, document
from kvferry.connector.server.status import ConnectionStatus, ServerStatus

DEADLINE_S = 20.0


def told(newest: ServerStatus | None = None) -> StatusDocument:
    history = History()
    for step in range(1, 40):
        history.take(status(step))
    newest = newest or status(40)
    history.take(newest)
    return document(newest, history.report(-30))


def shown(found: StatusDocument, width: int = 160, problem: str = "") -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115  # closed below
    try:
        console.print(frame(found, width, problem))
        return console.export_text()
    finally:
        console.file.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["top", *arguments])


def test_one_frame_tells_the_essentials() -> None:
    text = shown(told())
    assert "kvferry ready" in text
    assert "470 requests/s" in text
    host, disk = (line.split() for line in text.splitlines() if line.strip().startswith(("host", "disk")))
    assert {"95%", "45%", "66.1", "working", "520"} <= set(host)
    assert {"86%", "20%", "21.0", "13.1", "160", "2", "working"} <= set(disk)
    assert "vllm-1" in text


@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, 120, 160, 240])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = shown(told(), width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    rows = [line for line in lines if line.strip().startswith(("host", "disk"))]
    assert len(rows) == 2, "a tier is one line, and its name can be read"
    assert all("%" in row for row in rows)
    if width > 40:
        assert all(row.rstrip().endswith("working") for row in rows)


def test_states_that_need_attention_are_told() -> None:
    tier = disk_counters()
    tier.breaker = "open"
    served = pool(40, disk=tier)
    served.problems.append("tier 'redis' cannot be opened: refused")
    text = shown(told(status(40, served, is_draining=True, is_ready=False)))
    assert "kvferry draining" in text
    assert "paused" in text
    assert "tier 'redis' cannot be opened" in text
    assert "connection refused" in shown(told(), problem="connection refused")
    assert "away, last seen" in shown(told(), problem="connection refused")


def test_names_of_others_are_text() -> None:
    """Neither rich's markup nor a terminal's escapes come from outside."""
    name = f"[red]x[/red]\x1b]0;owned\x07{HOSTILE}"
    connection = ConnectionStatus(
        engine=name, tenant=name, fingerprint="9f3c21ab", mode="map", connected_s=1.0, requests=1
    )
    text = shown(told(status(40, pool(40, tenant=name), connections=[connection])))
    assert "\x1b" not in text
    assert "[red]x[/red]?]0;owned?" in text


def test_a_server_without_pools_or_history_has_a_frame() -> None:
    empty = status(1, connections=[], lookup_seconds=[], requests={})
    bare = document(
        ServerStatus(**{**{name: getattr(empty, name) for name in empty.__struct_fields__}, "pools": []}),
        History().report(),
    )
    text = shown(bare)
    assert "no pool yet" in text
    assert "none" in text


def test_a_sparkline_has_a_place_for_every_sample() -> None:
    assert sparkline([0.0, 0.5, 1.0], 1.0) == "▁▅█"
    assert sparkline([None, 7.0, None]) == " █ "
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([5.0], 1.0) == "█"


def test_once_prints_a_frame_of_a_real_server_and_exits() -> None:
    with serving(lambda: status(10)) as server:
        result = run("--once", "--url", f"http://127.0.0.1:{server.port}/")
    assert result.exit_code == 0
    assert "kvferry ready" in result.output
    assert "\x1b" not in result.output


def test_no_server_is_a_clear_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = run("--once", "--url", url)
    assert result.exit_code == 1
    assert f"Error: no cache server at {url}:" in result.output
    assert "kvferry serve" in result.output


def test_a_server_that_does_not_answer_is_told_apart() -> None:
    def stuck() -> ServerStatus:
        raise TimeoutError("within 5 s")

    with (
        serving(stuck) as server,
        pytest.raises(KVFerryError, match=r"answers 503: the index thread does not"),
    ):
        fetch(f"http://127.0.0.1:{server.port}")


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"hello": 1}')

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(DEADLINE_S)


def test_something_else_at_the_address_is_told(stranger: str) -> None:
    result = run("--once", "--url", stranger)
    assert result.exit_code == 1
    assert "is not a cache server of this version" in result.output


@pytest.mark.parametrize("url", ["127.0.0.1:9464", "file:///etc/passwd", ""])
def test_only_web_addresses_are_taken(url: str) -> None:
    result = run("--once", "--url", url)
    assert result.exit_code == 1
    assert "is no web address" in result.output


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    result = run("--once")
    assert result.exit_code == 1
    assert "pip install 'kvferry[server]'" in result.output


def read_until(terminal: int, wanted: bytes) -> None:
    seen, end = b"", time.monotonic() + DEADLINE_S
    while wanted not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)


@contextlib.contextmanager
def live(url: str, first: str = "") -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run it in a terminal, after the statements ``first``; yield the process and our end of the terminal."""
    mine, theirs = pty.openpty()
    # What a shell runs in the background ignores Ctrl-C, these tests perhaps, and what they start would, too.
    main = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    main += f"{first}\nfrom kvferry.connector.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", main, "top", "--interval", "0.2", "--url", url],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    try:
        os.close(theirs)
        yield child, mine
    finally:
        child.kill()
        child.wait(DEADLINE_S)
        os.close(mine)


@pytest.mark.parametrize("how", ["q", "ctrl-c"])
def test_live_it_draws_until_it_is_told_to_quit(how: str) -> None:
    steps = iter(range(10, 10_000))
    with (
        serving(lambda: status(next(steps))) as server,
        live(f"http://127.0.0.1:{server.port}") as (child, terminal),
    ):
        read_until(terminal, b"kvferry")
        read_until(terminal, b"kvferry")  # it draws again
        os.write(terminal, b"q") if how == "q" else child.send_signal(signal.SIGINT)
        read_until(terminal, b"\x1b[?1049l")  # back to the screen as it was
        assert child.wait(DEADLINE_S) == 0


INTERRUPT_EVERY_DRAWING = """
import os
from rich.console import Console

def interrupted(console, draw=Console._exit_buffer):
    os.kill(os.getpid(), signal.SIGINT)
    draw(console)

Console._exit_buffer = interrupted
"""


def test_ctrl_c_in_the_middle_of_a_drawing_gives_the_screen_back() -> None:
    with (
        serving(lambda: status(10)) as server,
        live(f"http://127.0.0.1:{server.port}", INTERRUPT_EVERY_DRAWING) as (child, terminal),
    ):
        read_until(terminal, b"\x1b[?1049l")
        assert child.wait(DEADLINE_S) == 0
