"""``kvferry top``: a cache server's status in the terminal, live."""

from __future__ import annotations

import contextlib
import select
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, get_origin

import click
import msgspec

from kvferry.connector.cli.output import clean
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.memory import format_bytes
from kvferry.connector.server.history import Column, PoolHistory, StatusDocument, TierHistory
from kvferry.connector.server.status import ConnectionStatus, PoolStatus, ServerStatus
from kvferry.connector.service import HOST

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["fetch", "frame", "sparkline", "top"]

_SAMPLES = 30
"""A minute, at a sample each two seconds."""
_TIMEOUT_S = 10.0
_MAX_BYTES = 64 << 20
_MAX_CONNECTIONS = 12
_SPARKS = "▁▂▃▄▅▆▇█"
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_STATES = {"closed": ("working", "green"), "half_open": ("trying", "yellow"), "open": ("paused", "red")}


class _Room(NamedTuple):
    """What a terminal has room for."""

    columns: int
    """From so many columns on."""
    bar: int
    sparks: int
    has_size: bool = False
    has_totals: bool = False
    has_speed: bool = True


_ROOMS = (
    _Room(152, 20, 12, True, True),
    _Room(118, 12, 12, False, True),
    _Room(79, 6, 6),
    _Room(58, 6, 0),
    _Room(0, 6, 0, has_speed=False),
)


@click.command()
@click.option("--url", default="http://127.0.0.1:9464", show_default=True, help="Where the server's page is.")
@click.option("--once", is_flag=True, help="Print one frame and exit.")
@click.option(
    "--interval",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.2, 3600.0),
    help="Seconds between frames.",
)
def top(url: str, once: bool, interval: float) -> None:
    """Watch a cache server: fill, hit rate and throughput of every tier.

    Sparklines show the last minute. Press q or Ctrl-C to quit.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise click.ClickException(
            "kvferry top needs a library that is not here: pip install 'kvferry[server]'"
        ) from error
    console = Console()
    document = fetch(url)
    if once:
        console.print(frame(document, console.width))
        return
    ctrl_c = _CtrlC()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _single_keys(),
        ctrl_c.put_off(),
        Live(frame(document, console.width), console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            with ctrl_c.interrupting():
                if _is_quit_pressed(interval):
                    return
                try:
                    document, problem = fetch(url), ""
                except KVFerryError as error:
                    problem = str(error)
            live.update(frame(document, console.width, problem), refresh=True)


def fetch(url: str) -> StatusDocument:
    """Return a server's status and its last minute. Blocks for some seconds at most.

    Raises:
        ConfigError: The address is none.
        KVFerryError: Nobody answers there, or not a cache server of this version.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError("--url", f"{clean(url)!r} is no web address", "write http://127.0.0.1:9464")
    where = f"{url.rstrip('/')}/status.json?since=-{_SAMPLES}"
    try:
        with _WITHOUT_PROXY.open(where, timeout=_TIMEOUT_S) as answer:
            return msgspec.json.decode(answer.read(_MAX_BYTES), type=StatusDocument, dec_hook=_counter)
    except urllib.error.HTTPError as error:
        with error:
            why = (
                f"the server at {url} answers {error.code}: {clean(error.read(200).decode(errors='replace'))}"
            )
        raise KVFerryError(why.strip()) from error
    except (OSError, ValueError) as error:
        if isinstance(error, msgspec.DecodeError):
            raise KVFerryError(f"{url} is not a cache server of this version: {error}") from error
        reason = getattr(error, "reason", error)
        raise KVFerryError(
            f"no cache server at {url}: {reason}; start one with `kvferry serve`, or name its page with --url"
        ) from error


def _counter(kind: type, found: object) -> object:
    """Make a ``Counter`` of a JSON object, which msgspec does not do by itself."""
    if (get_origin(kind) or kind) is Counter and isinstance(found, dict):
        return Counter(msgspec.convert(found, dict[str, int]))
    raise msgspec.ValidationError(f"a {kind} cannot be read")


