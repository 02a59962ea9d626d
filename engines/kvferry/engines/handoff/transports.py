"""Choosing transports: which ones an engine offers its pages through, and reads others' through."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvferry.connector.address import parse_address
from kvferry.connector.config import Config, PeerConfig
from kvferry.connector.offers import AUTO
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.transport import PageMemory, TransportContext, TransportType

__all__ = ["chosen", "context", "usable"]

logger = logging.getLogger(__name__)


def chosen(registry: PluginRegistry, peer: PeerConfig) -> list[TransportType]:
    """Return the transports that may be used, best first.

    Raises:
        ConfigError: There is none of the configured name.
        PluginMissing: It may be that of a plugin that is broken.
    """
    if peer.transport != AUTO:
        return [registry.transport(peer.transport)]
    return sorted(registry.transports().values(), key=lambda transport: -transport.priority)


def context(config: Config, name: str) -> TransportContext:
    """Return what transports of this engine's rank ``name`` are given."""
    host = parse_address(config.peer.listen, "peer.listen").host
    return TransportContext(
        host=host,
        advertised=config.peer.advertise or host,
        token=config.token,
        name=name,
        is_only=config.peer.transport != AUTO,
    )


def usable(transports: Sequence[TransportType], memory: PageMemory) -> dict[str, TransportType]:
    """Return, by name and in order, the transports that can write into these pages; say why others can not."""
    found: dict[str, TransportType] = {}
    for transport in transports:
        try:
            why_not = transport.unusable(memory)
        except Exception as error:  # noqa: BLE001  # boundary: a transport may raise anything
            why_not = repr(error)
        if why_not:
            logger.warning("rank %d does not read through %s: %s", memory.shard.rank, transport.name, why_not)
        else:
            found[transport.name] = transport
    return found
