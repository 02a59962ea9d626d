"""What the vLLM adapter adds to kvferry through the public hooks.

Imported on every run of the ``kvferry`` command line, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry.connector.hooks import hookimpl

if TYPE_CHECKING:
    import click

    from kvferry.connector.finding import Finding

__all__ = ["kvferry_commands", "kvferry_doctor_findings"]


@hookimpl
def kvferry_commands() -> Sequence[click.Command]:
    """Add ``kvferry demo``."""
    from kvferry.engines.vllm.demo.command import command

    return [command]


@hookimpl
def kvferry_doctor_findings() -> Sequence[Finding]:
    """Tell about the installed vLLM."""
    from kvferry.engines.vllm.diagnosis import findings

    return findings()