def frame(document: StatusDocument, width: int, problem: str = "") -> RenderableType:
    """Return one picture of a server.

    Args:
        document: What it told.
        width: Columns of the terminal.
        problem: Why the picture is an old one; empty if it is not.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(document, problem), Text()]
    past = {(pool.tenant, pool.fingerprint): pool for pool in document.history.pools}
    for pool in document.status.pools:
        parts += [_pool_line(pool), _tiers(pool, past.get((pool.tenant, pool.fingerprint)), width)]
        parts += [Text(f"  {clean(line)}", style="red") for line in pool.problems]
        parts.append(Text())
    if not document.status.pools:
        parts += [Text("no pool yet: the first engine that connects opens one", style="dim"), Text()]
    parts.append(_connections(document.status.connections))
    return Group(*parts)


def sparkline(values: Column, top: float | None = None) -> str:
    """Return a line of blocks, a blank where there was nothing to measure.

    Args:
        values: Samples, oldest first.
        top: What a full block stands for; the largest value if None.
    """
    highest = top or max((value for value in values if value is not None), default=0.0) or 1.0
    return "".join(
        " " if value is None else _SPARKS[min(7, max(0, int(8 * value / highest)))] for value in values
    )


def _head(document: StatusDocument, problem: str) -> RenderableType:
    from rich.text import Text

    status, history = document.status, document.history
    state, style = _state(status)
    if problem:
        state, style = f"away, last seen {time.strftime('%H:%M:%S', time.localtime(status.now))}", "red"
    line = Text.assemble(("kvferry ", "bold"), (state, f"bold {style}"))
    line.append(f"  {clean(status.version)}  up {_lasting(status.now - status.started)}", "dim")
    requests, p99 = _newest(history.requests), _newest(history.lookup_p99)
    if requests is not None:
        line.append(f"  {requests:,.0f} requests/s ")
        line.append(sparkline(history.requests), "cyan")
    if p99 is not None:
        line.append(f"  lookups within {_seconds(p99)}")
    if problem:
        line.append(f"\n{clean(problem)}", "red")
    return line


def _state(status: ServerStatus) -> tuple[str, str]:
    if status.is_draining:
        return "draining", "yellow"
    return ("ready", "green") if status.is_ready else ("starting", "yellow")


def _pool_line(pool: PoolStatus) -> RenderableType:
    from rich.text import Text

    line = Text.assemble((f"{clean(pool.tenant, 40) or 'default'} {clean(pool.fingerprint)}", "bold"))
    counters = pool.counters
    held = f"{pool.connections} connections, {counters.leases} leases, {counters.reservations} reservations"
    line.append(f"  {format_bytes(pool.block_bytes)} a block, {held}", "dim")
    if pool.dead_writers:
        line.append(f", {pool.dead_writers} dead writers", "yellow")
    return line


def _tiers(pool: PoolStatus, past: PoolHistory | None, width: int) -> RenderableType:
    from rich.text import Text

    room = next(room for room in _ROOMS if width >= room.columns)
    table = _table("tier", "fill", *(["size"] if room.has_size else []), "hits")
    for title in ("read", "written") if room.has_speed else ():
        table.add_column(title, no_wrap=True)
    for title in ("evicted", "refused") if room.has_totals else ():
        table.add_column(title, justify="right")
    table.add_column("state")
    counters = pool.counters
    sizes: list[tuple[str, int, int | None, int, int, str]] = [
        (HOST, counters.used_bytes, counters.capacity_bytes, counters.host_evictions, 0, "closed")
    ]
    for name, tier in counters.tiers.items():
        refused = sum(tier.refused.values())
        sizes.append((name, tier.used_bytes, tier.capacity_bytes, tier.evictions, refused, tier.breaker))
    for name, size, capacity, evictions, refused, breaker in sizes:
        rates = past.tiers.get(name) if past is not None else None
        state, style = _STATES.get(breaker, (clean(breaker), "red"))
        row: list[RenderableType] = [_plain(f"  {name}"), _bar(size, capacity, room.bar)]
        row += [_size(size, capacity)] if room.has_size else []
        row += list(_rates(rates, room.sparks))[: 3 if room.has_speed else 1]
        row += [f"{evictions:,}", f"{refused:,}"] if room.has_totals else []
        table.add_row(*row, Text(state, style))
    return table


def _rates(rates: TierHistory | None, sparks: int) -> Iterator[RenderableType]:
    """Yield the cells of hit rate, bytes read and bytes written."""
    from rich.text import Text

    if rates is None:
        yield from ("-", "-", "-")
        return
    for values, top, style in (
        (rates.hit_rate, 1.0, "green"),
        (rates.loaded, None, "cyan"),
        (rates.stored, None, "magenta"),
    ):
        newest = _newest(values)
        known = "-" if newest is None else f"{newest:.0%}" if top else f"{newest / 1e6:,.1f} MB/s"
        cell = Text(f"{known:>{4 if top else 10}}")
        if sparks:
            cell.append(f" {sparkline(values[-sparks:], top):>{sparks}}", style)
        yield cell


def _bar(used: int, capacity: int | None, cells: int) -> RenderableType:
    from rich.text import Text

    if not capacity:
        return Text("no bound", "dim")
    part = min(1.0, used / capacity)
    filled = round(part * cells)
    return Text.assemble(("━" * filled, "blue"), ("━" * (cells - filled), "bright_black"), f" {part:>4.0%}")


def _size(used: int, capacity: int | None) -> str:
    return f"{format_bytes(used)} of {format_bytes(capacity)}" if capacity else format_bytes(used)


def _connections(connections: Sequence[ConnectionStatus]) -> RenderableType:
    table = _table("connection", "tenant", "model", "mode")
    for title in ("since", "requests"):
        table.add_column(title, justify="right")
    longest = sorted(connections, key=lambda one: -one.connected_s)
    for one in longest[:_MAX_CONNECTIONS]:
        names = (clean(one.engine, 32) or "-", clean(one.tenant, 20) or "default", one.fingerprint, one.mode)
        table.add_row(*map(_plain, names), _lasting(one.connected_s), f"{one.requests:,}")
    if len(longest) > _MAX_CONNECTIONS:
        table.add_row(f"and {len(longest) - _MAX_CONNECTIONS} more")
    if not longest:
        table.add_row("none")
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, no_wrap=index > 0, overflow="ellipsis")
    return table


def _plain(text: str) -> RenderableType:
    """Return text of which nothing is taken for rich's markup."""
    from rich.text import Text

    return Text(clean(text))


