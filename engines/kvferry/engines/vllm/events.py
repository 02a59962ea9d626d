"""kvferry's service events as vLLM's KV cache events.

A block is named by its block key, which is the same in every engine; vLLM's own hashes name other
spans of tokens. The medium tells the host from the tiers below it, of which ``ownership`` names one; a cache
server says the same in ``kvferry.connector.server.kv_events``.
"""

from __future__ import annotations

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

from kvferry.connector.service import HOST, ServiceEvent

__all__ = ["translate"]

_NAMES_TIERS = "ownership" in BlockStored.__struct_fields__
"""Older releases have no field for it."""


def translate(event: ServiceEvent, block_tokens: int) -> KVCacheEvent:
    """Return vLLM's form of an event."""
    medium = "CPU" if event.tier == HOST else "STORAGE"
    tier = {"ownership": event.tier} if _NAMES_TIERS and event.tier != HOST else {}
    if event.kind == "removed":
        return BlockRemoved(block_hashes=list(event.keys), medium=medium, **tier)
    return BlockStored(
        block_hashes=list(event.keys),
        parent_block_hash=None,
        token_ids=[],
        block_size=block_tokens,
        lora_id=None,
        medium=medium,
        lora_name=None,
        **tier,
    )
