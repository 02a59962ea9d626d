"""Pools: the caches a server holds, one for each model of each tenant.

A pool is an ``EmbeddedService``: an arena, a manager and tiers of its own. So tenants and models cannot see, evict
or fill up one another; what they share is the machine. A tenant has at most ``max_models`` of them; one that
no engine is connected to makes room for a new one, and what it kept in tiers that survive a restart stays.

Who owns what
  * ``Pools`` opens pools on the thread of whoever asks (it takes as long as clearing the arena's memory) and keeps
    count of who uses them, under one lock.
  * An open pool's service belongs to the index thread, until ``Pools`` has had it withdrawn there to close it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from kvferry.connector import wire
from kvferry.connector.config import Config
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.errors import ArenaError, ConfigError, KVFerryError
from kvferry.connector.keys import tenant_fingerprint
from kvferry.connector.layout import BlockLayout
from kvferry.connector.memory import format_bytes
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.server.config import ServerSettings, TenantConfig
from kvferry.connector.settings import split_tier

__all__ = ["Pool", "PoolRefused", "Pools", "check_tiers"]

_MAX_DIMENSION = 1 << 24
_MAX_BLOCK_BYTES = 1 << 30
_CLOSE_DEADLINE_S = 10.0


class PoolRefused(KVFerryError):
    """A client cannot be given a pool.

    Args:
        code: For the client.
        why: The cause and what to do.
        is_mistake: Whether trying again is in vain before a configuration changes.
    """

    def __init__(self, code: wire.RefusalCode, why: str, is_mistake: bool) -> None:
        self.code = code
        self.is_mistake = is_mistake
        super().__init__(why)


class Pool:
    """The cache of one tenant's model. Owned by the index thread, apart from what is constant.

    Args:
        tenant: Whose; empty for the one without a name.
        fingerprint: The model's, as engines give it.
        service: Its arena, manager and tiers.
    """

    def __init__(self, tenant: str, fingerprint: bytes, service: EmbeddedService) -> None:
        self.tenant = tenant
        self.fingerprint = fingerprint
        self.service = service
        self.layout = service.layout
        self.tiers = tuple(service.counters().tiers)
        """Names of the tiers below the arena."""
        self.dead_writers = 0
        """Engines that are gone while a process of theirs may still write."""
        self.next_poll = 0.0
        self.headers: dict[int, tuple[int, bytes]] = {}
        """By slot: a generation and the frame header of the block it has in it. Of the streams, any thread."""

    @property
    def name(self) -> str:
        """For logs: the tenant and the first 8 hex digits of the fingerprint."""
        return f"{self.tenant or 'default'}/{self.fingerprint[:4].hex()}"

    @property
    def about(self) -> dict[str, str]:
        """For structured logs."""
        return {"tenant": self.tenant, "model": self.fingerprint[:4].hex()}


class _Place:
    """Where a pool is, will be or was: its users, and what whoever waits for it waits for."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.users = 0
        self.last_used = 0.0


