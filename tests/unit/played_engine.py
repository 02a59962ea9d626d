"""A small engine for tests: real sessions, stagers, service and arena; a model whose KV is checkable.

The "model" writes into every page a function of the whole token prefix, so a page that holds any other
request's, any older or any half-copied bytes is found at once. Ranks hold their own pages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from blake3 import blake3

from kvferry.connector.config import Config
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.explain import RequestRecord
from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import CacheService
from kvferry.connector.staging import Copies, HostStaging
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.jobs import StepJobs, WorkerReport
from kvferry.engines.request import RequestInfo
from kvferry.engines.session import EngineSessions, Peers
from kvferry.engines.stager import Stager, StagerResults

PAGE_TOKENS = 4
LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=8, head_dim=4, itemsize=2)
FINGERPRINT = bytes(range(32))
DEADLINE_S = 20.0


class GatedPages(HostStaging):
    """Copies only while its gate is open, so that a test decides how far copies lag behind."""

    gate: threading.Event

    @property
    def gathers(self) -> Copies:
        return _Gated(super().gathers, self.gate)

    @property
    def scatters(self) -> Copies:
        return _Gated(super().scatters, self.gate)


class _Gated:
    def __init__(self, copies: Copies, gate: threading.Event) -> None:
        self.copy, self.finish = copies.copy, copies.finish
        self._gate = gate

    def wait(self, mark: object) -> None:
        assert self._gate.wait(DEADLINE_S)


class Rank:
    """One worker: its heads' pages and its stager."""

    def __init__(self, rank: int, world_size: int, num_pages: int) -> None:
        self.shard = LAYOUT.shard(rank, world_size)
        heads = self.shard.num_heads
        self.pages = np.zeros(
            (LAYOUT.num_layers, num_pages, heads, PAGE_TOKENS, LAYOUT.token_bytes), np.uint8
        )
        layer, page, head, token, _ = self.pages.strides
        self.page_layout = PageLayout(
            num_pages=num_pages,
            page_tokens=PAGE_TOKENS,
            num_heads=heads,
            head_bytes=LAYOUT.head_dim * LAYOUT.itemsize,
            kv_factor=2,
            layer_offsets=tuple(layer * index for index in range(LAYOUT.num_layers)),
            page_stride=page,
            head_stride=head,
            token_stride=token,
            kv_stride=LAYOUT.head_dim * LAYOUT.itemsize,
        )
        staging = GatedPages(self.pages.reshape(-1), self.page_layout, LAYOUT, self.shard)
        staging.gate = self._gate = threading.Event()
        self.stager = Stager(staging, LAYOUT, self.shard, self._reads())
        self._submitted = 0
        self._results = StagerResults(set(), set(), set(), WorkerReport())

    def _reads(self) -> PeerReads | None:
        """What this rank reads from other engines' ranks through."""
        return None

    def submit(self, jobs: StepJobs) -> None:
        self.stager.submit_loads(jobs)
        self.stager.submit_saves(jobs)
        self._submitted += len(jobs.loads) + len(jobs.saves) + len(jobs.releases)

    def fence(self, jobs: StepJobs) -> None:
        if jobs.fences:
            self._gate.set()
            self.stager.fence(jobs.fences)
            self._copy_all()

    def collect(self) -> StagerResults:
        """Let every submitted copy happen and return all results."""
        self._copy_all()
        results = self._results
        self._results = StagerResults(set(), set(), set(), WorkerReport())
        return results

    def close(self) -> None:
        self._gate.set()
        self.stager.close()

    def _copy_all(self) -> None:
        self._gate.set()
        end = time.monotonic() + DEADLINE_S
        while self._submitted:
            assert time.monotonic() < end, "the stager does not report all jobs"
            fresh = self.stager.take_results()
            self._submitted -= len(fresh.released) + len(fresh.loaded) + len(fresh.report.saved)
            for mine, new in zip(self._results[:3], fresh[:3], strict=True):
                mine |= new
            self._results.report.merge(fresh.report)
        self._gate.clear()

    def write(self, page: int, offset: int, token_kv: np.ndarray) -> None:
        first = self.shard.first_head
        self.pages[:, page, :, offset] = token_kv[:, first : first + self.shard.num_heads]

    def holds(self, page: int, offset: int, token_kv: np.ndarray) -> bool:
        first = self.shard.first_head
        return np.array_equal(
            self.pages[:, page, :, offset], token_kv[:, first : first + self.shard.num_heads]
        )


