"""Running cases: which there are, and what becomes of one that cannot run or fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvferry.connector.bench.admission import ADMISSION
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure
from kvferry.connector.bench.disk import DISK
from kvferry.connector.bench.hashing import HASHING
from kvferry.connector.bench.host import HOST
from kvferry.connector.bench.lookup import LOOKUP
from kvferry.connector.bench.server_lookup import SERVER_LOOKUP
from kvferry.connector.bench.server_map import SERVER_MAP
from kvferry.connector.bench.server_stream import SERVER_STREAM
from kvferry.connector.errors import KVFerryError
from kvferry.connector.registry import PluginRegistry

__all__ = ["CaseResult", "all_cases", "processor", "run_case"]


class CaseResult(msgspec.Struct, frozen=True):
    """What one case yielded."""

    name: str
    figures: Sequence[Figure]
    skipped: str = ""
    """Why there are no figures."""


def all_cases(registry: PluginRegistry) -> list[BenchCase]:
    """Return the core's cases and those of plugins, in the order they are run."""
    servers = [SERVER_MAP, SERVER_STREAM, SERVER_LOOKUP]
    return [HOST, DISK, LOOKUP, HASHING, ADMISSION, *servers, *registry.bench_cases()]


def run_case(case: BenchCase, quick: bool, scratch: str, progress: Callable[[float], None]) -> CaseResult:
    """Run a case in a directory of its own; what it cannot do is a result, not an error."""
    directory = Path(scratch) / case.name
    directory.mkdir(mode=0o700)
    try:
        return CaseResult(case.name, case.run(BenchContext(quick, str(directory), progress)))
    except (BenchSkipped, KVFerryError, OSError, MemoryError) as error:
        return CaseResult(case.name, (), str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001  # boundary: a plugin's case
        return CaseResult(case.name, (), f"failed: {type(error).__name__}: {error}")


def processor() -> str:
    """Return the processor's name, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"
