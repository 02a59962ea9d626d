"""The S3 tier: one object per block in a bucket that many engines share, on any S3-compatible store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure
from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.tier import Tier, TierContext, TierType
from kvferry.plugins.s3.options import THREADS, S3Options

__all__ = ["kvferry_bench_cases", "kvferry_tier_types"]


_MISSING = "boto3 and obstore are not installed"
_HINT = "pip install 'kvferry[s3]'"


def _create(options: S3Options, context: TierContext) -> Tier:
    try:
        from kvferry.plugins.s3.opening import open_s3_tier
    except ModuleNotFoundError as error:
        raise ConfigError(f"tiers.{context.name}.type", _MISSING, _HINT) from error
    return open_s3_tier(options, context)


def _check(options: S3Options, name: str) -> Iterable[Finding]:
    try:
        from kvferry.plugins.s3.check import check
    except ModuleNotFoundError:
        return [Finding("error", f"tier {name}", _MISSING, _HINT)]
    return check(options, name)


def _measure(context: BenchContext) -> Sequence[Figure]:
    try:
        from kvferry.plugins.s3.bench import measure
    except ModuleNotFoundError as error:
        raise BenchSkipped(f"{_MISSING}: {_HINT}") from error
    return measure(context)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    """Offer the tier type ``s3``."""
    return [
        TierType(
            name="s3",
            options=S3Options,
            create=_create,
            summary="a bucket of any S3-compatible store, shared by many engines",
            threads=THREADS,
            check=_check,
        )
    ]


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Offer the measurement ``s3``."""
    return [BenchCase("s3", "the S3 tier, checksums included, against raw obstore", _measure)]
