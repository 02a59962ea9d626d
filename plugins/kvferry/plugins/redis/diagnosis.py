"""Why a server that was reached can't be used: the operator's mistakes, told apart from a server that is away.

A mistake becomes one ConfigError that names the option. No message holds a password.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from redis import exceptions
from redis.sentinel import MasterNotFoundError

from kvferry.connector.errors import ConfigError
from kvferry.plugins.redis.faults import one_line
from kvferry.plugins.redis.options import RedisOptions, Target
from kvferry.plugins.redis.servers import connection_to, sentinel_places
from kvferry.plugins.redis.wire import Deadline, Reader, pack

__all__ = ["check_tls_files", "diagnose", "needed_rules"]

_COMMANDS = "+get +set +exists +unlink +info +dbsize"
_SECOND_LOOK_S = 1.0
_CAPACITY_COMMANDS = (
    "+eval +multi +exec +zadd +zrange +zrem +zscore +zcard +hget +hset +hdel +del +strlen +time"
)


def needed_rules(options: RedisOptions, target: Target) -> str:
    """Return the ACL rules that the tier's user needs."""
    is_cluster = target.mode == "cluster"
    pattern = f"~{{{options.prefix}:*" if is_cluster else f"~{options.prefix}:*"
    commands = _COMMANDS + (f" {_CAPACITY_COMMANDS}" if options.capacity is not None else "")
    finding = " +cluster|slots +command" if is_cluster else " +select" if target.db else ""
    return f"{pattern} {commands}{finding}"


def check_tls_files(name: str, options: RedisOptions) -> None:
    """Raise ConfigError where certificates or the key cannot be read."""
    if options.tls_ca:
        try:
            ssl.create_default_context(cafile=str(Path(options.tls_ca).expanduser()))
        except OSError as error:
            raise ConfigError(f"tiers.{name}.tls_ca", f"{options.tls_ca} holds no certificates") from error
    if options.tls_cert:
        certificate, key = (Path(path).expanduser() for path in (options.tls_cert, options.tls_key))
        try:
            ssl.create_default_context().load_cert_chain(certificate, key)
        except OSError as error:
            raise ConfigError(
                f"tiers.{name}.tls_cert", f"certificate and key cannot be used: {error.strerror or error}"
            ) from error


def diagnose(
    name: str, options: RedisOptions, target: Target, error: BaseException, step_timeout_s: float
) -> ConfigError | None:
    """Return the mistake behind ``error``, or None where the server is only away.

    Args:
        name: The tier's name.
        options: What the operator wrote.
        target: The servers it names.
        error: What the first attempt to use them raised.
        step_timeout_s: Bound on each step of a further look at the server.
    """
    found = None
    for one in _causes(error):
        found = _tls_mistake(one) or _mistake(one, options, target)
        if found is not None:
            break
        if isinstance(one, MasterNotFoundError):
            found = _sentinel_mistake(options, target, step_timeout_s)
            break
    if found is None and target.addresses:
        found = _second_look(error, target, min(step_timeout_s, _SECOND_LOOK_S))
    return ConfigError(f"tiers.{name}.{found[0]}", found[1], found[2]) if found is not None else None


