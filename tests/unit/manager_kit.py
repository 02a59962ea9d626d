"""A manager without a world: what its tests share. Time stands still unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec, ManagerOptions
from kvferry.connector.plan import Transfer, TransferResult
from kvferry.connector.policy import LRU
from kvferry.connector.tier import Outcome

DISK, S3 = "disk", "s3"
OPTIONS = ManagerOptions(lease_s=60.0, retry_failed_s=30.0, batch_blocks=2, remembered_blocks=100)
A = [BlockKey(bytes([number]) * 32) for number in range(20)]
B = [BlockKey(bytes([100 + number]) * 32) for number in range(20)]


def make(
    slots: int = 8,
    tiers: Sequence[str] = (),
    queue_blocks: int = 100,
    scan: bool = False,
    specs: Sequence[LowerTierSpec] = (),
) -> BlockManager:
    named = [LowerTierSpec(name=name, queue_blocks=queue_blocks, has_scan=scan) for name in tiers]
    return BlockManager(slots, LRU(), [*named, *specs], OPTIONS)


def save(manager: BlockManager, keys: Sequence[BlockKey], now: float = 0.0) -> list[Transfer]:
    reservation = manager.reserve("writer", keys, now)
    return manager.commit(reservation.id, [place.key for place in reservation.places], now)


class Prefetched(NamedTuple):
    coming: int
    transfers: list[Transfer]


def prefetch(manager: BlockManager, owner: str, keys: Sequence[BlockKey], now: float) -> Prefetched:
    """Prefetch as an engine does whose speed is not known."""
    coming, transfers = manager.prefetch(owner, keys, now)
    return Prefetched(coming.blocks, transfers)


def finish(
    manager: BlockManager,
    transfers: Sequence[Transfer],
    outcome: Outcome = Outcome.OK,
    now: float = 0.0,
    refused: bool = False,
) -> list[Transfer]:
    followers = []
    for transfer in transfers:
        keys = transfer.keys if refused else ()
        result = TransferResult(
            transfer, (outcome,) * len(transfer.keys), True, ("checksum",) * len(keys), keys
        )
        followers += manager.on_result(result, now)
    return followers


def late(manager: BlockManager, transfers: Sequence[Transfer], now: float = 0.0) -> None:
    for transfer in transfers:
        outcomes = (Outcome.FAILED,) * len(transfer.keys)
        manager.on_result(TransferResult(transfer, outcomes, False), now)


def on_disk(slots: int = 8, blocks: int = 4, tiers: Sequence[str] = (DISK,)) -> BlockManager:
    """A manager whose first tiers hold ``A[:blocks]``, the arena being empty."""
    manager = make(slots, tiers)
    for tier in tiers:
        manager.on_tier_scanned(tier, A[:blocks], is_complete=True)
    manager.take_events()
    return manager


def assert_nothing_leaks(manager: BlockManager) -> None:
    held = manager.occupancy
    assert (held.leases, held.holds, held.reservations, held.void_reservations) == (0, 0, 0, 0)
    assert (held.loading, held.transfers) == (0, 0)
    assert (held.slots.pinned, held.slots.reserved, held.slots.quarantined, held.slots.retired) == (
        0,
        0,
        0,
        0,
    )
