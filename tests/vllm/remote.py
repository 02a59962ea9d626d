"""Tiers on real servers of the tests' own, and what can happen to those servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from redis_server import RedisServer

from kvferry.plugins.s3.weed import Weed

__all__ = ["KINDS", "RedisRemote", "Remote", "S3Remote"]


class Remote(Protocol):
    """A server that keeps blocks."""

    name: str

    def tier(self) -> dict[str, Any]:
        """Return the configuration of a tier on this server."""

    def start(self) -> None:
        """Start it again after ``kill``."""

    def kill(self) -> None:
        """Kill it as a crash would."""

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Keep it from answering; connections stay open."""

    def written_bytes(self) -> int:
        """Return how many bytes the process has written so far, to sockets included."""


class RedisRemote:
    """A Valkey that keeps everything in memory: a crash loses its blocks."""

    name = "redis"

    def __init__(self, directory: Path) -> None:
        self.server = RedisServer(directory)

    def tier(self) -> dict[str, Any]:
        return {"type": "redis", "url": self.server.url}

    def start(self) -> None:
        self.server.start()

    def kill(self) -> None:
        self.server.kill()

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        return self.server.frozen()

    def written_bytes(self) -> int:
        assert self.server.process is not None
        return _written_bytes(self.server.process.pid)

    def fill_up(self) -> None:
        """Let nothing more in."""
        with contextlib.closing(self.server.client()) as client:
            used = int(client.info("memory")["used_memory"])
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", str(used))

    def make_room(self) -> None:
        with contextlib.closing(self.server.client()) as client:
            client.config_set("maxmemory", "0")


class S3Remote:
    """A SeaweedFS whose objects survive a crash, holding blocks that zstd has encoded."""

    name = "s3"

    def __init__(self, directory: Path) -> None:
        self._weed = Weed(directory)
        self._weed.start()

    def tier(self) -> dict[str, Any]:
        return {"type": "s3", "codec": "zstd", **self._weed.options()}

    def start(self) -> None:
        self._weed.start()

    def kill(self) -> None:
        self._weed.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self._weed.freeze()
        try:
            yield
        finally:
            self._weed.thaw()

    def written_bytes(self) -> int:
        assert self._weed._process is not None
        return _written_bytes(self._weed._process.pid)


KINDS = {"redis": RedisRemote, "s3": S3Remote}
"""By the type of tier."""


def _written_bytes(pid: int) -> int:
    counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counters["wchar"])
