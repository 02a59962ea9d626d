"""Addresses of a cache server: ``unix:///path``, ``tcp://host:port``, ``tls://host:port``.

Both ends read them here: the server's ``listen``, the engine's ``service``, the ``remote`` tier's list. An address is
text that somebody typed; whatever is not exactly one of the three forms is an error that says which.

Pure functions.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

import msgspec

from kvferry.connector.errors import ConfigError

__all__ = ["Address", "is_loopback", "parse_address"]

Scheme = Literal["unix", "tcp", "tls"]

_FORMS = "write unix:///path/of/a.sock, tcp://host:port or tls://host:port"
_LONGEST_PATH = 107
"""Bytes; what the kernel has room for, without the zero at its end."""
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)
_HOST_AND_PORT = re.compile(r"(\[(?P<ipv6>[^\]]*)\]|(?P<host>[^\[\]:]*)):(?P<port>[0-9]{1,5})", re.ASCII)


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cache server listens. ``str()`` gives back the form that ``parse_address`` reads."""

    scheme: Scheme
    path: str = ""
    """Of the socket's file; ``unix`` only."""
    host: str = ""
    """Name or IP address, without brackets; ``tcp`` and ``tls`` only."""
    port: int = 0
    """0, for a listener: one that is free."""

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from this machine only."""
        return self.scheme == "unix" or is_loopback(self.host)

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine's own. Of names only ``localhost`` is believed to be."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def parse_address(text: str, path: str) -> Address:
    """Return the address that ``text`` is.

    Args:
        text: As somebody wrote it.
        path: Where it stands in the configuration, for the message.

    Raises:
        ConfigError: It is none; the message shows what one looks like.
    """
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "unix":
        return _unix(text, rest, path)
    if separator and scheme in ("tcp", "tls"):
        host, port = _host_and_port(text, rest, path)
        return Address(scheme="tcp" if scheme == "tcp" else "tls", host=host, port=port)
    raise _not_one(text, path, "is no address of a cache server")


def _unix(text: str, file: str, path: str) -> Address:
    if not file.startswith("/"):
        raise _not_one(text, path, "has no absolute path", "three slashes: unix:///run/kvferry/kvferry.sock")
    if file.endswith("/") or "\0" in file or not file.isprintable():
        raise _not_one(text, path, "does not name a file")
    if len(file.encode()) > _LONGEST_PATH:
        raise _not_one(
            text, path, f"has more than {_LONGEST_PATH} bytes in its path", "choose a shorter directory"
        )
    return Address(scheme="unix", path=file)


def _host_and_port(text: str, rest: str, path: str) -> tuple[str, int]:
    if "@" in rest:
        raise ConfigError(
            path, "an address must not hold a credential", "give it as token, or in KVFERRY_TOKEN"
        )
    match = _HOST_AND_PORT.fullmatch(rest)
    if match is None:
        raise _not_one(text, path, "is not host:port", f"{_FORMS}; an IPv6 address stands in brackets")
    port = int(match["port"])
    if port > 65535:
        raise _not_one(text, path, "has a port over 65535")
    if match["ipv6"] is not None:
        if not _is_ipv6(match["ipv6"]):
            raise _not_one(text, path, "has no IPv6 address in its brackets")
        return match["ipv6"], port
    host = match["host"]
    if not _HOST.fullmatch(host):
        hint = "0.0.0.0 and [::] stand for every address of this machine" if host in ("", "*") else _FORMS
        raise _not_one(text, path, "has no valid host", hint)
    return host, port


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _not_one(text: str, path: str, why: str, hint: str = _FORMS) -> ConfigError:
    shown = text if len(text) <= 120 else text[:117] + "..."
    return ConfigError(path, f"{shown!r} {why}", hint)
