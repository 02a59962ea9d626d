"""What all adapters have in common and add to kvferry through the public hooks.

Imported on every run of the ``kvferry`` command line, so it imports no engine and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry.connector.hooks import hookimpl

if TYPE_CHECKING:
    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.finding import Finding

__all__ = ["kvferry_bench_cases", "kvferry_doctor_findings"]


@hookimpl
def kvferry_doctor_findings() -> Sequence[Finding]:
    """Tell whether there is an engine, and what its GPU has."""
    from kvferry.engines.diagnosis import findings

    return findings()


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Add the measurements of the engines' side."""
    from kvferry.engines.bench import SCHEDULER
    from kvferry.engines.handoff.bench import HANDOFF_CHECKS

    return [SCHEDULER, HANDOFF_CHECKS]
