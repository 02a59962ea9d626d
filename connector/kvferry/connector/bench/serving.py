"""A real ``kvferry serve`` for a measurement: a process of its own on loopback, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvferry.connector.bench.case import BenchSkipped

__all__ = ["Serving", "serving"]

_START_S = 60.0
_STOP_S = 20.0
_TOLD = 300
_MAIN = "from kvferry.connector.cli import main; main()"


class Serving(NamedTuple):
    """A server that answers."""

    unix: str
    tcp: str
    token: str
    """What both want to see."""
    directory: Path
    """Of its sockets: a short path, removed at the end."""


@contextlib.contextmanager
def serving(capacity_bytes: int) -> Iterator[Serving]:
    """Run a cache server with an arena of ``capacity_bytes`` and no tiers.

    Raises:
        BenchSkipped: It does not start; what it printed is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as name:
        directory, token = Path(name), secrets.token_hex(16)
        unix, port = f"unix://{directory}/kvferry.sock", _free_port()
        server = Serving(unix, f"tcp://127.0.0.1:{port}", token, directory)
        config = directory / "kvferry.toml"
        config.write_text(
            f'[server]\nlisten = ["{server.unix}", "{server.tcp}"]\nhttp = ""\n[host]\ncapacity = {capacity_bytes}\n'
        )
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ | {"KVFERRY_TOKEN": token},
            )
        try:
            _wait_for(process, directory / "kvferry.sock", directory / "log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(path))
            except OSError:
                time.sleep(0.02)
            else:
                return
    raise BenchSkipped(f"the cache server did not start: {log.read_text(errors='replace')[-_TOLD:].strip()}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
