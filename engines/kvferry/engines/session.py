"""Sessions: one engine's requests, in kvferry's terms.

An adapter tells ``EngineSessions`` what its engine does (a request arrived, was given pages, computed so
many tokens, finished) and gets back what to tell the engine: how many tokens are offered, what the
workers must copy in this step, and whether pages must be held.

Rules that keep wrong bytes out
  * A load is planned only from leased blocks, and only the workers' report ends the lease.
  * A save is planned only for blocks whose every token is computed by the end of the step, and is
    committed only when every rank reported it and none reported a failure.
  * Copies are planned for one arena; if the service has another one when the step is handed out, they fail.
  * Pages that are reused while a save still reads them are fenced in the same step.
  * Pages of a peer are asked for by a digest of everything that determines them.

Threading: owned by the engine's scheduler thread; nothing here blocks.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from kvferry.connector.config import Config
from kvferry.connector.explain import RequestRecord
from kvferry.connector.keys import BlockKey, KeyChain, content_digest, epoch_fingerprint, root_key
from kvferry.connector.service import CacheService, Match, MissReason, Reservation
from kvferry.engines.jobs import (
    BlockCopy,
    LoadJob,
    PeerRead,
    PeerSource,
    SaveJob,
    StepJobs,
    WorkerReport,
)
from kvferry.engines.loads import Load, OpenLoads, block_copies
from kvferry.engines.patience import Patience
from kvferry.engines.prefill import PrefillRate
from kvferry.engines.request import RequestInfo, RequestState
from kvferry.engines.saves import OpenSaves, Save

__all__ = ["EngineSessions", "Peers"]

_MOST_RESERVED = 4096
"""Blocks that slots are asked for at once."""
_CLEARED = "the cache was cleared while the request ran"


class Peers(Protocol):
    """Where other engines hold pages for requests of this one; ``handoff.handoffs.Handoffs`` is one."""

    def source(self, request_id: str) -> PeerSource | None:
        """Return where a request's pages can be had; None where nowhere, or no longer."""

    def reader(self, request_id: str) -> str:
        """Return what this engine calls itself and the request towards the other."""

    def over(self, request_id: str) -> None:
        """Say that nothing is wanted any more for a request. Idempotent; unknown ids are ignored."""


