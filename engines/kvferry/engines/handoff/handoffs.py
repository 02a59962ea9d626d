"""Handoffs, as an engine's scheduler sees them: whose pages are held for others, and where others hold pages for us.

Who owns what
  * The engine's scheduler thread calls everything here; nothing blocks but ``start`` and ``close``.
  * ``HandoffTable`` has the leases; ``SideChannel``'s threads let other engines ask it.
  * ``LeaseKeeper`` has a thread that renews and releases the leases of requests that wait here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence

from blake3 import blake3

from kvferry.connector.config import Config
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff.keeper import LeaseKeeper
from kvferry.engines.handoff.params import MAX_NAME, Allowed, answer_params, read_params
from kvferry.engines.handoff.roles import Role
from kvferry.engines.handoff.side_channel import SideChannel
from kvferry.engines.handoff.table import Handed, HandoffTable
from kvferry.engines.jobs import ExportJob, PeerSource, WorkerReport

__all__ = ["Handoffs"]

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 5.0


class Handoffs:
    """The scheduler's part of every handoff of one engine.

    Args:
        config: The effective configuration.
        role: What this engine does.
        fingerprint: What blocks are keyed under.
        engine_id: The engine's name, by which routers know it.
        num_pages: Pages of the engine.
        port_offset: Added to a configured port, so that data-parallel engines of one host have one each.
        clock: Monotonic seconds.

    Raises:
        ConfigError: ``peer`` cannot be what it is.
    """

    def __init__(
        self,
        config: Config,
        role: Role,
        fingerprint: bytes,
        engine_id: str,
        num_pages: int,
        port_offset: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        peer = config.peer
        self._role = role
        self._engine_id = engine_id
        self._clock = clock
        self._most_held = int(peer.held_share * num_pages)
        self._allowed = Allowed(peer.allowed_hosts, bool(config.token))
        self._name = f"{engine_id[:64]}/{secrets.token_hex(4)}"
        self._wanted: set[str] = set()
        self._sources: dict[str, PeerSource] = {}
        self._exports: list[ExportJob] = []
        self._tp_size = 0
        self.table = HandoffTable(peer.lease_s)
        self._channel = (
            SideChannel(peer, config.token, fingerprint, engine_id, self.table, port_offset=port_offset)
            if role.gives
            else None
        )
        self._keeper = LeaseKeeper(config.token, fingerprint, self._name) if role.takes else None
        self._has_started = False

    def start(self, ranks: Sequence[RemotePages]) -> None:
        """The ranks can be read from: let other engines ask for pages.

        Args:
            ranks: One for each tensor-parallel rank; if it is not all of them, nothing is handed over.

        Raises:
            KVFerryError: The side channel cannot listen.
        """
        if self._channel is None or not ranks:
            return
        self._tp_size = len(ranks)
        self._channel.set_ranks(ranks)
        self._channel.start()
        self._has_started = True
        host, port = self.address
        logger.info("kvferry hands pages over: side channel %s:%d, engine id %s", host, port, self._engine_id)

    @property
    def address(self) -> tuple[str, int]:
        """Where other engines reach the side channel, once there is one."""
        assert self._channel is not None
        return self._channel.address

    def arrived(self, request_id: str, params: object) -> bool:
        """A request has come, with what a router says of it; return whether that can be followed."""
        wish = read_params(params, self._allowed)
        problem = wish.problem
        if wish.hands_over and self._has_started:
            self._wanted.add(request_id)
        elif wish.hands_over:
            problem = problem or "this engine hands nothing over, as kv_role or peer.enabled says"
        if wish.source is not None and self._keeper is not None:
            self._sources[request_id] = wish.source
            self._keeper.adopt(request_id, wish.source, self.reader(request_id))
        elif wish.source is not None:
            problem = problem or "this engine takes nothing from peers, as kv_role says"
        if problem:
            logger.warning("request %s is computed as if nobody spoke of a handoff: %s", request_id, problem)
        return not problem

    def is_wanted(self, request_id: str) -> bool:
        """Tell whether another engine will ask for this request's pages."""
        return request_id in self._wanted

    def source(self, request_id: str) -> PeerSource | None:
        """Return where a request's pages can be had; None where nowhere, or no longer."""
        return None if self.is_gone(request_id) else self._sources.get(request_id)

    def is_gone(self, request_id: str) -> bool:
        """Tell whether pages that were held for a request are not any more."""
        return request_id in self._sources and self._keeper is not None and self._keeper.is_gone(request_id)

    def reader(self, request_id: str) -> str:
        """Return what this engine calls itself and the request towards the other."""
        name = f"{self._name}/{request_id}"
        return name if len(name) <= MAX_NAME else blake3(name.encode()).hexdigest()

    def over(self, request_id: str) -> None:
        """Nothing is wanted any more for a request. Idempotent; unknown ids are ignored."""
        if self._sources.pop(request_id, None) is not None and self._keeper is not None:
            self._keeper.drop(request_id)

    def hand_over(
        self, request_id: str, pages: Sequence[int], num_tokens: int, content: Callable[[int], bytes] | None
    ) -> dict[str, object] | None:
        """Hold a finished request's pages for whoever comes for them.

        Args:
            request_id: The request.
            pages: Its page ids, that of its first token first.
            num_tokens: Tokens whose KV they hold.
            content: What digests the first n of its tokens; None if nothing can be said of its KV.

        Returns:
            What to tell the router; None if nothing is held and the other engine has to compute.
        """
        is_named = len(request_id) <= MAX_NAME
        if self._channel is None or content is None or not (is_named and pages and num_tokens > 0):
            return None
        if self.table.held_pages + len(pages) > self._most_held:
            logger.warning(
                "the pages of %s are not held: %d of %d pages are held for others (peer.held_share)",
                request_id,
                self.table.held_pages,
                self._most_held,
            )
            return None
        seq = self.table.hand_over(Handed(request_id, tuple(pages), num_tokens, content), self._clock())
        self._exports.append(ExportJob(seq, tuple(pages)))
        host, port = self.address
        return answer_params(
            host=host,
            port=port,
            engine_id=self._engine_id,
            request_id=request_id,
            pages=pages,
            num_tokens=num_tokens,
            tp_size=self._tp_size,
        )

    def finished(self, request_id: str) -> None:
        """A request is over here."""
        self._wanted.discard(request_id)
        self.over(request_id)

    def take_exports(self) -> list[ExportJob]:
        """Return what the ranks must digest."""
        exports, self._exports = self._exports, []
        return exports

    def take_ended(self) -> list[str]:
        """Return the requests whose pages are held for nobody any more. They may be freed now, and not before."""
        return self.table.take_ended(self._clock()) if len(self.table) else []

    def report(self, report: WorkerReport) -> None:
        """Take in what the ranks digested."""
        for seq, by_rank in report.digests.items():
            for rank, digests in by_rank.items():
                self.table.set_digests(seq, rank, digests)

    def close(self) -> None:
        """Tell the peers that nothing is wanted any more, and answer nobody. Idempotent."""
        if self._keeper is not None:
            self._keeper.close(_CLOSE_DEADLINE_S)
        if self._channel is not None:
            self._channel.close(_CLOSE_DEADLINE_S)
