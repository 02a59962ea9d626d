"""Requests at work: many at once, bounded over the whole tier, and all of them over when a call returns.

One event loop in a thread of its own (``kvferry-<tier>-io``) drives every request of a tier; the calls
that brought them wait in their own threads. obstore's connections live in threads of its runtime.

Who owns what: the loop's thread owns the semaphores, the tasks and their count. ``_lock`` guards
``_is_closed``. Stores take a second semaphore, so that however many there are, an eighth of the requests is
left for the rest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from kvferry.connector.errors import ClosedError, TierTimeout
from kvferry.plugins.s3.trouble import Trouble, trouble_of

__all__ = ["Requests"]

R = TypeVar("R")
Request = Callable[[], Coroutine[Any, Any, R]]

_GRACE_S = 5.0
"""How long an overdue call waits for its cancelled requests to be over; they take a millisecond."""
_CLOSE_S = 5.0


class Requests:
    """Carries out requests for the calls of one tier. Thread-safe.

    Args:
        tier: The tier's name.
        max_in_flight: Most requests at once.
    """

    def __init__(self, tier: str, max_in_flight: int) -> None:
        self._tier = tier
        self._slots = asyncio.Semaphore(max_in_flight)
        self._store_slots = asyncio.Semaphore(max(1, max_in_flight - max_in_flight // 8))
        self._lock = threading.Lock()
        self._is_closed = False
        self._under_way = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=f"kvferry-{tier}-io", daemon=True)
        self._thread.start()

    def require_open(self) -> None:
        """Raise ClosedError after ``close``."""
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"tier {self._tier!r} is closed")

    def run(
        self, requests: Sequence[Request[R]], deadline_s: float, *, is_store: bool = False
    ) -> list[R | Trouble]:
        """Carry out ``requests`` at once, as far as the bound allows. Blocks until all of them are over.

        Args:
            requests: Each is called on the loop's thread and awaited.
            deadline_s: Seconds after which what is not over is cancelled.
            is_store: They count as stores.

        Returns:
            For each request what it returned, or why it failed.

        Raises:
            ClosedError: The tier is closed.
            TierTimeout: The loop did not get to cancel them; they may still be under way.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"tier {self._tier!r} is closed")
            future = asyncio.run_coroutine_threadsafe(self._all(requests, deadline_s, is_store), self._loop)
        try:
            return future.result(deadline_s + _GRACE_S)
        except concurrent.futures.CancelledError:
            raise ClosedError(f"tier {self._tier!r} was closed meanwhile") from None
        except TimeoutError:
            raise TierTimeout(self._tier, f"requests could not be ended in {_GRACE_S:g} s") from None

    def under_way(self) -> int:
        """Return how many requests are under way or wait for their turn."""
        return self._under_way

    def close(self) -> None:
        """Cancel what is under way and end the thread. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        ending = self._loop.create_task(_ended(tasks))
        ending.add_done_callback(lambda _: self._loop.stop())

    async def _all(
        self, requests: Sequence[Request[R]], deadline_s: float, is_store: bool
    ) -> list[R | Trouble]:
        tasks = [asyncio.create_task(self._one(request, is_store)) for request in requests]
        self._under_way += len(tasks)
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=deadline_s)
        finally:
            for task in tasks:
                task.cancel()
            await _ended(tasks)
            self._under_way -= len(tasks)
        return [_result(task) for task in tasks]

    async def _one(self, request: Request[R], is_store: bool) -> R:
        if not is_store:
            async with self._slots:
                return await request()
        async with self._store_slots, self._slots:
            return await request()


async def _ended(tasks: Sequence[asyncio.Task[Any]] | set[asyncio.Task[Any]]) -> None:
    """Wait until cancelled tasks are over, whatever they end with."""
    await asyncio.gather(*tasks, return_exceptions=True)


def _result(task: asyncio.Task[R]) -> R | Trouble:
    if task.cancelled():
        return trouble_of(TimeoutError())
    error = task.exception()
    return task.result() if error is None else trouble_of(error)
