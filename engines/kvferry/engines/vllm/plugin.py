"""What the vLLM adapter adds to kvferry through the public hooks.

Imported on every run of the ``kvferry`` command line, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry.connector.hooks import hookimpl

if TYPE_CHECKING:
    import click

    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.finding import Finding

__all__ = ["kvferry_bench_cases", "kvferry_commands", "kvferry_doctor_findings"]


@hookimpl
def kvferry_commands() -> Sequence[click.Command]:
    """Add ``kvferry demo``."""
    from kvferry.engines.vllm.demo.command import command

    return [command]


@hookimpl
def kvferry_doctor_findings() -> Sequence[Finding]:
    """Tell about the installed vLLM and its GPU."""
    from kvferry.engines.vllm.diagnosis import findings

    return findings()


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Add the measurements of the engines' side."""
    from kvferry.engines.bench import SCHEDULER
    from kvferry.engines.handoff.bench import HANDOFF_CHECKS

    return [SCHEDULER, HANDOFF_CHECKS]
