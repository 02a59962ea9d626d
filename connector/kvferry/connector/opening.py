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

from kvferry.connector.config import Config, TierConfig
from kvferry.connector.errors import ConfigError, KVFerryError, PluginError
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import split_tier, typed_options
from kvferry.connector.tier import Tier, TierContext

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
    make_context: Callable[[str], TierContext],
    logger: logging.Logger,
) -> OpenedTiers:
    """Open every configured tier, in order. May block.

    Args:
        config: The whole configuration.
        registry: Knows the kinds of tier.
        make_context: Returns what a tier of the given name is told.
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
    make_context: Callable[[str], TierContext],
    opened: OpenedTiers,
    logger: logging.Logger,
) -> None:
    config, rest = split_tier(raw, path)
    tier_type = registry.tier_type(config.type, path)
    options = typed_options(tier_type, rest, path)
    try:
        tier = tier_type.create(options, make_context(config.name))
        if not isinstance(tier, Tier):
            raise PluginError(config.type, "create", f"{tier!r} is no tier")
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


def close_tiers(tiers: Iterable[OpenTier], deadline_s: float, logger: logging.Logger) -> None:
    """Close tiers side by side; one that takes longer than ``deadline_s`` is logged and left behind."""
    deadline = time.monotonic() + deadline_s
    closing: Sequence[threading.Thread] = [
        threading.Thread(
            target=_close_one, args=(opened, logger), name=f"kvferry-{opened.config.name}-close", daemon=True
        )
        for opened in tiers
    ]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            logger.warning("thread %s did not end within %.1f s; left behind", thread.name, deadline_s)


def _close_one(opened: OpenTier, logger: logging.Logger) -> None:
    try:
        opened.tier.close()
    except Exception as error:  # noqa: BLE001  # boundary: a plugin's tier
        logger.warning("tier %r did not close cleanly: %s", opened.config.name, error)