class EngineSessions:
    """Turns an engine's requests into lookups, leases, reservations and copy jobs.

    Args:
        service: Where blocks are kept.
        config: The effective configuration.
        fingerprint: The model's fingerprint, root of every key.
        page_tokens: Tokens per engine page; divides the service's ``block_tokens``.
        world_size: Ranks that report every save.
        on_record: Called with the record of each finished request.
        clock: Monotonic seconds.
        peers: Where other engines hold pages for these requests; None when none is ever asked.
    """

    def __init__(
        self,
        service: CacheService,
        config: Config,
        fingerprint: bytes,
        page_tokens: int,
        world_size: int,
        on_record: Callable[[RequestRecord], None],
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._fingerprint = self._model_fingerprint = fingerprint
        self._block_tokens = service.layout.block_tokens
        self._page_tokens = page_tokens
        self._pages_per_block = self._block_tokens // page_tokens
        self._on_record = on_record
        self._peers = peers
        self._clock = clock
        self.prefill = PrefillRate()
        """How fast the engine computes; the adapter tells it each step."""
        self._patience = Patience(service, config, self.prefill, clock)
        self._sessions: dict[str, RequestState] = {}
        self._loads = OpenLoads(service)
        self._saves = OpenSaves(world_size)
        self._jobs = StepJobs()
        self._disabled = ""

    @property
    def disabled(self) -> str:
        """Why nothing is offered or saved any more; empty while the cache is in use."""
        return self._disabled

    def disable(self, reason: str) -> None:
        """Offer and save nothing from now on; what is under way is still settled."""
        self._disabled = self._disabled or reason

    def open(self, info: RequestInfo) -> None:
        """Take note of a request; a second call for the same id changes nothing."""
        if info.id in self._sessions:
            return
        chain = KeyChain(root_key(self._fingerprint, info.scope), self._block_tokens)
        record = RequestRecord(
            request_id=info.id,
            arrived=time.time(),
            block_tokens=self._block_tokens,
            prompt_tokens=info.prompt_tokens,
            passed=info.uncacheable or self._disabled,
        )
        self._sessions[info.id] = RequestState(info, chain, record)

    def offer(
        self, request_id: str, tokens: Sequence[int], local_tokens: int, *, may_wait: bool = True
    ) -> int | None:
        """Tell how many tokens beyond ``local_tokens`` can be loaded, while the request has no pages yet.

        Args:
            request_id: An opened request.
            tokens: All its tokens.
            local_tokens: What the engine holds itself, a multiple of the page size.
            may_wait: False offers what is in the arena now; what is on its way goes on arriving there.

        Returns:
            Tokens offered, 0 for none; None while slower tiers are bringing blocks: ask again.
        """
        session = self._sessions[request_id]
        self._loads.let_go(request_id)
        if self._disabled or session.info.uncacheable or request_id in self._loads:
            return 0
        session.saved_blocks = session.asked_blocks = 0  # the pages it is given next are new ones
        if self._peers is not None and (source := self._peers.source(request_id)) is not None:
            offered = self._offer_from_peer(session, source, tokens, local_tokens)
            if offered:
                return offered
        first = local_tokens // self._block_tokens
        wanted = session.chain.extend(tokens, session.info.extras)[first:]
        match = self._service.lookup(wanted)
        missing = match.missing
        if match.ready < match.reachable or match.missing is MissReason.NOT_ASKED:
            session.note_sources(match, first)
            why = self._patience.wait(session, match, first, wanted)
            if why is None and may_wait:
                return None
            missing = why or match.missing
        session.note_match(match, first, local_tokens, missing, self._clock())
        offered = (first + match.ready) * self._block_tokens - local_tokens
        return max(0, min(offered, len(tokens) - local_tokens))

    def secure(self, request_id: str, local_tokens: int, offered_tokens: int) -> int:
        """Lease now what was offered, for an engine that counts on every token of an offer it takes.

        ``accept`` uses the lease; another offer, the request's end or a clear releases it.

        Returns:
            Tokens beyond ``local_tokens`` that are leased, no more than were offered.
        """
        first, keys = self._offered_keys(request_id, local_tokens, offered_tokens)
        leased = self._loads.secure(request_id, keys) if keys else 0
        return max(0, min(offered_tokens, (first + leased) * self._block_tokens - local_tokens))

    def decline(self, request_id: str) -> bool:
        """Nothing of the last offer is taken, or its pages are gone: release its lease and let no worker load it.

        Returns:
            Whether a load was planned that no worker has been told of yet.
        """
        self._loads.let_go(request_id)
        planned = len(self._jobs.loads)
        self._jobs.loads = [load for load in self._jobs.loads if load.request_id != request_id]
        if len(self._jobs.loads) == planned:
            return False
        self._loads.end(request_id, ok=True)
        return True

    def accept(self, request_id: str, pages: Sequence[int], local_tokens: int, offered_tokens: int) -> None:
        """Plan the load of tokens that were offered and that the engine made pages for.

        Args:
            request_id: The request.
            pages: Its page ids from its first token on.
            local_tokens: Tokens the engine holds itself.
            offered_tokens: Tokens to load beyond them; the engine now waits until every rank has
                reported this request's load.
        """
        copies: tuple[BlockCopy, ...] = ()
        peer: PeerRead | None = None
        try:
            self._sessions[request_id].waiting.end()
            copies, peer = self._plan_load(request_id, pages, local_tokens, offered_tokens)
        finally:
            # The engine waits for this request's load from now on, so it is reported in any case.
            self._plan().loads.append(LoadJob(request_id, copies, peer))

    def load_finished(self, request_id: str, ok: bool) -> None:
        """Every rank has reported the load of ``request_id``; unknown ids are ignored."""
        load = self._loads.end(request_id, ok)
        if load is None:
            return
        self._peer_is_over(request_id)
        session = self._sessions.get(request_id)
        if session is None:
            return
        load_ms = (self._clock() - load.started) * 1e3
        session.note(load_ms=load_ms, peer_ms=load_ms if ok and load.peer else 0.0)
        if ok:
            pages = len(load.keys) * self._pages_per_block + (len(load.peer.pages) if load.peer else 0)
            loaded = pages * self._service.layout.payload_bytes // self._pages_per_block
            session.note(loaded_tokens=session.record.offered_tokens, bytes_loaded=loaded)
        else:
            session.waiting.lost()
            session.note(failed=True, missing_reason=MissReason.LOAD_FAILED.value)

    def computed(
        self,
        request_id: str,
        tokens: Sequence[int],
        num_computed: int,
        pages: Sequence[int],
        wait_s: float = 0.0,
    ) -> None:
        """Plan the save of blocks that are full by the end of this step.

        Args:
            request_id: The request.
            tokens: All its confirmed tokens.
            num_computed: Tokens whose KV is in the pages when the step ends.
            pages: Its page ids from its first token on.
            wait_s: Seconds that slots may be waited for, where there is no later step to save in.
        """
        session = self._sessions.get(request_id)
        if session is None:
            return
        session.waiting.end()
        self._peer_is_over(request_id)
        if self._disabled or session.info.uncacheable or self._config.save == "none":
            return
        last = min(num_computed, len(tokens), len(pages) * self._page_tokens)
        if self._config.save == "prompt":
            last = min(last, session.info.prompt_tokens)
        full = last // self._block_tokens
        if full <= session.saved_blocks:
            return
        session.chain.extend(tokens, session.info.extras)
        while session.saved_blocks < full and self._reserve(session, full, pages, wait_s):
            pass

    def pages_assigned(self, pages: Iterable[int]) -> None:
        """Pages were given to a request in this step: fence the saves that still read them."""
        self._jobs.fences.extend(self._saves.reading(pages).difference(self._jobs.fences))

    def take_jobs(self) -> StepJobs:
        """Return what the workers must do in this step."""
        jobs, self._jobs = self._plan(), StepJobs()
        jobs.layout = self._service.layout
        return jobs

    def report(self, report: WorkerReport) -> None:
        """Take in what the ranks finished: commit saves that all of them made, abort the failed."""
        if report.problem:
            self.disable(report.problem)
        for request_id, reason in report.peer.failed.items():
            self.peer_failed(request_id, reason)
        for save in self._saves.report(report):
            self._settle(save)

    def peer_failed(self, request_id: str, reason: str) -> None:
        """Note why a request gets nothing from a peer, as ``HandoffFailed.reason``."""
        if (session := self._sessions.get(request_id)) is not None:
            session.note(peer_failed=reason)

    def saved_keys(self, request_id: str) -> Sequence[BlockKey]:
        """Return the keys of the blocks that are full by now, if they are to be saved."""
        session = self._sessions.get(request_id)
        if session is None or self._disabled or session.info.uncacheable or self._config.save == "none":
            return ()
        return tuple(session.chain.keys)

    def content(self, request_id: str, tokens: Sequence[int]) -> Callable[[int], bytes] | None:
        """Return what digests the first n tokens, also when the request is over; None if its KV is not keyed."""
        session = self._sessions.get(request_id)
        if session is None or session.info.uncacheable or self._disabled:
            return None
        chain, extras, known = session.chain, session.info.extras, list(tokens)
        return lambda count: content_digest(chain, known[:count], extras)

    def release(self, request_id: str) -> None:
        """Have every rank report a finished request whose pages were held, once its saves are through."""
        self._jobs.releases.append(request_id)

    def finish(self, request_id: str, *, is_held: bool = False) -> bool:
        """The request is over. Return whether its pages must be held until its saves are through.

        When True, every rank reports the id once it has finished the saves; if ``is_held``, because somebody else
        reads the pages, only after ``release``.
        """
        session = self._sessions.pop(request_id, None)
        if session is None:
            return False
        self._peer_is_over(request_id)
        self._loads.let_go(request_id)
        session.note_regret(self.prefill.seconds(self._block_tokens))
        self._on_record(session.record)
        if request_id in self._loads:
            # The engine holds the pages until the load is reported. No save reads them: whatever this request
            # saved before lay in pages that it no longer has.
            return False
        self._service.release_owner(request_id)
        if is_held:
            return True
        if not session.pending_saves:
            return False
        self._jobs.releases.append(request_id)
        return True

    def is_loading(self, request_id: str) -> bool:
        """Tell whether some rank still has to report a request's load."""
        return request_id in self._loads

    def is_saving(self, request_id: str) -> bool:
        """Tell whether some rank still has to report a save of a request, also when it is over."""
        return self._saves.is_reading(request_id)

    def has_pending(self) -> bool:
        """Tell whether workers still have to report something."""
        return bool(self._saves or self._loads or self._jobs.loads or self._jobs.releases)

    def hit_tokens_by_tier(self, request_id: str, tokens: int) -> dict[str, int]:
        """Split the first ``tokens`` of the last offer over the tiers they came from."""
        session = self._sessions.get(request_id)
        split: dict[str, int] = {}
        for tier, matched in session.record.matched_tokens.items() if session else ():
            part = min(matched, tokens - sum(split.values()))
            if part > 0:
                split[tier] = part
        return split

    def clear(self) -> None:
        """Forget all blocks, because the weights may have changed in place.

        Saves under way are not committed. From now on keys belong to an epoch of this engine's own, so
        that nothing is found that was computed with the old weights, wherever it is kept and whoever
        keeps it. Requests that began with the old weights are no longer cached.
        """
        self._saves.spoil()
        self._loads.let_all_go()
        for session in self._sessions.values():
            session.info = msgspec.structs.replace(session.info, uncacheable=_CLEARED)
        self._fingerprint = epoch_fingerprint(self._fingerprint, secrets.token_bytes(32))
        self._service.clear()

    def _peer_is_over(self, request_id: str) -> None:
        if self._peers is not None:
            self._peers.over(request_id)

    def _offer_from_peer(
        self, session: RequestState, source: PeerSource, tokens: Sequence[int], local_tokens: int
    ) -> int:
        """Offer what the arena holds now, and behind it what a peer holds; 0 if the peer adds nothing."""
        held = min(source.num_tokens or len(tokens), session.info.prompt_tokens, len(tokens))
        first = local_tokens // self._block_tokens
        match = self._service.lookup(session.chain.extend(tokens, session.info.extras)[first:])
        start = max(local_tokens, (first + match.ready) * self._block_tokens)
        if held <= start:
            return 0
        if session.peer_tokens != held:
            session.peer_tokens = held
            session.peer_content = content_digest(session.chain, tokens[:held], session.info.extras)
        ready = Match(match.ready, match.ready, match.tiers[: match.ready], MissReason.NONE)
        session.note_match(ready, first, local_tokens, MissReason.NONE, self._clock())
        session.note_peer(held - start)
        return held - local_tokens

    def _plan_load(
        self, request_id: str, pages: Sequence[int], local_tokens: int, offered_tokens: int
    ) -> tuple[tuple[BlockCopy, ...], PeerRead | None]:
        session = self._sessions[request_id]
        first, keys = self._offered_keys(request_id, local_tokens, offered_tokens)
        end_token = local_tokens + offered_tokens
        lease = self._loads.lease(request_id, keys)
        leased = len(lease.places)
        session.note(offered_tokens=offered_tokens)
        is_whole = (first + leased) * self._block_tokens >= end_token
        source = None if is_whole or self._peers is None else self._peers.source(request_id)
        peer = None
        if source is not None and end_token == session.peer_tokens:
            start = max(local_tokens, (first + leased) * self._block_tokens)
            peer = self._peer_read(session, source, pages, start)
        self._loads.begin(request_id, Load(lease, keys[:leased] if peer else keys, self._clock(), peer))
        if not is_whole and peer is None:
            return (), None
        first_page, end_page = local_tokens // self._page_tokens, -(-end_token // self._page_tokens)
        return block_copies(lease, pages, first, first_page, end_page, self._pages_per_block), peer

    def _offered_keys(
        self, request_id: str, local_tokens: int, offered_tokens: int
    ) -> tuple[int, Sequence[BlockKey]]:
        """Return the block that ``local_tokens`` end in, and the keys of it and of all that was offered behind it."""
        first = local_tokens // self._block_tokens
        end = -(-(local_tokens + offered_tokens) // self._block_tokens)
        return first, tuple(self._sessions[request_id].chain.keys[first:end])

    def _peer_read(
        self, session: RequestState, source: PeerSource, pages: Sequence[int], start: int
    ) -> PeerRead:
        """Plan to read, from token ``start`` on, what was offered from a peer."""
        assert self._peers is not None
        first_page = start // self._page_tokens
        end_page = -(-session.peer_tokens // self._page_tokens)
        return PeerRead(
            source=source,
            reader=self._peers.reader(session.info.id),
            num_tokens=session.peer_tokens,
            fingerprint=self._model_fingerprint,
            content=session.peer_content,
            first_page=first_page,
            pages=tuple(pages[first_page:end_page]),
        )

    def _reserve(self, session: RequestState, full: int, pages: Sequence[int], wait_s: float) -> bool:
        """Plan the save of blocks up to ``full``, or of those that were asked for before and not answered.

        Returns:
            False when there is no answer yet; the same is asked in the next step.
        """
        start, asked = session.saved_blocks, session.asked_blocks
        end = asked if start < asked <= full else min(full, start + _MOST_RESERVED)
        keys = session.chain.keys[start:end]
        reservation = self._service.reserve(session.info.id, keys, wait_s)
        if reservation is None:
            session.asked_blocks = end
            return False
        session.saved_blocks = end
        if reservation.places:
            self._plan_save(session, reservation, dict(zip(keys, range(start, end), strict=True)), pages)
        return True

    def _plan_save(
        self,
        session: RequestState,
        reservation: Reservation,
        index_of: Mapping[BlockKey, int],
        pages: Sequence[int],
    ) -> None:
        copies = []
        for place in reservation.places:
            start = index_of[place.key] * self._pages_per_block
            own = tuple(pages[start : start + self._pages_per_block])
            copies.append(BlockCopy(place.slot, place.generation, 0, own))
        touched = [page for copy in copies for page in copy.pages]
        job = SaveJob(
            self._saves.begin(session.info.id, reservation, touched), session.info.id, tuple(copies)
        )
        session.pending_saves.add(job.id)
        self._plan().saves.append(job)

    def _plan(self) -> StepJobs:
        """Return the step's jobs, for the arena there is now; what was planned for another will fail."""
        arena = self._service.arena
        if arena != self._jobs.arena:
            self._jobs.void()
            self._jobs.arena = arena
        return self._jobs

    def _settle(self, save: Save) -> None:
        session = self._sessions.get(save.request_id)
        if session is not None:
            session.pending_saves.discard(save.id)
        if self._disabled or not save.is_good:
            self._service.abort(save.reservation)
            return
        keys = [place.key for place in save.reservation.places]
        self._service.commit(save.reservation, keys)
        if session is not None:
            blocks = session.record.saved_blocks + len(keys)
            session.note(saved_blocks=blocks, bytes_saved=blocks * self._service.layout.payload_bytes)
