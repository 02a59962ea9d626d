"""Roles: what an engine does with others' pages and its own, as the engine's ``kv_role`` says."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ROLES", "Role"]


class Role(NamedTuple):
    """What an engine does in a handoff."""

    gives: bool
    """It prefills for others: pages are handed over, and what it saves is visible before it answers."""
    takes: bool
    """It takes pages of engines that prefilled for it."""
    saves: bool
    """It saves blocks into the cache."""

    def is_on(self, enabled: bool | None) -> bool:
        """Tell whether there are handoffs: as configured, else where the engine has one role only."""
        return self.gives != self.takes if enabled is None else enabled


ROLES = {
    "kv_producer": Role(gives=True, takes=False, saves=True),
    "kv_consumer": Role(gives=False, takes=True, saves=False),
    "kv_both": Role(gives=True, takes=True, saves=True),
}