class Pools:
    """All pools of a server. Any thread may call any method; ``acquire`` blocks.

    Args:
        settings: The server's configuration.
        registry: The plugins.
        on_opened: Called with a new pool before anybody gets it; hands it to the index thread.
        withdraw: Called with a pool to be closed; returns when the index thread no longer touches it.
        on_report: Called, on a tier's thread, when some pool has something to take in.
        logger: Where openings and closings are reported.
    """

    def __init__(
        self,
        settings: ServerSettings,
        registry: PluginRegistry,
        *,
        on_opened: Callable[[Pool], None],
        withdraw: Callable[[Pool], None],
        on_report: Callable[[], None],
        logger: logging.Logger,
    ) -> None:
        self._settings = settings
        self._tenants = {tenant.name: tenant for tenant in settings.tenants}
        self._registry = registry
        self._on_opened = on_opened
        self._withdraw = withdraw
        self._on_report = on_report
        self._logger = logger
        self._changed = threading.Condition()
        self._places: dict[tuple[str, bytes], _Place] = {}
        self._closing: set[tuple[str, bytes]] = set()
        """What is not to be opened again before it has let go of its disk."""
        self._turns: dict[str, threading.Lock] = {}
        """By tenant: held while a pool of its is opened."""
        self._is_draining = False

    def acquire(self, tenant: str, fingerprint: bytes, layout: BlockLayout, deadline: float) -> Pool:
        """Return the pool of a tenant's model, opening it if need be. ``release`` it when done.

        Args:
            tenant: From the client's credential.
            fingerprint: From the client's ``Hello``.
            layout: From the client's ``Hello``, not yet checked.
            deadline: When to stop waiting for others who are opening it, or another model of the tenant.

        Raises:
            PoolRefused: There is none for this client.
        """
        _check(layout)
        place, is_new = self._enter((tenant, fingerprint), deadline)
        try:
            if is_new:
                self._open_in_turn(place, tenant, fingerprint, layout, deadline)
            pool = place.pool
            assert pool is not None  # _enter waited for it, or it was just opened
            if layout != pool.layout:
                raise PoolRefused(
                    "layout",
                    f"this model's blocks are kept as {pool.layout}, not as {layout}: give all its engines the "
                    "same block_tokens and kvferry version",
                    is_mistake=True,
                )
        except BaseException:
            self._leave((tenant, fingerprint), place)
            raise
        return pool

    def release(self, pool: Pool) -> None:
        """Note that one of its users has gone."""
        key = (pool.tenant, pool.fingerprint)
        self._leave(key, self._places[key])

    def users(self, pool: Pool) -> int:
        """Return how many connections use a pool."""
        with self._changed:
            place = self._places.get((pool.tenant, pool.fingerprint))
            return place.users if place else 0

    def drain(self) -> list[Pool]:
        """Open nothing any more; return the pools that are open."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            return [place.pool for place in self._places.values() if place.pool is not None]

    def _enter(self, key: tuple[str, bytes], deadline: float) -> tuple[_Place, bool]:
        """Count the caller as a user; return the place and whether the caller has to open the pool."""
        with self._changed:
            while True:
                if self._is_draining:
                    raise PoolRefused("draining", "the server is stopping", is_mistake=False)
                place = self._places.get(key)
                if place is None and key not in self._closing:
                    place = self._places[key] = _Place()
                    place.users = 1
                    return place, True
                if place is not None and place.pool is not None:
                    place.users += 1
                    return place, False
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PoolRefused(
                        "no_room",
                        "the model's cache is still being opened, or closed: try again",
                        is_mistake=False,
                    )
                self._changed.wait(left)

    def _leave(self, key: tuple[str, bytes], place: _Place) -> None:
        with self._changed:
            place.users -= 1
            place.last_used = time.monotonic()
            if place.pool is None and not place.users:
                del self._places[key]
            self._changed.notify_all()

    def _open_in_turn(
        self, place: _Place, tenant: str, fingerprint: bytes, layout: BlockLayout, deadline: float
    ) -> None:
        """Open pools of one tenant one after the other: each may remove what others left on disk."""
        with self._changed:
            turn = self._turns.setdefault(tenant, threading.Lock())
        if not turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise PoolRefused(
                "no_room", "another model's cache is still being opened: try again", is_mistake=False
            )
        try:
            self._open(place, tenant, fingerprint, layout)
        finally:
            turn.release()

    def _open(self, place: _Place, tenant: str, fingerprint: bytes, layout: BlockLayout) -> None:
        self._make_room(tenant)
        config = self._config(tenant)
        started = time.monotonic()
        try:
            service = EmbeddedService(
                config,
                layout,
                tenant_fingerprint(fingerprint, tenant),
                self._registry,
                instance=f"{tenant or 'default'}-{fingerprint[:8].hex()}",
                kept_instances=self._most(tenant),
                logger=self._logger,
                on_report=self._on_report,
            )
        except ConfigError as error:
            raise PoolRefused("layout", str(error), is_mistake=True) from error
        except ArenaError as error:
            raise PoolRefused("no_room", str(error), is_mistake=False) from error
        except KVFerryError as error:
            raise PoolRefused("internal", str(error), is_mistake=False) from error
        pool = Pool(tenant, fingerprint, service)
        self._on_opened(pool)
        with self._changed:
            place.pool = pool
            self._changed.notify_all()
        self._logger.info(
            "opened the cache %s in %.1f s: blocks of %d tokens (%s), %d slots, tiers below: %s",
            pool.name,
            time.monotonic() - started,
            layout.block_tokens,
            format_bytes(layout.payload_bytes),
            service.arena.num_slots,
            ", ".join(pool.tiers) or "none",
            extra=pool.about,
        )

    def _config(self, tenant: str) -> Config:
        config, own = self._settings.cache, self._tenants.get(tenant)
        if own is not None and own.host is not None:
            config = msgspec.structs.replace(config, host=own.host)
        if own is not None and own.tiers is not None:
            config = msgspec.structs.replace(config, tiers=own.tiers)
        return config

    def _most(self, tenant: str) -> int:
        """Return how many models a tenant may have at the same time."""
        own = self._tenants.get(tenant, TenantConfig(name=tenant))
        return own.max_models or self._settings.server.max_models

    def _make_room(self, tenant: str) -> None:
        """Close the tenant's longest unused pool if it has as many as it may."""
        most = self._most(tenant)
        with self._changed:
            held = {key: place for key, place in self._places.items() if key[0] == tenant}
            if len(held) <= most:  # the new one is among them
                return
            idle = [(place.last_used, key) for key, place in held.items() if place.pool and not place.users]
            if not idle:
                raise PoolRefused(
                    "no_room",
                    f"tenant {tenant!r} has {most} models in use and may not have more (max_models)",
                    is_mistake=False,
                )
            _, key = min(idle)
            pool = self._places.pop(key).pool
            self._closing.add(key)
        assert pool is not None  # it was idle, so it was open
        try:
            self._withdraw(pool)
            pool.service.close(_CLOSE_DEADLINE_S)
        finally:
            with self._changed:
                self._closing.discard(key)
                self._changed.notify_all()
        self._logger.info(
            "closed the cache %s, which nobody used, for another model", pool.name, extra=pool.about
        )


