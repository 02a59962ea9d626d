"""The table of leases: whose pages are held for another engine, and until when.

An engine that prefilled a request *hands over* its pages: they stay as they are until the lease ends, and only the
engine's scheduler frees them, after ``take_ended`` named the request. So a ``check`` that said yes proves that the
pages had not been given to anybody else up to that moment. A lease ends when its readers release it, when nobody
renewed it for ``lease_s``, and in any case ``LONGEST_LEASES`` times that after it began: a reader that hangs and renews
for ever must not keep an engine's memory.

One lock, never held for I/O; any thread may call. The clock is an argument.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvferry.connector.errors import LeaseError, UsageError

__all__ = ["LONGEST_LEASES", "Claimed", "Handed", "HandoffTable", "Refusal"]

LONGEST_LEASES = 16
"""How many times ``lease_s`` a lease lives at most, however often it is renewed."""
_SEQ_BITS = 62
_MOST_READERS = 64
"""Of one request."""
_EXPIRED_KEPT = 1024
"""Requests that are remembered as expired, so that whoever comes late is told why."""

Refusal = Literal["gone", "content", "expired", "refused"]
"""Why a claim is refused; a reason of ``HandoffFailed``."""


class Handed(NamedTuple):
    """What is handed over of a request."""

    request_id: str
    pages: tuple[int, ...]
    """Page ids, the same on every rank."""
    num_tokens: int
    """Tokens whose KV the pages hold, from the first one on."""
    content: Callable[[int], bytes]
    """Digest of the first n tokens and of all else that determines their KV. Called with the table locked, from any
    thread: it has to be quick and must not call the table."""


class Claimed(NamedTuple):
    """A claim that was accepted."""

    seq: int
    """Names the lease, also towards the same request's other ones."""
    num_tokens: int
    """Tokens whose KV the pages hold; at least as many as were asked for."""
    pages: tuple[int, ...]
    """All pages."""


@dataclass
class _Lease:
    handed: Handed
    seq: int
    ends_at: float
    """Unless it is renewed."""
    longest: float
    """Until when it can be renewed."""
    readers: dict[str, float] = field(default_factory=dict)
    """Who claimed or renewed it, and until when that counts."""
    digests: dict[int, bytes] = field(default_factory=dict)


