"""Reading: a rank takes pages out of another engine's memory into its own.

A read is good only if the other engine confirmed, before, that it holds the KV of exactly these tokens, and after, that
it had not given the pages to anybody else in between; and if the digests of both sides agree, where there are any.
Whatever goes wrong is a failed load: the request is recomputed.

Who owns what
  * The stager's loading thread submits reads; it never waits. Each read is answered exactly once, through its
    ``on_done``, on a thread of this module.
  * Each peer has a *link*, with a thread ``kvferry-peer-<host>:<port>`` that owns the connection and the transport's
    readers, so that a peer that is slow delays nobody else. A link ends when nothing was read for ``_IDLE_S``.
  * A second thread of the link, ``kvferry-verify``, digests what was read while more is being read.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kvferry.connector.config import PeerConfig
from kvferry.connector.errors import HandoffFailed, LayoutError
from kvferry.connector.keys import pages_fingerprint
from kvferry.connector.transport import (
    Heads,
    PageIds,
    PageMemory,
    PageReader,
    RemotePages,
    TransportContext,
    TransportType,
)
from kvferry.engines.handoff.caller import PeerCaller
from kvferry.engines.handoff.digest import DIGEST_BYTES, PageDigester, part
from kvferry.engines.handoff.table import Claimed
from kvferry.engines.jobs import PeerRead

__all__ = ["OnDone", "PeerReads", "shared_heads"]

logger = logging.getLogger(__name__)

OnDone = Callable[[HandoffFailed | None, int, float], None]
"""Called with why a read failed, or None, the bytes it moved and the seconds it took."""

_MOST_LINKS = 64
_IDLE_S = 120.0
_CLOSE_DEADLINE_S = 5.0
_CHUNK_BYTES = 4 << 20
"""What is digested while the next as many are read; also how often a read looks at its deadline."""
_DIGESTS_PAUSE_S = 0.002
_LASTING = ("gone", "content", "expired", "checksum")
"""What says nothing about the connection: the next read may use it."""


class _Submitted(NamedTuple):
    read: PeerRead
    deadline: float
    on_done: OnDone


class PeerReads:
    """Everything that one rank reads from peers.

    Args:
        memory: The rank's pages.
        transports: The usable ones, best first.
        context: What transports are given.
        config: The handoff's options.
    """

    def __init__(
        self,
        memory: PageMemory,
        transports: Mapping[str, TransportType],
        context: TransportContext,
        config: PeerConfig,
    ) -> None:
        self._memory = memory
        self._transports = dict(transports)
        self._context = context
        self._config = config
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int], _Link] = {}
        self._is_closed = False
        self._digester = PageDigester(memory) if config.verify and memory.device == "cpu" else None

    def submit(self, read: PeerRead, on_done: OnDone) -> None:
        """Read pages. The deadline counts from now, whatever else is read from this peer."""
        submitted = _Submitted(read, time.monotonic() + self._config.deadline_s, on_done)
        where = (read.source.host, read.source.port)
        with self._lock:
            link = self._links.get(where)
            if link is None and not self._is_closed and len(self._links) < _MOST_LINKS:
                link = self._links[where] = _Link(self, where)
            if link is not None:
                link.queue.put(submitted)
                return
        why = "this engine stops" if self._is_closed else f"pages are read from {_MOST_LINKS} peers already"
        on_done(HandoffFailed("aborted", why), 0, 0.0)

    def close(self) -> None:
        """Fail what has not begun and end all links. Idempotent."""
        with self._lock:
            self._is_closed = True
            links = list(self._links.values())
        for link in links:
            link.stop()
        deadline = time.monotonic() + _CLOSE_DEADLINE_S
        for link in links:
            link.join(deadline)

    def retire(self, where: tuple[str, int]) -> bool:
        """A link was idle. Return whether it may end: nothing has been submitted to it meanwhile."""
        with self._lock:
            if not self._links[where].queue.empty() and not self._is_closed:
                return False
            del self._links[where]
            return True

    @property
    def digester(self) -> PageDigester | None:
        """Digests this rank's pages; None where nothing is verified."""
        return self._digester

    def call(self, where: tuple[str, int], fingerprint: bytes, deadline: float) -> PeerCaller:
        """Connect to the side channel of a peer that serves the same model from pages of the same order.

        Raises:
            HandoffFailed: ``unreachable``, ``refused``, ``incompatible`` or ``timeout``.
        """
        of_pages = pages_fingerprint(fingerprint, self._memory.layout.order)
        return PeerCaller.connect(*where, self._context.token, of_pages, self._context.name, deadline)

    def connect(self, pages: RemotePages, deadline: float) -> PageReader:
        """Connect to a rank's memory, through the best transport that both sides have.

        Raises:
            HandoffFailed: Through none.
        """
        try:
            pages.check(self._memory)
        except LayoutError as error:
            raise HandoffFailed("incompatible", str(error)) from error
        failures = []
        names = [name for name in self._transports if name in pages.offers]
        for index, name in enumerate(names, start=1):
            # One that gets nowhere leaves time for the next.
            now = time.monotonic()
            until = deadline if index == len(names) else now + (deadline - now) / 2
            transport = self._transports[name]
            try:
                reader = transport.connect(pages, pages.offers[name], self._memory, self._context, until)
            except HandoffFailed as failure:
                failures.append(failure)
                logger.warning(
                    "rank %d of the peer cannot be read through %s: %s", pages.shard.rank, name, failure
                )
                continue
            logger.info(
                "pages of the peer's rank %d are read through %s", pages.shard.rank, reader.description
            )
            return reader
        if failures:
            raise failures[0]
        raise HandoffFailed(
            "transport",
            f"the peer offers {', '.join(sorted(pages.offers)) or 'nothing'}, "
            f"this engine has {', '.join(self._transports) or 'nothing'}",
        )

    @property
    def memory(self) -> PageMemory:
        """The rank's pages."""
        return self._memory


