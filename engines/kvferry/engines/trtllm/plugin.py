"""What the TensorRT-LLM adapter adds to kvferry through the public hooks.

Imported on every run of the ``kvferry`` command line, so it imports neither TensorRT-LLM nor torch.
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
    """Tell about the installed TensorRT-LLM."""
    from kvferry.engines.trtllm.diagnosis import findings

    return findings()


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Add the measurement of the query."""
    from kvferry.engines.trtllm.bench import QUERY

    return [QUERY]
