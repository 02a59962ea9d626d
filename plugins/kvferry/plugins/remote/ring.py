"""The ring: which server holds which block, when there are several.

Rendezvous hashing: every server gets a weight for every key, from a hash of both, and the key belongs to the heaviest.
A server that is lost moves only its own keys, evenly to the others; one that is added takes only its share. Nobody has
to agree on anything: whoever writes the same addresses finds the same servers, on every machine and in every process.

Pure. The weights are part of what deployments rely on: changing them moves every block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import xxhash
from blake3 import blake3

from kvferry.connector.keys import BlockKey

__all__ = ["Ring"]


class _Server(NamedTuple):
    name: str
    seed: int


class Ring:
    """Servers by name.

    Args:
        names: What the servers are called; no name twice. Their order has no meaning.
    """

    __slots__ = ("_servers",)

    def __init__(self, names: Sequence[str]) -> None:
        self._servers = tuple(_Server(name, _seed(name)) for name in sorted(names))

    def assign(self, keys: Sequence[BlockKey], usable: Collection[str]) -> dict[str, list[int]]:
        """Return by server the positions of its keys, in order.

        Args:
            keys: The blocks.
            usable: The servers that can be used now, at least one; a key whose server is not among them goes
                to the next heaviest that is.
        """
        servers = [server for server in self._servers if server.name in usable]
        if len(servers) == 1:
            return {servers[0].name: list(range(len(keys)))} if keys else {}
        assigned: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            _, name = max((_weight(server, key), server.name) for server in servers)
            assigned.setdefault(name, []).append(index)
        return assigned


def _seed(name: str) -> int:
    return int.from_bytes(
        blake3(name.encode(), derive_key_context="kvferry 1 remote ring").digest(8), "little"
    )


def _weight(server: _Server, key: BlockKey) -> int:
    return xxhash.xxh3_64_intdigest(key, server.seed)
