"""Codecs: what a block's payload is turned into before it leaves the arena, and back.

A codec sees one whole payload at a time. Which one was used is written in the frame, so a reader that
does not know it refuses the block. Encoding is an offer: when the result is not smaller than the
payload, the block is stored as it is.

A lossy codec changes what the model reads. It must be named in the configuration, and blocks of a
deployment that uses one have keys of their own (see :func:`lossy_fingerprint`), so that they never stand
in for exact ones, whatever tier they travel through.

Who calls a codec, and what is checked before and after, is ``coder``'s business. Pure functions and
values; a codec may be called from several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
from blake3 import blake3

from kvferry.connector.layout import BlockLayout

__all__ = ["MAX_CODEC_ID", "NONE", "Codec", "CodecType", "lossy_fingerprint"]

NONE = "none"
"""The codec that leaves a payload as it is; its id in a frame is 0."""

MAX_CODEC_ID = 0xFFFF
"""A frame has two bytes for the id."""


class Codec(Protocol):
    """Encodes and decodes payloads of one layout. Thread-safe.

    Equal payloads need not be encoded to equal bytes, but a body is decoded alike for ever: what a new
    version of a codec would read differently needs a new id.
    """

    def encode(self, payload: memoryview, into: memoryview) -> int:
        """Write ``payload`` (``layout.payload_bytes`` long) encoded to the start of ``into``.

        ``into`` is not longer than the payload and overlaps nothing. It may be left half written when 0
        is returned.

        Returns:
            Bytes written; 0 when the result would not fit into ``into``, or when the codec prefers that
            this payload is stored as it is.
        """

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Write the payload that ``body`` stands for into ``into``, filling it exactly.

        ``body`` may be anything. The work and the memory it can cause are bounded by the length of
        ``into``, whatever ``body`` says of itself.

        Raises:
            ValueError: ``body`` does not stand for a payload of that length.
        """


class CodecType(msgspec.Struct, frozen=True):
    """A codec, as a plugin registers it."""

    name: str
    """The value of ``codec`` in a tier's configuration."""
    id: int
    """What names it in a frame, for ever: 1 to 65535; kvferry's own are below 256."""
    is_lossy: bool
    """True when ``decode(encode(x))`` may differ from ``x``."""
    make: Callable[[BlockLayout], Codec]
    """Returns a codec for blocks of this layout; raises ConfigError where it cannot be one."""
    summary: str
    """One line for ``kvferry plugins``."""


def lossy_fingerprint(fingerprint: bytes, lossy: Iterable[str]) -> bytes:
    """Return the fingerprint of blocks that may have passed through lossy codecs.

    Args:
        fingerprint: The model's own, 32 bytes.
        lossy: Names of the lossy codecs that any tier of the deployment uses.
    """
    names = sorted(set(lossy))
    if not names:
        return fingerprint
    return blake3(b"kvferry/1 lossy\0" + fingerprint + "\0".join(names).encode()).digest()
