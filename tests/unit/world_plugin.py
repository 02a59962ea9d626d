"""A plugin whose tier claims to be persistent and is gone with its process."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from world_tier import World, WorldTier

from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def _create(options: Options, context: TierContext) -> Tier:
    return WorldTier(context, World(), 64 << 20)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    return [TierType("world", Options, _create, "for tests")]