class HandoffTable:
    """The leases of one engine.

    Args:
        lease_s: Seconds that a lease lives without being renewed.
        first_seq: The first lease's number; random where it is not given, so that no number of an earlier life of
            the process means anything.
    """

    def __init__(self, lease_s: float, first_seq: int | None = None) -> None:
        self.lease_s = lease_s
        self._lock = threading.Lock()
        self._next_seq = secrets.randbits(_SEQ_BITS) if first_seq is None else first_seq
        self._leases: dict[str, _Lease] = {}
        self._by_seq: dict[int, _Lease] = {}
        self._released: dict[str, int] = {}
        """Requests that nobody reads any more, with the number of their pages, until ``take_ended`` names them."""
        self._held_pages = 0
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._expired_count = 0

    def hand_over(self, handed: Handed, now: float) -> int:
        """Begin a lease.

        Returns:
            Its number, which no other lease of this table has.

        Raises:
            UsageError: The request's pages are held already.
        """
        with self._lock:
            if handed.request_id in self._leases or handed.request_id in self._released:
                raise UsageError(f"the pages of request {handed.request_id!r} are handed over already")
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            lease = _Lease(handed, seq, now + self.lease_s, now + LONGEST_LEASES * self.lease_s)
            self._leases[handed.request_id] = self._by_seq[seq] = lease
            self._held_pages += len(handed.pages)
            self._expired.pop(handed.request_id, None)
            return seq

    def claim(
        self, request_id: str, reader: str, num_tokens: int, content: bytes, now: float
    ) -> Claimed | Refusal:
        """Let a reader read, if the pages hold what it needs, and renew the lease.

        Args:
            request_id: Whose pages.
            reader: Who asks.
            num_tokens: How many tokens' KV it needs, from the first one on.
            content: Digest of these tokens and all else that determines their KV.
            now: The clock.
        """
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None:
                return "expired" if request_id in self._expired else "gone"
            if now >= lease.ends_at:
                return "expired"
            handed = lease.handed
            if not 0 < num_tokens <= handed.num_tokens or handed.content(num_tokens) != content:
                return "content"
            if not self._renew(lease, reader, now):
                return "refused"
            return Claimed(lease.seq, handed.num_tokens, handed.pages)

    def renew(self, request_id: str, reader: str, now: float) -> bool:
        """Renew a lease for a reader; False when there is none any more."""
        with self._lock:
            lease = self._leases.get(request_id)
            return lease is not None and now < lease.ends_at and self._renew(lease, reader, now)

    def check(self, request_id: str, seq: int, now: float) -> bool:
        """Tell whether a lease still lives: if so, its pages were never given to anybody else since it began."""
        with self._lock:
            lease = self._leases.get(request_id)
            return lease is not None and lease.seq == seq and now < lease.ends_at

    def release(self, request_id: str, reader: str, now: float) -> None:
        """Say that a reader needs the pages no more, also one that never asked for them.

        The lease ends unless another reader claimed or renewed it within the last ``lease_s``. Unknown requests are
        ignored.
        """
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None:
                return
            lease.readers.pop(reader, None)
            if not any(now < until for until in lease.readers.values()):
                self._forget(lease)
                self._released[request_id] = len(lease.handed.pages)

    def set_digests(self, seq: int, rank: int, digests: bytes) -> None:
        """Keep what a rank digested of a lease's pages; ignored where the lease is over.

        Args:
            seq: The lease.
            rank: The rank.
            digests: Equally many bytes for each page, in order; none where the rank digests nothing.
        """
        with self._lock:
            lease = self._by_seq.get(seq)
            if lease is not None:
                lease.digests[rank] = digests

    def digests(self, seq: int, rank: int, first: int, count: int) -> bytes | None:
        """Return what a rank digested of ``count`` pages from the lease's page ``first`` on.

        None while it is not there yet; empty where the rank digests nothing.

        Raises:
            LeaseError: The lease is over, or has no such pages.
        """
        with self._lock:
            lease = self._by_seq.get(seq)
            if lease is None:
                raise LeaseError(f"lease {seq} is over")
            num_pages = len(lease.handed.pages)
            if first + count > num_pages:
                raise LeaseError(f"lease {seq} has {num_pages} pages, not {first + count}")
            digests = lease.digests.get(rank)
            if digests is None:
                return None
            width = len(digests) // num_pages
            return digests[first * width : (first + count) * width]

    def take_ended(self, now: float) -> list[str]:
        """Return the requests whose lease has ended since the last call: these may be freed, and no others."""
        with self._lock:
            ended = list(self._released)
            self._held_pages -= sum(self._released.values())
            self._released.clear()
            for lease in [lease for lease in self._leases.values() if now >= lease.ends_at]:
                self._forget(lease)
                self._held_pages -= len(lease.handed.pages)
                self._remember_expired(lease.handed.request_id)
                ended.append(lease.handed.request_id)
            return ended

    @property
    def expired_count(self) -> int:
        """Leases so far that ended because nobody renewed or released them."""
        return self._expired_count

    @property
    def held_pages(self) -> int:
        """Pages that the engine may not free, those of ended leases that ``take_ended`` has not named included."""
        return self._held_pages

    def __len__(self) -> int:
        """Return the number of requests whose pages are held, counted likewise."""
        with self._lock:
            return len(self._leases) + len(self._released)

    def _renew(self, lease: _Lease, reader: str, now: float) -> bool:
        if reader not in lease.readers and len(lease.readers) >= _MOST_READERS:
            lease.readers = {name: until for name, until in lease.readers.items() if now < until}
            if len(lease.readers) >= _MOST_READERS:
                return False
        until = min(now + self.lease_s, lease.longest)
        lease.readers[reader] = until
        lease.ends_at = max(lease.ends_at, until)
        return True

    def _forget(self, lease: _Lease) -> None:
        del self._leases[lease.handed.request_id], self._by_seq[lease.seq]

    def _remember_expired(self, request_id: str) -> None:
        self._expired_count += 1
        self._expired[request_id] = None
        if len(self._expired) > _EXPIRED_KEPT:
            self._expired.popitem(last=False)
