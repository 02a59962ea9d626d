"""A kvferry plugin for tests that damages leases, to prove that the tests would notice.

It runs in vLLM's scheduler process, where it stands between the sessions and the service, behind every
verification that kvferry makes. What it does is read from the file that the environment variable
``TAMPERING`` names, at each lease:

    flip     one byte of the first leased block is inverted in the arena while the lease is held
    stale    leases name the generation before the slot's own
    (other)  nothing
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import Lease

_lease = EmbeddedService.lease
_release = EmbeddedService.release
_flipped: dict[int, tuple[int, int]] = {}
"""Lease -> slot and offset of the byte that is inverted."""


def _mode() -> str:
    try:
        return Path(os.environ["TAMPERING"]).read_text().strip()
    except FileNotFoundError:
        return ""


def _top_byte(key: BlockKey, payload_bytes: int) -> int:
    """Choose a float32 by the key and return the offset of its sign and exponent (little endian)."""
    return int.from_bytes(key[:4], "big") % (payload_bytes // 4) * 4 + 3


def _invert(service: EmbeddedService, slot: int, offset: int) -> None:
    service._arena.slots_array[slot, offset] ^= 0xFF


def _tampered_lease(self: EmbeddedService, owner: str, keys: Sequence[BlockKey]) -> Lease:
    lease = _lease(self, owner, keys)
    mode = _mode()
    if mode == "flip" and lease.places:
        slot, offset = lease.places[0].slot, _top_byte(lease.places[0].key, self.layout.payload_bytes)
        _flipped[lease.id] = (slot, offset)
        _invert(self, slot, offset)
    if mode == "stale":
        places = tuple(place._replace(generation=place.generation - 1) for place in lease.places)
        return msgspec.structs.replace(lease, places=places)
    return lease


def _tampered_release(self: EmbeddedService, lease: Lease) -> None:
    if lease.id in _flipped:
        _invert(self, *_flipped.pop(lease.id))
    _release(self, lease)


EmbeddedService.lease = _tampered_lease  # type: ignore[method-assign]
EmbeddedService.release = _tampered_release  # type: ignore[method-assign]
