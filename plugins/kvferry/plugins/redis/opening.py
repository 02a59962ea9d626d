"""Opening a Redis tier: mistakes in the configuration are errors, a server that is away is not.

A tier whose server does not answer opens all the same, so that hits begin when it does; kvferry's circuit
breaker sees to it that nobody waits for it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from redis import exceptions

from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import KEY_BYTES
from kvferry.connector.memory import format_bytes
from kvferry.connector.tier import TierContext
from kvferry.plugins.redis.census import Census, ServerFacts, ask_facts
from kvferry.plugins.redis.diagnosis import check_tls_files, diagnose
from kvferry.plugins.redis.faults import one_line
from kvferry.plugins.redis.keyspace import ENTRY_BYTES, Keyspace
from kvferry.plugins.redis.options import RedisOptions, Target, parse_target
from kvferry.plugins.redis.servers import Place, Servers, connect, connection_to
from kvferry.plugins.redis.tier import RedisTier
from kvferry.plugins.redis.wire import Argument, Deadline, Reader, pack

__all__ = ["Reached", "make_keyspace", "open_redis_tier", "reach", "size_findings"]

_STEP_TIMEOUT_S = 5.0
_MIN_BLOCKS = 4
_FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError)


class Reached(NamedTuple):
    """What a first look at the servers found."""

    facts: dict[str, ServerFacts]
    """By server; empty where the user may not ask."""
    why_away: str
    """Why they can't be used now; empty where they can."""


def open_redis_tier(options: RedisOptions, context: TierContext) -> RedisTier:
    """Open the tier. Blocks until the servers answered or could have.

    Raises:
        ConfigError: The options make no sense, or the servers refuse what they say.
    """
    target = parse_target(context.name, options)
    check_tls_files(context.name, options)
    keyspace = make_keyspace(options, target, context.fingerprint)
    _check_capacity(context, options, keyspace)
    step_timeout_s = min(_STEP_TIMEOUT_S, context.deadline_s / 3)
    servers = connect(target, options, step_timeout_s)
    try:
        reached = reach(context.name, options, target, servers, step_timeout_s)
    except BaseException:
        servers.close()
        raise
    census = Census(options.capacity)
    for place, facts in reached.facts.items():
        census.note(place, facts)
    if reached.why_away:
        context.logger.warning(
            "tier %r: %s is not available: %s; opened anyway, it is used once it answers",
            context.name,
            target.label,
            reached.why_away,
        )
    for finding in size_findings(context.name, options, reached.facts):
        if finding.level != "ok":
            context.logger.warning("tier %r: %s; %s", context.name, finding.text, finding.hint)
    is_bounded = options.capacity is not None or _is_limited(reached.facts)
    return RedisTier(context, servers, keyspace, census, is_bounded)


def make_keyspace(options: RedisOptions, target: Target, fingerprint: bytes = bytes(KEY_BYTES)) -> Keyspace:
    """Return the names of keys for these options; without a model's fingerprint, to try the server."""
    return Keyspace(options.prefix, fingerprint, target.mode == "cluster", options.capacity, options.ttl_s)


def reach(
    name: str, options: RedisOptions, target: Target, servers: Servers, step_timeout_s: float
) -> Reached:
    """Try what the tier will do, on a key that no block has, and ask the servers for their figures.

    Raises:
        ConfigError: The servers answer and refuse.
    """
    keyspace = make_keyspace(options, target)
    facts: dict[str, ServerFacts] = {}
    try:
        _try_commands(servers.place_of(keyspace.probe()), keyspace, options, step_timeout_s)
        for place in servers.places():
            facts |= _facts(place, step_timeout_s)
    except _FAILURES as error:
        mistake = diagnose(name, options, target, error, step_timeout_s)
        if mistake is not None:
            raise mistake from error
        return Reached({}, one_line(error))
    if target.mode != "cluster" and any(one.is_cluster for one in facts.values()):
        raise ConfigError(
            f"tiers.{name}.url", f"{target.label} is part of a cluster", "write the scheme with +cluster"
        )
    return Reached(facts, "")


