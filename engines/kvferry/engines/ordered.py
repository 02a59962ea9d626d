"""A thread that does what it is given, one thing after the other, in that order.

``concurrent.futures`` has no executor that can be left behind: at the interpreter's end it joins its threads, however
long a device takes to answer. This one is a daemon, and its end has a deadline.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

__all__ = ["OrderedThread"]

logger = logging.getLogger(__name__)


class OrderedThread:
    """Runs calls in the order in which they are submitted. Any thread may submit and close.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], object]) -> None:
        """Queue a call, which may not raise. Never blocks; behind ``close`` nothing runs any more."""
        self._queue.put(call)

    def close(self) -> None:
        """End behind what is queued. Idempotent; does not wait."""
        self._queue.put(None)

    def join(self, end: float) -> bool:
        """Wait for the end until a monotonic time; tell whether it has come."""
        self._thread.join(max(0.0, end - time.monotonic()))
        is_over = not self._thread.is_alive()
        if not is_over:
            logger.error("%s does not stop", self._thread.name)
        return is_over

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            call()
