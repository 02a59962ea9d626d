"""Frames: a block as it lies outside the arena, a self-describing header and the payload.

Nothing a tier returns is believed before :func:`verify` has found every field of the header, the
payload's checksum and (where the operator gave a secret) its MAC to be what was asked for.

Header, little-endian, ``HEADER_BYTES`` long:

    offset  bytes  field
         0      8  magic ``KVFERRY\\0``
         8      2  version
        10      2  header length
        12      2  codec id (0: none)
        14      2  flags (bit 0: a MAC is present)
        16     32  block key
        48     32  model fingerprint
        80      8  payload length in bytes
        88     16  XXH3-128 of the payload
       104     32  keyed BLAKE3 over bytes 0..104 and the payload; zeros without a secret
       136      8  XXH3-64 of bytes 0..136
       144    112  zeros

Pure functions, usable from any thread.
"""

from __future__ import annotations

import hmac
import struct

import xxhash
from blake3 import blake3

from kvferry.connector.errors import BlockRefused
from kvferry.connector.keys import BlockKey

__all__ = ["FRAME_VERSION", "HEADER_BYTES", "FrameSeal", "peek_key"]

HEADER_BYTES = 256
FRAME_VERSION = 1
MAGIC = b"KVFERRY\0"

_FIELDS = struct.Struct("<8sHHHH32s32sQ16s")
_MAC_END = _FIELDS.size + 32
_CHECK_END = _MAC_END + 8
_FLAG_MAC = 1
_CODEC_NONE = 0


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

    def seal(self, key: BlockKey, header: memoryview, payload: memoryview) -> None:
        """Write the header for ``payload`` into ``header`` (``HEADER_BYTES`` long).

        Reads the whole payload once (checksum) or twice (with a MAC); releases the GIL meanwhile.
        """
        body = payload[: self._payload_bytes]
        flags = _FLAG_MAC if self._mac_key is not None else 0
        fields = _FIELDS.pack(
            MAGIC,
            FRAME_VERSION,
            HEADER_BYTES,
            _CODEC_NONE,
            flags,
            key,
            self._fingerprint,
            self._payload_bytes,
            xxhash.xxh3_128_digest(body),
        )
        sealed = fields + self._mac(fields, body)
        header[:_CHECK_END] = sealed + struct.pack("<Q", xxhash.xxh3_64_intdigest(sealed))
        header[_CHECK_END:] = bytes(HEADER_BYTES - _CHECK_END)

    def verify(self, key: BlockKey, header: memoryview, payload: memoryview) -> None:
        """Raise BlockRefused unless ``header`` and ``payload`` are exactly the block ``key``."""
        fields = bytes(header[: _FIELDS.size])
        found = _FIELDS.unpack(fields)
        magic, version, length, codec, flags, found_key, fingerprint, payload_bytes, checksum = found
        body = payload[: self._payload_bytes]
        (check,) = struct.unpack("<Q", header[_MAC_END:_CHECK_END])
        expectations = [
            ("magic", magic == MAGIC, "not a kvferry frame"),
            ("version", (version, length) == (FRAME_VERSION, HEADER_BYTES), f"frame version {version}"),
            ("header", check == xxhash.xxh3_64_intdigest(header[:_MAC_END]), "damaged header"),
            ("codec", codec == _CODEC_NONE, f"unknown codec {codec}"),
            ("key", found_key == key, "the frame holds another block"),
            ("fingerprint", fingerprint == self._fingerprint, "the frame is another model's"),
            ("length", payload_bytes == self._payload_bytes, f"payload of {payload_bytes} bytes"),
        ]
        for reason, holds, why in expectations:
            if not holds:
                raise BlockRefused(key, reason, why)
        if xxhash.xxh3_128_digest(body) != checksum:
            raise BlockRefused(key, "checksum", "the payload's bytes have changed")
        self._verify_mac(key, fields, flags, bytes(header[_FIELDS.size : _MAC_END]), body)

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
