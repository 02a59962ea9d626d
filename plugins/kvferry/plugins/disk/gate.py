"""The gate: counts the calls under way, and closes once they have ended.

Thread-safe; its own lock is held for a few instructions, and released while ``close`` waits.
"""

from __future__ import annotations

import threading

from kvferry.connector.errors import ClosedError, TierTimeout

__all__ = ["Gate"]


class Gate:
    """Wrap every call in ``with gate:``; after ``close`` it raises ClosedError.

    Args:
        tier: The tier's name, for messages.
    """

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._idle = threading.Condition(threading.Lock())
        self._calls = 0
        self._is_closed = False
        self._is_passed = False

    def __enter__(self) -> None:
        with self._idle:
            if self._is_closed:
                raise ClosedError(f"tier {self._tier!r} is closed")
            self._calls += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._idle:
            self._calls -= 1
            if self._is_closed:
                self._idle.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in any more and wait for those inside; True for the one caller that saw them out.

        Raises:
            TierTimeout: Some are still inside; the gate stays closed, and close may be called again.
        """
        with self._idle:
            self._is_closed = True
            if not self._idle.wait_for(lambda: self._calls == 0, timeout_s):
                raise TierTimeout(self._tier, f"calls are still under way after {timeout_s:g} s")
            is_first, self._is_passed = not self._is_passed, True
            return is_first
