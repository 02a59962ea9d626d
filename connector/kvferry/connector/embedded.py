"""The embedded service: arena, manager, mover and tiers in the engine's scheduler process.

This is the composition: it owns the parts, hands the manager's transfers to the mover and the mover's
results back to the manager, and tells observers. It decides nothing about blocks itself.

Threading: one thread calls every method. Tiers run on the mover's threads; what they drop on their own
arrives through a queue. Nothing here waits for a tier after the constructor, except ``settle`` and ``close``.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec

from kvferry.connector import guards
from kvferry.connector.arena import Arena, ArenaHandle, slots_for
from kvferry.connector.coding import tier_codecs
from kvferry.connector.config import Config, TierConfig
from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.counting import CountersDelta
from kvferry.connector.errors import ClosedError
from kvferry.connector.frame import FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.manager import BlockManager, LowerTierSpec, ManagerOptions
from kvferry.connector.metrics import Counts
from kvferry.connector.mover import Mover
from kvferry.connector.opening import OpenTier, close_tiers, open_tiers
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.scan import Scan, ScanBatch, wait_for
from kvferry.connector.service import HOST, Coming, Lease, Match, Reservation, ServiceEvent
from kvferry.connector.tier import Outcome, TierContext, TierStats
from kvferry.connector.visibility import Settling

__all__ = ["EmbeddedService", "batch_blocks"]

_SCAN_WAIT_S = 5.0
"""Longest that the constructor waits to learn what the tiers hold; the rest comes with ``poll``."""
_CLOSE_GRACE_S = 2.0
"""Time that threads and tiers have to end after the deadline of ``close``."""
_WAIT_POLL_S = 0.5
"""How often a wait looks after deadlines while no tier reports anything."""
_TRANSFER_BYTES = 8 << 20
_MAX_TRANSFER_BLOCKS = 64
_MAX_EVENTS = 65536
_SCAN_BATCHES_PER_POLL = 4


class EmbeddedService:
    """Implements ``service.CacheService`` inside one process.

    Args:
        config: The effective configuration.
        layout: Geometry of the model's blocks.
        fingerprint: What blocks are keyed under, 32 bytes (``coding.block_fingerprint``).
        registry: The plugins.
        instance: Distinguishes engines of one deployment that must not share exclusive resources.
        kept_instances: How many instances may leave something in a tier; see ``tier.TierContext``.
        clock: Seconds, monotonic.
        logger: Where problems are reported.
        on_report: Called, on a tier's thread, when ``poll`` has something to take in.

    Raises:
        ConfigError: Something in the configuration is wrong, or does not fit these blocks.
        ArenaError: The arena's memory cannot be had.
        KVFerryError: A tier that is required cannot be opened.
    """

    def __init__(
        self,
        config: Config,
        layout: BlockLayout,
        fingerprint: bytes,
        registry: PluginRegistry,
        instance: str = "",
        kept_instances: int = 0,
        clock: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
        on_report: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout = layout
        self._registry = registry
        self._instance = instance
        self._kept_instances = kept_instances
        self._clock = clock
        self._logger = logger or logging.getLogger(__name__)
        self._is_closed = False
        self._removed: queue.SimpleQueue[tuple[str, tuple[BlockKey, ...]]] = queue.SimpleQueue()
        self._events: deque[ServiceEvent] = deque(maxlen=_MAX_EVENTS)
        self._removals: dict[str, int] = {}
        self._counting = CountersDelta()
        policy = registry.eviction_policy(config.host.eviction)
        codecs = tier_codecs(config, layout, registry, self._logger)
        num_slots = slots_for(config.host.capacity, layout.slot_bytes, config.host.huge_pages)
        opened = open_tiers(
            config,
            registry,
            lambda tier: self._context(tier, fingerprint),
            self._logger,
        )
        self._tiers, self._problems = opened
        try:
            specs = [_spec(opened_tier, registry) for opened_tier in self._tiers]
            self._arena = Arena.create(num_slots, layout.slot_bytes, config.host.huge_pages, self._logger)
            self._mover = Mover(
                self._tiers,
                seal=FrameSeal(fingerprint, layout.payload_bytes, config.secret or None),
                codecs=codecs,
                slot=self._arena.slot,
                clock=clock,
                logger=self._logger,
                on_report=on_report,
            )
        except BaseException:
            close_tiers(self._tiers, _CLOSE_GRACE_S, self._logger)
            raise
        self._manager = BlockManager(
            num_slots,
            policy,
            specs,
            ManagerOptions(
                lease_s=config.lease_s,
                retry_failed_s=config.retry_failed_s,
                batch_blocks=batch_blocks(layout),
            ),
            on_generation=self._arena.set_generation,
        )
        self._available = {opened_tier.config.name: True for opened_tier in self._tiers}
        self._scans = [
            Scan(opened_tier.config.name, opened_tier.tier, self._logger)
            for opened_tier in self._tiers
            if _has_scan(opened_tier)
        ]
        for scan, batch in wait_for(list(self._scans), _SCAN_WAIT_S):
            self._take_scanned(scan, batch)

    @property
    def layout(self) -> BlockLayout:
        """Geometry of the blocks."""
        return self._layout

    @property
    def arena(self) -> ArenaHandle:
        """How worker processes map the arena."""
        return self._arena.handle

    def slot(self, index: int) -> memoryview:
        """Return the bytes of a slot, for whoever holds a lease or reservation of it. Any thread."""
        return self._arena.slot(index)

    @property
    def description(self) -> str:
        """Where blocks are kept, in a few words for a log."""
        names = [HOST, *(opened.config.name for opened in self._tiers)]
        return f"{self._arena.handle.num_slots} slots, tiers {', '.join(names)}"

    @property
    def is_shared(self) -> bool:
        """Whether there is a shared tier."""
        return any(opened.tier.capabilities.is_shared for opened in self._tiers)

    def problems(self) -> list[str]:
        """Return one line for each configured tier that this service goes on without."""
        return list(self._problems)

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        """Tell how much of a prefix is there. No side effect."""
        return self._manager.lookup(keys, self._now())

    def prefetch(self, owner: str, keys: Sequence[BlockKey], block_s: float | None = None) -> Coming:
        """Start bringing the reachable prefix into the arena; return how many blocks are ready or coming."""
        now = self._now()
        prefetch = self._manager.prefetch(owner, keys, now, block_s)
        self._submit(prefetch.transfers, now)
        return prefetch.coming

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        """Pin the ready prefix of ``keys``."""
        return self._manager.lease(owner, keys, self._now())

    def release(self, lease: Lease) -> None:
        """End a lease. Unknown or expired ones are ignored."""
        self._require_open()
        self._manager.release(lease.id)

    def reserve(self, owner: str, keys: Sequence[BlockKey], wait_s: float = 0.0) -> Reservation:
        """Hand out slots for the blocks of ``keys`` that are not held, evicting where allowed."""
        return self._manager.reserve(owner, keys, self._now())

    def is_expected(self, key: BlockKey) -> bool:
        """Tell whether a block is in the arena or on its way there, be it that somebody else reserved it."""
        return self._manager.is_expected(key)

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        """Make filled blocks visible and start spilling them; the reservation's others are aborted."""
        now = self._now()
        self._submit(self._manager.commit(reservation.id, keys, now), now)

    def settle(self, keys: Sequence[BlockKey], deadline_s: float) -> bool:
        """Wait until a shared tier holds each of these blocks, having them written where need be.

        What admission policies and deferred writes would keep back is written too. While it waits it does what
        ``poll`` does. Without a shared tier there is nothing to wait for.
        """
        settling = Settling(keys)
        deadline = time.monotonic() + deadline_s
        while True:
            now = self._now()
            self._submit(self._manager.settle(settling, now), now)
            if not settling.waiting:
                return not settling.lost
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._poll(wait_s=min(left, _WAIT_POLL_S))

    def abort(self, reservation: Reservation) -> None:
        """Give back all slots of a reservation, nothing of it becoming visible."""
        self._require_open()
        self._manager.abort(reservation.id)

    def report_load_failed(self, keys: Sequence[BlockKey]) -> None:
        """Remember for a while that these blocks could not be delivered, and stop offering them."""
        self._manager.report_load_failed(keys, self._now())

    def release_owner(self, owner: str) -> None:
        """Drop everything prefetched and leased for ``owner``; reservations stay until settled."""
        self._require_open()
        self._manager.release_owner(owner)

    def poll(self) -> None:
        """Take in what the tiers finished, expire leases, start waiting transfers. Call every step."""
        self._require_open()
        self._poll()

    def _poll(self, wait_s: float = 0.0) -> None:
        now = self._clock()
        self._take_in_scans()
        self._take_in_removed()
        refused: set[BlockKey] = set()
        for result in self._mover.poll(now, wait_s):
            refused.update(result.refused_keys)
            self._submit(self._manager.on_result(result, now), now)
            self._observe(result)
        self._switch_tiers(now)
        self._submit(self._manager.expire(now), now)
        self._collect_events("evicted", refused)

    def has_pending(self) -> bool:
        """Tell whether transfers are under way that a later ``poll`` will report."""
        return self._mover.has_pending()

    def take_events(self) -> Sequence[ServiceEvent]:
        """Return and forget the events since the last call; the oldest go when nobody asks for long."""
        self._collect_events("evicted")
        events = tuple(self._events)
        self._events.clear()
        return events

    def clear(self) -> None:
        """Forget every block in every tier (weights changed). Leased blocks go when released."""
        now = self._now()
        self._collect_events("evicted")
        self._submit(self._manager.clear(now), now)
        self._collect_events("deleted")

    def counters(self) -> ServiceCounters:
        """Return a snapshot of all totals and sizes."""
        held, decisions = self._manager.occupancy, self._manager.counters
        tiers = self._mover.counters()
        for opened in self._tiers:
            name = opened.config.name
            self._add_size(opened, tiers[name])
            tiers[name].shed_stores += decisions.shed.get(name, 0) + decisions.skipped.get(name, 0)
        return ServiceCounters(
            decisions=decisions,
            slots=self._arena.handle.num_slots,
            used_slots=self._arena.handle.num_slots - held.slots.free,
            capacity_bytes=self._arena.handle.total_bytes,
            host_blocks=held.slots.committed,
            host_evictions=decisions.evictions,
            leases=held.leases + held.holds,
            reservations=held.reservations + held.void_reservations,
            pending_transfers=held.transfers,
            tiers=tiers,
        )

    def report(self, counts: Counts) -> None:
        """Count what happened since the last call."""
        self._counting.add(self.counters(), counts)

    def close(self, deadline_s: float) -> None:
        """Finish transfers under way for at most ``deadline_s`` seconds and release everything. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + deadline_s
        for scan in self._scans:
            scan.stop(_CLOSE_GRACE_S)
        while (left := deadline - time.monotonic()) > 0:
            self._submit(self._manager.flush(), self._clock())
            if not self._mover.has_pending():
                break
            self._poll(wait_s=min(left, _WAIT_POLL_S))
        for name in self._manager.uncleared_tiers:
            self._logger.error(
                "tier %r may still hold blocks that were to be forgotten: empty it before its next use", name
            )
        self._mover.close(max(0.0, deadline - time.monotonic()))
        close_tiers(self._tiers, _CLOSE_GRACE_S, self._logger)
        self._arena.close()

    def _now(self) -> float:
        self._require_open()
        return self._clock()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the cache service is closed")

    def _context(self, tier: TierConfig, fingerprint: bytes) -> TierContext:
        return TierContext(
            name=tier.name,
            layout=self._layout,
            fingerprint=fingerprint,
            instance=self._instance,
            kept_instances=self._kept_instances,
            on_removed=partial(self._on_removed, tier.name),
            make_eviction_policy=self._registry.eviction_policy,
            logger=self._logger.getChild(tier.name),
            threads=tier.threads,
            deadline_s=tier.deadline_s,
            codec=tier.codec,
        )

    def _on_removed(self, tier: str, keys: Iterable[object]) -> None:
        """Queue what a tier dropped, leaving out what is no key. Called on the tier's threads."""
        self._removed.put((tier, tuple(BlockKey(key) for key in keys if isinstance(key, bytes))))

    def _submit(self, transfers: Sequence[Transfer], now: float) -> None:
        if transfers:
            self._mover.submit(transfers, now)
            self._switch_tiers(now)

    def _take_in_scans(self) -> None:
        for scan in list(self._scans):
            for _ in range(_SCAN_BATCHES_PER_POLL):
                batch = scan.take()
                if batch is None:
                    break
                self._take_scanned(scan, batch)

    def _take_scanned(self, scan: Scan, batch: ScanBatch) -> None:
        self._submit(self._manager.on_tier_scanned(scan.name, batch.keys, batch.is_last), self._clock())
        if batch.is_last:
            self._scans.remove(scan)

    def _take_in_removed(self) -> None:
        """Removals before results: a block dropped and stored again in between is there."""
        while True:
            try:
                tier, keys = self._removed.get_nowait()
            except queue.Empty:
                return
            self._removals[tier] = self._removals.get(tier, 0) + len(keys)
            self._manager.on_tier_removed(tier, keys)

    def _switch_tiers(self, now: float) -> None:
        for name, was_available in self._available.items():
            is_available = self._mover.is_available(name, now)
            if is_available != was_available:
                self._available[name] = is_available
                self._manager.set_tier_available(name, is_available)

    def _observe(self, result: TransferResult) -> None:
        """Tell observers of loads; what is stored and removed they learn from the manager's events."""
        transfer = result.transfer
        if not result.is_finished or transfer.direction is not Direction.LOAD:
            return
        loaded = _keys_with(Outcome.OK, result)
        if loaded:
            self._registry.notify_loaded(transfer.tier, loaded)
        for reason in sorted(set(result.refused)):
            refused = zip(result.refused_keys, result.refused, strict=True)
            keys = [key for key, why in refused if why == reason]
            self._registry.notify_refused(transfer.tier, keys, reason)

    def _collect_events(self, reason: str, refused: Iterable[BlockKey] = ()) -> None:
        """Move the manager's events to the engine's list, telling observers."""
        refused = frozenset(refused)
        for event in self._manager.take_events():
            self._events.append(event)
            if event.kind == "stored":
                self._registry.notify_stored(event.tier, event.keys)
                continue
            others = [key for key in event.keys if key not in refused]
            damaged = [key for key in event.keys if key in refused]
            if others:
                self._registry.notify_removed(event.tier, others, reason)
            if damaged:
                self._registry.notify_removed(event.tier, damaged, "refused")

    def _add_size(self, opened: OpenTier, counters: TierCounters) -> None:
        counters.removed_blocks = self._removals.get(opened.config.name, 0)
        with guards.boundary(partial(self._logger.debug, "tier %r has no stats: %s", opened.config.name)):
            stats = msgspec.convert(msgspec.to_builtins(opened.tier.stats()), TierStats)
            counters.blocks = stats.blocks
            counters.used_bytes = stats.used_bytes
            counters.capacity_bytes = stats.capacity_bytes
            counters.evictions = stats.evictions


def _spec(opened: OpenTier, registry: PluginRegistry) -> LowerTierSpec:
    config = opened.config
    return LowerTierSpec(
        name=config.name,
        queue_blocks=config.queue_blocks,
        has_scan=_has_scan(opened),
        is_shared=opened.tier.capabilities.is_shared,
        admission=registry.admission_policy(config.admission, f"tiers.{config.name}.admission"),
        is_deferred=config.write == "back",
        is_promoted_to=config.promote,
        is_always_asked=config.ask == "always",
    )


def _has_scan(opened: OpenTier) -> bool:
    capabilities = opened.tier.capabilities
    return capabilities.is_persistent and not capabilities.is_shared


def batch_blocks(layout: BlockLayout) -> int:
    """Return how many blocks one transfer moves: few large ones, many small ones."""
    return max(1, min(_MAX_TRANSFER_BLOCKS, _TRANSFER_BYTES // layout.payload_bytes))


def _keys_with(outcome: Outcome, result: TransferResult) -> list[BlockKey]:
    return [key for key, found in zip(result.transfer.keys, result.outcomes, strict=True) if found is outcome]
