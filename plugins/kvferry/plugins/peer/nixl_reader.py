"""The side that reads: one NIXL agent per rank of another engine, gone with it.

An agent per peer, because ending the agent is the only cancellation NIXL has, and because a peer's bad metadata stays
with the agent that has seen it.

Between two engines on one machine UCX copies with ``process_vm_readv``, within the call that starts the read. Anything
else may go on after the call: RDMA, NVLink, or TCP, where the target's progress thread sends. TCP is refused for host
memory unless the operator asked for it: it is slower than the ``socket`` transport, and a target whose reader goes
away in the middle of a read may crash in UCX (ADR 0023).

A reader of host memory has no progress thread: bytes that TCP delivers reach the pages only while this module polls.
"""

from __future__ import annotations

import logging
import threading
import time

import numpy as np

from kvferry.connector.errors import HandoffFailed, LayoutError
from kvferry.connector.transport import PageIds, PageMemory, RemotePages, TransportContext
from kvferry.plugins.peer.agent import Agent, memory_type
from kvferry.plugins.peer.nixl_offer import PROBE_BYTES, PROBE_REPEATS, Offer, unpack
from kvferry.plugins.peer.runs import Rows, batches, check_pages, common_heads, common_runs
from kvferry.plugins.peer.tcp_traffic import TcpTraffic

__all__ = ["NixlReader"]

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
MOST_RUNS = 1 << 14
"""Of one transfer: the deadline is looked at between transfers, and one that is synchronous takes this much time."""

PROBES = 8
"""Reads of a little memory before a peer counts as reached over TCP: all but the first, which wires up, came so."""

SHORTEST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 1e-3


class NixlReader:
    """Reads pages of one rank of another engine over NIXL; a ``PageReader``.

    Args:
        remote: What the other rank says of its pages.
        offer: What its ``NixlExporter`` says.
        own: This rank's pages.
        context: Of this engine.
        deadline: ``time.monotonic`` until which connecting may take.

    Raises:
        HandoffFailed: ``incompatible``, ``transport``, ``disconnected`` or ``timeout``.
    """

    def __init__(
        self,
        remote: RemotePages,
        offer: bytes,
        own: PageMemory,
        context: TransportContext,
        deadline: float,
    ) -> None:
        believed = unpack(offer)
        if believed.nbytes != remote.nbytes:
            raise HandoffFailed("transport", "the peer's NIXL offer is not about the pages it describes")
        try:
            remote.check(own)
            heads = common_heads(own.shard, remote.shard)
            self._runs = common_runs(own.layout, own.shard, remote.layout, remote.shard, heads)
            self._parts = self._runs.parts()
        except LayoutError as error:
            raise HandoffFailed("incompatible", str(error)) from error
        self._lock = threading.Lock()
        self._is_closing = False
        is_on_host = own.device == remote.device == "cpu"
        self._scratch = np.zeros(PROBE_BYTES * PROBE_REPEATS, np.uint8)
        traffic = TcpTraffic()
        self._agent = Agent(context.name, is_local=believed.is_local, has_thread=not is_on_host)
        try:
            self._is_over_tcp = self._introduce(believed, own, traffic, deadline)
            if is_on_host and self._is_over_tcp:
                _warn_or_refuse(context)
            self._lists = [self._prepare(part, believed, remote, own) for part in self._parts]
        except BaseException:
            self._agent.close()
            raise

    @property
    def description(self) -> str:
        """How bytes travel."""
        return "nixl over TCP" if self._is_over_tcp else "nixl, one-sided"

    def read(self, remote_pages: PageIds, local_pages: PageIds, deadline: float) -> None:
        """Copy pages; see ``PageReader.read``. Whatever goes wrong ends the agent before it is raised."""
        with self._lock:
            if self._agent.is_closed:
                raise HandoffFailed("disconnected", "this reader has failed before, or was closed")
            check_pages(self._runs, remote_pages, local_pages)
            most = max(1, min(MOST_RUNS, MOST_BYTES // self._runs.run_bytes))
            try:
                for part, (own, remote) in zip(self._parts, self._lists, strict=True):
                    for indices in batches(self._runs, part, remote_pages, local_pages, most):
                        self._transfer(own, indices[0], remote, indices[1], deadline)
            except BaseException:
                self._agent.close()
                raise

    def close(self) -> None:
        """Disconnect. Waits for a read that is under way, which ends after its current transfer."""
        self._is_closing = True
        with self._lock:
            self._agent.close()

    def _introduce(self, offer: Offer, own: PageMemory, traffic: TcpTraffic, deadline: float) -> bool:
        """Connect, make sure it is the right memory, and tell whether host memory comes over TCP."""
        agent, here, nbytes = self._agent, memory_type("cpu"), self._scratch.nbytes
        agent.register(own.address, own.nbytes, memory_type(own.device), own.device_id)
        agent.register(self._scratch.ctypes.data, nbytes, here, 0)
        agent.connect(offer.metadata, offer.agent)
        lists = [
            agent.prepare(_probe_row(address, nbytes), here, is_remote=is_remote)
            for address, is_remote in ((self._scratch.ctypes.data, False), (offer.probe_address, True))
        ]
        first = np.zeros(1, np.int32)
        for attempt in range(PROBES):
            self._scratch[:] = 0
            before = traffic.received_bytes()
            self._transfer(lists[0], first, lists[1], first, deadline)
            if self._scratch.tobytes() != offer.probe * PROBE_REPEATS:
                raise HandoffFailed("transport", "NIXL reaches something else than the peer's memory")
            if attempt and traffic.received_bytes() - before < nbytes:
                return False
        return True

    def _prepare(self, part: slice, offer: Offer, remote: RemotePages, own: PageMemory) -> tuple[int, int]:
        runs = self._runs
        ours = runs.own.rows(part, runs.run_bytes, own.address, own.device_id)
        theirs = runs.remote.rows(part, runs.run_bytes, offer.address, offer.device_id)
        return (
            self._agent.prepare(ours, memory_type(own.device), is_remote=False),
            self._agent.prepare(theirs, memory_type(remote.device), is_remote=True),
        )

    def _transfer(
        self, own: int, own_indices: PageIds, remote: int, remote_indices: PageIds, deadline: float
    ) -> None:
        """Read once, to the end."""
        if time.monotonic() >= deadline:
            raise HandoffFailed("timeout", "the other engine's pages were not read in time")
        if self._is_closing:
            raise HandoffFailed("disconnected", "this reader was closed")
        if self._agent.post(own, own_indices, remote, remote_indices):
            return
        pause = SHORTEST_PAUSE_S
        while not self._agent.poll():
            if time.monotonic() >= deadline:
                raise HandoffFailed("timeout", "the other engine does not answer in time")
            if self._is_closing:
                raise HandoffFailed("disconnected", "this reader was closed")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)


def _probe_row(address: int, nbytes: int) -> Rows:
    return np.array([[address, nbytes, 0, nbytes, 1]], np.uint64)


def _warn_or_refuse(context: TransportContext) -> None:
    if not context.is_only:
        why = "NIXL reaches the other engine's host memory only over TCP, where a plain socket is faster"
        hint = "engines of one user on one machine, in one PID namespace, are read directly"
        raise HandoffFailed("transport", f'{why}; {hint}; peer.transport = "nixl" uses NIXL all the same')
    log.warning(
        "nixl reads this peer's host memory over TCP: an engine whose reader dies in the middle of a read "
        "may crash in UCX; the transport `socket` does not have this problem"
    )
