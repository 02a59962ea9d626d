"""Opening a disk tier: from whatever the last process left to a tier that can serve.

Every step can be cut short and repeated: blocks leave the index before their records go, and the
directory is marked as in use before anything else is changed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

from kvferry.connector.errors import TierUnavailable
from kvferry.connector.tier import TierContext
from kvferry.plugins.disk.directory import Directory, hint_for, tier_path
from kvferry.plugins.disk.index import Entry, Index, IndexFull
from kvferry.plugins.disk.options import INDEX_BATCH, DiskOptions, Geometry, plan_geometry
from kvferry.plugins.disk.records import Records
from kvferry.plugins.disk.siblings import remove_oldest
from kvferry.plugins.disk.slabs import Slabs, record_of, split_record
from kvferry.plugins.disk.tier import DiskTier

if TYPE_CHECKING:
    from kvferry.connector.policy import EvictionPolicy

__all__ = ["open_disk_tier"]


def open_disk_tier(options: DiskOptions, context: TierContext) -> DiskTier:
    """Open the tier in ``options.path``, creating it when absent. Blocks on the disk.

    Raises:
        ConfigError: The options make no sense for these blocks.
        TierUnavailable: The directory cannot be used; the message says why and what to do.
    """
    geometry = plan_geometry(context.name, options, context.layout)
    policy = cast("EvictionPolicy", context.make_eviction_policy(options.eviction))
    path = tier_path(options.path, context)
    with contextlib.ExitStack() as undo:
        directory = Directory(context, path, geometry.record_bytes, is_durable=options.sync)
        undo.callback(directory.release, is_clean=False)
        remove_oldest(path, context)
        try:
            slabs = Slabs(path, geometry.record_bytes, use_direct_io=options.direct_io == "auto")
            undo.callback(slabs.close)
            index = Index(context.name, directory.index_path, geometry.index_bytes, is_durable=options.sync)
            undo.callback(index.close)
            entries = _reconcile(index, slabs, geometry, context)
            if not slabs.sizes:
                slabs.grow(min(geometry.slab_records, geometry.record_count))
        except OSError as error:
            raise TierUnavailable(
                context.name, f"{path} cannot be used: {error.strerror}", hint_for(error)
            ) from error
        if options.direct_io == "auto" and not slabs.is_direct:
            context.logger.warning(
                "tier %r: %s has no direct I/O; going through the page cache", context.name, path
            )
        records = _recollect(entries, slabs, policy)
        context.logger.info(
            "tier %r: %s opened with %d blocks, room for %d",
            context.name,
            path,
            len(records),
            geometry.record_count,
        )
        undo.pop_all()
    return DiskTier(options, context, geometry, directory, index, slabs, records)


def _reconcile(index: Index, slabs: Slabs, geometry: Geometry, context: TierContext) -> list[Entry]:
    """Bring index, slabs and capacity into agreement; return the entries that stand."""
    entries, damaged = index.entries()
    allowed = _allowed_records(slabs.sizes, geometry.record_count)
    standing: list[Entry] = []
    dropped: list[Entry] = []
    seen: set[int] = set()
    for entry in reversed(entries):
        slab, position = split_record(entry.record)
        if position < allowed.get(slab, 0) and entry.record not in seen:
            seen.add(entry.record)
            standing.append(entry)
        else:
            dropped.append(entry)
    if damaged or dropped:
        context.logger.warning(
            "tier %r: %d blocks are gone: %d damaged index entries, %d outside the slabs or the capacity",
            context.name,
            damaged + len(dropped),
            damaged,
            len(dropped),
        )
    try:
        for start in range(0, len(dropped), INDEX_BATCH):
            index.update((), [(entry.key, entry.record) for entry in dropped[start : start + INDEX_BATCH]])
    except IndexFull as error:
        raise TierUnavailable(
            context.name, f"the index has no room: {error}", "make room on the disk"
        ) from error
    for slab, count in allowed.items():
        slabs.trim(slab, count)
    if index.size_bytes > geometry.index_bytes:
        index.compact(geometry.index_bytes)
    standing.reverse()
    return standing


def _allowed_records(sizes: dict[int, int], limit: int) -> dict[int, int]:
    """Return how many records each slab may keep so that all together are at most ``limit``."""
    allowed = {}
    for slab in sorted(sizes):
        allowed[slab] = min(sizes[slab], limit)
        limit -= allowed[slab]
    return allowed


def _recollect(entries: list[Entry], slabs: Slabs, policy: EvictionPolicy) -> Records:
    """Rebuild what is in memory; a record that no entry names is free."""
    records = Records(policy)
    for entry in entries:
        records.add_held(entry.key, entry.record)
    held = {entry.record for entry in entries}
    records.add_free(
        [
            record
            for slab, count in slabs.sizes.items()
            for position in range(count)
            if (record := record_of(slab, position)) not in held
        ]
    )
    return records
