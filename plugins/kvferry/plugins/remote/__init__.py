"""The remote tier: blocks on cache servers, one or several, that engines of many machines share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType
from kvferry.plugins.remote.options import RemoteOptions

__all__ = ["kvferry_tier_types"]


def _create(options: RemoteOptions, context: TierContext) -> Tier:
    from kvferry.plugins.remote.opening import open_remote_tier

    return open_remote_tier(options, context)


def _check(options: RemoteOptions, name: str) -> Iterable[Finding]:
    from kvferry.plugins.remote.check import check_remote_tier

    return check_remote_tier(options, name)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    """Offer the tier type ``remote``."""
    return [
        TierType(
            name="remote",
            options=RemoteOptions,
            create=_create,
            summary="other kvferry servers, over TCP, TLS or a UNIX socket: shared by many engines",
            check=_check,
        )
    ]
