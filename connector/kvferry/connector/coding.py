"""Which codecs a configuration asks for, and what that means for keys.

A tier writes with the codec its configuration names. It reads every lossless codec that is installed,
whatever it writes with, so that an operator may change his mind and keep his blocks; a lossy one only
where it writes with that one.

Functions of the configuration; called once, at start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from kvferry.connector.codec import NONE, CodecType, lossy_fingerprint
from kvferry.connector.coder import TierCodec, TierCodecs
from kvferry.connector.config import Config, TierConfig
from kvferry.connector.errors import ConfigError, PluginError, PluginMissing
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import split_tier

__all__ = ["block_fingerprint", "tier_codecs"]


def block_fingerprint(fingerprint: bytes, config: Config, registry: PluginRegistry) -> bytes:
    """Return what blocks of this deployment are keyed under: the model, and lossy codecs if there are any.

    Args:
        fingerprint: The model's own, 32 bytes.
        config: The effective configuration.
        registry: The plugins.

    Raises:
        ConfigError: A tier names a codec that nobody offers.
    """
    lossy = []
    for path, tier in _tiers(config):
        try:
            offered = _named(tier, path, registry)
        except PluginMissing:
            continue  # nothing will be encoded with it, see ``tier_codecs``
        if offered is not None and offered.is_lossy:
            lossy.append(offered.name)
    return lossy_fingerprint(fingerprint, lossy)


def tier_codecs(
    config: Config, layout: BlockLayout, registry: PluginRegistry, logger: logging.Logger
) -> Mapping[str, TierCodecs]:
    """Return each tier's codecs, made for blocks of ``layout``, by the tier's name.

    A tier whose codec a broken plugin fails to bring stores blocks as they are, which is logged.

    Args:
        config: The effective configuration.
        layout: Geometry of the blocks.
        registry: The plugins.
        logger: Where that is reported.

    Raises:
        ConfigError: A tier names a codec that nobody offers, or that cannot encode these blocks here.
    """
    tiers = list(_tiers(config))
    if not tiers:
        return {}
    lossless: dict[int, TierCodec] = {}
    for offered in registry.codec_types().values():
        if not offered.is_lossy:
            try:
                lossless[offered.id] = _make(offered, layout, "codec")
            except (ConfigError, PluginError) as error:
                logger.debug("blocks encoded with %s will be refused: %s", offered.name, error)
    codecs = {}
    for path, tier in tiers:
        try:
            writes = _writes(tier, path, layout, registry, lossless)
        except (PluginError, PluginMissing) as error:
            logger.warning("tier %r stores blocks without its codec: %s", tier.name, error)
            writes = None
        reads = lossless if writes is None else {**lossless, writes.id: writes}
        codecs[tier.name] = TierCodecs(writes, reads)
    return codecs


def _writes(
    tier: TierConfig,
    path: str,
    layout: BlockLayout,
    registry: PluginRegistry,
    made: Mapping[int, TierCodec],
) -> TierCodec | None:
    offered = _named(tier, path, registry)
    if offered is None:
        return None
    return made.get(offered.id) or _make(offered, layout, f"{path}.codec")


def _tiers(config: Config) -> Iterator[tuple[str, TierConfig]]:
    for index, raw in enumerate(config.tiers):
        path = f"tiers[{index}]"
        yield path, split_tier(raw, path)[0]


def _named(tier: TierConfig, path: str, registry: PluginRegistry) -> CodecType | None:
    return None if tier.codec == NONE else registry.codec_type(tier.codec, f"{path}.codec")


def _make(offered: CodecType, layout: BlockLayout, path: str) -> TierCodec:
    try:
        return TierCodec(offered.name, offered.id, offered.is_lossy, offered.make(layout))
    except ConfigError as error:
        raise ConfigError(path, error.why, error.hint) from error
    except Exception as error:  # boundary: a plugin's factory
        raise PluginError(offered.name, "making its codec", f"{type(error).__name__}: {error}") from error
