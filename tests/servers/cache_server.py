"""A real ``kvferry serve`` process for the tests, that can be stopped in every way and started again."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

__all__ = ["CacheServer", "toml"]

START_S = 60.0
STOP_S = 30.0
_PR_SET_PDEATHSIG = 1
_MAIN = "from kvferry.connector.cli import main; main()"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy of the environment


class CacheServer:
    """One server. Use it as a context manager, or ``kill`` it at the end.

    Args:
        directory: For its socket, configuration and log; made by the caller, its path short enough for a socket.
        config: Its configuration; listeners and the status page's port are added.
        tls: Listen with TLS too; the ``server.tls`` table has to be configured.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any] = {}, *, tls: bool = False) -> None:
        self.directory = directory
        self.unix = f"unix://{directory}/kvferry.sock"
        self.tcp = f"tcp://127.0.0.1:{free_port()}"
        self.tls = f"tls://127.0.0.1:{free_port()}" if tls else ""
        self.url = f"http://127.0.0.1:{free_port()}"
        server = {
            "listen": [address for address in (self.unix, self.tcp, self.tls) if address],
            "http": self.url.removeprefix("http://"),
        }
        tables = dict(config) | {"server": server | dict(config.get("server", {}))}
        self._config = directory / "kvferry.toml"
        self._config.write_text("".join(f"{name} = {toml(value)}\n" for name, value in tables.items()))
        self._log = directory / "kvferry.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it has printed, in all its lives."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Start it, again if need be, and wait until it is ready."""
        assert self.process is None
        paths = [str(Path(__file__).parents[1] / "unit"), os.environ.get("PYTHONPATH", "")]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # tests start servers from one thread
            )
        deadline = time.monotonic() + START_S
        try:
            while not self.is_ready():
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)
        except BaseException:
            self.kill()
            raise

    def is_ready(self) -> bool:
        """Tell whether it lets clients in."""
        try:
            with _open(f"{self.url}/readyz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def status(self) -> dict[str, Any]:
        """Return what it tells about itself."""
        with _open(f"{self.url}/status.json", timeout=20) as response:
            status: dict[str, Any] = json.load(response)["status"]
            return status

    def stop(self) -> None:
        """End it in order."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(STOP_S)
        self.process = None
        assert code == 0, self.log

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)
            self.process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep it from answering; connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            self._wait_until_stopped()
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def _wait_until_stopped(self) -> None:
        """A thread that runs on another processor stops a moment after the signal was sent."""
        deadline = time.monotonic() + STOP_S
        tasks = Path(f"/proc/{self.pid}/task")
        while any(_state(task) != "T" for task in tasks.iterdir()):
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _state(task: Path) -> str:
    """Return a thread's state, as in ps."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def toml(value: Any) -> str:
    """Return a value as TOML writes it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    return json.dumps(value)


def _die_with_parent() -> None:
    """A server must not outlive tests that were killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
