"""The coder: arena slots into the frames a tier stores, and what it loaded back into slots.

Without a codec a frame's payload is the slot itself, and only the header is composed or verified. With
one, the payload is encoded into a buffer of this thread. Whatever is loaded is verified as it was
stored, header, checksum and MAC, before a codec sees a byte of it.

A lossless codec is held to its word: the body begins with a digest of the payload, and what was decoded
must have it. So a wrong decoder costs a miss, never a wrong byte.

    codec id 0       the payload
    lossless codec   XXH3-128 of the payload (16 bytes), then what the codec made of it
    lossy codec      what the codec made of the payload

Threading: a coder may be used by several threads at once. Buffers belong to the thread that caused them,
live as long as it does, and hold at most one transfer's blocks.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Mapping, Sequence

import msgspec
import xxhash

from kvferry.connector.codec import Codec
from kvferry.connector.errors import BlockRefused, short_key
from kvferry.connector.frame import CODEC_NONE, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Frame

__all__ = ["PLAIN", "FrameCoder", "TierCodec", "TierCodecs"]

_DIGEST_BYTES = 16


class TierCodec(msgspec.Struct, frozen=True):
    """One codec, made for the blocks at hand."""

    name: str
    id: int
    """What names it in a frame."""
    is_lossy: bool
    codec: Codec


class TierCodecs(msgspec.Struct, frozen=True):
    """The codecs of one tier."""

    writes: TierCodec | None = None
    """Encodes what is stored; None stores payloads as they are."""
    reads: Mapping[int, TierCodec] = {}
    """The codecs whose bodies are decoded, by id."""


PLAIN = TierCodecs()
"""A tier whose frames hold payloads, and nothing else."""


class FrameCoder:
    """Turns slots into frames and frames into slots, for one tier.

    Args:
        seal: Composes and verifies headers.
        codecs: The tier's codecs.
        logger: Where a codec that cannot encode is reported.
    """

    def __init__(
        self, seal: FrameSeal, codecs: TierCodecs = PLAIN, logger: logging.Logger | None = None
    ) -> None:
        self._seal = seal
        self._codecs = codecs
        self._logger = logger or logging.getLogger(__name__)
        self._is_broken = False
        self._scratch = _Scratch()

    @property
    def payload_bytes(self) -> int:
        """Length of every block's payload."""
        return self._seal.payload_bytes

    def pack(self, frames: Sequence[Frame]) -> list[Frame]:
        """Return the frames to store of the slots in ``frames``, sealed and read-only.

        The result is good until this thread's next call. A codec that raises is reported and not used for
        storing any more.
        """
        if self._codecs.writes is None or self._is_broken or not frames:
            return [self._seal_as(frame, frame.payload, CODEC_NONE, self.payload_bytes) for frame in frames]
        slot_bytes = len(frames[0].payload)
        room = self._scratch.take(slot_bytes * len(frames))
        return [
            self._encode(self._codecs.writes, frame, room[index * slot_bytes : (index + 1) * slot_bytes])
            for index, frame in enumerate(frames)
        ]

    def unpack(self, frame: Frame) -> int:
        """Verify what a tier put into ``frame`` and leave the block's payload in its slot.

        Returns:
            Length of the body that the tier delivered.

        Raises:
            BlockRefused: It is not the block; the slot's content is meaningless.
        """
        sealed = self._seal.verify(frame.key, frame.header, frame.payload, self._codecs.reads)
        if sealed.codec != CODEC_NONE:
            self._decode(self._codecs.reads[sealed.codec], frame, sealed.length)
        return sealed.length

    def _encode(self, used: TierCodec, frame: Frame, room: memoryview) -> Frame:
        payload = frame.payload[: self.payload_bytes].toreadonly()
        prefix = 0 if used.is_lossy else _DIGEST_BYTES
        try:
            encoded = int(used.codec.encode(payload, room[prefix : self.payload_bytes]))
        except Exception as error:  # noqa: BLE001  # boundary: a plugin's codec
            encoded = 0
            self._give_up(used, frame.key, error)
        length = prefix + encoded
        if encoded <= 0 or length >= self.payload_bytes:
            return self._seal_as(frame, frame.payload, CODEC_NONE, self.payload_bytes)
        if prefix:
            room[:prefix] = xxhash.xxh3_128_digest(payload)
        room[length:] = bytes(len(room) - length)
        return self._seal_as(frame, room, used.id, length)

    def _seal_as(self, frame: Frame, payload: memoryview, codec: int, length: int) -> Frame:
        self._seal.seal(frame.key, frame.header, payload, codec, length)
        return Frame(frame.key, frame.header.toreadonly(), payload.toreadonly(), length)

    def _give_up(self, used: TierCodec, key: BlockKey, error: Exception) -> None:
        if not self._is_broken:
            self._is_broken = True
            self._logger.error(
                "codec %r failed to encode block %s, blocks are stored without it from now on: %s: %s",
                used.name,
                short_key(key),
                type(error).__name__,
                error,
            )

    def _decode(self, used: TierCodec, frame: Frame, length: int) -> None:
        body = self._scratch.take(length)
        body[:] = frame.payload[:length]
        payload = frame.payload[: self.payload_bytes]
        prefix = 0 if used.is_lossy else _DIGEST_BYTES
        try:
            used.codec.decode(body[prefix:].toreadonly(), payload)
        except Exception as error:  # boundary: a plugin's codec
            why = f"codec {used.name!r} cannot decode the body: {type(error).__name__}: {error}"
            raise BlockRefused(frame.key, "codec", why) from error
        if prefix and body[:prefix] != xxhash.xxh3_128_digest(payload):
            raise BlockRefused(frame.key, "codec", f"codec {used.name!r} decoded the body to something else")


class _Scratch(threading.local):
    """One page-aligned buffer per thread, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """Return ``size`` bytes of this thread's buffer, with whatever they hold."""
        if len(self._buffer) < size:
            self._buffer = memoryview(mmap.mmap(-1, size))
        return self._buffer[:size]
