"""Exporting: a rank makes its pages readable for other engines, and digests those that are handed over.

Who owns what
  * The engine's worker thread makes and closes ``PageExports``, hands it jobs and collects digests; it never waits.
  * One thread, ``kvferry-digests-<rank>``, digests.
  * What transports need beside (listeners, agents) belongs to them and ends with ``close``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Sequence

from kvferry.connector.errors import HandoffFailed
from kvferry.connector.transport import (
    MAX_OFFER_BYTES,
    PageExporter,
    PageMemory,
    RemotePages,
    TransportContext,
    TransportType,
)
from kvferry.engines.handoff.digest import PageDigester
from kvferry.engines.jobs import ExportJob

__all__ = ["PageExports", "export_pages"]

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 5.0


class PageExports:
    """One rank's readable pages.

    Args:
        memory: The pages.
        exporters: By the name of their transport.
        is_digested: Whether what is handed over gets digests; only for host memory.
    """

    def __init__(self, memory: PageMemory, exporters: dict[str, PageExporter], is_digested: bool) -> None:
        self._exporters = exporters
        self._rank = memory.shard.rank
        self.pages = RemotePages(
            shard=memory.shard,
            layout=memory.layout,
            nbytes=memory.nbytes,
            device=memory.device,
            offers={name: exporter.offer for name, exporter in exporters.items()},
        )
        """What readers need to know."""
        self._digester = PageDigester(memory) if is_digested else None
        self._jobs: queue.SimpleQueue[ExportJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._digests: dict[int, dict[int, bytes]] = {}
        self._thread = threading.Thread(target=self._run, name=f"kvferry-digests-{self._rank}", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[ExportJob]) -> None:
        """Have pages digested. Their lease keeps them as they are until the digests are collected, or longer."""
        for job in jobs:
            self._jobs.put(job)

    def take_digests(self) -> dict[int, dict[int, bytes]]:
        """Return and forget what was digested: lease -> this rank -> digests."""
        with self._lock:
            digests, self._digests = self._digests, {}
        return digests

    def close(self) -> None:
        """Let nobody read any more. Idempotent."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_DEADLINE_S)
        for exporter in self._exporters.values():
            exporter.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # Without a digester the answer is "none", so that no reader waits for more.
            digests = self._digester.digest(job.pages) if self._digester is not None else b""
            with self._lock:
                self._digests[job.seq] = {self._rank: digests}


def export_pages(
    memory: PageMemory, transports: Sequence[TransportType], context: TransportContext, is_digested: bool
) -> PageExports | None:
    """Make a rank's pages readable through every transport that can.

    Returns:
        None when none can: then nothing is handed over, and it is logged why.
    """
    exporters: dict[str, PageExporter] = {}
    for transport in transports:
        try:
            why_not = transport.unusable(memory)
            if not why_not:
                exporter = transport.export(memory, context)
                if len(exporter.offer) > MAX_OFFER_BYTES:
                    exporter.close()
                    raise HandoffFailed("transport", f"an offer of {len(exporter.offer)} bytes")
                exporters[transport.name] = exporter
                continue
        except Exception as error:  # noqa: BLE001  # boundary: a transport may raise anything
            why_not = str(error) or repr(error)
        logger.warning("rank %d does not offer transport %s: %s", memory.shard.rank, transport.name, why_not)
    if not exporters:
        logger.error("rank %d can hand no pages over: no transport is usable", memory.shard.rank)
        return None
    logger.info("rank %d offers its pages through %s", memory.shard.rank, ", ".join(exporters))
    return PageExports(memory, exporters, is_digested and memory.device == "cpu")
