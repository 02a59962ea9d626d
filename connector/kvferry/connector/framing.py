"""Framing: how messages, and the keys in them, are cut out of bytes. See ``wire`` for the messages themselves.

Pure functions; a ``MessageReader`` belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from kvferry.connector.errors import WireError
from kvferry.connector.keys import KEY_BYTES, BlockKey

__all__ = [
    "LENGTH",
    "MAX_KEYS",
    "MAX_MESSAGE_BYTES",
    "MessageReader",
    "framed",
    "message_length",
    "pack_keys",
    "unpack_keys",
]

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 20
MAX_KEYS = 8192
"""Keys in one message."""


def framed(body: bytes, what: str) -> bytes:
    """Return a message's body with its length before it.

    Raises:
        WireError: It is longer than anybody would accept; ``what`` names it.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise WireError(f"a {what} of {len(body)} bytes is over {MAX_MESSAGE_BYTES}")
    return LENGTH.pack(len(body)) + body


def message_length(prefix: bytes | bytearray | memoryview) -> int:
    """Return the length that ``prefix`` (4 bytes) announces.

    Raises:
        WireError: It is 0, or more than ``MAX_MESSAGE_BYTES``.
    """
    (length,) = LENGTH.unpack(prefix)
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise WireError(
            f"a message of {length} bytes was announced, between 1 and {MAX_MESSAGE_BYTES} may be"
        )
    return int(length)


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """Return keys as one string of bytes."""
    return b"".join(keys)


def unpack_keys(packed: bytes) -> list[BlockKey]:
    """Return the keys of a message.

    Raises:
        WireError: The bytes are no whole number of keys.
    """
    if len(packed) % KEY_BYTES:
        raise WireError(f"{len(packed)} bytes of keys are no multiple of {KEY_BYTES}")
    return list(struct.unpack(f"{KEY_BYTES}s" * (len(packed) // KEY_BYTES), packed))


class MessageReader:
    """Cuts a stream of bytes into messages. Holds at most one unfinished message."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Take in bytes and yield the body of every message that is complete.

        Exhaust it before the next call.

        Raises:
            WireError: A length is out of bounds.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH.size:
            length = message_length(buffer[start : start + LENGTH.size])
            end = start + LENGTH.size + length
            if end > len(buffer):
                break
            yield bytes(buffer[start + LENGTH.size : end])
            start = end
        del buffer[:start]
