"""Sessions: one engine's requests, in kvferry's terms.

An adapter tells ``EngineSessions`` what its engine does (a request arrived, was given pages, computed so
many tokens, finished) and gets back what to tell the engine: how many tokens are offered, what the
workers must copy in this step, and whether pages must be held.

Rules that keep wrong bytes out
  * A load is planned only from leased blocks, and only the workers' report ends the lease.
  * A save is planned only for blocks whose every token is computed by the end of the step, and is
    committed only when every rank reported it and none reported a failure.
  * Pages that are reused while a save still reads them are fenced in the same step.

Threading: owned by the engine's scheduler thread; nothing here blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from kvferry.connector.config import Config
from kvferry.connector.explain import RequestRecord
from kvferry.connector.keys import BlockKey, Extra, KeyChain, Scope, root_key
from kvferry.connector.service import CacheService, Lease, Match, MissReason, Reservation
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs, WorkerReport

__all__ = ["EngineSessions", "RequestInfo"]


class RequestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known about a request before it can be keyed."""

    id: str
    prompt_tokens: int
    scope: Scope = Scope()
    extras: Mapping[int, Sequence[Extra]] = {}
    """Non-token inputs by block index."""
    uncacheable: str = ""
    """Why this request is passed through uncached; empty when it is cached."""


class _Session:
    """State of one live request."""

    __slots__ = ("chain", "info", "pending_saves", "record", "saved_blocks", "sources", "waiting_since")

    def __init__(self, info: RequestInfo, chain: KeyChain, record: RequestRecord) -> None:
        self.info = info
        self.chain = chain
        self.record = record
        self.sources: dict[int, str] = {}
        """Block index -> tier it was brought from for this request."""
        self.waiting_since: float | None = None
        self.saved_blocks = 0
        self.pending_saves: set[int] = set()

    def note(self, **changes: object) -> None:
        """Update the request's record."""
        self.record = msgspec.structs.replace(self.record, **changes)


class _Load(msgspec.Struct):
    """A load that the workers have not reported yet; outlives its session on abort."""

    lease: Lease
    keys: tuple[BlockKey, ...]
    started: float


