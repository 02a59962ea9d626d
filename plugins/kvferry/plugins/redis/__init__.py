"""The Redis tier: blocks as values in Redis or Valkey, one server, a cluster, or behind sentinels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure
from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType
from kvferry.plugins.redis.options import RedisOptions

__all__ = ["kvferry_bench_cases", "kvferry_tier_types"]

_MISSING = "redis-py is not installed"
_HINT = "pip install 'kvferry[redis]'"


def _create(options: RedisOptions, context: TierContext) -> Tier:
    try:
        from kvferry.plugins.redis.opening import open_redis_tier
    except ModuleNotFoundError as error:
        raise ConfigError(f"tiers.{context.name}.type", _MISSING, _HINT) from error
    return open_redis_tier(options, context)


def _check(options: RedisOptions, name: str) -> Iterable[Finding]:
    try:
        from kvferry.plugins.redis.check import check_redis_tier
    except ModuleNotFoundError:
        return [Finding("error", f"tier {name}", _MISSING, _HINT)]
    return check_redis_tier(options, name)


def _measure(context: BenchContext) -> Sequence[Figure]:
    try:
        from kvferry.plugins.redis.bench import measure
    except ModuleNotFoundError as error:
        raise BenchSkipped(f"{_MISSING}: {_HINT}") from error
    return measure(context)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    """Offer the tier type ``redis``."""
    return [
        TierType(
            name="redis",
            options=RedisOptions,
            create=_create,
            summary="Redis or Valkey, also a cluster or behind sentinels: shared by many engines",
            check=_check,
        )
    ]


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Offer the measurement ``redis``."""
    return [BenchCase("redis", "the Redis tier, checksums included, against plain redis-py", _measure)]
