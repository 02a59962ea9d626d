"""Frames: a block as it lies outside the arena, a self-describing header and the body.

The body is the block's payload, or what a codec made of it. Nothing a tier returns is believed, nor
decoded, before :meth:`FrameSeal.verify` has found every field of the header, the body's checksum and
(where the operator gave a secret) its MAC to be what was asked for.

Header, little-endian, ``HEADER_BYTES`` long:

    offset  bytes  field
         0      8  magic ``KVFERRY\\0``
         8      2  version
        10      2  header length
        12      2  codec id (0: the body is the payload)
        14      2  flags (bit 0: a MAC is present)
        16     32  block key
        48     32  model fingerprint
        80      8  length of the body in bytes
        88     16  XXH3-128 of the body
       104     32  keyed BLAKE3 over bytes 0..104 and the body; zeros without a secret
       136      8  XXH3-64 of bytes 0..136
       144    112  zeros

Pure functions, usable from any thread.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Container
from typing import NamedTuple

import xxhash
from blake3 import blake3

from kvferry.connector.errors import BlockRefused
from kvferry.connector.keys import BlockKey

__all__ = ["CODEC_NONE", "FRAME_VERSION", "HEADER_BYTES", "FrameSeal", "Sealed", "peek_key"]

HEADER_BYTES = 256
FRAME_VERSION = 1
CODEC_NONE = 0
"""Codec id of a frame whose body is the payload itself."""
MAGIC = b"KVFERRY\0"

_FIELDS = struct.Struct("<8sHHHH32s32sQ16s")
_MAC_END = _FIELDS.size + 32
_CHECK_END = _MAC_END + 8
_FLAG_MAC = 1


class Sealed(NamedTuple):
    """What a verified frame holds."""

    codec: int
    """Id of the codec that made the body; ``CODEC_NONE`` for none."""
    length: int
    """Bytes of the body."""


class FrameSeal:
    """Writes and verifies the headers of one model's frames.

    Args:
        fingerprint: The model's 32-byte fingerprint.
        payload_bytes: Length of every block's payload.
        secret: The operator's secret; None for frames without a MAC. With a secret, frames
            without a valid MAC are refused.
    """

    __slots__ = ("_fingerprint", "_mac_key", "_payload_bytes")

    def __init__(self, fingerprint: bytes, payload_bytes: int, secret: str | None = None) -> None:
        self._fingerprint = fingerprint
        self._payload_bytes = payload_bytes
        self._mac_key = (
            blake3(secret.encode(), derive_key_context="kvferry 1 frame mac").digest()
            if secret is not None
            else None
        )

    @property
    def payload_bytes(self) -> int:
        """Length of every block's payload."""
        return self._payload_bytes

    def seal(
        self,
        key: BlockKey,
        header: memoryview,
        payload: memoryview,
        codec: int = CODEC_NONE,
        length: int | None = None,
    ) -> None:
        """Write the header for the body at the start of ``payload`` into ``header``.

        Reads the whole body once (checksum) or twice (with a MAC); releases the GIL meanwhile.

        Args:
            key: The block's key.
            header: ``HEADER_BYTES`` bytes.
            payload: Starts with the body; what follows is not sealed.
            codec: What made the body.
            length: Bytes of the body; a payload's when omitted.
        """
        body = payload[: self._payload_bytes if length is None else length]
        fields = _FIELDS.pack(
            MAGIC,
            FRAME_VERSION,
            HEADER_BYTES,
            codec,
            _FLAG_MAC if self._mac_key is not None else 0,
            key,
            self._fingerprint,
            len(body),
            xxhash.xxh3_128_digest(body),
        )
        sealed = fields + self._mac(fields, body)
        header[:_CHECK_END] = sealed + struct.pack("<Q", xxhash.xxh3_64_intdigest(sealed))
        header[_CHECK_END:] = bytes(HEADER_BYTES - _CHECK_END)

    def verify(
        self, key: BlockKey, header: memoryview, payload: memoryview, codecs: Container[int] = ()
    ) -> Sealed:
        """Return what the frame holds, if it is exactly the block ``key``; decodes nothing.

        Args:
            key: The block that was asked for.
            header: ``HEADER_BYTES`` bytes.
            payload: At least ``payload_bytes`` bytes; the body is at the start.
            codecs: Ids that are accepted besides ``CODEC_NONE``.

        Raises:
            BlockRefused: Something is not as it has to be; nothing of the body may be used.
        """
        fields = bytes(header[: _FIELDS.size])
        found = _FIELDS.unpack(fields)
        magic, version, header_bytes, codec, flags, found_key, fingerprint, length, checksum = found
        (check,) = struct.unpack("<Q", header[_MAC_END:_CHECK_END])
        shortest = self._payload_bytes if codec == CODEC_NONE else 1
        expectations = [
            ("magic", magic == MAGIC, "not a kvferry frame"),
            ("version", (version, header_bytes) == (FRAME_VERSION, HEADER_BYTES), f"frame version {version}"),
            ("header", check == xxhash.xxh3_64_intdigest(header[:_MAC_END]), "damaged header"),
            ("codec", codec == CODEC_NONE or codec in codecs, f"codec {codec} is not read here"),
            ("key", found_key == key, "the frame holds another block"),
            ("fingerprint", fingerprint == self._fingerprint, "the frame is another model's"),
            ("length", shortest <= length <= self._payload_bytes, f"body of {length} bytes"),
        ]
        for reason, holds, why in expectations:
            if not holds:
                raise BlockRefused(key, reason, why)
        body = payload[:length]
        if xxhash.xxh3_128_digest(body) != checksum:
            raise BlockRefused(key, "checksum", "the body's bytes have changed")
        self._verify_mac(key, fields, flags, bytes(header[_FIELDS.size : _MAC_END]), body)
        return Sealed(codec, length)

    def _mac(self, fields: bytes, body: memoryview) -> bytes:
        if self._mac_key is None:
            return bytes(32)
        return blake3(fields, key=self._mac_key).update(body).digest()

    def _verify_mac(self, key: BlockKey, fields: bytes, flags: int, mac: bytes, body: memoryview) -> None:
        if self._mac_key is None:
            return
        if not flags & _FLAG_MAC or not hmac.compare_digest(mac, self._mac(fields, body)):
            raise BlockRefused(key, "mac", "not written by a holder of this deployment's secret")


def peek_key(header: memoryview | bytes) -> BlockKey | None:
    """Return the key that a header claims, or None when it is not an intact header."""
    if len(header) < _CHECK_END or bytes(header[: len(MAGIC)]) != MAGIC:
        return None
    (check,) = struct.unpack("<Q", header[_MAC_END:_CHECK_END])
    if check != xxhash.xxh3_64_intdigest(header[:_MAC_END]):
        return None
    return BlockKey(bytes(header[16:48]))
