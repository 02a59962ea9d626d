"""What differs between vLLM releases, in one place: names that newer releases added.

0.29 is the oldest release served; later ones only add to the connector's interface.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base

__all__ = ["TransferResults", "hit_sources"]

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorTransferResults as TransferResults,
    )
elif hasattr(_base, "KVConnectorTransferResults"):
    TransferResults = _base.KVConnectorTransferResults
else:

    @dataclass
    class TransferResults:
        """vLLM 0.30's ``KVConnectorTransferResults``; 0.29 asks ``get_finished`` instead."""

        finished_sending: set[str] = field(default_factory=set)
        finished_recving: set[str] = field(default_factory=set)
        failed_recving: set[str] = field(default_factory=set)


_SOURCES = {"host": "HOST", "disk": "DISK", "peer": "P2P"}


def hit_sources(tokens_by_tier: dict[str, int]) -> dict[Any, int]:
    """Translate tokens by tier into vLLM's hit sources (0.32 and newer)."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    translated: dict[Any, int] = {}
    for tier, tokens in tokens_by_tier.items():
        source = CacheHitSource[_SOURCES.get(tier, "EXTERNAL_UNSPECIFIED")]
        translated[source] = translated.get(source, 0) + tokens
    return translated