def check_tiers(settings: ServerSettings, registry: PluginRegistry) -> None:
    """Refuse tiers that a server cannot have.

    Raises:
        ConfigError: A codec loses precision: engines would get such blocks without having asked for them.
    """
    tables = [("tiers", settings.cache.tiers)]
    tables += [(f"tenants[{tenant.name}].tiers", tenant.tiers or ()) for tenant in settings.tenants]
    for table, tiers in tables:
        for index, raw in enumerate(tiers):
            tier, _ = split_tier(raw, f"{table}[{index}]")
            if tier.codec != "none" and registry.codec_type(tier.codec, f"{table}[{index}].codec").is_lossy:
                raise ConfigError(
                    f"{table}[{index}].codec",
                    f"{tier.codec!r} loses precision, and engines of this server have not agreed to that",
                    "use lz4 or zstd, or configure the tier in the engines themselves",
                )


def _check(layout: BlockLayout) -> None:
    sizes = (
        layout.num_layers,
        layout.num_kv_heads,
        layout.block_tokens,
        layout.head_dim,
        layout.kv_factor,
        layout.itemsize,
    )
    is_sane = all(0 < size <= _MAX_DIMENSION for size in sizes) and len(layout.dtype) <= 64
    if not is_sane or layout.payload_bytes > _MAX_BLOCK_BYTES:
        raise PoolRefused("layout", "no model has blocks of this layout", is_mistake=True)
