"""What an operator can set for a disk tier, and the sizes that follow from it.

Values and arithmetic only; no file is touched here.
"""

from __future__ import annotations

import mmap
from typing import Literal

import msgspec

from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout

__all__ = ["INDEX_BATCH", "SECTOR_BYTES", "DiskOptions", "Geometry", "plan_geometry"]

SECTOR_BYTES = 4096
"""Unit of direct I/O; each record starts with one sector that holds the frame's header."""

INDEX_BATCH = 64
"""Most keys that one index transaction changes; bounds the pages a transaction can copy."""

_MIN_RECORDS = 4
_TARGET_SLAB_BYTES = 256 << 20
_MAX_SLABS = 128
_MIN_SLABS = 16
# Manifest, its temporary twin, the lock file and the directory itself.
_FIXED_BYTES = 64 << 10
# A file's block map: ext4 keeps 340 extents in a 4 KiB block, and a record is at most two extents.
_SLAB_MAP_BYTES = 16 << 10
_RECORD_MAP_BYTES = 32
# LMDB merges a page that falls below a quarter full: 4080 B / 4 / 66 B (node, key, value, pointer).
_FEWEST_ENTRIES_PER_PAGE = 14


class DiskOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a tier of type ``disk``."""

    path: str
    """Directory for this tier alone; created when absent. ``~`` is understood."""
    capacity: int
    """Bytes that all files in the directory together never exceed; sizes like ``"64GiB"``."""
    eviction: str = "s3fifo"
    """Eviction policy by name: ``lru``, ``s3fifo``, or a plugin's."""
    direct_io: Literal["auto", "off"] = "auto"
    """``auto`` goes past the page cache where the filesystem can and says so where it cannot;
    ``off`` always uses the page cache."""
    sync: bool = False
    """Flush records and index to the medium before a store counts as done. Without it a killed
    process loses nothing, but after a crash of the machine the tier starts empty. With it the
    blocks survive that too, and every batch of stores waits for the device to flush."""


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """How a capacity is divided; every figure is an upper bound that holds at any time."""

    record_bytes: int
    """One block on disk: a sector for the header, then the slot's bytes."""
    record_count: int
    """Records in all slabs together."""
    slab_records: int
    """Records in a slab that is added now; earlier slabs may differ."""
    index_bytes: int
    """Size of the index file."""


def index_budget_bytes(record_count: int) -> int:
    """Return the most bytes that an index of ``record_count`` entries can need.

    Counted are leaf and branch pages at their lowest fill, and the copies that a transaction makes of
    the pages it changes, three times over: LMDB reuses a page only after two further transactions.
    """
    tree_pages = 4 + -(-record_count * 106 // (100 * _FEWEST_ENTRIES_PER_PAGE))
    copied_pages = min(tree_pages, INDEX_BATCH * 4)
    return mmap.PAGESIZE * (18 + tree_pages + 3 * copied_pages)


def plan_geometry(name: str, options: DiskOptions, layout: BlockLayout) -> Geometry:
    """Return the sizes for ``options`` and blocks of ``layout``.

    Raises:
        ConfigError: The capacity holds less than a few blocks.
    """
    record_bytes = SECTOR_BYTES + layout.slot_bytes
    fixed_bytes = _FIXED_BYTES + min(options.capacity // 64, 2 * _MAX_SLABS * _SLAB_MAP_BYTES)
    count = options.capacity // record_bytes
    while count > 0 and _total_bytes(count, record_bytes, fixed_bytes) > options.capacity:
        excess = _total_bytes(count, record_bytes, fixed_bytes) - options.capacity
        count -= max(1, excess // (2 * record_bytes))
    if count < _MIN_RECORDS:
        needed = _total_bytes(_MIN_RECORDS, record_bytes, _FIXED_BYTES) * 64 // 63 + 1
        raise ConfigError(
            f"tiers.{name}.capacity",
            f"{options.capacity} bytes hold fewer than {_MIN_RECORDS} blocks of {layout.slot_bytes} bytes",
            f"give at least {needed}",
        )
    slab_records = max(1, min(_TARGET_SLAB_BYTES // record_bytes, -(-count // _MIN_SLABS)))
    return Geometry(
        record_bytes=record_bytes,
        record_count=count,
        slab_records=max(slab_records, -(-count // _MAX_SLABS)),
        index_bytes=index_budget_bytes(count),
    )


def _total_bytes(count: int, record_bytes: int, fixed_bytes: int) -> int:
    return fixed_bytes + index_budget_bytes(count) + count * (record_bytes + _RECORD_MAP_BYTES)
