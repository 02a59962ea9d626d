"""What an operator can set for a Redis tier, and the servers that its URL names.

Values and parsing only; nothing is connected here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from kvferry.connector.errors import ConfigError

__all__ = ["RedisOptions", "Target", "parse_target"]

_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
_REDIS_PORT = 6379
_SENTINEL_PORT = 26379
_PREFIX = re.compile(r"[A-Za-z0-9_.:/-]{1,64}", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:,\s]+)(?::(\d{1,5}))?", re.ASCII)


class RedisOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a tier of type ``redis``."""

    url: str
    """Where the server is: ``redis://host:6379/0``, ``rediss://`` with TLS, ``unix:///path/to/socket``,
    ``redis+cluster://host1:6379,host2:6379`` for a Redis Cluster,
    ``redis+sentinel://host1:26379,host2:26379/service/0`` behind sentinels; the last two also with
    ``rediss+``. May hold ``user:password@``."""
    username: str = ""
    """ACL user; the server's default user when empty."""
    password: str = ""
    """Password of the user, where the URL has none."""
    sentinel_username: str = ""
    """ACL user of the sentinels, where they ask for one."""
    sentinel_password: str = ""
    """Password of the sentinels, where they ask for one."""
    prefix: str = "kvferry"
    """Every key starts with it, so that an ACL can name them and others can share the server."""
    capacity: int | None = None
    """Bytes of blocks that all engines together keep under this prefix; the least recently used go
    first. Give every engine the same. Without it the server's ``maxmemory`` is the bound."""
    ttl_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds after which a block is dropped, counted from when it was stored; 0 keeps it."""
    tls_ca: str = ""
    """File of the certificates to trust; the system's when empty."""
    tls_cert: str = ""
    """File of the client's certificate, where the server asks for one."""
    tls_key: str = ""
    """File of the key to ``tls_cert``."""
    tls_verify: bool = True
    """False accepts any certificate: whoever answers can then read and change blocks."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The servers a URL names, with the credentials to use."""

    mode: Literal["single", "cluster", "sentinel"]
    addresses: tuple[tuple[str, int], ...]
    """Servers or sentinels; empty for a UNIX socket."""
    socket_path: str = ""
    is_tls: bool = False
    db: int = 0
    service: str = ""
    """What the sentinels call the master."""
    username: str = ""
    password: str = ""

    @property
    def label(self) -> str:
        """The servers in words, fit for logs: no credentials."""
        if self.socket_path:
            return self.socket_path
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.addresses
        )
        return f"{self.service} behind {hosts}" if self.service else hosts

    def __repr__(self) -> str:
        return f"Target({self.mode}, {self.label})"  # a traceback must not show the password


def parse_target(name: str, options: RedisOptions) -> Target:
    """Return the servers that ``options`` name.

    Args:
        name: The tier's name, for messages.
        options: What the operator wrote.

    Raises:
        ConfigError: The URL or another option makes no sense. No message holds a password.
    """
    at = f"tiers.{name}"
    parts = _split(f"{at}.url", options.url)
    if not _PREFIX.fullmatch(options.prefix):
        raise ConfigError(
            f"{at}.prefix", f"found {options.prefix!r}", "use letters, digits and any of _ . : / -"
        )
    username, password = _credentials(at, parts, options)
    db = _db(f"{at}.url", parts)
    target = Target(
        mode="cluster"
        if "cluster" in parts.scheme
        else "sentinel"
        if "sentinel" in parts.scheme
        else "single",
        addresses=() if parts.scheme == "unix" else _addresses(f"{at}.url", parts),
        socket_path=unquote(parts.path) if parts.scheme == "unix" else "",
        is_tls=parts.scheme.startswith("rediss"),
        db=db,
        service=unquote(_segments(parts)[0]) if "sentinel" in parts.scheme and _segments(parts) else "",
        username=username,
        password=password,
    )
    _check_shape(f"{at}.url", target, parts)
    _check_tls(at, target, options)
    return target


def _split(path: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(path, "is not a URL", "write redis://host:6379/0") from error
    if parts.scheme not in _SCHEMES:
        hint = f"known: {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
        found = f"found the scheme {parts.scheme!r}" if "://" in url else "has no scheme"
        raise ConfigError(path, found, hint)
    unknown = sorted(set(parse_qs(parts.query, keep_blank_values=True)) - {"db"})
    if unknown or parts.fragment:
        what = ", ".join(repr(key) for key in unknown) or "a fragment"
        raise ConfigError(
            path, f"has {what} after the path", "only ?db= is understood; use the tier's own options"
        )
    return parts


def _credentials(at: str, parts: SplitResult, options: RedisOptions) -> tuple[str, str]:
    userinfo, has_any, _ = parts.netloc.rpartition("@")
    user, _, secret = userinfo.partition(":")
    for field, inside, beside in (
        ("username", user, options.username),
        ("password", secret, options.password),
    ):
        if has_any and inside and beside:
            raise ConfigError(f"{at}.{field}", "is given twice, here and in the URL", "keep one of them")
    return unquote(user) or options.username, unquote(secret) or options.password


def _addresses(path: str, parts: SplitResult) -> tuple[tuple[str, int], ...]:
    default = _SENTINEL_PORT if "sentinel" in parts.scheme else _REDIS_PORT
    found = []
    for part in parts.netloc.rpartition("@")[2].split(","):
        match = _HOST.fullmatch(part.strip())
        port = int(match[2] or default) if match else 0
        if match is None or not 0 < port < 65536:
            raise ConfigError(path, f"{part!r} is not host:port", "write redis://host:6379/0")
        found.append((match[1].strip("[]"), port))
    return tuple(found)


def _segments(parts: SplitResult) -> list[str]:
    return [] if parts.scheme == "unix" else [part for part in parts.path.split("/") if part]


def _db(path: str, parts: SplitResult) -> int:
    segments = _segments(parts)[1 if "sentinel" in parts.scheme else 0 :]
    values = segments + parse_qs(parts.query).get("db", [])
    if len(values) > 1 or not all(value.isascii() and value.isdecimal() for value in values):
        raise ConfigError(path, f"found the database {'/'.join(values)!r}", "write one number, such as /0")
    return int(values[0]) if values else 0


def _check_shape(path: str, target: Target, parts: SplitResult) -> None:
    if parts.scheme == "unix":
        if not target.socket_path or parts.netloc.rpartition("@")[2]:
            raise ConfigError(path, "names no socket", "write unix:///path/to/socket, with three slashes")
        return
    if target.mode == "single" and len(target.addresses) > 1:
        scheme = parts.scheme
        raise ConfigError(path, "names several servers", f"write {scheme}+cluster:// or {scheme}+sentinel://")
    if target.mode == "cluster" and target.db:
        raise ConfigError(path, "names a database, and a cluster has only one", "leave it out")
    if target.mode == "sentinel" and not target.service:
        raise ConfigError(path, "names no service", "write redis+sentinel://host:26379/mymaster")


def _check_tls(at: str, target: Target, options: RedisOptions) -> None:
    for field in ("tls_ca", "tls_cert", "tls_key"):
        value: str = getattr(options, field)
        if value and not target.is_tls:
            raise ConfigError(f"{at}.{field}", "is given, and the URL is one without TLS", "write rediss://")
        if value and not Path(value).expanduser().is_file():
            raise ConfigError(f"{at}.{field}", f"{value} is not a file")
    if bool(options.tls_cert) != bool(options.tls_key):
        missing = "tls_key" if options.tls_cert else "tls_cert"
        raise ConfigError(f"{at}.{missing}", "is missing: certificate and key go together")
