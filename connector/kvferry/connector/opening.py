"""Opening and closing the tiers that the configuration names.

A mistake in the configuration is raised. A tier that cannot be opened though its configuration is right
(disk full, server away) is a problem that is reported once, and kvferry goes on without it, unless the
operator said that it is required.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from kvferry.connector.config import Config, TierConfig
from kvferry.connector.errors import ConfigError, KVFerryError, PluginError, TierTimeout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import split_tier, typed_options
from kvferry.connector.tier import Capabilities, Tier, TierContext, TierType

__all__ = ["OpenTier", "OpenedTiers", "close_tiers", "open_tiers"]


class OpenTier(NamedTuple):
    """A tier that was opened, and its configuration."""

    config: TierConfig
    tier: Tier


class OpenedTiers(NamedTuple):
    """What came of the configured tiers."""

    tiers: list[OpenTier]
    problems: list[str]
    """One line for each tier that kvferry goes on without."""


def open_tiers(
    config: Config,
    registry: PluginRegistry,
    make_context: Callable[[TierConfig], TierContext],
    logger: logging.Logger,
) -> OpenedTiers:
    """Open every configured tier, in order. Blocks for each at most its ``open_deadline_s``.

    Args:
        config: The whole configuration.
        registry: Knows the kinds of tier.
        make_context: Returns what a tier of the given configuration is told.
        logger: Where problems are reported.

    Raises:
        ConfigError: A tier's type, option or size is wrong. Tiers opened before are closed again.
        KVFerryError: A tier that is required cannot be opened. Tiers opened before are closed again.
    """
    opened = OpenedTiers([], [])
    try:
        for index, raw in enumerate(config.tiers):
            _open_one(raw, f"tiers[{index}]", registry, make_context, opened, logger)
    except BaseException:
        close_tiers(opened.tiers, 5.0, logger)
        raise
    return opened


def _open_one(
    raw: dict[str, object],
    path: str,
    registry: PluginRegistry,
    make_context: Callable[[TierConfig], TierContext],
    opened: OpenedTiers,
    logger: logging.Logger,
) -> None:
    config, rest = split_tier(raw, path)
    try:
        tier_type = registry.tier_type(config.type, path)
        options = typed_options(tier_type, rest, path)
        config = msgspec.structs.replace(config, threads=config.threads or tier_type.threads)
        tier = _Opening(tier_type, options, make_context(config), logger).wait(config.open_deadline_s)
    except ConfigError:
        raise
    except Exception as error:  # boundary: a plugin's tier
        if config.required:
            raise
        why = str(error) if isinstance(error, KVFerryError) else f"{type(error).__name__}: {error}"
        problem = f"tier {config.name!r} is left out, it cannot be opened: {why}"
        logger.error("%s", problem)
        opened.problems.append(problem)
        return
    opened.tiers.append(OpenTier(config, tier))


class _Opening:
    """A tier that is being created, in a thread of its own (``kvferry-<tier>-open``).

    Whoever comes last, the thread with the tier or the caller out of patience, sees that the other has
    been; ``_lock`` guards that, so a tier that comes too late is closed again.
    """

    def __init__(
        self, tier_type: TierType, options: msgspec.Struct, context: TierContext, logger: logging.Logger
    ) -> None:
        self._tier_type = tier_type
        self._options = options
        self._context = context
        self._logger = logger
        self._lock = threading.Lock()
        self._is_given_up = False
        self._tier: Tier | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._create, name=f"kvferry-{context.name}-open", daemon=True)
        self._thread.start()

    def wait(self, deadline_s: float) -> Tier:
        """Return the tier, or raise what creating it raised.

        Raises:
            TierTimeout: It was not there within ``deadline_s``.
        """
        self._thread.join(deadline_s)
        with self._lock:
            self._is_given_up = self._tier is None and self._error is None
        if self._error is not None:
            raise self._error
        if self._tier is None:
            hint = "raise open_deadline_s if it only needs longer"
            raise TierTimeout(self._context.name, f"opening it took longer than {deadline_s:g} s", hint)
        return self._tier

    def _create(self) -> None:
        try:
            tier = self._tier_type.create(self._options, self._context)
            if not isinstance(tier, Tier):
                raise PluginError(self._tier_type.name, "create", f"{tier!r} is no tier")
            promised: object = tier.capabilities
            if not isinstance(promised, Capabilities):
                raise PluginError(self._tier_type.name, "create", f"its capabilities are {promised!r}")
        except Exception as error:  # noqa: BLE001  # boundary: a plugin's factory, reported by ``wait``
            self._error = error
            return
        except BaseException as error:  # noqa: BLE001  # boundary: a plugin's factory, which shall not end us
            self._error = PluginError(self._tier_type.name, "create", f"{type(error).__name__}: {error}")
            return
        with self._lock:
            if not self._is_given_up:
                self._tier = tier
                return
        _close_quietly(self._context.name, tier, self._logger)


def close_tiers(tiers: Iterable[OpenTier], deadline_s: float, logger: logging.Logger) -> None:
    """Close tiers side by side; one that takes longer than ``deadline_s`` is logged and left behind."""
    deadline = time.monotonic() + deadline_s
    closing: Sequence[threading.Thread] = [
        threading.Thread(
            target=_close_quietly,
            args=(opened.config.name, opened.tier, logger),
            name=f"kvferry-{opened.config.name}-close",
            daemon=True,
        )
        for opened in tiers
    ]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            logger.warning("thread %s did not end within %.1f s; left behind", thread.name, deadline_s)


def _close_quietly(name: str, tier: Tier, logger: logging.Logger) -> None:
    try:
        tier.close()
    except BaseException as error:  # noqa: BLE001  # boundary: a plugin's tier
        logger.warning("tier %r did not close cleanly: %s", name, error)
