"""A tier for kvferry that keeps blocks in one SQLite file.

What a plugin's module holds is loaded by every command of kvferry, so it is small: the options, and the hook
that says what is offered. The tier itself is imported when one is opened.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType

__all__ = ["SqliteOptions", "kvferry_api_version", "kvferry_tier_types"]

kvferry_api_version = 1
"""The version of kvferry's plugin interface that this was written for; an older kvferry says so and goes on."""


class SqliteOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a tier of type ``sqlite``."""

    path: str
    """The file; created when absent. ``~`` is understood."""
    capacity: int
    """Bytes of the file that are in use at most; sizes like ``"64GiB"``."""


def _create(options: SqliteOptions, context: TierContext) -> Tier:
    from kvferry_sqlite.tier import SqliteTier

    return SqliteTier(options, context)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    """Offer the tier type ``sqlite``."""
    return [
        TierType(
            name="sqlite",
            options=SqliteOptions,
            create=_create,
            summary="one SQLite file, shared by a machine",
        )
    ]