class _Rank(NamedTuple):
    """A rank of the peer that holds heads of ours."""

    pages: RemotePages
    heads: Heads
    """Those of ours that are read from it."""
    reader: PageReader


class _Link:
    """The way to one peer. Everything but ``queue`` belongs to its thread."""

    def __init__(self, reads: PeerReads, where: tuple[str, int]) -> None:
        self._reads = reads
        self._where = where
        self.queue: queue.SimpleQueue[_Submitted | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._caller: PeerCaller | None = None
        self._ranks: list[_Rank] = []
        self._verifier = ThreadPoolExecutor(1, "kvferry-verify")
        self._thread = threading.Thread(
            target=self._run, name=f"kvferry-peer-{where[0]}:{where[1]}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end after the read that is under way."""
        self._stopping.set()
        self.queue.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.error("%s did not stop in time", self._thread.name)

    def _run(self) -> None:
        while True:
            try:
                submitted = self.queue.get(timeout=_IDLE_S)
            except queue.Empty:
                submitted = None
            if submitted is None:
                if self._reads.retire(self._where):
                    break
                continue
            self._serve(submitted)
        self._disconnect()
        self._verifier.shutdown()

    def _serve(self, submitted: _Submitted) -> None:
        started = time.monotonic()
        failure: HandoffFailed | None = None
        moved = 0
        try:
            if self._stopping.is_set():
                raise HandoffFailed("aborted", "this engine stops")
            moved = self._read(submitted.read, submitted.deadline)
        except HandoffFailed as error:
            failure = error
        except Exception as error:  # boundary: the read must be answered whatever a transport does
            logger.exception("a read from %s:%d failed", *self._where)
            failure = HandoffFailed("transport", repr(error))
        if failure is not None:
            logger.warning("request %s: %s", submitted.read.reader, failure)
            if failure.reason not in _LASTING:
                self._disconnect()
        submitted.on_done(failure, moved, time.monotonic() - started)

    def _read(self, read: PeerRead, deadline: float) -> int:
        """Return how many bytes were read and found good."""
        source = read.source
        caller, claimed = self._claim(read, deadline)
        num_pages = -(-read.num_tokens // self._reads.memory.layout.page_tokens)
        last = read.first_page + len(read.pages)
        if claimed.num_tokens < read.num_tokens or last > min(num_pages, len(claimed.pages)):
            raise HandoffFailed("gone", f"it holds {claimed.num_tokens} of {read.num_tokens} tokens")
        theirs = np.asarray(claimed.pages[read.first_page : last], np.int32)
        ours = np.asarray(read.pages, np.int32)
        moved, digests = self._transfer(theirs, ours, deadline)
        if digests is not None:
            self._compare(caller, claimed.seq, read.first_page, digests, deadline)
        caller.check(source.request_id, claimed.seq, deadline)
        return moved

    def _claim(self, read: PeerRead, deadline: float) -> tuple[PeerCaller, Claimed]:
        """Claim the lease; over a new connection if the one there is turns out to be dead, or of a former life."""
        if self._caller is not None:
            try:
                return self._claim_over(self._caller, read, deadline)
            except HandoffFailed as failure:
                is_stale = self._caller.welcome.engine_id != read.source.engine_id
                if failure.reason != "disconnected" and not is_stale:
                    raise
            self._disconnect()
        return self._claim_over(self._connect(read, deadline), read, deadline)

    def _claim_over(self, caller: PeerCaller, read: PeerRead, deadline: float) -> tuple[PeerCaller, Claimed]:
        source, there = read.source, caller.welcome.engine_id
        if there != source.engine_id:
            raise HandoffFailed("gone", f"engine {there} is there now, not {source.engine_id}")
        claimed = caller.claim(source.request_id, read.reader, read.num_tokens, read.content, deadline)
        return caller, claimed

    def _connect(self, read: PeerRead, deadline: float) -> PeerCaller:
        self._caller = self._reads.call(self._where, read.fingerprint, deadline)
        try:
            self._ranks = self._connect_ranks(self._caller.welcome.ranks, deadline)
        except HandoffFailed:
            self._disconnect()
            raise
        return self._caller

    def _connect_ranks(self, ranks: list[RemotePages], deadline: float) -> list[_Rank]:
        connected: list[_Rank] = []
        try:
            for pages, heads in shared_heads(ranks, self._reads.memory.heads):
                connected.append(_Rank(pages, heads, self._reads.connect(pages, deadline)))
        except BaseException:
            for rank in connected:
                rank.reader.close()
            raise
        return connected

    def _transfer(
        self, theirs: PageIds, ours: PageIds, deadline: float
    ) -> tuple[int, list[Future[bytes]] | None]:
        """Read pages from every rank, and have them digested chunk by chunk."""
        memory = self._reads.memory
        digester = self._reads.digester
        page_bytes = memory.page_bytes(memory.heads)
        step = max(1, _CHUNK_BYTES // page_bytes) if digester is not None else max(1, len(ours))
        digests: list[Future[bytes]] = []
        for start in range(0, len(ours), step):
            chunk = slice(start, start + step)
            for rank in self._ranks:
                rank.reader.read(theirs[chunk], ours[chunk], deadline)
            if digester is not None:
                digests.append(self._verifier.submit(digester.digest, ours[chunk]))
        return page_bytes * len(ours), digests if digester is not None else None

    def _compare(
        self,
        caller: PeerCaller,
        seq: int,
        first_page: int,
        digests: list[Future[bytes]],
        deadline: float,
    ) -> None:
        own = b"".join(chunk.result(max(0.0, deadline - time.monotonic())) for chunk in digests)
        heads = self._reads.memory.heads
        for rank in self._ranks:
            owned = Heads(rank.pages.shard.first_head, rank.pages.shard.num_heads)
            count = len(own) // (heads.count * DIGEST_BYTES)
            told = self._told(caller, seq, rank.pages.shard.rank, first_page, count, deadline)
            if told and part(told, owned, rank.heads) != part(own, heads, rank.heads):
                raise HandoffFailed("checksum", "what was read is not what the peer holds")

    def _told(
        self, caller: PeerCaller, seq: int, rank: int, first_page: int, count: int, deadline: float
    ) -> bytes:
        """Return the peer's digests; empty if it makes none. They may take it a moment."""
        while (told := caller.digests(seq, rank, first_page, count, deadline)) is None:
            if time.monotonic() >= deadline or self._stopping.wait(_DIGESTS_PAUSE_S):
                raise HandoffFailed("timeout", "the peer's digests did not come in time")
        return told

    def _disconnect(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.reader.close()
        caller, self._caller = self._caller, None
        if caller is not None:
            caller.close()


def shared_heads(ranks: list[RemotePages], wanted: Heads) -> list[tuple[RemotePages, Heads]]:
    """Return which ranks to read which heads from, so that each wanted head is read once.

    Raises:
        HandoffFailed: ``incompatible``: some heads are nobody's.
    """
    found: list[tuple[RemotePages, Heads]] = []
    next_head = wanted.first
    for pages in sorted(ranks, key=lambda pages: (pages.shard.first_head, pages.shard.rank)):
        end = pages.shard.first_head + pages.shard.num_heads
        if pages.shard.first_head <= next_head < min(end, wanted.end):
            found.append((pages, Heads(next_head, min(end, wanted.end) - next_head)))
            next_head = min(end, wanted.end)
    if next_head < wanted.end:
        raise HandoffFailed("incompatible", f"no rank of the peer holds head {next_head}")
    return found
