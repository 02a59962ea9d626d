"""The lossy codec ``fp8``: every element as 8-bit float (e4m3), every vector with a scale of its own.

A vector is the ``head_dim`` elements of one K or V; where the engine's pages are opaque, so many elements
that lie together. Its scale is the smallest power of two under which its
largest magnitude is at most 448, e4m3's largest, so scaling loses nothing and an element ``x`` comes back
within ``max(|x| / 16, scale / 1024)``, the scale being less than 1/224 of the vector's largest magnitude.
Encoding and decoding that again changes nothing more, so errors do not add up from tier to tier.

    body = exponent of each vector's scale (int8), then each element's e4m3 bits

A payload with a NaN or an infinity is not encoded; it is stored as it is. A result beyond the largest
value of the element's type becomes that value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Codes = npt.NDArray[np.uint8]

__all__ = ["Fp8Codec", "make_fp8"]

LARGEST_BY_DTYPE = {
    "bfloat16": float.fromhex("0x1.fep127"),
    "float16": 65504.0,
    "float32": float.fromhex("0x1.fffffep127"),
}
"""The element types that can be encoded, and the largest finite value of each."""
LARGEST = 448.0
"""That of e4m3."""
_LARGEST_MANTISSA = 0.875  # 448 = 0.875 * 2**9
_LARGEST_EXPONENT = 9
_MIN_EXPONENT = -126
"""Below it, a power of two and its inverse are not both ordinary float32."""
_NAN = 0x7F
_PIECE = 1 << 15
"""Elements worked on at a time, so that what is computed on the way stays in the processor's cache."""


class Fp8Codec:
    """Encodes payloads of one layout; see the module docstring.

    Args:
        layout: Geometry of the blocks; its ``dtype`` is in ``LARGEST_BY_DTYPE``.

    Raises:
        ImportError: The package ml_dtypes is not installed.
    """

    def __init__(self, layout: BlockLayout) -> None:
        import ml_dtypes

        self._e4m3 = np.dtype(ml_dtypes.float8_e4m3fn)
        self._dtype = np.dtype(ml_dtypes.bfloat16 if layout.dtype == "bfloat16" else layout.dtype)
        self._vector = layout.head_dim
        self._vectors = layout.payload_bytes // (layout.head_dim * layout.itemsize)
        step = max(1, _PIECE // self._vector)
        self._pieces = [slice(first, first + step) for first in range(0, self._vectors, step)]
        self._limit = np.float32(LARGEST_BY_DTYPE[layout.dtype])
        self._value_of_code: Floats = np.arange(256, dtype=np.uint8).view(self._e4m3).astype(np.float32)
        self._code_of_bits = self._all_bfloat16_codes() if layout.dtype == "bfloat16" else None

    @property
    def body_bytes(self) -> int:
        """Length of every body."""
        return self._vectors * (1 + self._vector)

    def encode(self, payload: memoryview, into: memoryview) -> int:
        """Encode; see ``codec.Codec``."""
        if self.body_bytes > len(into):
            return 0
        values = np.frombuffer(payload, self._dtype).reshape(-1, self._vector)
        exponents, codes = self._parts(into)
        for part in self._pieces:
            floats: Floats = values[part].astype(np.float32)
            largest = np.abs(floats).max(axis=1)
            if not np.isfinite(largest).all():
                return 0
            exponent = _exponents(largest)
            floats *= np.ldexp(np.float32(1), -exponent)[:, None]
            exponents[part] = exponent
            codes[part] = self._codes(floats)
        return self.body_bytes

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Decode; see ``codec.Codec``."""
        if len(body) != self.body_bytes:
            raise ValueError(f"{len(body)} bytes instead of {self.body_bytes}")
        values = np.frombuffer(into, self._dtype).reshape(-1, self._vector)
        exponents, codes = self._parts(body)
        for part in self._pieces:
            if ((codes[part] & _NAN) == _NAN).any():
                raise ValueError("holds a NaN")
            floats = np.take(self._value_of_code, codes[part])
            with np.errstate(over="ignore"):
                floats *= np.ldexp(np.float32(1), exponents[part].astype(np.int32))[:, None]
            values[part] = np.clip(floats, -self._limit, self._limit, out=floats)

    def _parts(self, body: memoryview) -> tuple[npt.NDArray[np.int8], Codes]:
        """Return a body's exponents, and its codes by vector."""
        whole = np.frombuffer(body, np.uint8, self.body_bytes)
        return whole[: self._vectors].view(np.int8), whole[self._vectors :].reshape(-1, self._vector)

    def _codes(self, scaled: Floats) -> Codes:
        if self._code_of_bits is None:
            return scaled.astype(self._e4m3).view(np.uint8)
        # A scaled bfloat16 still is one: the upper half of its bits says it all, and a table is ten times as fast.
        return np.take(self._code_of_bits, (scaled.view(np.uint32) >> 16).astype(np.uint16))

    def _all_bfloat16_codes(self) -> Codes:
        every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
        finite = np.where(np.abs(every) <= LARGEST, every, np.float32(0))
        return finite.astype(self._e4m3).view(np.uint8)


def make_fp8(layout: BlockLayout) -> Fp8Codec:
    """Return the codec ``fp8``.

    Raises:
        ConfigError: The package ml_dtypes is not installed, or these blocks' elements are no floats of
            16 or 32 bits.
    """
    if layout.dtype not in LARGEST_BY_DTYPE:
        what = f"of {layout.dtype}" if layout.dtype else "whose element type is unknown"
        raise ConfigError(
            "codec",
            f"fp8 cannot encode blocks {what}",
            f"it can encode {', '.join(LARGEST_BY_DTYPE)}; use zstd",
        )
    try:
        return Fp8Codec(layout)
    except ImportError as error:
        raise ConfigError(
            "codec", "fp8 needs the package ml_dtypes", "pip install 'kvferry[codecs]'"
        ) from error


def _exponents(largest: Floats) -> npt.NDArray[np.int32]:
    """Return the exponent of each vector's scale, for its largest magnitude."""
    mantissas, exponents = np.frexp(largest)  # largest = mantissa * 2**exponent, mantissa in [0.5, 1)
    above = exponents - _LARGEST_EXPONENT + (mantissas > _LARGEST_MANTISSA)
    return np.asarray(np.maximum(above, _MIN_EXPONENT), np.int32)