def _try_commands(place: Place, keyspace: Keyspace, options: RedisOptions, step_timeout_s: float) -> None:
    key = keyspace.probe()
    commands: list[tuple[Argument, ...]] = [
        (b"EXISTS", key),
        (b"GET", key),
        (b"SET", key, b"", b"PX", 1000),
        (b"UNLINK", key),
    ]
    if options.capacity is not None:
        commands.append((b"EVAL", b"return redis.call('ZCARD', KEYS[1])", 1, key))
    deadline = Deadline(step_timeout_s)
    with connection_to(place, deadline) as (connection, wire):
        reader = Reader(wire, deadline)
        connection.send_packed_command(pack(commands), check_health=False)
        for _ in commands:
            try:
                reader.reply()
            except exceptions.OutOfMemoryError:
                pass  # full, and that is a value


def _facts(place: Place, step_timeout_s: float) -> dict[str, ServerFacts]:
    try:
        return {place.label: ask_facts(place, Deadline(step_timeout_s))}
    except exceptions.NoPermissionError:
        return {}


def _check_capacity(context: TierContext, options: RedisOptions, keyspace: Keyspace) -> None:
    block = HEADER_BYTES + context.layout.payload_bytes + ENTRY_BYTES
    if keyspace.limit_bytes is not None and keyspace.limit_bytes < _MIN_BLOCKS * block:
        needed = _MIN_BLOCKS * block * keyspace.partitions
        shared = f", divided over {keyspace.partitions} parts," if keyspace.partitions > 1 else ""
        raise ConfigError(
            f"tiers.{context.name}.capacity",
            f"{options.capacity} bytes{shared} hold fewer than {_MIN_BLOCKS} blocks of {block} bytes",
            f"give at least {needed}",
        )


def _is_limited(facts: dict[str, ServerFacts]) -> bool:
    return bool(facts) and all(one.maxmemory for one in facts.values())


def size_findings(name: str, options: RedisOptions, facts: dict[str, ServerFacts]) -> Iterator[Finding]:
    """Yield what there is to say about how large the tier can become.

    Args:
        name: The tier's name.
        options: What the operator wrote.
        facts: What the servers said of themselves.
    """
    topic = f"tier {name}"
    if not facts:
        if options.capacity is None:
            yield Finding("ok", topic, "how large it can become is not known: the server was not asked")
        return
    limit = sum(one.maxmemory for one in facts.values()) if _is_limited(facts) else 0
    policies = {one.policy for one in facts.values() if one.policy}
    evicts = bool(policies) and all(policy.startswith("allkeys") for policy in policies)
    shown = ", ".join(sorted(policies)) or "unknown"
    if options.capacity is None and not limit:
        hint = "set maxmemory and maxmemory-policy allkeys-lru on the server, or the tier's capacity"
        yield Finding("warn", topic, "nothing bounds it: the server has no maxmemory", hint)
    elif options.capacity is None and not evicts:
        hint = "set maxmemory-policy allkeys-lru on the server, or the tier's capacity below maxmemory"
        text = (
            f"once the server's {format_bytes(limit)} are full it takes no more: maxmemory-policy is {shown}"
        )
        yield Finding("warn", topic, text, hint)
    elif options.capacity is None:
        yield Finding("ok", topic, f"bounded by the server's maxmemory, {format_bytes(limit)}, {shown}")
    elif limit and options.capacity > limit:
        text = (
            f"its capacity, {format_bytes(options.capacity)}, is more than maxmemory, {format_bytes(limit)}"
        )
        yield Finding("warn", topic, text, "raise maxmemory or lower the capacity")
    else:
        yield Finding("ok", topic, f"bounded by its capacity, {format_bytes(options.capacity)}")
