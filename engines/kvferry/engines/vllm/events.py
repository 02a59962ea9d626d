"""kvferry's service events as vLLM's KV cache events.

A block is named by its block key, which is the same in every engine; vLLM's own hashes name other
spans of tokens. The medium tells the tier.
"""

from __future__ import annotations

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

from kvferry.connector.service import HOST, ServiceEvent

__all__ = ["translate"]


def translate(event: ServiceEvent, block_tokens: int) -> KVCacheEvent:
    """Return vLLM's form of an event."""
    medium = "CPU" if event.tier == HOST else "STORAGE"
    if event.kind == "removed":
        return BlockRemoved(block_hashes=list(event.keys), medium=medium)
    return BlockStored(
        block_hashes=list(event.keys),
        parent_block_hash=None,
        token_ids=[],
        block_size=block_tokens,
        lora_id=None,
        medium=medium,
        lora_name=None,
    )
