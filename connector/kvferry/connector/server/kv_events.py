"""KV events in the form that vLLM gives them, so that whoever reads vLLM's reads ours.

A batch is an array ``[time, events, rank]``, an event a map with its kind under ``type``. A block is named by its
block key, which is the same in every engine and every server. The medium tells the host from what lies below it,
and ``ownership`` names the tier below.

Values and pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from kvferry.connector.service import HOST, ServiceEvent

__all__ = ["MAX_KEYS", "cut", "encode_batch", "topic_of"]

MAX_KEYS = 1024
"""Keys in one batch."""


class _Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of vLLM's events."""


class _BlockStored(_Event, frozen=True, tag="BlockStored"):
    """Blocks that can be loaded from now on."""

    block_hashes: Sequence[bytes]
    parent_block_hash: None
    token_ids: list[int]
    block_size: int
    lora_id: None
    medium: str
    lora_name: None
    ownership: str | None = None


class _BlockRemoved(_Event, frozen=True, tag="BlockRemoved"):
    """Blocks that cannot be loaded from there any more."""

    block_hashes: Sequence[bytes]
    medium: str
    ownership: str | None = None


class _AllBlocksCleared(_Event, frozen=True, tag="AllBlocksCleared"):
    """Nothing of the topic can be loaded."""


_encoder = msgspec.msgpack.Encoder()


def topic_of(tenant: str, fingerprint: bytes) -> str:
    """Return the topic under which events of a tenant's model are published."""
    return f"kv@{tenant or 'default'}@{fingerprint[:4].hex()}"


def cut(events: Sequence[ServiceEvent]) -> Iterator[list[ServiceEvent]]:
    """Yield events, in order, in batches of at most ``MAX_KEYS`` keys."""
    batch: list[ServiceEvent] = []
    room = MAX_KEYS
    for event in events:
        start = 0
        while start < len(event.keys):
            keys = event.keys[start : start + room]
            batch.append(event._replace(keys=keys))
            start += len(keys)
            room -= len(keys)
            if not room:
                yield batch
                batch, room = [], MAX_KEYS
    if batch:
        yield batch


def encode_batch(happened: float, block_tokens: int, events: Sequence[ServiceEvent] | None) -> bytes:
    """Return a batch as it is published.

    Args:
        happened: Unix time.
        block_tokens: Tokens of a block.
        events: None for one that says that everything of the topic is gone.
    """
    encoded: list[_Event] = [_AllBlocksCleared()]
    if events is not None:
        encoded = [_event(event, block_tokens) for event in events]
    rank = None  # of a data-parallel engine; a cache server has none
    return _encoder.encode((happened, encoded, rank))


def _event(event: ServiceEvent, block_tokens: int) -> _Event:
    medium, ownership = ("CPU", None) if event.tier == HOST else ("STORAGE", event.tier)
    if event.kind == "removed":
        return _BlockRemoved(event.keys, medium, ownership)
    return _BlockStored(event.keys, None, [], block_tokens, None, medium, None, ownership)
