"""How the stand-in ends a test."""

from __future__ import annotations

__all__ = ["ContractBroken", "EngineDied"]


class ContractBroken(AssertionError):
    """The connector did what the engine's contract forbids; the message is the rule."""


class EngineDied(RuntimeError):
    """The connector raised outside every ``try`` of the event loop; the cause is what it raised."""
