"""Keeping leases alive at other engines while requests wait here, and releasing them afterwards.

Used by the scheduler process of an engine that takes pages. ``adopt``, ``drop`` and ``is_gone`` only note things down;
one thread, ``kvferry-lease-keeper``, talks. It visits one peer at a time: those that it is connected to first, and one
that failed only again after a pause, which grows. So a peer that is dead or frozen delays the others by ``_CALL_S`` now
and then, and a lease has two more renewals to go before it would end. Only the lookup of a host's name has no deadline
but the system's: where that is slow, routers should be told addresses (``peer.advertise``).

Who owns what
  * The lock guards what is noted down; it is never held while something is sent.
  * Connections belong to the thread.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry.connector.errors import HandoffFailed
from kvferry.engines.handoff.caller import PeerCaller
from kvferry.engines.handoff.messages import MAX_LEASES
from kvferry.engines.jobs import PeerSource

__all__ = ["LeaseKeeper"]

_logger = logging.getLogger(__name__)

_CALL_S = 1.0
"""For connecting to a peer, and for each answer of it."""
_RENEWALS = 3
"""Renewals in the life of a lease."""
_SHORTEST_PERIOD_S = 0.05
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 5.0
_MOST_CONNECTIONS = 64
_IDLE_S = 60.0
_KEPT_RELEASE_S = 60.0
"""How long a release is tried; the lease ends by itself meanwhile."""
_MOST_RELEASES = 4096
"""Waiting, for one peer."""

_NEVER = float("inf")

_Where = tuple[str, int]
_NOWHERE: _Where = ("", 0)


class _Kept(NamedTuple):
    """A lease of another engine, as it is named there."""

    request_id: str
    reader: str


@dataclass
class _Peer:
    """One peer. The lock's, but for ``caller``, ``used_at`` and ``failures``, which only the thread changes."""

    where: _Where
    kept: dict[str, _Kept] = field(default_factory=dict)
    """By this engine's names for the requests."""
    releases: dict[_Kept, float] = field(default_factory=dict)
    """With until when they are tried."""
    renew_at: float = 0.0
    not_before: float = 0.0
    used_at: float = 0.0
    caller: PeerCaller | None = None
    failures: int = 0

    def due_at(self) -> float:
        """Return when the peer is to be visited next."""
        if self.releases:
            return self.not_before
        if self.kept:
            return max(self.not_before, self.renew_at)
        return self.used_at + _IDLE_S


