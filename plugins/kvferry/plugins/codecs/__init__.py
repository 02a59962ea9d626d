"""kvferry's own codecs: ``lz4`` and ``zstd``, which lose nothing, and ``fp8``, which loses precision."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.codec import Codec, CodecType
from kvferry.connector.hooks import hookimpl
from kvferry.connector.layout import BlockLayout

__all__ = ["kvferry_codecs"]


def _lz4(layout: BlockLayout) -> Codec:
    from kvferry.plugins.codecs.lossless import make_lz4

    return make_lz4(layout)


def _zstd(layout: BlockLayout) -> Codec:
    from kvferry.plugins.codecs.lossless import make_zstd

    return make_zstd(layout)


def _fp8(layout: BlockLayout) -> Codec:
    from kvferry.plugins.codecs.fp8 import make_fp8

    return make_fp8(layout)


@hookimpl
def kvferry_codecs() -> Sequence[CodecType]:
    """Offer ``lz4``, ``zstd`` and ``fp8``."""
    return [
        CodecType("lz4", 1, False, _lz4, "lossless, fast, saves little"),
        CodecType("zstd", 2, False, _zstd, "lossless, saves about 30 % of bfloat16 KV"),
        CodecType("fp8", 3, True, _fp8, "LOSSY: 8-bit floats, saves about half of bfloat16 KV"),
    ]
