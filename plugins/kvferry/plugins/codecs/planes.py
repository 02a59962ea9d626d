"""Byte planes: the first byte of every element, then the second of every element, and so on.

A float's high byte holds its sign and exponent, of which a block has few different ones; its low byte is
noise. Apart, the one shrinks and the other is passed over quickly; mixed, each spoils the other.

Pure functions, usable from any thread; NumPy releases the GIL while it copies.
"""

from __future__ import annotations

import numpy as np

__all__ = ["join", "split"]


def split(payload: memoryview, itemsize: int) -> memoryview:
    """Return the planes of ``payload``, one after another; ``itemsize`` divides its length."""
    if itemsize == 1:
        return payload
    elements = np.frombuffer(payload, np.uint8).reshape(-1, itemsize)
    planes = np.empty((itemsize, len(elements)), np.uint8)
    for index in range(itemsize):  # plane by plane is several times as fast as one transposed copy
        planes[index] = elements[:, index]
    return planes.reshape(-1).data


def join(planes: bytes, itemsize: int, into: memoryview) -> None:
    """Write the payload of ``planes``, which are as long as ``into``, to ``into``."""
    source = np.frombuffer(planes, np.uint8).reshape(itemsize, -1)
    elements = np.frombuffer(into, np.uint8).reshape(-1, itemsize)
    for index in range(itemsize):
        elements[:, index] = source[index]
