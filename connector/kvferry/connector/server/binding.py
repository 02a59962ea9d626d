"""Binding: a listening socket for an address, that nobody gets at who should not.

A unix socket has mode 0600 from the first moment it can be seen. One that a dead server left behind is replaced; one
that somebody answers on is left alone.

Functions without state; a ``Bound`` belongs to whoever made it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvferry.connector.address import Address
from kvferry.connector.errors import ConfigError, KVFerryError

__all__ = ["Bound", "bind"]

_BACKLOG = 256
_PROBE_S = 1.0
_LISTEN = "server.listen"


class Bound(NamedTuple):
    """A socket that listens."""

    sock: socket.socket
    address: Address
    """With the port that it really has."""
    inode: tuple[int, int] | None = None
    """Of the unix socket's file."""

    def close(self) -> None:
        """Listen no more; remove the file if it is still ours. Idempotent."""
        self.sock.close()
        if self.inode is not None and _inode(self.address.path) == self.inode:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)


def bind(address: Address) -> Bound:
    """Listen on an address.

    Raises:
        ConfigError: It cannot be listened on, whatever happens on the machine.
        KVFerryError: Somebody else has it, or it is not permitted.
    """
    return _bind_unix(address) if address.scheme == "unix" else _bind_port(address)


def _bind_unix(address: Address) -> Bound:
    path = Path(address.path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KVFerryError(
            f"cannot make the directory of {address}: {error.strerror}; choose another in {_LISTEN}"
        ) from error
    _make_way(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file takes over this mode when it is made
        sock.bind(address.path)
        mode = stat.S_IMODE(os.stat(address.path).st_mode)
        if mode & 0o077:
            os.unlink(address.path)
            raise KVFerryError(
                f"{address} would have mode {mode:o}, open to others: this file system does not keep modes; "
                f"choose a directory on another in {_LISTEN}"
            )
        inode = _inode(address.path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _not_had(address, error) from error
    except BaseException:
        sock.close()
        raise
    return Bound(sock, address, inode)


def _make_way(address: Address) -> None:
    """Remove what a dead server left behind; refuse to touch anything else."""
    try:
        if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            raise ConfigError(_LISTEN, f"{address.path} is there and is no socket", "choose another path")
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_had(address, error) from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, None):  # those are a server that is too busy to answer
                raise _not_had(address, error) from error
    raise KVFerryError(f"another server listens on {address}; stop it, or choose another path in {_LISTEN}")


def _bind_port(address: Address) -> Bound:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            _LISTEN, f"the host of {address} is not known: {error}", "use an IP address of this machine"
        ) from error
    family, _, _, _, target = found[0]
    actual = msgspec.structs.replace(address, host=str(target[0]))
    if address.is_loopback and not actual.is_loopback:
        raise ConfigError(_LISTEN, f"{address} is {target[0]}, which others reach", "use 127.0.0.1 or [::1]")
    try:
        sock = socket.create_server((str(target[0]), address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _not_had(address, error) from error
    return Bound(sock, msgspec.structs.replace(address, port=sock.getsockname()[1]))


def _not_had(address: Address, error: OSError) -> KVFerryError:
    cause = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        return KVFerryError(f"cannot listen on {address}: something else does; stop it, or change {_LISTEN}")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            _LISTEN, f"{address} is no address of this machine", "0.0.0.0 stands for all of them"
        )
    return KVFerryError(
        f"cannot listen on {address}: {cause}; change {_LISTEN}, or the rights of its directory"
    )


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