class Request:
    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name = name
        self.tokens = tokens
        self.pages: list[int] = []
        self.computed = 0
        self.is_loading = False
        self.offered = 0
        self.is_aborted = False


def kv_of(tokens: list[int], count: int) -> Iterator[np.ndarray]:
    """Yield each token's KV, ``[layers, heads, bytes]``, from the prefix that ends with it."""
    shape = (LAYOUT.num_layers, LAYOUT.num_kv_heads, LAYOUT.token_bytes)
    hasher = blake3(b"model")
    for token in tokens[:count]:
        hasher.update(token.to_bytes(4, "little"))
        yield np.frombuffer(hasher.digest(length=int(np.prod(shape))), np.uint8).reshape(shape)


class PlayedEngine:
    """Schedules requests step by step as vLLM does; ``check`` fails on any wrong byte."""

    def __init__(
        self,
        config: Config,
        world_size: int = 1,
        num_pages: int = 24,
        clock: Callable[[], float] = time.monotonic,
        registry: PluginRegistry | None = None,
        service: CacheService | None = None,
        peers: Peers | None = None,
        make_rank: Callable[[int, int, int], Rank] = Rank,
    ) -> None:
        self.service = service or EmbeddedService(
            config, LAYOUT, FINGERPRINT, registry or PluginRegistry(config.plugins), clock=clock
        )
        self.clock = clock
        self.records: list[RequestRecord] = []
        self.sessions = EngineSessions(
            self.service, config, FINGERPRINT, PAGE_TOKENS, world_size, self.records.append, clock, peers
        )
        self.ranks = [make_rank(rank, world_size, num_pages) for rank in range(world_size)]
        self.free = list(range(num_pages))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.held: dict[str, list[int]] = {}
        self._send_counts: dict[str, int] = {}
        self._recv_counts: dict[str, int] = {}
        self._failed: set[str] = set()
        self._poisoned: list[int] = []
        self._names = 0

    def arrive(self, tokens: list[int], **facts: object) -> Request:
        self._names += 1
        request = Request(f"r{self._names}", tokens)
        self.sessions.open(RequestInfo(id=request.name, prompt_tokens=len(tokens), **facts))
        self.waiting.append(request)
        return request

    def step(self, chunk: int = 1 << 30, collect: bool = True) -> None:
        """One engine step: admit, compute up to ``chunk`` tokens of each request, move blocks.

        Without ``collect`` the step's copies lag behind, until a fence or a later step.
        """
        self.service.poll()
        for request in list(self.waiting):
            self._admit(request)
        scheduled = [
            (request, min(chunk, len(request.tokens) - request.computed)) for request in self.running
        ]
        scheduled = [(request, count) for request, count in scheduled if count > 0]
        assigned = [page for request, _ in scheduled for page in self._grow(request)]
        self.sessions.pages_assigned(assigned)
        for request, count in scheduled:
            self.sessions.computed(request.name, request.tokens, request.computed + count, request.pages)
        jobs = self._jobs()
        prompt_tokens = sum(
            count for request, count in scheduled if len(request.tokens) - request.computed > 1
        )
        self.sessions.prefill.step_planned(prompt_tokens, self.clock())
        for rank in self.ranks:
            rank.fence(jobs)
        for page in self._poisoned:
            for rank in self.ranks:
                rank.pages[:, page] = 0xEE
        self._poisoned = []
        for request, count in scheduled:
            self._forward(request, count)
        for rank in self.ranks:
            rank.submit(jobs)
        self.sessions.prefill.step_ended(self.clock())
        if collect:
            self._collect()

    def _jobs(self) -> StepJobs:
        return self.sessions.take_jobs()

    def settle(self) -> None:
        """Step until nothing is under way."""
        end = time.monotonic() + DEADLINE_S
        while self.sessions.has_pending() or self.held or self.service.has_pending():
            assert time.monotonic() < end, "the engine does not quiesce"
            self.step()
            time.sleep(0.0005)

    def run(self, tokens: list[int], chunk: int = 1 << 30) -> RequestRecord:
        """Serve one request to its end and return its record."""
        request = self.arrive(tokens)
        end = time.monotonic() + DEADLINE_S
        while request.computed < len(tokens):
            assert time.monotonic() < end, "the request does not end"
            self.step(chunk)
        self.finish(request)
        self.settle()
        return self.records[-1]

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        self._retire(request)

    def abort(self, request: Request) -> None:
        request.is_aborted = True
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        if request.is_loading:
            self.sessions.finish(request.name)
            self.held[request.name] = request.pages
        else:
            self._retire(request)

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.free += request.pages
        request.pages, request.computed = [], 0
        self.waiting.insert(0, request)

    def check(self, request: Request) -> None:
        for index, token_kv in enumerate(kv_of(request.tokens, request.computed)):
            page = request.pages[index // PAGE_TOKENS]
            for rank in self.ranks:
                assert rank.holds(page, index % PAGE_TOKENS, token_kv), (
                    f"{request.name}: wrong bytes at token {index}"
                )

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.service.close(5.0)

    def _retire(self, request: Request) -> None:
        if self.sessions.finish(request.name):
            self.held[request.name] = request.pages
        else:
            self.free += request.pages

    def _admit(self, request: Request) -> None:
        if request.is_loading:
            return
        offered = self.sessions.offer(request.name, request.tokens, 0)
        needed = -(-len(request.tokens) // PAGE_TOKENS)
        if offered is None or len(self.free) < needed:
            return
        if offered:
            count = -(-offered // PAGE_TOKENS)
            request.pages = [self.free.pop(0) for _ in range(count)]
            request.is_loading, request.offered = True, offered
            self.sessions.accept(request.name, request.pages, 0, offered)
            return
        self.waiting.remove(request)
        self.running.append(request)

    def _grow(self, request: Request) -> list[int]:
        missing = -(-len(request.tokens) // PAGE_TOKENS) - len(request.pages)
        fresh = [self.free.pop(0) for _ in range(max(0, min(missing, len(self.free))))]
        request.pages += fresh
        self._poisoned += fresh
        return fresh

    def _forward(self, request: Request, count: int) -> None:
        last = min(request.computed + count, len(request.pages) * PAGE_TOKENS)
        for index, token_kv in enumerate(kv_of(request.tokens, last)):
            if index >= request.computed:
                for rank in self.ranks:
                    rank.write(request.pages[index // PAGE_TOKENS], index % PAGE_TOKENS, token_kv)
        request.computed = last
        self.check(request)

    def _collect(self) -> None:
        report = WorkerReport()
        for rank in self.ranks:
            results = rank.collect()
            report.merge(results.report)
            self._failed |= results.failed_loads
            for name in results.loaded:
                self._recv_counts[name] = self._recv_counts.get(name, 0) + 1
            for name in results.released:
                self._send_counts[name] = self._send_counts.get(name, 0) + 1
        self.sessions.report(report)
        for name in self._complete(self._recv_counts):
            self._loaded(name)
        for name in self._complete(self._send_counts):
            self.free += self.held.pop(name)

    def _complete(self, counts: dict[str, int]) -> list[str]:
        done = [name for name, count in counts.items() if count == len(self.ranks)]
        for name in done:
            del counts[name]
        return done

    def _loaded(self, name: str) -> None:
        is_good = name not in self._failed
        self._failed.discard(name)
        self.sessions.load_finished(name, ok=is_good)
        if name in self.held:
            self.free += self.held.pop(name)
            return
        request = next(request for request in self.waiting if request.name == name)
        request.is_loading = False
        if not is_good:
            self.free += request.pages
            request.pages = []
            return
        request.computed = request.offered
        self.check(request)
        request.computed = min(request.computed, len(request.tokens) - 1)
        self.waiting.remove(request)
        self.running.append(request)
