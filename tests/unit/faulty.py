"""Tiers for tests, as a plugin: ``memory`` (a dict), and ``faulty``, which wraps any other and misbehaves.

Load it with ``plugins: ["faulty"]`` and this directory on ``sys.path`` (``PYTHONPATH=tests/unit`` for an
engine). Faults are drawn from a seeded generator, so a failing run can be repeated.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import msgspec

from kvferry.connector.errors import ClosedError, TierError, TierUnavailable
from kvferry.connector.hooks import hookimpl
from kvferry.connector.keys import BlockKey
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.tier import Capabilities, Frame, Outcome, Tier, TierContext, TierStats, TierType

LOAD_MODES = ("truncated", "bit_flip", "header_flip", "other_block", "lie_missing", "failed", "zeroed")
STORE_MODES = ("failed", "no_room", "lost")
CALL_MODES = ("tier_error", "other_error", "exit", "slow", "wrong_shape")
MODES = tuple(dict.fromkeys((*LOAD_MODES, *STORE_MODES, *CALL_MODES)))


class MemoryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    capacity_blocks: int = 1 << 30


class MemoryTier:
    """Holds frames in a dict; evicts the oldest and says so."""

    def __init__(self, capacity_blocks: int, context: TierContext) -> None:
        self._capacity_blocks = capacity_blocks
        self._context = context
        self._blocks: dict[BlockKey, tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()
        self._evictions = 0
        self._is_closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(is_persistent=False, is_shared=False, is_bounded=True)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [key in self._blocks for key in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        self._require_open()
        return [self._load(frame) for frame in into]

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        self._require_open()
        evicted: list[BlockKey] = []
        with self._lock:
            for frame in frames:
                self._blocks[frame.key] = (bytes(frame.header), bytes(frame.payload))
            while len(self._blocks) > self._capacity_blocks:
                evicted.append(next(iter(self._blocks)))
                del self._blocks[evicted[-1]]
            self._evictions += len(evicted)
        if evicted:
            self._context.on_removed(evicted)
        return [Outcome.OK] * len(frames)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._require_open()
        with self._lock:
            for key in keys:
                self._blocks.pop(key, None)

    def scan(self) -> Iterator[BlockKey]:
        yield from list(self._blocks)

    def stats(self) -> TierStats:
        size = self._context.layout.payload_bytes
        return TierStats(
            blocks=len(self._blocks),
            used_bytes=len(self._blocks) * size,
            capacity_bytes=self._capacity_blocks * size,
            evictions=self._evictions,
        )

    def close(self) -> None:
        self._is_closed = True

    def _load(self, frame: Frame) -> Outcome:
        held = self._blocks.get(frame.key)
        if held is None:
            return Outcome.MISSING
        frame.header[:], frame.payload[:] = held
        return Outcome.OK

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"tier {self._context.name!r} is closed")


class FaultyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inner: dict[str, object]
    """Configuration of the tier that is wrapped."""
    seed: int = 0
    rate: float = 0.2
    """Share of the calls (or blocks, where the fault is a block's) that go wrong."""
    modes: tuple[str, ...] = MODES
    slow_s: float = 0.5
    die_after: int = 0
    """Calls after which the tier is dead for good; 0 for never."""


class FaultyTier:
    """Passes calls on to the tier it wraps, except when it does not."""

    def __init__(self, options: FaultyOptions, inner: Tier) -> None:
        unknown = set(options.modes) - set(MODES)
        assert not unknown, unknown
        self._options = options
        self._inner = inner
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._calls = 0
        self._is_dead = False
        self._last: tuple[bytes, bytes] | None = None
        self.injected: dict[str, int] = {}

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def kill(self) -> None:
        """From now on every call fails."""
        self._is_dead = True

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        self._begin("contains")
        return self._inner.contains(keys)

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        shape = self._begin("load")
        outcomes = self._inner.load(into)
        for index, frame in enumerate(into):
            if outcomes[index] is Outcome.OK:
                outcomes[index] = self._spoil(frame)
        return outcomes[1:] if shape else outcomes

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        shape = self._begin("store")
        verdicts = [self._draw(STORE_MODES) for _ in frames]
        kept = [frame for frame, verdict in zip(frames, verdicts, strict=True) if verdict is None]
        stored = iter(self._inner.store(kept) if kept else [])
        said = {"failed": Outcome.FAILED, "no_room": Outcome.NO_ROOM, "lost": Outcome.OK}
        outcomes = [next(stored) if verdict is None else said[verdict] for verdict in verdicts]
        return outcomes[1:] if shape else outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._begin("delete")
        self._inner.delete(keys)

    def scan(self) -> Iterator[BlockKey]:
        self._begin("scan")
        yield from self._inner.scan()

    def stats(self) -> TierStats:
        return self._inner.stats()

    def close(self) -> None:
        self._closing.set()
        self._inner.close()

    def _begin(self, call: str) -> bool:
        """Fail the call as a whole, delay it, or return whether its answer shall have a wrong shape."""
        with self._lock:
            self._calls += 1
            if self._options.die_after and self._calls > self._options.die_after:
                self._is_dead = True
        if self._is_dead:
            raise TierUnavailable("faulty", f"dead ({call})")
        mode = self._draw(CALL_MODES)
        if mode == "tier_error":
            raise TierError("faulty", f"injected ({call})")
        if mode == "other_error":
            raise RuntimeError(f"injected ({call})")
        if mode == "exit":
            raise SystemExit(f"injected ({call})")
        if mode == "slow":
            self._closing.wait(self._options.slow_s)
        return mode == "wrong_shape"

    def _draw(self, modes: Sequence[str]) -> str | None:
        possible = [mode for mode in modes if mode in self._options.modes]
        with self._lock:
            if not possible or self._random.random() >= self._options.rate:
                return None
            mode = self._random.choice(possible)
            self.injected[mode] = self.injected.get(mode, 0) + 1
            return mode

    def _spoil(self, frame: Frame) -> Outcome:
        """Damage one loaded frame, still calling it OK, or lie about it."""
        mode = self._draw(LOAD_MODES)
        whole = (bytes(frame.header), bytes(frame.payload))
        if mode == "truncated":
            cut = self._random.randrange(len(frame.payload) // 2)
            frame.payload[cut:] = bytes(len(frame.payload) - cut)
        elif mode == "bit_flip":
            self._flip(frame.payload, len(frame.payload) // 2)
        elif mode == "header_flip":
            self._flip(frame.header, 130)
        elif mode == "other_block" and self._last is not None:
            frame.header[:], frame.payload[:] = self._last
        elif mode == "zeroed":
            frame.payload[:] = bytes(len(frame.payload))
        self._last = whole
        return {"lie_missing": Outcome.MISSING, "failed": Outcome.FAILED}.get(mode or "", Outcome.OK)

    def _flip(self, buffer: memoryview, within: int) -> None:
        buffer[self._random.randrange(within)] ^= 1 << self._random.randrange(8)


def _make_memory(options: MemoryOptions, context: TierContext) -> MemoryTier:
    return MemoryTier(options.capacity_blocks, context)


def _make_faulty(options: FaultyOptions, context: TierContext) -> FaultyTier:
    inner = dict(options.inner)
    inner_type = PluginRegistry(["faulty"]).tier_type(str(inner.pop("type")))
    return FaultyTier(options, inner_type.create(msgspec.convert(inner, inner_type.options), context))


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    return [
        TierType("memory", MemoryOptions, _make_memory, "a dict, for tests"),
        TierType("faulty", FaultyOptions, _make_faulty, "another tier that misbehaves, for tests"),
    ]
