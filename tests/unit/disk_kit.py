"""Small blocks, frames with content that follows from the key, and tier contexts for the disk tests."""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.policy import POLICIES, EvictionPolicy
from kvferry.connector.tier import Frame, Outcome, TierContext
from kvferry.plugins.disk.opening import open_disk_tier
from kvferry.plugins.disk.options import DiskOptions, plan_geometry
from kvferry.plugins.disk.tier import DiskTier

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2)
"""15,360 bytes of payload in a slot of 16 KiB."""
FINGERPRINT = bytes(range(32))
SEAL = FrameSeal(FINGERPRINT, LAYOUT.payload_bytes)
LOGGER = logging.getLogger("kvferry.test.disk")


class Fifo:
    """The simplest eviction policy, so that these tests depend on no other."""

    def __init__(self) -> None:
        self._keys: dict[BlockKey, None] = {}

    def insert(self, key: BlockKey) -> None:
        self._keys[key] = None

    def touch(self, key: BlockKey) -> None:
        pass

    def remove(self, key: BlockKey) -> None:
        self._keys.pop(key, None)

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        found: list[BlockKey] = []
        for key in self._keys:
            if len(found) == count:
                break
            if is_evictable(key):
                found.append(key)
        return found

    def __len__(self) -> int:
        return len(self._keys)


ALL_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"fifo": Fifo, **POLICIES}


def make_context(
    *,
    fingerprint: bytes = FINGERPRINT,
    layout: BlockLayout = LAYOUT,
    instance: str = "",
    on_removed: Callable[[Sequence[BlockKey]], None] = lambda keys: None,
) -> TierContext:
    return TierContext(
        name="disk",
        layout=layout,
        fingerprint=fingerprint,
        instance=instance,
        on_removed=on_removed,
        make_eviction_policy=lambda name: ALL_POLICIES[name](),
        logger=LOGGER,
    )


def capacity_for(blocks: int) -> int:
    """Return a capacity that holds exactly ``blocks`` blocks of ``LAYOUT``."""
    low, high = 0, 1 << 34
    while low + 1 < high:
        middle = (low + high) // 2
        options = DiskOptions(path="/", capacity=middle)
        try:
            fits = plan_geometry("disk", options, LAYOUT).record_count >= blocks
        except ConfigError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def open_tier(path: Path, capacity: int, context: TierContext | None = None, **options: object) -> DiskTier:
    chosen = DiskOptions(path=str(path), capacity=capacity, **({"eviction": "fifo"} | options))  # type: ignore[arg-type]
    return open_disk_tier(chosen, context or make_context())


def key_of(number: int) -> BlockKey:
    return BlockKey(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest())


def payload_of(key: BlockKey) -> bytes:
    """Return the content that belongs to ``key``: different in every 32 bytes from any other key's."""
    return (key * (LAYOUT.slot_bytes // len(key)))[: LAYOUT.payload_bytes]


def empty_frame(key: BlockKey) -> Frame:
    """Return a frame with buffers as the arena would give them: aligned, full of something else."""
    slot = memoryview(mmap.mmap(-1, LAYOUT.slot_bytes))
    slot[:] = b"\xee" * LAYOUT.slot_bytes
    return Frame(key, memoryview(bytearray(HEADER_BYTES)), slot, LAYOUT.payload_bytes)


def sealed_frame(key: BlockKey) -> Frame:
    frame = empty_frame(key)
    frame.payload[: LAYOUT.payload_bytes] = payload_of(key)
    SEAL.seal(key, frame.header, frame.payload)
    return frame


def store(tier: DiskTier, keys: Iterable[BlockKey]) -> list[Outcome]:
    return tier.store([sealed_frame(key) for key in keys])


def load_verified(tier: DiskTier, keys: Sequence[BlockKey]) -> list[Outcome]:
    """Load and check every block that is reported OK: the seal holds and the bytes are the key's."""
    frames = [empty_frame(key) for key in keys]
    outcomes = tier.load(frames)
    for frame, outcome in zip(frames, outcomes, strict=True):
        if outcome is Outcome.OK:
            SEAL.verify(frame.key, frame.header, frame.payload)
            assert bytes(frame.payload[: LAYOUT.payload_bytes]) == payload_of(frame.key)
    return outcomes


def bytes_on_disk(path: Path) -> int:
    """Return what a directory takes: the larger of length and allocation of every file, and its own."""
    files = [path, *path.rglob("*")]
    return sum(max(stat.st_size, stat.st_blocks * 512) for stat in (file.stat() for file in files))
