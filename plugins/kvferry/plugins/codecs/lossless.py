"""The lossless codecs: byte planes through LZ4 or Zstandard.

The body of ``lz4`` is one LZ4 block, that of ``zstd`` one Zstandard frame with its content size. Neither
is believed about how much it holds: never more is unpacked than a payload's length.

Both libraries release the GIL while they work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout
from kvferry.plugins.codecs.planes import join, split

if TYPE_CHECKING:
    from zstandard import ZstdCompressor, ZstdDecompressor

__all__ = ["PlaneCodec", "make_lz4", "make_zstd"]

INSTALL = "pip install 'kvferry[codecs]'"
ZSTD_LEVEL = 1
"""On KV, higher levels are slower and no smaller; see ADR 0012."""


class PlaneCodec:
    """Byte planes through a general compressor.

    Args:
        itemsize: Bytes of an element.
        compress: Returns its argument compressed.
        decompress: Returns exactly so many bytes from a body, or raises ValueError.
    """

    def __init__(
        self,
        itemsize: int,
        compress: Callable[[memoryview], bytes],
        decompress: Callable[[memoryview, int], bytes],
    ) -> None:
        self._itemsize = itemsize
        self._compress = compress
        self._decompress = decompress

    def encode(self, payload: memoryview, into: memoryview) -> int:
        """Encode; see ``codec.Codec``."""
        body = self._compress(split(payload, self._itemsize))
        if len(body) > len(into):
            return 0
        into[: len(body)] = body
        return len(body)

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Decode; see ``codec.Codec``."""
        planes = self._decompress(body, len(into))
        if len(planes) != len(into):
            raise ValueError(f"{len(planes)} bytes instead of {len(into)}")
        join(planes, self._itemsize, into)


def make_lz4(layout: BlockLayout) -> PlaneCodec:
    """Return the codec ``lz4``.

    Raises:
        ConfigError: The package lz4 is not installed.
    """
    try:
        import lz4.block
    except ImportError as error:
        raise ConfigError("codec", "lz4 needs the package lz4", INSTALL) from error

    def compress(planes: memoryview) -> bytes:
        return bytes(lz4.block.compress(planes, store_size=False))

    def decompress(body: memoryview, length: int) -> bytes:
        try:
            return bytes(lz4.block.decompress(body, uncompressed_size=length))
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from error

    return PlaneCodec(layout.itemsize, compress, decompress)


def make_zstd(layout: BlockLayout) -> PlaneCodec:
    """Return the codec ``zstd``.

    Raises:
        ConfigError: The package zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("codec", "zstd needs the package zstandard", INSTALL) from error

    class Tools(threading.local):
        """One of each per thread: they are not made to be shared."""

        def __init__(self) -> None:
            self.compressor: ZstdCompressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
            self.decompressor: ZstdDecompressor = zstandard.ZstdDecompressor()

    tools = Tools()

    def compress(planes: memoryview) -> bytes:
        return tools.compressor.compress(planes)

    def decompress(body: memoryview, length: int) -> bytes:
        try:
            said = zstandard.get_frame_parameters(body)
            if said.content_size != length or said.window_size > max(length, 1024):
                raise ValueError(f"says that it holds {said.content_size} bytes instead of {length}")
            return tools.decompressor.decompress(body, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error

    return PlaneCodec(layout.itemsize, compress, decompress)
