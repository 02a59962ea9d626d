"""What ``kvferry doctor`` says about a Redis tier: whether it answers, what it is, and how it is set up.

The server is asked and one key, ``<prefix>:probe``, is written for a moment; nothing else changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from redis import exceptions

from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.plugins.redis.census import ServerFacts
from kvferry.plugins.redis.diagnosis import check_tls_files
from kvferry.plugins.redis.opening import make_keyspace, reach, size_findings
from kvferry.plugins.redis.options import RedisOptions, Target, parse_target
from kvferry.plugins.redis.servers import Servers, connect, connection_to
from kvferry.plugins.redis.wire import Deadline, Reader, pack

__all__ = ["check_redis_tier"]

_STEP_TIMEOUT_S = 2.0
_PINGS = 20
_SLOW_S = 0.005


def check_redis_tier(options: RedisOptions, name: str) -> Iterator[Finding]:
    """Yield findings; takes a few seconds at most.

    Args:
        options: What the operator wrote.
        name: The tier's name.
    """
    topic = f"tier {name}"
    try:
        target = parse_target(name, options)
        check_tls_files(name, options)
        servers = connect(target, options, _STEP_TIMEOUT_S)
        try:
            yield from _look(topic, name, options, target, servers)
        finally:
            servers.close()
    except ConfigError as error:
        yield Finding("error", topic, f"{error.path}: {error.why}", error.hint)


def _look(
    topic: str, name: str, options: RedisOptions, target: Target, servers: Servers
) -> Iterator[Finding]:
    reached = reach(name, options, target, servers, _STEP_TIMEOUT_S)
    if reached.why_away:
        text = f"{target.label} is not available: {reached.why_away}"
        yield Finding("warn", topic, text, "the engine starts without it and uses it once it answers")
        return
    versions = sorted({facts.version for facts in reached.facts.values() if facts.version})
    known = f", version {', '.join(versions)}" if versions else ""
    yield Finding("ok", topic, f"{target.label} answers{known}")
    yield from _latency(topic, options, target, servers)
    yield from size_findings(name, options, reached.facts)
    yield from _setup(topic, options, reached.facts)
    if target.is_tls and not options.tls_verify:
        yield Finding(
            "warn", topic, "any certificate is accepted: tls_verify is false", "give tls_ca instead"
        )


def _latency(topic: str, options: RedisOptions, target: Target, servers: Servers) -> Iterator[Finding]:
    key = make_keyspace(options, target).probe()
    taken = []
    try:
        deadline = Deadline(_STEP_TIMEOUT_S)
        with connection_to(servers.place_of(key), deadline) as (connection, wire):
            reader = Reader(wire, deadline)
            for _ in range(_PINGS):
                started = time.perf_counter()
                connection.send_packed_command(pack([(b"EXISTS", key)]), check_health=False)
                reader.reply()
                taken.append(time.perf_counter() - started)
    except (exceptions.RedisError, exceptions.RedisClusterException, OSError):
        pass  # what was measured until then still counts
    if taken:
        median = statistics.median(taken)
        text = f"it answers a small request in {median * 1000:.2f} ms"
        hint = "a server further away than the same rack makes hits slow" if median > _SLOW_S else ""
        yield Finding("warn" if median > _SLOW_S else "ok", topic, text, hint)


def _setup(topic: str, options: RedisOptions, facts: dict[str, ServerFacts]) -> Iterator[Finding]:
    if any(one.is_aof for one in facts.values()):
        hint = "a cache needs no append-only file: set appendonly no, unless something else needs it"
        yield Finding("warn", topic, "every store is also written to the server's append-only file", hint)
    if options.capacity is not None and any(one.policy.startswith("allkeys") for one in facts.values()):
        hint = "set maxmemory-policy noeviction and maxmemory well above the capacity"
        text = "the server evicts by itself and can drop the index that holds the capacity"
        yield Finding("warn", topic, text, hint)
