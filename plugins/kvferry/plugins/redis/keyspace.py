"""What the tier's keys are called, and how a capacity is held that many engines share.

On one server all keys are ``prefix:<model>:<block key in hex>``, where the model is 8 hex digits of its
fingerprint, so that models and a cache server's tenants find nothing of one another's. On a cluster they are
spread over ``PARTITIONS`` hash tags, chosen so that every range of slots gets its share; whatever has one tag
lives in one slot and can be changed in one transaction.

No engine counts what the others store. Where the operator gives a capacity, each partition has an index
on the server instead: a sorted set of its blocks by time of last use, and a hash of their sizes and their
sum. Storing a block is one transaction of two commands: a script makes room by removing the blocks used
longest ago and enters the new one, then ``SET`` stores it. The block's bytes never pass through the script.
What the server dropped by itself (its own eviction, a TTL) leaves the index when somebody asks for it, or
when it has become the oldest; until then it counts, so the sum is never too small.

Pure functions and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from redis.crc import key_slot

from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.tier import Frame
from kvferry.plugins.redis.batches import Request
from kvferry.plugins.redis.wire import Argument

__all__ = ["PARTITIONS", "Keyspace", "Usage"]

PARTITIONS = 128
"""Hash tags on a cluster."""

_SLOTS = 16384
ENTRY_BYTES = 512
"""Counted for each block besides its bytes: the server's key and both index entries."""

_COMMON = """
local index, sizes = KEYS[1], KEYS[2]
local sum = redis.call('HGET', sizes, 'sum')
if not sum then
  sum = 0
  for _, key in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    local size = redis.call('STRLEN', key) + ENTRY
    redis.call('HSET', sizes, key, size)
    sum = sum + size
  end
end
sum = tonumber(sum)
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local function forget(key)
  redis.call('ZREM', index, key)
  sum = sum - tonumber(redis.call('HGET', sizes, key) or '0')
  redis.call('HDEL', sizes, key)
end
local function enter(key, size, used)
  forget(key)
  redis.call('ZADD', index, used, key)
  redis.call('HSET', sizes, key, size)
  sum = sum + size
end
""".replace("ENTRY", str(ENTRY_BYTES))

_MAKE_ROOM = (
    _COMMON
    + """
local key, size, limit = KEYS[3], tonumber(ARGV[1]), tonumber(ARGV[2])
local gone = {}
forget(key)
while sum + size > limit do
  local oldest = redis.call('ZRANGE', index, 0, 0)[1]
  if not oldest then
    redis.call('DEL', sizes)
    sum = 0
    break
  end
  redis.call('UNLINK', oldest)
  forget(oldest)
  gone[#gone + 1] = oldest
end
enter(key, size, now)
redis.call('HSET', sizes, 'sum', sum)
return {sum, redis.call('ZCARD', index), gone}
"""
)
"""KEYS: index, sizes, the block. ARGV: the size to enter, the partition's limit."""

_RECONCILE = (
    _COMMON
    + """
for position = 3, #KEYS do
  local key = KEYS[position]
  local length = redis.call('STRLEN', key)
  if length == 0 then
    forget(key)
  elseif redis.call('ZSCORE', index, key) then
    redis.call('ZADD', index, now - position, key)
  else
    enter(key, length + ENTRY, now - position)
  end
end
local count = redis.call('ZCARD', index)
if count == 0 then
  redis.call('DEL', sizes)
  sum = 0
else
  redis.call('HSET', sizes, 'sum', sum)
end
return {sum, count, {}}
""".replace("ENTRY", str(ENTRY_BYTES))
)
"""KEYS: index, sizes, blocks. Marks those that are there as used now, the first of them last; forgets the
others."""


class Usage(msgspec.Struct, frozen=True):
    """What a script says about a partition."""

    used_bytes: int
    blocks: int
    evicted: tuple[BlockKey, ...]
    """Of this model; others' may have the same keys and are of no concern here."""


