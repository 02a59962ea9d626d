"""Choosing where an engine's cache is: in the engine, or on a cache server.

``service`` decides. Empty: everything is in this process. ``unix://``: the server of this machine owns it, and this
engine maps its arena. ``tcp://`` or ``tls://``: this engine has an arena of its own, and a tier below it that is the
server.
"""

from __future__ import annotations

import msgspec

from kvferry.connector.address import parse_address
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config, TlsConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import CacheService

__all__ = ["REMOTE", "open_service", "with_remote_tier"]

REMOTE = "remote"
"""Type and name of the tier that is a cache server."""


def open_service(
    config: Config,
    layout: BlockLayout,
    fingerprint: bytes,
    registry: PluginRegistry,
    *,
    instance: str = "",
    engine: str = "",
    wants_events: bool = False,
) -> CacheService:
    """Return the cache that the configuration asks for.

    Args:
        config: The effective configuration.
        layout: Geometry of the model's blocks.
        fingerprint: What blocks are keyed under, 32 bytes (``coding.block_fingerprint``).
        registry: The plugins.
        instance: Distinguishes engines of one deployment that must not share exclusive resources.
        engine: A name for a server's reports.
        wants_events: Whether somebody will take the service's events.

    Raises:
        ConfigError: Something in the configuration is wrong, or does not fit these blocks.
        KVFerryError: There can be no cache: no memory, no tier that is required, a server that refuses.
    """
    if config.service and parse_address(config.service, "service").scheme == "unix":
        return ClientService(config, layout, fingerprint, engine, wants_events)
    return EmbeddedService(with_remote_tier(config), layout, fingerprint, registry, instance=instance)


def with_remote_tier(config: Config) -> Config:
    """Return the configuration with a server elsewhere as what it is to this engine: a tier.

    Raises:
        ConfigError: ``service`` is no address.
    """
    if not config.service or parse_address(config.service, "service").scheme == "unix":
        return config
    tier: dict[str, object] = {
        "type": REMOTE,
        "name": REMOTE,
        "servers": [config.service],
        "admission": "always",
    }
    if config.token:
        tier["token"] = config.token
    if config.tls != TlsConfig():
        tier["tls"] = msgspec.to_builtins(config.tls)
    return msgspec.structs.replace(config, service="", token="", tls=TlsConfig(), tiers=(tier,))
