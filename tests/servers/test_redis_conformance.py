"""The Redis tier is held to the conformance kit: one server and a cluster, each without and with a capacity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import redis
from redis_server import RedisCluster, RedisServer, short_directory

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, TierTests
from kvferry.connector.tier import Tier
from kvferry.plugins.redis.keyspace import Keyspace

MIB = 1 << 20


class OnServers(TierTests):
    """What all of them have in common: back doors through clients of the servers themselves."""

    plugins = ("kvferry.plugins.redis",)
    has_capacity: ClassVar[bool] = False
    nodes: ClassVar[list[RedisServer]]
    url: ClassVar[str]

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        entry: dict[str, object] = {"type": "redis", "url": self.url, "prefix": place.name}
        return {**entry, "capacity": capacity_bytes} if self.has_capacity else entry

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        name = Keyspace(place.name, bytes(range(32)), len(self.nodes) > 1, None, 0).name(key)
        for node in self.nodes:
            with (
                contextlib.closing(node.client()) as client,
                contextlib.suppress(redis.exceptions.MovedError),
            ):
                raw = client.get(name)
                assert isinstance(raw, bytes)
                client.set(name, self.damaged(raw, how))
                return
        raise AssertionError("no node has the key")

    def suspend(self) -> None:
        type(self).frozen = contextlib.ExitStack()
        for node in self.nodes:
            type(self).frozen.enter_context(node.frozen())

    def resume(self) -> None:
        type(self).frozen.close()

    frozen: ClassVar[contextlib.ExitStack] = contextlib.ExitStack()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def revive(self) -> None:
        for node in self.nodes:
            if node.process is None:
                node.start()

    def exhaust(self, tier: Tier, place: Path) -> None:
        self._limit("1mb")

    def relieve(self, tier: Tier, place: Path) -> None:
        self._limit("0")

    def _limit(self, maxmemory: str) -> None:
        for node in self.nodes:
            with contextlib.closing(node.client()) as client:
                client.config_set("maxmemory", maxmemory)


class OneServer(OnServers):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        server = RedisServer(short_directory(tmp_path_factory))
        cls.nodes, cls.url = [server], server.url
        yield
        server.kill()


class ClusterServers(OnServers):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _cluster(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        cls.cluster = RedisCluster(short_directory(tmp_path_factory))
        cls.nodes, cls.url = cls.cluster.nodes, cls.cluster.url
        yield
        cls.cluster.kill()

    cluster: ClassVar[RedisCluster]

    def revive(self) -> None:
        super().revive()
        self.cluster.wait_until_whole()


class TestRedis(OneServer):
    """Bounded by the server's maxmemory at most."""


class TestRedisWithCapacity(OneServer):
    has_capacity = True


class TestRedisCluster(ClusterServers):
    """Keys spread over three nodes."""


class TestRedisClusterWithCapacity(ClusterServers):
    has_capacity = True
    capacity_bytes = 1024 * MIB  # divided over 128 parts, each with room for four blocks
    small_capacity_bytes = 24 * MIB
