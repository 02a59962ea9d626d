"""Blocks to test with: keys, contents that follow from the key, and frames that lie between guards.

The buffers of a batch are laid out as in the arena, aligned and side by side, but with a guard page
before, between and after them, and a guard between headers. A tier that writes past its own slot is
found by ``Batch.check_guards``.

Values and memory only: no pytest, no threads, no tier is called here.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from blake3 import blake3

from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.tier import Frame

__all__ = ["DIRT", "Batch", "Blocks", "content_of", "hostile_keys", "key_of"]

DIRT = 0x5A
"""What the buffers of a load hold before it."""

_HOSTILE = [
    bytes(32),
    b"\xff" * 32,
    b"\n" * 32,
    b"/" * 32,
    b"../" * 10 + b"..",
    b"\0/\0\\" * 8,
    b"key with spaces and\r\nSET other 1",
    b"%s%n{}$(id);'\"`--*?[a-z]" + b"\x80" * 7,
    b"\xc3\x28" * 16,
    *[b"samehead" + bytes([number]) * 24 for number in range(4)],
    *[bytes(31 - number) + b"\x01" + bytes(number) for number in range(4)],
    *[bytes([number]) + b"same tail, other first byte, 32." for number in (0, 10, 13, 47, 255)],
]

_GUARD = 0xA5
_GUARD_BYTES = SLOT_ALIGNMENT_BYTES


def key_of(number: int, salt: str = "") -> BlockKey:
    """Return a key that looks like a real one: 32 bytes without any pattern."""
    return BlockKey(blake3(f"{salt}/{number}".encode()).digest())


def content_of(key: BlockKey, length: int) -> bytes:
    """Return the ``length`` bytes that every test stores under ``key``."""
    return blake3(key, derive_key_context="kvferry test block").digest(length=length)


def hostile_keys() -> list[BlockKey]:
    """Return keys that break what takes them for text, names, patterns or numbers."""
    return [BlockKey(key.ljust(32, b"\0")[:32]) for key in _HOSTILE]


class Batch:
    """Buffers for some blocks, with guards around each.

    Args:
        layout: Geometry of the blocks.
        keys: The blocks, in order; the same key may come twice.
        length: Bytes of each payload that carry meaning.
        fill: What the buffers hold at first.
    """

    def __init__(self, layout: BlockLayout, keys: Sequence[BlockKey], length: int, fill: int = DIRT) -> None:
        self._slot_bytes = layout.slot_bytes
        self._count = len(keys)
        self._payloads = _guarded(self._count, layout.slot_bytes, _GUARD_BYTES, fill)
        self._headers = _guarded(self._count, HEADER_BYTES, HEADER_BYTES, fill)
        self.frames = [
            Frame(
                key,
                _part(self._headers, index, HEADER_BYTES, HEADER_BYTES),
                _part(self._payloads, index, layout.slot_bytes, _GUARD_BYTES),
                length,
            )
            for index, key in enumerate(keys)
        ]
        """Writable."""

    def sources(self) -> list[Frame]:
        """Return the frames with read-only buffers, as ``store`` gets them."""
        return [
            Frame(frame.key, frame.header.toreadonly(), frame.payload.toreadonly(), frame.length)
            for frame in self.frames
        ]

    def image(self) -> bytes:
        """Return a copy of all buffers and guards, to compare with later."""
        return bytes(self._headers) + bytes(self._payloads)

    def overwrite(self, byte: int) -> None:
        """Set every byte of every buffer; the guards stay."""
        for frame in self.frames:
            frame.header[:] = bytes([byte]) * len(frame.header)
            frame.payload[:] = bytes([byte]) * len(frame.payload)

    def check_guards(self) -> None:
        """Raise AssertionError when anything outside the buffers was written."""
        for what, memory, size, guard in (
            ("payload", self._payloads, self._slot_bytes, _GUARD_BYTES),
            ("header", self._headers, HEADER_BYTES, HEADER_BYTES),
        ):
            expected = bytes([_GUARD]) * guard
            for index in range(self._count + 1):
                start = index * (size + guard)
                if memory[start : start + guard] != expected:
                    raise AssertionError(f"bytes outside the {what} buffers were written, near block {index}")


class Blocks:
    """Makes and checks the frames of one model.

    Args:
        layout: Geometry of the blocks.
        fingerprint: The model's, 32 bytes.
    """

    def __init__(self, layout: BlockLayout, fingerprint: bytes) -> None:
        self.layout = layout
        self._fingerprint = fingerprint

    def sealed(self, keys: Sequence[BlockKey], length: int | None = None) -> Batch:
        """Return whole blocks, ready to be stored through ``Batch.sources``.

        Args:
            keys: The blocks.
            length: Bytes of each; fewer than ``layout.payload_bytes`` is what a codec makes.
        """
        length = self.layout.payload_bytes if length is None else length
        batch = Batch(self.layout, keys, length, fill=0)
        for frame in batch.frames:
            frame.body[:] = content_of(frame.key, length)
            self._seal(length).seal(frame.key, frame.header, frame.body)
        return batch

    def empty(self, keys: Sequence[BlockKey]) -> Batch:
        """Return dirty buffers, ready to be loaded into."""
        return Batch(self.layout, keys, self.layout.payload_bytes)

    def verify(self, frame: Frame, length: int | None = None) -> None:
        """Check a loaded frame as kvferry would, and that it holds what the tests store.

        Args:
            frame: What was loaded.
            length: Bytes that were stored, by default the whole payload.

        Raises:
            BlockRefused: The frame is not an intact frame of this block.
            AssertionError: It is, but of other content.
        """
        length = self.layout.payload_bytes if length is None else length
        self._seal(length).verify(frame.key, frame.header, frame.payload[:length])
        if frame.payload[:length] != content_of(frame.key, length):
            raise AssertionError(f"the frame of {frame.key[:4].hex()} verifies, but its bytes are others")

    def raw(self, key: BlockKey, length: int | None = None) -> bytes:
        """Return header and body of a whole block as one byte string, for back doors."""
        (frame,) = self.sealed([key], length).frames
        return bytes(frame.header) + bytes(frame.body)

    def _seal(self, length: int) -> FrameSeal:
        return FrameSeal(self._fingerprint, length)


def _guarded(count: int, size: int, guard: int, fill: int) -> memoryview:
    """Return page-aligned memory: guard, buffer, guard, buffer, ..., guard."""
    memory = memoryview(mmap.mmap(-1, count * (size + guard) + guard))
    memory[:] = bytes([_GUARD]) * len(memory)
    for index in range(count):
        _part(memory, index, size, guard)[:] = bytes([fill]) * size
    return memory


def _part(memory: memoryview, index: int, size: int, guard: int) -> memoryview:
    start = index * (size + guard) + guard
    return memory[start : start + size]
