"""What travels from the leader to every rank in a step.

Plain values: the engine copies them to each rank by its own means, and a rank may not change what another reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.engines.jobs import StepJobs

__all__ = ["StepPlan"]


@dataclass
class StepPlan:
    """A step's copies, and where the ranks report them."""

    jobs: StepJobs = field(default_factory=StepJobs)
    """Its loads are promised: the engine counts their tokens as computed already. One without copies cannot be kept
    any more."""
    mailbox: str = ""
    """Name of the leader's mailbox; empty when the leader has switched the cache off."""
    sync_loads: tuple[str, ...] = ()
    """Requests whose load must be visible before this step's forward pass."""
    empty_loads: tuple[str, ...] = ()
    """Requests that the engine parks until their load is over although it took nothing of the offer."""
    awaited_loads: tuple[str, ...] = ()
    """Requests with a load, of this step or before, into pages that others read or write from this step on: it must
    be over before this step's forward pass."""
    step: int = 0
