"""Loads of an engine on this machine's cache server against memcpy: lease, scatter into pages, release.

The engine's side is what it does in service: its scheduler asks the server, a process of its own, for a lease, its
worker copies out of the arena that both map and makes sure of the slots' generations, and the lease is given back.
The limit is ``np.copyto`` of as many contiguous bytes between the same two regions. Both move cold memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.host import MIB, SHAPES, SMALL, engine_memory, page_layout
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.serving import Serving, serving
from kvferry.connector.bench.tier_side import FINGERPRINT
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.service import Lease, Reservation
from kvferry.connector.staging import HostStaging, PageIds

__all__ = ["SERVER_MAP"]

GOAL = Goal(0.7, at_least=True)
OWNER = "bench"
RESERVED_AT_ONCE = 64
_WAIT_S = 20.0


def _measure(context: BenchContext) -> Sequence[Figure]:
    shapes = SMALL if context.quick else SHAPES
    figures: list[Figure] = []
    for index, (name, layout) in enumerate(shapes.items()):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(shapes))

        seconds, moved = _compare(layout, context.quick, progress)
        figures.append(
            Figure(
                name=f"load from a local cache server, {name} blocks",
                value=moved / seconds["load"] / 1e9,
                unit="GB/s",
                raw=moved / seconds["memcpy"] / 1e9,
                raw_name="memcpy",
                goal=GOAL,
            )
        )
    return figures


def _compare(
    layout: BlockLayout, quick: bool, progress: Callable[[float], None]
) -> tuple[dict[str, float], int]:
    """Return median seconds by side, and the bytes that each call moves."""
    blocks = (4 if quick else 512) * MIB // layout.slot_bytes
    batch = max(1, min(blocks // 4, (1 if quick else 64) * MIB // layout.slot_bytes))
    with ExitStack() as stack:
        server = stack.enter_context(serving((blocks + 2) * layout.slot_bytes + MIB))
        engine = _Engine(server, layout, blocks)
        stack.callback(engine.close)
        engine.fill()

        def chosen(repetition: int) -> range:
            first = (repetition + 1) * batch
            return range(first, first + batch)

        sides: dict[str, Callable[[int], None]] = {
            "load": lambda repetition: engine.load(chosen(repetition)),
            "memcpy": lambda repetition: engine.copy(chosen(repetition)),
        }
        seconds = interleaved(sides, 3 if quick else 21, progress)
    return seconds, batch * layout.payload_bytes


class _Engine:
    """An engine's scheduler and worker in one: a client of the server, pages, and the mapped arena.

    Args:
        server: Where the blocks are.
        layout: Of the blocks.
        blocks: How many there are, in the server as in the pages.
    """

    def __init__(self, server: Serving, layout: BlockLayout, blocks: int) -> None:
        logger = logging.getLogger(f"{__name__}.client")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        config = Config(service=server.unix, token=server.token)
        self._service = ClientService(config, layout, FINGERPRINT, OWNER, logger=logger)
        self._until("connect", lambda: self._service.arena)
        handle = self._service.arena
        assert handle is not None
        self._arena = Arena.attach(handle)
        self._keys = [BlockKey(number.to_bytes(KEY_BYTES, "big")) for number in range(blocks)]
        pages = page_layout(layout, "heads", layout.block_tokens, blocks)
        self._pages: npt.NDArray[np.uint8] = engine_memory(pages.extent_bytes())
        self._staging = HostStaging(self._pages, pages, layout, layout.shard(0, 1))
        self._length = layout.payload_bytes
        self._slots: list[memoryview] = []

    def fill(self) -> None:
        """Save all blocks."""
        for first in range(0, len(self._keys), RESERVED_AT_ONCE):
            keys = self._keys[first : first + RESERVED_AT_ONCE]
            reservation = self._until("reserve", partial(self._service.reserve, OWNER, keys))
            assert isinstance(reservation, Reservation)
            slots = np.array([place.slot for place in reservation.places])
            self._staging.gather(
                _as_blocks(len(self._slots) + np.arange(len(slots))), slots, self._arena.slots_array
            )
            self._slots.extend(self._arena.slot(slot) for slot in slots.tolist())
            self._service.commit(reservation, keys)
        self._until("save", lambda: self._service.lookup(self._keys).ready == len(self._keys))

    def load(self, indices: range) -> None:
        """Load blocks into pages that are not those they came from."""
        count = len(self._keys)
        keys = [self._keys[index % count] for index in indices]
        lease = self._until("lease", lambda: self._leased(keys))
        assert isinstance(lease, Lease)
        slots = np.array([place.slot for place in lease.places])
        pages = (np.array(indices) + count // 2) % count
        self._staging.scatter(_as_blocks(pages), slots, self._arena.slots_array)
        if any(self._arena.generation(place.slot) != place.generation for place in lease.places):
            raise BenchSkipped("a leased slot was given to another block")
        self._service.release(lease)

    def copy(self, indices: range) -> None:
        """Copy the bytes of as many blocks between the same regions."""
        count = len(self._keys)
        for index in indices:
            start = (index + count // 2) % count * self._length
            source = np.asarray(self._slots[index % count])[: self._length]
            np.copyto(self._pages[start : start + self._length], source)

    def close(self) -> None:
        """Leave the server."""
        self._slots.clear()
        if hasattr(self, "_arena"):
            self._arena.close()
        self._service.close(1.0)

    def _leased(self, keys: Sequence[BlockKey]) -> Lease | None:
        lease = self._service.lease(OWNER, keys)
        return lease if len(lease.places) == len(keys) else None

    def _until(self, what: str, ask: Callable[[], object]) -> object:
        """Ask again in every step, as an engine does, until there is an answer; return it."""
        end = time.monotonic() + _WAIT_S
        while time.monotonic() < end:
            self._service.poll()
            if answer := ask():
                return answer
        raise BenchSkipped(f"the server did not let us {what} within {_WAIT_S:g} s")


def _as_blocks(pages: npt.NDArray[np.int64]) -> PageIds:
    """As a batch of blocks of one page."""
    return pages.astype(np.int32).reshape(-1, 1)


SERVER_MAP = BenchCase(
    "server-map", "loads from the arena of a cache server on this machine, against memcpy", _measure
)
