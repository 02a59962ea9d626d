"""Finding the cache server again, and again, without anybody waiting for it.

Who owns what
  * One thread, ``kvferry-reconnect``, exists while there is no connection. It connects and introduces the engine,
    with pauses that double and are drawn by chance, so that engines don't come back all at once.
  * The engine's scheduler thread begins the search and takes what was found. It never waits, except once in
    ``wait_for_first``.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from kvferry.connector.errors import KVFerryError
from kvferry.connector.joining import Joined, is_mistake

__all__ = ["LONGEST_PAUSE_S", "SHORTEST_PAUSE_S", "Reconnector", "pause_s"]

SHORTEST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
_CLOSE_S = 5.0


class Reconnector:
    """Looks for a server in the background.

    Args:
        join: Connects once; its argument tells whether the connection is still wanted. See ``joining.join``.
        logger: Where a refusal is reported, once as long as it stays the same.
    """

    def __init__(self, join: Callable[[Callable[[], bool]], Joined], logger: logging.Logger) -> None:
        self._join = join
        self._logger = logger
        self._lock = threading.Lock()
        self._found: Joined | None = None
        self._problem: Exception | None = None
        self._refusal = ""
        self._is_first_over = threading.Event()
        self._is_awaited = True
        """Whether somebody else reports the first problem."""
        self._stop = threading.Event()
        self._attempts = 0
        """Since a connection lasted."""
        self._found_at = -LONGEST_PAUSE_S
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Look for the server until it is found. It must not be looked for already.

        After a connection that did not last, there is a pause first.
        """
        if time.monotonic() - self._found_at > LONGEST_PAUSE_S:
            self._attempts = 0
        self._thread = threading.Thread(target=self._run, name="kvferry-reconnect", daemon=True)
        self._thread.start()

    def wait_for_first(self, seconds: float) -> Exception | None:
        """Wait until the very first attempt is over, at most for ``seconds``; return why it failed, if it did."""
        is_over = self._is_first_over.wait(seconds)
        self._is_awaited = False
        return self._problem if is_over else TimeoutError(f"no answer within {seconds:g} s")

    def take(self) -> Joined | None:
        """Return the connection if there is one; the caller owns it. Never waits."""
        with self._lock:
            found, self._found = self._found, None
        return found

    def close(self) -> None:
        """Look no more and close what nobody has taken. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        found = self.take()
        if found is not None:
            found.close()

    def _run(self) -> None:
        if self._attempts:
            self._stop.wait(random.uniform(0, pause_s(self._attempts)))
        while not self._stop.is_set():
            self._attempts += 1
            try:
                found = self._join(self._stop.is_set)
            except (OSError, KVFerryError) as error:
                self._failed(error)
                self._stop.wait(
                    LONGEST_PAUSE_S if is_mistake(error) else random.uniform(0, pause_s(self._attempts))
                )
            except Exception as error:  # boundary: the thread must not end without having found the server
                self._logger.exception("looking for the cache server failed")
                self._failed(error)
                self._stop.wait(LONGEST_PAUSE_S)
            else:
                self._succeeded(found)
                return

    def _failed(self, error: Exception) -> None:
        self._problem = error
        self._is_first_over.set()
        if is_mistake(error) and not self._is_awaited and str(error) != self._refusal:
            self._refusal = str(error)
            self._logger.error("the cache server cannot be used: %s; kvferry goes on trying", error)

    def _succeeded(self, found: Joined) -> None:
        self._problem, self._refusal = None, ""
        self._found_at = time.monotonic()
        with self._lock:
            self._found = found
        self._is_first_over.set()


def pause_s(attempts: int) -> float:
    """Return the longest pause after so many attempts, at least one."""
    return min(LONGEST_PAUSE_S, SHORTEST_PAUSE_S * 2.0 ** min(attempts - 1, 30))