class LeaseKeeper:
    """Renews and releases the leases of an engine's requests.

    Args:
        token: The credential of all engines; empty for none.
        fingerprint: 32 bytes; what this engine's blocks are keyed under.
        name: What this engine calls itself.
        logger: Where it reports.
    """

    def __init__(self, token: str, fingerprint: bytes, name: str, logger: logging.Logger = _logger) -> None:
        self._token = token
        self._fingerprint = fingerprint
        self._name = name
        self._logger = logger
        self._condition = threading.Condition()
        self._peers: dict[_Where, _Peer] = {}
        self._places: dict[str, _Where] = {}
        """Where each request's pages are."""
        self._gone: set[str] = set()
        self._stop_at = _NEVER
        self._thread: threading.Thread | None = None

    def adopt(self, request_id: str, source: PeerSource, reader: str) -> None:
        """Keep a request's lease alive until ``drop``. Never blocks; any thread.

        Args:
            request_id: The request.
            source: Where its pages are.
            reader: What this engine calls itself and the request towards the other.
        """
        where = (source.host, source.port)
        with self._condition:
            if self._stop_at != _NEVER:
                return
            self._forget(request_id)
            peer = self._peers.setdefault(where, _Peer(where))
            peer.kept[request_id] = _Kept(source.request_id, reader)
            peer.renew_at = 0.0
            self._places[request_id] = where
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvferry-lease-keeper", daemon=True)
                self._thread.start()
            self._condition.notify()

    def drop(self, request_id: str) -> None:
        """A request's pages are needed no more: release them soon. Never blocks; any thread; idempotent."""
        with self._condition:
            self._forget(request_id)
            self._condition.notify()

    def is_gone(self, request_id: str) -> bool:
        """Tell whether the other engine said that a request's lease is over."""
        with self._condition:
            return request_id in self._gone

    def close(self, deadline_s: float) -> None:
        """Release everything, as far as peers answer within ``deadline_s`` seconds, and stop. Idempotent."""
        with self._condition:
            for request_id in list(self._places):
                self._forget(request_id)
            self._stop_at = min(self._stop_at, time.monotonic() + deadline_s)
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(deadline_s)

    def _forget(self, request_id: str) -> None:
        self._gone.discard(request_id)
        peer = self._peers.get(self._places.pop(request_id, _NOWHERE))
        kept = peer.kept.pop(request_id, None) if peer is not None else None
        if peer is not None and kept is not None and len(peer.releases) < _MOST_RELEASES:
            peer.releases[kept] = time.monotonic() + _KEPT_RELEASE_S

    def _run(self) -> None:
        while (peer := self._next_peer()) is not None:
            self._try(peer)
        for peer in sorted(self._peers.values(), key=lambda peer: peer.caller is None):
            if peer.releases and time.monotonic() < self._stop_at:
                self._try(peer)
            _hang_up(peer)

    def _next_peer(self) -> _Peer | None:
        """Wait until a peer is due and return it; None when it is time to stop."""
        with self._condition:
            while self._stop_at == _NEVER:
                now = time.monotonic()
                due = [peer for peer in self._peers.values() if peer.due_at() <= now]
                if due:
                    return min(due, key=lambda peer: (peer.caller is None, peer.failures, peer.due_at()))
                next_at = min((peer.due_at() for peer in self._peers.values()), default=None)
                self._condition.wait(None if next_at is None else next_at - now)
            return None

    def _try(self, peer: _Peer) -> None:
        try:
            self._visit(peer)
        except HandoffFailed as failure:
            self._failed(peer, str(failure))
        except Exception as error:  # noqa: BLE001  # boundary: the keeper outlives whatever a peer makes it do
            self._failed(peer, repr(error))

    def _failed(self, peer: _Peer, why: str) -> None:
        _hang_up(peer)
        level = logging.DEBUG if peer.failures else logging.WARNING
        self._logger.log(level, "leases at %s:%d cannot be renewed or released: %s", *peer.where, why)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(peer.failures, 10))
        with self._condition:
            peer.failures += 1
            peer.renew_at = 0.0
            peer.not_before = time.monotonic() + pause_s * random.uniform(0.5, 1.0)

    def _visit(self, peer: _Peer) -> None:
        if not self._has_work(peer):
            _hang_up(peer)
            return
        caller = self._connected(peer)
        with self._condition:
            releases = list(peer.releases)
        for kept in releases:
            caller.release(kept.request_id, kept.reader, self._deadline())
            with self._condition:
                peer.releases.pop(kept, None)
        self._renew(peer, caller)
        peer.used_at = time.monotonic()
        peer.failures = 0

    def _has_work(self, peer: _Peer) -> bool:
        """Drop releases that have become pointless, and the peer if there is nothing else."""
        now = time.monotonic()
        with self._condition:
            for kept in [kept for kept, until in peer.releases.items() if now >= until]:
                del peer.releases[kept]
            if not peer.kept and not peer.releases:
                del self._peers[peer.where]
                return False
            return True

    def _connected(self, peer: _Peer) -> PeerCaller:
        if peer.caller is None:
            with self._condition:
                connected = [other for other in self._peers.values() if other.caller is not None]
            if len(connected) >= _MOST_CONNECTIONS:
                _hang_up(min(connected, key=lambda other: other.used_at))
            peer.caller = PeerCaller.connect(
                *peer.where, self._token, self._fingerprint, self._name, self._deadline()
            )
        return peer.caller

    def _renew(self, peer: _Peer, caller: PeerCaller) -> None:
        now = time.monotonic()
        with self._condition:
            if now < peer.renew_at:
                return
            peer.renew_at = now + max(_SHORTEST_PERIOD_S, caller.welcome.lease_s / _RENEWALS)
            kept = list(peer.kept.items())
        for start in range(0, len(kept), MAX_LEASES):
            batch = kept[start : start + MAX_LEASES]
            alive = caller.renew([lease for _, lease in batch], self._deadline())
            with self._condition:
                for (request_id, lease), lives in zip(batch, alive, strict=True):
                    if not lives and peer.kept.get(request_id) == lease:
                        del peer.kept[request_id]
                        self._gone.add(request_id)

    def _deadline(self) -> float:
        return min(self._stop_at, time.monotonic() + _CALL_S)


def _hang_up(peer: _Peer) -> None:
    caller, peer.caller = peer.caller, None
    if caller is not None:
        caller.close()