_Mistake = tuple[str, str, str]
"""Option, what is wrong, hint."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _mistake(error: BaseException, options: RedisOptions, target: Target) -> _Mistake | None:
    text = one_line(error)
    place = target.label
    if isinstance(error, exceptions.NoPermissionError | exceptions.AuthorizationError):
        return (
            "username",
            f"{place} does not allow it: {text}",
            f"the user needs {needed_rules(options, target)}",
        )
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthenticationWrongNumberOfArgsError):
        if target.password or target.username:
            return "password", f"{place} refuses the credentials: {text}", "check username and password"
        return "password", f"{place} asks for a password", "give password, and username if it has ACL users"
    if isinstance(error, exceptions.InvalidResponse):
        return "url", f"what answers at {place} is not Redis", "check host and port"
    if isinstance(error, exceptions.MovedError):
        return "url", f"{place} is part of a cluster", "write the scheme with +cluster"
    if (
        isinstance(error, exceptions.RedisClusterException)
        and "not enabled" in text
        and target.mode == "cluster"
    ):
        return "url", f"{place} is no cluster", "leave +cluster out of the scheme"
    if isinstance(error, exceptions.ResponseError):
        if "DB index" in text or "SELECT" in text:
            return "url", f"{place} has no database {target.db}", "the number after the host"
        if "unknown command" in text:
            return (
                "url",
                f"{place} is no ordinary server: {text}",
                "a sentinel needs the scheme redis+sentinel",
            )
    return None


def _tls_mistake(error: BaseException) -> _Mistake | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        if "match" in error.verify_message or "ostname" in error.verify_message:
            return (
                "url",
                f"the certificate is for another host: {error.verify_message}",
                "use the name it is for",
            )
        why = f"the server's certificate is not trusted: {error.verify_message}"
        return "tls_ca", why, "name the file of the certificates that signed it"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        reason = (error.reason or "").upper()
        if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
            return "tls_cert", "the server asks for a client certificate", "give tls_cert and tls_key"
        if any(word in reason for word in ("UNKNOWN_CA", "BAD_CERTIFICATE", "ALERT_CERTIFICATE")):
            return "tls_cert", f"the server refuses the client certificate: {reason}", ""
        if any(word in reason for word in ("WRONG_VERSION", "RECORD_LAYER", "HTTP_REQUEST")):
            return "url", "the server does not speak TLS", "write the scheme with one s: redis"
        return "url", f"TLS cannot be agreed on: {reason or error}", ""
    return None


def _sentinel_mistake(options: RedisOptions, target: Target, step_timeout_s: float) -> _Mistake | None:
    """Ask the sentinels what they know; None where none answers or they do know the service."""
    names: set[str] = set()
    is_answered = False
    for place in sentinel_places(target, options, step_timeout_s):
        deadline = Deadline(2 * step_timeout_s)
        try:
            with connection_to(place, deadline) as (connection, wire):
                connection.send_packed_command(pack([(b"SENTINEL", b"MASTERS")]), check_health=False)
                reply = Reader(wire, deadline).reply()
        except exceptions.AuthenticationError as error:
            why = f"{place.label} refuses the credentials: {one_line(error)}"
            return "sentinel_password", why, "the sentinels have their own"
        except (exceptions.RedisError, OSError) as error:
            found = next((mistake for one in _causes(error) if (mistake := _tls_mistake(one))), None)
            if found is not None:
                return found
            continue
        finally:
            place.pool.disconnect()
        is_answered = True
        names |= {
            name for entry in (reply if isinstance(reply, list) else []) if (name := _master_name(entry))
        }
    if not is_answered or target.service in names:
        return None
    known = f"they know {', '.join(sorted(names))}" if names else "they know none"
    return "url", f"the sentinels know no service {target.service!r}", known


def _master_name(entry: object) -> str:
    fields = entry if isinstance(entry, list) else []
    pairs = dict(zip(fields[::2], fields[1::2], strict=False))
    name = pairs.get(b"name", b"")
    return name.decode(errors="replace") if isinstance(name, bytes) else ""


def _second_look(error: BaseException, target: Target, timeout_s: float) -> _Mistake | None:
    """Tell TLS and its absence apart where neither side said so: it hung up, or waits for more."""
    address = target.addresses[0]
    if target.is_tls:
        if _answers_plainly(address, timeout_s):
            return "url", f"{target.label} does not speak TLS", "write the scheme with one s: redis"
        refusal = _handshake(address, timeout_s)
        return _tls_mistake(refusal) if isinstance(refusal, ssl.SSLError) else None
    if _is_hung_up(error) and _handshake(address, timeout_s) is None:
        return "url", f"{target.label} speaks TLS", "write the scheme with a second s: rediss"
    return None


def _is_hung_up(error: BaseException) -> bool:
    """Tell whether the connection was made and then closed by the other side."""
    texts = " ".join(str(one) for one in _causes(error))
    return any(text in texts for text in ("closed by server", "reset by peer", "Broken pipe"))


def _answers_plainly(address: tuple[str, int], timeout_s: float) -> bool:
    try:
        with socket.create_connection(address, timeout_s) as plain:
            plain.settimeout(timeout_s)
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in (b"+", b"-")
    except OSError:
        return False


def _handshake(address: tuple[str, int], timeout_s: float) -> OSError | None:
    """Try TLS without looking at the server's certificate or sending anything; return what goes wrong.

    A server that wants a client's certificate says so after the handshake, so a moment is waited for it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(address, timeout_s) as plain, context.wrap_socket(plain) as secure:
            secure.settimeout(timeout_s)
            try:
                secure.recv(1)
            except TimeoutError:
                pass  # it waits for a command, as it should
            return None
    except OSError as error:
        return error
