"""Connecting to a cache server: the socket, TLS, the handshake, and errors that tell what to do.

Used by engines (``client``) and by the ``remote`` tier. The errors fall into two kinds, because what to do about them
differs: ``OSError`` and ``TimeoutError`` mean that the server is away, and trying again makes sense; ``ConfigError``,
``AccessRefused`` and ``WireError`` are mistakes that stay until somebody corrects them.

Threading: ``dial`` blocks; any thread may call it. It holds no state.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.errors import AccessRefused, ConfigError, WireError
from kvferry.connector.handshake import client_handshake
from kvferry.connector.tls import client_context

__all__ = ["client_tls", "dial"]

PEER_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: what the kernel tells about the other end of a unix socket."""
_CERTIFICATE_ALERTS = (
    "ALERT_CERTIFICATE",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_UNKNOWN_CA",
    "ALERT_ACCESS_DENIED",
)
"""How OpenSSL names a server's refusal of our certificate; version prefixes differ."""


def dial(address: Address, token: str, tls: TlsConfig, deadline: float) -> Channel:
    """Connect to a cache server and introduce ourselves.

    Args:
        address: Where.
        token: The credential; empty for none.
        tls: For a ``tls://`` address.
        deadline: ``time.monotonic`` until which it may take. Looking up a host's name is left to the system's
            resolver, which has deadlines of its own.

    Returns:
        A channel ready for ``wire.Hello``; the caller closes it.

    Raises:
        ConfigError: TLS options for another kind of address, or files that cannot be used.
        AccessRefused: The server refuses us, or is not the one it should be.
        WireError: What listens there is no cache server of a version that goes with ours.
        TimeoutError: The deadline passed.
        OSError: The server is away, or has no room now.
    """
    context = client_tls(address, tls)
    sock = _connect(address, deadline)
    try:
        if address.scheme == "unix" and not token:
            _check_owner(address, sock)
        if context is not None:
            sock = _wrapped(address, sock, context, tls, deadline)
        channel = Channel(sock)
        client_handshake(channel, token, deadline)
    except BaseException as error:
        sock.close()
        explained = _explained(address, error)
        if explained is error:
            raise
        raise explained from error
    return channel


def client_tls(address: Address, tls: TlsConfig, path: str = "tls") -> ssl.SSLContext | None:
    """Return the TLS context for an address; None for those without TLS.

    Raises:
        ConfigError: The options do nothing for this address, are incomplete, or name files that cannot be used.
    """
    if address.scheme == "tls":
        return client_context(tls, path)
    if tls != TlsConfig():
        raise ConfigError(path, f"TLS options do nothing with {address}", "use a tls:// address")
    return None


def _connect(address: Address, deadline: float) -> socket.socket:
    if address.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return _connected(sock, address.path, address, deadline)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"{address}: the host's name is not known: {error}") from error
    last: OSError = OSError(f"{address}: the host has no address")
    for family, kind, protocol, _, target in found:
        try:
            return _connected(socket.socket(family, kind, protocol), target, address, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            last = error
    raise last


def _connected(
    sock: socket.socket, target: str | tuple[object, ...], address: Address, deadline: float
) -> socket.socket:
    try:
        sock.settimeout(_left(address, deadline))
        sock.connect(target)
    except TimeoutError as error:
        sock.close()
        raise TimeoutError(f"{address}: no connection within the deadline") from error
    except OSError as error:
        sock.close()
        raise type(error)(error.errno, f"{address}: {error.strerror or error}") from error
    return sock


def _check_owner(address: Address, sock: socket.socket) -> None:
    """Without a token, the user who runs the server is what tells that it is the right one."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    uid = PEER_CREDENTIALS.unpack(raw)[1]
    if uid != os.geteuid():
        raise AccessRefused(
            f"the server runs as user id {uid}, this process as {os.geteuid()}: run both as one user, or use a token"
        )


def _wrapped(
    address: Address, sock: socket.socket, context: ssl.SSLContext, tls: TlsConfig, deadline: float
) -> ssl.SSLSocket:
    wrapped = context.wrap_socket(
        sock, server_hostname=tls.server_name or address.host, do_handshake_on_connect=False
    )
    try:
        wrapped.settimeout(_left(address, deadline))
        wrapped.do_handshake()
    except BaseException:
        wrapped.close()
        raise
    return wrapped


def _explained(address: Address, error: BaseException) -> BaseException:
    """Return the error with the address before it, and TLS's errors as what they mean."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessRefused(
            f"{address}: the server's certificate is refused: {error.verify_message}; see tls.ca and tls.server_name"
        )
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if any(alert in reason for alert in _CERTIFICATE_ALERTS):
            return AccessRefused(
                f"{address}: the server refuses our certificate ({reason}); see tls.certificate"
            )
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return ConnectionError(f"{address}: the server closed the connection")
        return WireError(f"{address}: no TLS with it ({error.reason or error}); is it a tcp:// address?")
    if isinstance(error, AccessRefused | WireError):
        return type(error)(f"{address}: {error}")
    if isinstance(error, TimeoutError):
        return TimeoutError(f"{address}: it did not introduce itself in time; is it of this scheme?")
    if isinstance(error, ConnectionError):
        return type(error)(f"{address}: {error}")
    return error


def _left(address: Address, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{address}: no connection within the deadline")
    return left