class Keyspace:
    """Names of keys, and the requests that store, touch and remove blocks.

    Args:
        prefix: What every key starts with.
        fingerprint: The model's, 32 bytes.
        is_cluster: Whether the keys are spread over hash tags.
        capacity: Bytes of all partitions together; None where the server alone decides.
        ttl_s: Seconds until a block is dropped; 0 for never.
    """

    def __init__(
        self, prefix: str, fingerprint: bytes, is_cluster: bool, capacity: int | None, ttl_s: float
    ) -> None:
        self._stems = (
            [f"{{{tag}}}:".encode() for tag in _tags(prefix)] if is_cluster else [f"{prefix}:".encode()]
        )
        self._model = f"{fingerprint[:4].hex()}:".encode()
        self._limit = capacity // len(self._stems) if capacity is not None else None
        self._expiry: tuple[bytes | int, ...] = (b"PX", max(1, round(ttl_s * 1000))) if ttl_s else ()

    @property
    def limit_bytes(self) -> int | None:
        """Bytes of one partition; None where there is no capacity."""
        return self._limit

    @property
    def partitions(self) -> int:
        """How many parts the keys are divided into."""
        return len(self._stems)

    def partition_of(self, key: BlockKey) -> int:
        """Return the number of a block's partition."""
        return int.from_bytes(key[:4], "little") % len(self._stems)

    def name(self, key: BlockKey) -> bytes:
        """Return the server's key of a block."""
        return self._stems[self.partition_of(key)] + self._model + key.hex().encode()

    def probe(self) -> bytes:
        """Return a key that no block has."""
        return self._stems[0] + b"probe"

    def get(self, frame: Frame) -> Request:
        """Return the request that reads a block."""
        name = self.name(frame.key)
        return Request(name, ((b"GET", name),), len(frame.body))

    def exists(self, key: BlockKey) -> Request:
        """Return the request that asks whether a block is there."""
        name = self.name(key)
        return Request(name, ((b"EXISTS", name),))

    def unlink(self, key: BlockKey) -> Request:
        """Return the request that removes a block."""
        name = self.name(key)
        return Request(name, ((b"UNLINK", name),))

    def set(self, frame: Frame) -> Request:
        """Return the request that stores a block, after making room where there is a capacity."""
        name = self.name(frame.key)
        store: tuple[Argument, ...] = (b"SET", name, frame, *self._expiry)
        if self._limit is None:
            return Request(name, (store,), len(frame.body))
        size = len(frame.header) + len(frame.body) + ENTRY_BYTES
        index, sizes = self._index(self.partition_of(frame.key))
        room: tuple[Argument, ...] = (b"EVAL", _MAKE_ROOM.encode(), 3, index, sizes, name, size, self._limit)
        return Request(name, ((b"MULTI",), room, store, (b"EXEC",)), len(frame.body))

    def reconcile(self, keys: Iterable[BlockKey]) -> list[tuple[int, Request]]:
        """Return by partition what brings the index up to date with the use, or the loss, of blocks."""
        if self._limit is None:
            return []
        by_partition: dict[int, list[bytes]] = {}
        for key in keys:
            by_partition.setdefault(self.partition_of(key), []).append(self.name(key))
        requests = []
        for partition, names in by_partition.items():
            index, sizes = self._index(partition)
            command: tuple[Argument, ...] = (
                b"EVAL",
                _RECONCILE.encode(),
                2 + len(names),
                index,
                sizes,
                *names,
            )
            requests.append((partition, Request(index, (command,))))
        return requests

    def usage(self, partition: int, reply: object) -> Usage | None:
        """Return what a script's reply says about a partition; None where it is none."""
        if not isinstance(reply, list) or len(reply) != 3 or not isinstance(reply[2], list):
            return None
        stem = self._stems[partition] + self._model
        keys = (_block_key(name, stem) for name in reply[2])
        return Usage(int(reply[0]), int(reply[1]), tuple(key for key in keys if key is not None))

    def _index(self, partition: int) -> tuple[bytes, bytes]:
        return self._stems[partition] + b"index", self._stems[partition] + b"sizes"


def _block_key(name: object, stem: bytes) -> BlockKey | None:
    """Return the block key in a server's key; None where it holds none that begins with ``stem``."""
    if not isinstance(name, bytes) or not name.startswith(stem):
        return None
    try:
        key = bytes.fromhex(name[len(stem) :].decode())
    except ValueError:
        return None
    return BlockKey(key) if len(key) == KEY_BYTES else None


def _tags(prefix: str) -> Sequence[str]:
    """Return one hash tag for each of ``PARTITIONS`` equal ranges of slots."""
    width = _SLOTS // PARTITIONS
    found: dict[int, str] = {}
    number = 0
    while len(found) < PARTITIONS:
        tag = f"{prefix}:{number}"
        found.setdefault(key_slot(tag.encode()) // width, tag)
        number += 1
    return [found[part] for part in range(PARTITIONS)]
