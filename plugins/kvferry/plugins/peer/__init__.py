"""The peer plugin: transports that read KV pages out of another engine's memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.hooks import hookimpl
from kvferry.connector.transport import TransportType

__all__ = ["kvferry_transports"]


@hookimpl
def kvferry_transports() -> Sequence[TransportType]:
    """Offer the transports ``nixl`` and ``socket``."""
    return []
