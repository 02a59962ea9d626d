"""Request records: what kvferry did for each request, kept in small files for ``kvferry explain``.

A record tells how many tokens were found where, which block was the first one missing and why, what was
moved and how long it took. It never holds tokens or text of the prompt.

Who owns what: the engine's scheduler thread calls ``record``, which only appends to a bounded queue. One
thread, ``kvferry-explain``, owns the files. When it falls behind, records are dropped and counted; the
engine never waits. Each engine has two files, ``ENGINE.jsonl`` and the one before it, together at
most ``max_bytes`` long; only the newest ``MAX_ENGINES`` engines' files are kept.
"""

from __future__ import annotations

import collections
import heapq
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from kvferry.connector.config import ExplainConfig
from kvferry.connector.rotation import RotatedFile, file_name, make_private, prune, read_lines

__all__ = [
    "ExplainLog",
    "NoLog",
    "Reading",
    "RecordLog",
    "RequestRecord",
    "explain_directory",
    "open_log",
    "read_records",
]

MAX_ENGINES = 16
_QUEUED_RECORDS = 4096
_BATCH_RECORDS = 64
"""Records encoded before the interpreter lock is let go of for writing them."""
_PAUSE_S = 0.25
"""Pause between two writes, so that a burst of records is one write."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What kvferry did for one request."""

    request_id: str
    engine: str = ""
    model: str = ""
    arrived: float = 0.0
    """Unix time."""
    block_tokens: int = 0
    prompt_tokens: int = 0
    local_tokens: int = 0
    """Found in the engine's own prefix cache."""
    matched_tokens: dict[str, int] = {}
    """Found by the lookup beyond the local ones, by tier."""
    offered_tokens: int = 0
    """Told to the engine as loadable."""
    loaded_tokens: int = 0
    """Copied into the engine's pages."""
    missing_block: int | None = None
    """Index of the first block that was not found; None when nothing was missing."""
    missing_reason: str = ""
    """A ``service.MissReason`` value."""
    passed: str = ""
    """Why the request was left alone (``prompt embeddings``); empty when it was served."""
    saved_blocks: int = 0
    bytes_loaded: int = 0
    bytes_saved: int = 0
    wait_ms: float = 0.0
    """From the first offer that was put off until the awaited blocks were in the arena, or given up."""
    load_ms: float = 0.0
    """From the offer until the blocks were in the engine's pages."""
    expected_ms: float | None = None
    """How long all that the tiers hold was expected to take to arrive, when it was first decided on; None
    when nothing had to come or it was not known."""
    recompute_ms: float | None = None
    """How long the engine was expected to take to compute the same; None like ``expected_ms``."""
    declined_blocks: dict[str, int] = {}
    """Blocks left in their tier because the engine computes them sooner, by tier."""
    regret_ms: float = 0.0
    """How much sooner the blocks would have been computed than they came; 0 when the wait was worth it."""
    regret_tier: str = ""
    """The tier that was waited for then, ``several`` if it was not one alone."""
    failed: bool = False
    """A load failed and the engine recomputed."""
    peer_ms: float = 0.0
    """From the offer of another engine's pages until they were read and checked, or given up; 0 if none were."""
    peer_failed: str = ""
    """Why the pages of another engine could not be had: one of ``HandoffFailed.REASONS``; empty when they could, or
    nobody had asked for it."""

    @property
    def outcome(self) -> str:
        """One word: ``passed``, ``failed``, ``hit``, ``partial`` or ``miss``."""
        if self.passed:
            return "passed"
        if self.failed:
            return "failed"
        if self.loaded_tokens == 0:
            return "miss"
        return "hit" if self.missing_block is None else "partial"


class RecordLog(Protocol):
    """Where the scheduler side leaves its records."""

    @property
    def dropped(self) -> int:
        """Records lost because the writer was behind or could not write."""

    def record(self, record: RequestRecord) -> None:
        """Keep a record. Never blocks, never raises."""

    def close(self, deadline_s: float = 2.0) -> None:
        """Write what is queued for at most ``deadline_s`` seconds and stop. Idempotent."""


