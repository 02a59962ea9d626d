"""Opening a remote tier: mistakes in the configuration are errors, a server that is away is not.

A tier whose servers do not answer opens all the same, so that hits begin when they do; kvferry's circuit breaker sees
to it that nobody waits for them meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kvferry.connector import wire
from kvferry.connector.address import Address
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.joining import JoinRefused, is_mistake
from kvferry.connector.tier import TierContext
from kvferry.plugins.remote.links import DIAL_S, Link, Server, connect
from kvferry.plugins.remote.options import RemoteOptions, servers_of, tls_for
from kvferry.plugins.remote.talks import Failure, Sizing, converse
from kvferry.plugins.remote.tier import RemoteTier

__all__ = ["mistake_of", "open_remote_tier"]

_MOST_AT_ONCE = 16


def open_remote_tier(options: RemoteOptions, context: TierContext) -> RemoteTier:
    """Open the tier. Blocks until every server answered or could have, at most ``context.deadline_s``.

    Raises:
        ConfigError: The options make no sense, or a server refuses what they say.
    """
    addresses = servers_of(options, context.name)
    if context.codec != "none":
        raise ConfigError(
            f"tiers.{context.name}.codec",
            f"{context.codec!r} cannot be used with cache servers, which keep blocks as engines have them",
            "leave it out, and give a codec to the tiers of the servers",
        )
    hello = wire.Hello(
        mode="stream", fingerprint=context.fingerprint, layout=context.layout, engine=context.instance[:256]
    )
    servers = [
        Server(
            address,
            partial(_dial, address, options, hello),
            context.threads,
            partial(_tell, context, len(addresses)),
            f"kvferry-{context.name}-{number}" if len(addresses) > 1 else "",
        )
        for number, address in enumerate(addresses)
    ]
    try:
        return _meet(servers, context)
    except BaseException:
        for server in servers:
            server.close()
        raise


def _meet(servers: Sequence[Server], context: TierContext) -> RemoteTier:
    """Connect to all servers side by side, and ask those that answer how large they are."""
    deadline = time.monotonic() + context.deadline_s
    with ThreadPoolExecutor(min(len(servers), _MOST_AT_ONCE), f"kvferry-{context.name}-open") as threads:
        results = list(threads.map(partial(_greet, deadline=deadline), servers))
    failures = {server: error for server, error in zip(servers, results, strict=True) if error is not None}
    talks = {server: Sizing() for server in servers if server not in failures}
    failures |= converse(talks, deadline)
    for server, error in failures.items():
        mistake = mistake_of(context.name, server.name, error)
        if mistake is not None:
            raise mistake from error
    for server, error in failures.items():
        server.fail(_with_name(server.name, error))
    if len(servers) == 1 and failures:
        context.logger.warning(
            "tier %r: %s is not available: %s; opened anyway, it is used once it answers",
            context.name,
            servers[0].name,
            failures[servers[0]],
        )
    sizes = {server.name: talk.size for server, talk in talks.items() if talk.size is not None}
    return RemoteTier(context, servers, sizes)


def _greet(server: Server, deadline: float) -> Failure | None:
    """Connect for the first time, and keep the link; return what went wrong."""
    try:
        server.give_back(server.take(min(deadline, time.monotonic() + DIAL_S)))
    except (KVFerryError, OSError) as error:
        return error
    return None


def mistake_of(name: str, server: str, error: Failure) -> ConfigError | None:
    """Return the mistake behind a failure, or None where the server is only away.

    Args:
        name: The tier's name.
        server: The server's.
        error: What a first attempt to use it ended with.
    """
    if isinstance(error, ConfigError):
        return ConfigError(f"tiers.{name}.{error.path}", error.why, error.hint)
    if not isinstance(error, KVFerryError) or not is_mistake(error):
        return None
    field = "servers" if isinstance(error, JoinRefused) else "token" if "token" in str(error) else "servers"
    return ConfigError(f"tiers.{name}.{field}", _with_name(server, error))


def _dial(address: Address, options: RemoteOptions, hello: wire.Hello, deadline: float) -> Link:
    return connect(address, options.token, tls_for(address, options), hello, deadline)


def _tell(context: TierContext, count: int, text: str) -> None:
    if count > 1:  # of a single one kvferry itself says it
        context.logger.warning("tier %r: %s", context.name, text)


def _with_name(server: str, error: Failure) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith(server) else f"{server}: {text}"
