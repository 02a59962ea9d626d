"""Played engines that hand over: real sessions, leases, side channel and transport, in one process.

A ``HandingEngine`` is a ``PlayedEngine`` whose ranks export their pages and read others', and whose finished requests'
pages are held for whoever comes for them. The pages' bytes are a function of the tokens, so that whatever is read
wrongly is found at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec
from played_engine import DEADLINE_S, FINGERPRINT, LAYOUT, PlayedEngine, Rank, Request
from transport_kit import rank_over

from kvferry.connector.config import Config, HostConfig, PeerConfig
from kvferry.connector.registry import PluginRegistry
from kvferry.engines.handoff.exporting import PageExports, export_pages
from kvferry.engines.handoff.handoffs import Handoffs
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.handoff.roles import ROLES
from kvferry.engines.handoff.transports import chosen, context, usable
from kvferry.engines.jobs import StepJobs, WorkerReport

__all__ = ["BLOCK", "HandingEngine", "config"]

BLOCK = LAYOUT.block_tokens
PEER = PeerConfig(transport="socket", lease_s=DEADLINE_S, deadline_s=5.0)
TRANSPORTS = chosen(PluginRegistry(["kvferry.plugins.peer"], use_entry_points=False), PEER)


def config(slots: int = 64, **peer: object) -> Config:
    changed = msgspec.structs.replace(PEER, **peer)
    return Config(host=HostConfig(capacity=(slots + 2) * LAYOUT.slot_bytes), peer=changed)


class HandingRank(Rank):
    """A rank whose pages others read, and that reads others'."""

    def __init__(self, settings: Config, name: str, rank: int, world_size: int, num_pages: int) -> None:
        self._settings = settings
        self._name = f"{name}-{rank}"
        self.exports: PageExports | None = None
        super().__init__(rank, world_size, num_pages)

    def _reads(self) -> PeerReads:
        peer = self._settings.peer
        memory = rank_over(self.pages.reshape(-1), self.page_layout, LAYOUT, self.shard).memory
        about = context(self._settings, self._name)
        self.exports = export_pages(memory, TRANSPORTS, about, peer.verify)
        return PeerReads(memory, usable(TRANSPORTS, memory), about, peer)

    def submit(self, jobs: StepJobs) -> None:
        assert self.exports is not None
        self.exports.submit(jobs.exports)
        super().submit(jobs)

    def digests(self) -> WorkerReport:
        assert self.exports is not None
        return WorkerReport(digests=self.exports.take_digests())

    def close(self) -> None:
        super().close()
        assert self.exports is not None
        self.exports.close()


class HandingEngine(PlayedEngine):
    """One of the two engines of a handoff, or both in one.

    Args:
        name: Its engine id.
        settings: Its configuration.
        world_size: Its ranks.
    """

    def __init__(
        self, name: str, settings: Config | None = None, world_size: int = 1, num_pages: int = 24
    ) -> None:
        settings = settings or config()
        self.name = name
        self.handoffs = Handoffs(settings, ROLES["kv_both"], FINGERPRINT, name, num_pages)
        super().__init__(
            settings,
            world_size,
            num_pages,
            peers=self.handoffs,
            make_rank=partial(HandingRank, settings, name),
        )
        self._num_pages = num_pages
        self.given = self.digested = 0
        self.handoffs.start([rank.exports.pages for rank in self.ranks])

    def arrive(self, tokens: list[int], params: object = None, **facts: object) -> Request:
        request = super().arrive(tokens, **facts)
        if params is not None:
            self.handoffs.arrived(request.name, params)
        return request

    def step(self, chunk: int = 1 << 30, collect: bool = True) -> None:
        for name in self.handoffs.take_ended():
            self.sessions.release(name)
        super().step(chunk, collect)
        for rank in self.ranks:
            report = rank.digests()
            self.digested += len(report.digests)
            self.handoffs.report(report)

    def _jobs(self) -> StepJobs:
        jobs = super()._jobs()
        jobs.exports = self.handoffs.take_exports()
        return jobs

    def prefill(self, tokens: list[int], **facts: object) -> dict[str, object] | None:
        """Compute a prompt, hold its pages, and return what a router is told."""
        request = self.arrive(tokens, {"do_remote_decode": True}, **facts)
        self.work_until(lambda: request.computed == len(tokens))
        return self.hand_over(request)

    def hand_over(self, request: Request) -> dict[str, object] | None:
        """End a request, hold its pages, and have them digested: whoever reads them waits for that."""
        assert self.handoffs.is_wanted(request.name)
        self.running.remove(request)
        content = self.sessions.content(request.name, request.tokens)
        params = self.handoffs.hand_over(request.name, request.pages, request.computed, content)
        self.handoffs.finished(request.name)
        self.given += params is not None
        if self.sessions.finish(request.name, is_held=params is not None):
            self.held[request.name] = request.pages
        else:
            self.free += request.pages
        if params is not None:
            self.work_until(lambda: self.digested == len(self.ranks) * self.given)
        return params

    def decode(self, tokens: list[int], params: object, **facts: object) -> Request:
        """Serve a request that another engine prefilled, until its whole prompt is computed."""
        request = self.arrive(tokens, params, **facts)
        self.work_until(lambda: request.computed == len(tokens))
        return request

    def work_until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < end, "the engine does not get there"
            self.step()
            time.sleep(0.0005)

    def is_at_rest(self) -> bool:
        """Tell whether every page is free and nothing is held for anybody."""
        return sorted(self.free) == list(range(self._num_pages)) and not len(self.handoffs.table)

    def close(self) -> None:
        self.handoffs.close()
        super().close()