class NoLog:
    """Keeps nothing: records are switched off or cannot be written."""

    dropped = 0

    def record(self, record: RequestRecord) -> None:
        """Do nothing."""

    def close(self, deadline_s: float = 2.0) -> None:
        """Do nothing."""


class ExplainLog:
    """Writes records of one engine to its files from a thread of its own.

    Args:
        directory: Created with mode 0700 if it is not there.
        engine: The engine's id; names the files.
        max_bytes: Bound on the engine's files together.
        logger: Told once when writing fails.

    Raises:
        OSError: The directory or file cannot be made or belongs to somebody else.
    """

    def __init__(
        self, directory: Path, engine: str, max_bytes: int, logger: logging.Logger | None = None
    ) -> None:
        make_private(directory)
        self._files = RotatedFile(directory / file_name(engine), max_bytes // 2)
        prune(directory, MAX_ENGINES)
        self._logger = logger or logging.getLogger(__name__)
        self._queue: collections.deque[RequestRecord] = collections.deque()
        self._dropped = 0
        self._unwritten = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="kvferry-explain", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records lost because the writer was behind or could not write."""
        return self._dropped + self._unwritten

    def record(self, record: RequestRecord) -> None:
        """Queue a record for writing; drop and count it when the queue is full or closed."""
        if len(self._queue) >= _QUEUED_RECORDS or self._stopping.is_set():
            self._dropped += 1
        else:
            self._queue.append(record)

    def close(self, deadline_s: float = 2.0) -> None:
        """Write what is queued for at most ``deadline_s`` seconds and stop. Idempotent."""
        self._stopping.set()
        self._thread.join(deadline_s)

    def _write_all(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            self._write_queued()
        self._write_queued()
        self._files.close()

    def _write_queued(self) -> None:
        while batch := self._take_batch():
            try:
                self._files.append([msgspec.json.encode(record) + b"\n" for record in batch])
            except (OSError, UnicodeEncodeError) as error:
                if not self._unwritten:
                    self._logger.warning("request records cannot be written: %s", error)
                self._unwritten += len(batch)

    def _take_batch(self) -> list[RequestRecord]:
        return [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_RECORDS))]


class Reading(NamedTuple):
    """What :func:`read_records` found."""

    records: list[RequestRecord]
    """Oldest first."""
    unreadable: int
    """Lines that are no records: torn by a crash, or not written by kvferry."""


def explain_directory(config: ExplainConfig, environ: Mapping[str, str]) -> Path:
    """Return where the records lie, following the XDG base directories by default."""
    if config.directory:
        return Path(config.directory).expanduser()
    state = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".local/state")
    return Path(state) / "kvferry" / "explain"


def open_log(
    config: ExplainConfig, engine: str, environ: Mapping[str, str], logger: logging.Logger | None = None
) -> RecordLog:
    """Return the log an engine writes to; one that keeps nothing where it is off or impossible.

    Records are an aid: a directory that cannot be written is one warning, never a reason not to start.
    """
    if not config.enabled:
        return NoLog()
    directory = explain_directory(config, environ)
    try:
        return ExplainLog(directory, engine, config.max_bytes, logger)
    except OSError as error:
        (logger or logging.getLogger(__name__)).warning(
            "no request records for `kvferry explain`: %s cannot be used: %s", directory, error
        )
        return NoLog()


def read_records(directory: Path, request_id: str = "", last: int = 1000) -> Reading:
    """Read the newest records of all engines. Nothing in the files is trusted.

    Args:
        directory: Where the logs lie; may be absent.
        request_id: Only requests whose id starts like this; all when empty.
        last: At most this many, the newest.

    Raises:
        OSError: A file cannot be read.
    """
    decoder = msgspec.json.Decoder(RequestRecord)
    unreadable = 0

    def decoded() -> Iterator[RequestRecord]:
        nonlocal unreadable
        for line in read_lines(directory):
            try:
                record = decoder.decode(line or b"")
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                unreadable += 1
                continue
            if record.request_id.startswith(request_id):
                yield record

    newest = heapq.nlargest(last, decoded(), key=lambda record: record.arrived)
    return Reading(newest[::-1], unreadable)
