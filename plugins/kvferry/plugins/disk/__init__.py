"""The disk tier: blocks in preallocated slab files, found through an LMDB index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType
from kvferry.plugins.disk.options import DiskOptions

__all__ = ["kvferry_tier_types"]


def _create(options: DiskOptions, context: TierContext) -> Tier:
    from kvferry.plugins.disk.opening import open_disk_tier

    return open_disk_tier(options, context)


def _check(options: DiskOptions, name: str) -> Iterable[Finding]:
    from kvferry.plugins.disk.check import check

    return check(options, name)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    """Offer the tier type ``disk``."""
    return [
        TierType(
            name="disk",
            options=DiskOptions,
            create=_create,
            summary="local NVMe or SSD: bounded, survives restarts and kill -9",
            check=_check,
        )
    ]
