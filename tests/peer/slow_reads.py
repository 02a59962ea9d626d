"""The shipped connector on an engine that decodes, whose reads from a peer a test can slow down.

Selected by ``kv_connector_module_path``. While the file that the environment variable ``READS`` names exists, pages are
read one at a time, each after as many seconds as it says, and with each one a line is added to a file beside it, whose
name ends in ``.begun``.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kvferry.connector.transport import PageIds, PageReader, RemotePages
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]

_connect = PeerReads.connect
_never = threading.Event()


class _SlowReader:
    """A transport's reader, page by page."""

    def __init__(self, reader: PageReader) -> None:
        self._reader = reader
        self._told = Path(os.environ["READS"])

    @property
    def description(self) -> str:
        return self._reader.description

    def read(self, remote_pages: PageIds, local_pages: PageIds, deadline: float) -> None:
        pause_s = self._pause_s()
        if pause_s is None:
            self._reader.read(remote_pages, local_pages, deadline)
            return
        for index in range(len(remote_pages)):
            with self._told.with_suffix(".begun").open("a") as lines:
                lines.write(f"{index}\n")
            _never.wait(pause_s)
            page = slice(index, index + 1)
            self._reader.read(remote_pages[page], local_pages[page], deadline)

    def close(self) -> None:
        self._reader.close()

    def _pause_s(self) -> float | None:
        try:
            return float(self._told.read_text())
        except FileNotFoundError:
            return None


def _connect_slowly(self: PeerReads, pages: RemotePages, deadline: float) -> PageReader:
    return _SlowReader(_connect(self, pages, deadline))


PeerReads.connect = _connect_slowly  # type: ignore[method-assign]
