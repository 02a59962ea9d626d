"""Tiers that wrap another one and misbehave, to test what stands above a tier.

Faults are drawn from a seeded generator, so that a failing run can be repeated.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

from kvferry.connector.errors import ConfigError, TierError, TierUnavailable
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, Tier, TierStats

__all__ = ["CALL_MODES", "LOAD_MODES", "MODES", "STORE_MODES", "FaultyTier", "SlowTier"]

LOAD_MODES = ("truncated", "bit_flip", "header_flip", "other_block", "lie_missing", "failed", "zeroed")
"""Faults of one block of a load; all but two still say ``OK``."""
STORE_MODES = ("failed", "no_room", "lost")
"""Faults of one block of a store; ``lost`` says ``OK``."""
CALL_MODES = ("tier_error", "other_error", "exit", "slow", "wrong_shape")
"""Faults of a whole call."""
MODES = tuple(dict.fromkeys((*LOAD_MODES, *STORE_MODES, *CALL_MODES)))

_SAID = {"failed": Outcome.FAILED, "no_room": Outcome.NO_ROOM, "lost": Outcome.OK}


class SlowTier:
    """Passes calls on to the tier it wraps, each after a while; ``close`` ends the waiting.

    Args:
        inner: What is called in the end. Owned: closed with this one.
        delay_s: Seconds before each call but ``stats`` and ``close``.
    """

    def __init__(self, inner: Tier, delay_s: float) -> None:
        self._inner = inner
        self._closing = threading.Event()
        self.delay_s = delay_s

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner tier."""
        return self._inner.capabilities

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Wait, then ask the inner tier."""
        self._closing.wait(self.delay_s)
        return self._inner.contains(keys)

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Wait, then load from the inner tier."""
        self._closing.wait(self.delay_s)
        return self._inner.load(into)

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Wait, then store in the inner tier."""
        self._closing.wait(self.delay_s)
        return self._inner.store(frames)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Wait, then delete from the inner tier."""
        self._closing.wait(self.delay_s)
        self._inner.delete(keys)

    def scan(self) -> Iterator[BlockKey]:
        """Wait, then scan the inner tier."""
        self._closing.wait(self.delay_s)
        return self._inner.scan()

    def stats(self) -> TierStats:
        """Those of the inner tier, at once."""
        return self._inner.stats()

    def close(self) -> None:
        """Close the inner tier."""
        self._closing.set()
        self._inner.close()


class FaultyTier:
    """Passes calls on to the tier it wraps, except when it does not. Thread-safe.

    Args:
        inner: What is called. Owned: closed with this one.
        seed: Of the generator that faults are drawn from.
        rate: Share of the calls (or blocks, where the fault is a block's) that go wrong, 0 to 1.
        modes: Which faults there are.
        slow_s: Seconds that ``slow`` takes.
        die_after: Calls after which the tier is dead for good; 0 for never.

    Raises:
        ConfigError: A mode is unknown.
    """

    def __init__(
        self,
        inner: Tier,
        seed: int = 0,
        *,
        rate: float = 0.2,
        modes: Sequence[str] = MODES,
        slow_s: float = 0.5,
        die_after: int = 0,
    ) -> None:
        unknown = set(modes) - set(MODES)
        if unknown:
            raise ConfigError("modes", f"unknown: {', '.join(sorted(unknown))}", f"one of {', '.join(MODES)}")
        self._inner = inner
        self._random = random.Random(seed)
        self.rate = rate
        """May be changed at any time."""
        self._modes = frozenset(modes)
        self._slow_s = slow_s
        self._die_after = die_after
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._calls = 0
        self._is_dead = False
        self._last: tuple[bytes, bytes] | None = None
        self.injected: dict[str, int] = {}
        """How often each fault happened."""

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner tier."""
        return self._inner.capabilities

    def kill(self) -> None:
        """Make every call fail from now on."""
        self._is_dead = True

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the inner tier, unless the call fails."""
        self._begin("contains")
        return self._inner.contains(keys)

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Load from the inner tier, then damage some of what came."""
        has_wrong_shape = self._begin("load")
        outcomes = self._inner.load(into)
        for index, frame in enumerate(into):
            if outcomes[index] is Outcome.OK:
                outcomes[index] = self._spoil(frame)
        return outcomes[1:] if has_wrong_shape else outcomes

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Store some of the frames in the inner tier, and say something about the others."""
        has_wrong_shape = self._begin("store")
        verdicts = [self._draw(STORE_MODES) for _ in frames]
        kept = [frame for frame, verdict in zip(frames, verdicts, strict=True) if verdict is None]
        stored = iter(self._inner.store(kept) if kept else [])
        outcomes = [next(stored) if verdict is None else _SAID[verdict] for verdict in verdicts]
        return outcomes[1:] if has_wrong_shape else outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Delete from the inner tier, unless the call fails."""
        self._begin("delete")
        self._inner.delete(keys)

    def scan(self) -> Iterator[BlockKey]:
        """Scan the inner tier, unless the call fails."""
        self._begin("scan")
        yield from self._inner.scan()

    def stats(self) -> TierStats:
        """Those of the inner tier."""
        return self._inner.stats()

    def close(self) -> None:
        """Close the inner tier."""
        self._closing.set()
        self._inner.close()

    def _begin(self, call: str) -> bool:
        """Fail the call as a whole, delay it, or return whether its answer shall have a wrong shape."""
        with self._lock:
            self._calls += 1
            if self._die_after and self._calls > self._die_after:
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
            self._closing.wait(self._slow_s)
        return mode == "wrong_shape"

    def _draw(self, modes: Sequence[str]) -> str | None:
        possible = [mode for mode in modes if mode in self._modes]
        with self._lock:
            if not possible or self._random.random() >= self.rate:
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