def _newest(values: Column) -> float | None:
    return values[-1] if values else None


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _lasting(seconds: float) -> str:
    whole = int(max(0.0, seconds))
    for unit, size, below, lower in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {lower}"
    return f"{whole} s"


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Let keys be read without Enter, where standard input is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin.fileno())
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class _CtrlC:
    """Ctrl-C, put off but for where it may interrupt.

    In the middle of a drawing it would keep rich from leaving the screen, in a finalizer it would be lost.
    """

    def __init__(self) -> None:
        self._was_pressed = False
        self._may_interrupt = False

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Take Ctrl-C over, unless it is ignored, as in what a shell runs in the background."""
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let Ctrl-C interrupt what runs in here, also if it was pressed before."""
        try:
            self._may_interrupt = True
            if self._was_pressed:
                raise KeyboardInterrupt
            yield
        finally:
            self._may_interrupt = False

    def _press(self, number: int, where: FrameType | None) -> None:
        self._was_pressed = True
        if self._may_interrupt:
            raise KeyboardInterrupt


def _is_quit_pressed(wait_s: float) -> bool:
    """Wait for a key for so long; tell whether it was q, or Ctrl-D."""
    if not sys.stdin.isatty():
        time.sleep(wait_s)
        return False
    ready, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "", "\x04")
