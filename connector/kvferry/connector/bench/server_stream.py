"""A cache server over TCP on loopback against a plain socket: the same bytes, threads and calls.

The client's side is the ``remote`` tier as in service: frames are sealed before they are stored and verified after
they are loaded. The server, a process of its own, verifies what it takes in. The raw side pulls as many bytes
from another process's memory into the same slots, or pushes them there; nobody looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.host import MIB, SHAPES, SMALL
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.raw_socket import RawSocket, raw_server
from kvferry.connector.bench.serving import Serving, serving
from kvferry.connector.bench.tier_side import TierSide, against_raw, context_of
from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import typed_options
from kvferry.connector.tier import DEFAULT_THREADS, Tier

__all__ = ["SERVER_STREAM"]

GOALS = {"load": Goal(0.7, at_least=True)}
ROUND_BYTES = 96 * MIB
KEPT_ROUNDS = 3
"""Room of the server, in rounds."""


def _measure(context: BenchContext) -> Sequence[Figure]:
    shapes = SMALL if context.quick else SHAPES
    plan = [(name, layout, threads) for threads in (1, DEFAULT_THREADS) for name, layout in shapes.items()]
    figures: list[Figure] = []
    for index, (name, layout, threads) in enumerate(plan):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(plan))

        figures += _compare(name, layout, threads, context.quick, progress)
    return figures


def _compare(
    name: str, layout: BlockLayout, count: int, quick: bool, progress: Callable[[float], None]
) -> list[Figure]:
    """Store and load blocks of one shape over ``count`` connections, both sides in turn."""
    blocks = (MIB if quick else ROUND_BYTES) // layout.slot_bytes
    with ExitStack() as stack:
        server = stack.enter_context(serving(KEPT_ROUNDS * blocks * layout.slot_bytes + MIB))
        arena = Arena.create(blocks, layout.slot_bytes)
        stack.callback(arena.close)
        threads = stack.enter_context(ThreadPoolExecutor(count, "kvferry-bench"))
        opened = _open_tier(server, layout, count)
        stack.callback(opened.close)
        tier = TierSide(opened, layout, arena, threads)
        port = stack.enter_context(raw_server(blocks, layout.payload_bytes))
        raw = RawSocket(port, layout, arena, threads)
        stack.callback(raw.close)
        tier.store(0)
        sides = {"store": tier.store, "raw store": raw.store, "load": tier.load, "raw load": raw.load}
        seconds = interleaved({**sides, "sweep": lambda _: tier.sweep()}, 3 if quick else 15, progress)
    what = f"{name} blocks, {count} connection{'s' if count > 1 else ''}"
    calls = {"store": "socket", "load": "socket"}
    return against_raw("server", what, blocks * layout.payload_bytes, seconds, calls, GOALS)


def _open_tier(server: Serving, layout: BlockLayout, threads: int) -> Tier:
    """Open a remote tier through the registry, as a service would."""
    registry = PluginRegistry()
    try:
        tier_type = registry.tier_type("remote")
    except ConfigError as error:
        raise BenchSkipped(f"no remote tier: {error}") from error
    options = typed_options(tier_type, {"servers": [server.tcp], "token": server.token}, "tiers[0]")
    return tier_type.create(options, context_of("remote", layout, threads))


SERVER_STREAM = BenchCase(
    "server-stream", "a cache server over TCP on loopback, against a plain socket", _measure
)
