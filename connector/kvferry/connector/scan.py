"""Scanning: what a tier already holds when kvferry starts.

A tier may hold millions of blocks, so a thread of its own reads the keys and hands them over in batches.
The service takes them in between other work, and waits for a moment at the start, so that after a restart
the first request already finds what the last process stored.

Threading: one thread (``kvferry-<tier>-scan``) fills a bounded queue, the service's thread empties it.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.tier import Tier

__all__ = ["Scan", "ScanBatch", "wait_for"]

_BATCH_KEYS = 4096
_QUEUED_BATCHES = 16


class ScanBatch(NamedTuple):
    """Some keys of a tier; the last batch says so."""

    keys: list[BlockKey]
    is_last: bool


class Scan:
    """Reads a tier's keys in the background.

    Args:
        name: The tier's name.
        tier: Its ``scan`` is called once.
        logger: Where a failed scan is reported; what was read until then counts.
    """

    def __init__(self, name: str, tier: Tier, logger: logging.Logger) -> None:
        self.name = name
        self._tier = tier
        self._logger = logger
        self._batches: queue.Queue[ScanBatch] = queue.Queue(_QUEUED_BATCHES)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kvferry-{name}-scan", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float = 0.0) -> ScanBatch | None:
        """Return the next batch, or None when none came within ``timeout_s``."""
        try:
            return self._batches.get(timeout=timeout_s) if timeout_s > 0 else self._batches.get_nowait()
        except queue.Empty:
            return None

    def stop(self, deadline_s: float) -> None:
        """End the thread; a tier that does not yield in time is left behind."""
        self._is_stopped.set()
        self._thread.join(deadline_s)

    def _run(self) -> None:
        try:
            for batch in _batched(self._tier.scan()):
                self._hand_over(ScanBatch(batch, is_last=False))
        except BaseException as error:  # noqa: BLE001  # boundary: a plugin's generator
            self._logger.warning("tier %r: the scan broke off: %s", self.name, error)
        self._hand_over(ScanBatch([], is_last=True))

    def _hand_over(self, batch: ScanBatch) -> None:
        while not self._is_stopped.is_set():
            try:
                return self._batches.put(batch, timeout=0.2)
            except queue.Full:
                continue


def _batched(keys: Iterable[BlockKey]) -> Iterator[list[BlockKey]]:
    """Group keys, leaving out what is no key."""
    valid = (key for key in keys if isinstance(key, bytes) and len(key) == KEY_BYTES)
    while batch := list(itertools.islice(valid, _BATCH_KEYS)):
        yield batch


def wait_for(scans: Iterable[Scan], deadline_s: float) -> Iterator[tuple[Scan, ScanBatch]]:
    """Yield batches until every scan is through or ``deadline_s`` is over."""
    deadline = time.monotonic() + deadline_s
    for scan in scans:
        while (batch := scan.take(max(0.0, deadline - time.monotonic()))) is not None:
            yield scan, batch
            if batch.is_last:
                break
