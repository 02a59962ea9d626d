"""The remote tier is held to the conformance kit: on a UNIX socket, on TCP with a token, and on two servers.

Every place of the kit is a tenant of its own, which has storage of its own. A server keeps whole payloads of the model
that it is told of and nothing else: where the kit stores shorter bodies, whole ones are stored here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from cache_server import CacheServer

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Blocks, TierCase, TierTests
from kvferry.connector.testing.capacity import CapacityChecks
from kvferry.connector.tier import Outcome, Tier

_TENANTS = 250


class Servers(TierCase):
    """What all of them have in common: places, and back doors to the servers' processes."""

    plugins = ("kvferry.plugins.remote",)
    count: ClassVar[int] = 1
    scheme: ClassVar[Literal["unix", "tcp"]] = "tcp"
    arena: ClassVar[str] = "12MiB"
    servers: ClassVar[list[CacheServer]]
    tenants: ClassVar[dict[Path, str]]
    frozen: ClassVar[contextlib.ExitStack]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _servers(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        config = {
            "host": {"capacity": cls.arena},
            "tenants": [{"name": f"t{number}", "token": _token(number)} for number in range(_TENANTS)],
        }
        with contextlib.ExitStack() as stack:
            cls.tenants = {}
            cls.servers = [
                stack.enter_context(CacheServer(tmp_path_factory.mktemp("kv"), config))
                for _ in range(cls.count)
            ]
            yield

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        token = self.tenants.setdefault(place, _token(len(self.tenants)))
        addresses = [getattr(server, self.scheme) for server in self.servers]
        return {"type": "remote", "servers": addresses, "token": token}

    def suspend(self) -> None:
        type(self).frozen = contextlib.ExitStack()
        for server in self.servers:
            self.frozen.enter_context(server.frozen())

    def resume(self) -> None:
        self.frozen.close()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def revive(self) -> None:
        for server in self.servers:
            if server.process is None:
                server.start()

    def store(self, tier: Tier, keys: Sequence[BlockKey], length: int | None = None) -> list[Outcome]:
        return super().store(tier, keys)

    def load(self, tier: Tier, keys: Sequence[BlockKey], length: int | None = None) -> list[Outcome]:
        return super().load(tier, keys)


class OnCacheServers(Servers, TierTests):
    """The whole kit, but for capacities, which are a server's."""

    def open_small(self, **claims: bool) -> Tier:
        pytest.skip("see TestRemoteCapacity")

    # ---- where a cache server is stricter than what the kit asks of any tier

    def test_bodies_of_different_lengths_share_a_batch(self, tier: Tier) -> None:
        """A shorter one fails without a server being bothered, and keeps nobody else out."""
        first, second = self.keys(2)
        whole, short = self.blocks.sealed([first]), self.blocks.sealed([second], 100)
        assert tier.store([*whole.sources(), *short.sources()]) == [Outcome.OK, Outcome.FAILED]
        assert self.load(tier, [first, second]) == [Outcome.OK, Outcome.MISSING]

    def test_the_header_comes_back_as_it_was(self, tier: Tier) -> None:
        """A header that is none is refused, and what follows it on the connection is not misread."""
        first, second, third = self.keys(3)
        batch = self.blocks.sealed([first, second, third])
        batch.frames[1].header[:] = bytes(range(256))
        assert tier.store(batch.sources()) == [Outcome.OK, Outcome.FAILED, Outcome.OK]
        assert self.load(tier, [first, second, third]) == [Outcome.OK, Outcome.MISSING, Outcome.OK]

    def test_two_models_in_one_place_never_mix(self, tier: Tier) -> None:
        """As in the kit, with blocks that are sealed as the other model's."""
        ours, theirs = self.keys(2, "our model"), self.keys(2, "their model")
        self.store_all(tier, ours)
        fingerprint = b"another model's fingerprint, 32."
        other = self.open(fingerprint=fingerprint)
        assert self.store(other, theirs) == [Outcome.FAILED] * 2, "sealed as ours"
        mine, self.blocks = self.blocks, Blocks(self.layout, fingerprint)
        self.store_all(other, theirs)
        assert self.load(other, [*ours, *theirs]) == [Outcome.MISSING] * 2 + [Outcome.OK] * 2
        self.blocks = mine
        assert self.load(tier, [*ours, *theirs]) == [Outcome.OK] * 2 + [Outcome.MISSING] * 2


class TestRemoteUnix(OnCacheServers):
    scheme = "unix"


class TestRemoteTcp(OnCacheServers):
    scheme = "tcp"


class TestRemoteTwoServers(OnCacheServers):
    """Keys spread over two."""

    count = 2


class TestRemoteCapacity(Servers, CapacityChecks):
    """A server whose arena is small."""

    arena = "1000KiB"


def _token(number: int) -> str:
    return f"the token of tenant number {number}"