class _Save(msgspec.Struct):
    """A save that not all ranks have reported yet.

    Its slots are given back only when every rank has reported, well or badly: until then some rank
    may still be writing into them.
    """

    request_id: str
    reservation: Reservation
    pages: frozenset[int]
    ranks: int = 0
    is_good: bool = True


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
    ) -> None:
        self._service = service
        self._config = config
        self._fingerprint = fingerprint
        self._block_tokens = service.layout.block_tokens
        self._page_tokens = page_tokens
        self._pages_per_block = self._block_tokens // page_tokens
        self._world_size = world_size
        self._on_record = on_record
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._loads: dict[str, _Load] = {}
        self._saves: dict[int, _Save] = {}
        self._saves_by_page: dict[int, int] = {}
        self._next_save = 1
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
        self._sessions[info.id] = _Session(info, chain, record)

    def offer(self, request_id: str, tokens: Sequence[int], local_tokens: int) -> int | None:
        """Tell how many tokens beyond ``local_tokens`` can be loaded, while the request has no pages yet.

        Args:
            request_id: An opened request.
            tokens: All its tokens.
            local_tokens: What the engine holds itself, a multiple of the page size.

        Returns:
            Tokens offered, 0 for none; None while slower tiers are bringing blocks (ask again).
        """
        session = self._sessions[request_id]
        if self._disabled or session.info.uncacheable or request_id in self._loads:
            return 0
        session.saved_blocks = 0  # the pages it is given next are new ones
        first = local_tokens // self._block_tokens
        wanted = session.chain.extend(tokens, session.info.extras)[first:]
        match = self._service.lookup(wanted)
        is_late = False
        if match.ready < match.reachable:
            self._note_sources(session, match, first)
            is_late = self._has_waited(session)
            if not is_late and match.ready < self._service.prefetch(request_id, wanted):
                return None
        self._note_match(session, match, first, local_tokens, is_late)
        offered = (first + match.ready) * self._block_tokens - local_tokens
        return max(0, min(offered, len(tokens) - local_tokens))

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
        try:
            copies = self._plan_load(request_id, pages, local_tokens, offered_tokens)
        finally:
            # The engine waits for this request's load from now on, so it is reported in any case.
            self._jobs.loads.append(LoadJob(request_id, copies))

    def load_finished(self, request_id: str, ok: bool) -> None:
        """Every rank has reported the load of ``request_id``; unknown ids are ignored."""
        load = self._loads.pop(request_id, None)
        if load is None:
            return
        self._service.release(load.lease)
        self._service.release_owner(request_id)
        if not ok:
            self._service.report_load_failed(load.keys)
        session = self._sessions.get(request_id)
        if session is None:
            return
        session.note(load_ms=(self._clock() - load.started) * 1e3)
        if ok:
            loaded = len(load.keys) * self._service.layout.payload_bytes
            session.note(loaded_tokens=session.record.offered_tokens, bytes_loaded=loaded)
        else:
            session.note(failed=True, missing_reason=MissReason.LOAD_FAILED.value)

    def computed(
        self, request_id: str, tokens: Sequence[int], num_computed: int, pages: Sequence[int]
    ) -> None:
        """Plan the save of blocks that are full by the end of this step.

        Args:
            request_id: The request.
            tokens: All its confirmed tokens.
            num_computed: Tokens whose KV is in the pages when the step ends.
            pages: Its page ids from its first token on.
        """
        session = self._sessions.get(request_id)
        if session is None or self._disabled or session.info.uncacheable or self._config.save == "none":
            return
        last = min(num_computed, len(tokens), len(pages) * self._page_tokens)
        if self._config.save == "prompt":
            last = min(last, session.info.prompt_tokens)
        full = last // self._block_tokens
        if full <= session.saved_blocks:
            return
        keys = session.chain.extend(tokens, session.info.extras)
        start, session.saved_blocks = session.saved_blocks, full
        new = keys[start:full]
        reservation = self._service.reserve(request_id, new)
        if reservation.places:
            self._plan_save(session, reservation, dict(zip(new, range(start, full), strict=True)), pages)

    def pages_assigned(self, pages: Iterable[int]) -> None:
        """Pages were given to a request in this step: fence the saves that still read them."""
        if self._saves_by_page:
            fences = {self._saves_by_page[page] for page in pages if page in self._saves_by_page}
            self._jobs.fences.extend(fences.difference(self._jobs.fences))

    def take_jobs(self) -> StepJobs:
        """Return what the workers must do in this step."""
        jobs, self._jobs = self._jobs, StepJobs()
        jobs.arena, jobs.layout = self._service.arena, self._service.layout
        return jobs

    def report(self, report: WorkerReport) -> None:
        """Take in what the ranks finished: commit saves that all of them made, abort the failed."""
        if report.problem:
            self.disable(report.problem)
        for job_id, ranks in report.saved.items():
            save = self._saves.get(job_id)
            if save is None:
                continue
            save.ranks += ranks
            save.is_good = save.is_good and job_id not in report.failed_saves
            if save.ranks >= self._world_size:
                self._settle(job_id, save)

    def finish(self, request_id: str) -> bool:
        """The request is over. Return whether its pages must be held until its saves are through.

        When True, every rank reports the id once it has finished the saves.
        """
        session = self._sessions.pop(request_id, None)
        if session is None:
            return False
        self._on_record(session.record)
        if request_id in self._loads:
            # The engine holds the pages until the load is reported, and the workers finish the
            # saves before it: they copy in order.
            return False
        self._service.release_owner(request_id)
        if not session.pending_saves:
            return False
        self._jobs.releases.append(request_id)
        return True

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
        """Forget all blocks; saves under way are not committed."""
        for save in self._saves.values():
            save.is_good = False
        self._service.clear()

    def _has_waited(self, session: _Session) -> bool:
        now = self._clock()
        if session.waiting_since is None:
            session.waiting_since = now
        waited_s = now - session.waiting_since
        session.note(wait_ms=waited_s * 1e3)
        return waited_s >= self._config.load_deadline_s

    def _note_sources(self, session: _Session, match: Match, first: int) -> None:
        for index, tier in enumerate(match.tiers, start=first):
            session.sources.setdefault(index, tier)

    def _note_match(
        self, session: _Session, match: Match, first: int, local_tokens: int, is_late: bool
    ) -> None:
        matched: dict[str, int] = {}
        for index, tier in enumerate(match.tiers[: match.ready], start=first):
            source = session.sources.get(index, tier)
            matched[source] = matched.get(source, 0) + self._block_tokens
        if matched:
            skipped = local_tokens - first * self._block_tokens
            matched[next(iter(matched))] -= skipped
        is_whole = match.missing is MissReason.NONE and not is_late
        session.note(
            local_tokens=local_tokens,
            matched_tokens=matched,
            missing_block=None if is_whole else first + match.ready,
            missing_reason=(MissReason.DEADLINE if is_late else match.missing).value,
        )

    def _plan_load(
        self, request_id: str, pages: Sequence[int], local_tokens: int, offered_tokens: int
    ) -> tuple[BlockCopy, ...]:
        session = self._sessions[request_id]
        first = local_tokens // self._block_tokens
        end = -(-(local_tokens + offered_tokens) // self._block_tokens)
        keys = tuple(session.chain.keys[first:end])
        lease = self._service.lease(request_id, keys)
        self._loads[request_id] = _Load(lease, keys, self._clock())
        session.note(offered_tokens=offered_tokens)
        if len(lease.places) < len(keys):
            return ()
        copies = []
        for index, place in enumerate(lease.places, start=first):
            start = index * self._pages_per_block
            skipped = max(0, local_tokens // self._page_tokens - start)
            own = tuple(pages[start + skipped : start + self._pages_per_block])
            copies.append(BlockCopy(place.slot, place.generation, skipped, own))
        return tuple(copies)

    def _plan_save(
        self,
        session: _Session,
        reservation: Reservation,
        index_of: Mapping[BlockKey, int],
        pages: Sequence[int],
    ) -> None:
        copies = []
        for place in reservation.places:
            start = index_of[place.key] * self._pages_per_block
            own = tuple(pages[start : start + self._pages_per_block])
            copies.append(BlockCopy(place.slot, place.generation, 0, own))
        job = SaveJob(self._next_save, session.info.id, tuple(copies))
        self._next_save += 1
        touched = frozenset(page for copy in copies for page in copy.pages)
        self._saves[job.id] = _Save(session.info.id, reservation, touched)
        self._saves_by_page.update(dict.fromkeys(touched, job.id))
        session.pending_saves.add(job.id)
        self._jobs.saves.append(job)

    def _settle(self, job_id: int, save: _Save) -> None:
        del self._saves[job_id]
        for page in save.pages:
            if self._saves_by_page.get(page) == job_id:
                del self._saves_by_page[page]
        session = self._sessions.get(save.request_id)
        if session is not None:
            session.pending_saves.discard(job_id)
        if self._disabled or not save.is_good:
            self._service.abort(save.reservation)
            return
        keys = [place.key for place in save.reservation.places]
        self._service.commit(save.reservation, keys)
        if session is not None:
            blocks = session.record.saved_blocks + len(keys)
            session.note(saved_blocks=blocks, bytes_saved=blocks * self._service.layout.payload_bytes)
