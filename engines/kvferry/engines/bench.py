"""What kvferry costs an engine's scheduler per request: everything a request does there, timed.

The engine is played by a loop; sessions, service, manager and arena are the real ones. Bytes are not
copied: workers do that elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure, Goal
from kvferry.connector.bench.measure import percentile
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.request import RequestInfo
from kvferry.engines.session import EngineSessions

__all__ = ["SCHEDULER"]

_PAGE_TOKENS = 16
_BLOCK_TOKENS = 64
_PROMPTS_TOKENS = (2048, 8192)
_CHUNK_TOKENS = 2048
_WARM_UP_REQUESTS = 20
"""More than the arena holds."""
_LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=_BLOCK_TOKENS, head_dim=16, itemsize=2)


class _PlayedEngine:
    """Takes prompts through sessions as an engine's scheduler would, timing what sessions take."""

    def __init__(self, slots: int) -> None:
        host = HostConfig(capacity=(slots + 1) * _LAYOUT.slot_bytes + (1 << 20))
        config = Config(host=host)
        self.service = EmbeddedService(config, _LAYOUT, bytes(32), PluginRegistry())
        self._sessions = EngineSessions(
            self.service, config, bytes(32), _PAGE_TOKENS, 1, on_record=lambda record: None
        )
        self._next_id = 0

    def request(self, tokens: list[int]) -> float:
        """Serve one request; return the seconds spent in sessions."""
        self._next_id += 1
        name, pages = f"bench-{self._next_id}", list(range(len(tokens) // _PAGE_TOKENS + 1))
        started = time.perf_counter()
        self._sessions.open(RequestInfo(id=name, prompt_tokens=len(tokens)))
        offered = self._sessions.offer(name, tokens, 0) or 0
        if offered:
            self._sessions.accept(name, pages, 0, offered)
            self._step()
            self._sessions.load_finished(name, ok=True)
        for computed in range(min(offered + _CHUNK_TOKENS, len(tokens)), len(tokens) + 1, _CHUNK_TOKENS):
            self._sessions.computed(name, tokens, computed, pages)
            self._step()
        self._sessions.finish(name)
        return time.perf_counter() - started

    def _step(self) -> None:
        self.service.poll()
        jobs = self._sessions.take_jobs()
        self._sessions.report(WorkerReport(saved={save.id: 1 for save in jobs.saves}))


def _measure(context: BenchContext) -> Sequence[Figure]:
    figures: list[Figure] = []
    for index, tokens in enumerate(_PROMPTS_TOKENS):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(_PROMPTS_TOKENS))

        seconds = _serve(tokens, 40 if context.quick else 1000, progress)
        note = f"half of each shared, {_BLOCK_TOKENS}-token blocks, every store evicts"
        figures += [
            Figure(
                name=f"scheduler time of a {tokens:,}-token prompt, {what}",
                value=percentile(seconds, percent) * 1e3,
                unit="ms",
                goal=goal,
                note=note,
            )
            for what, percent, goal in (("median", 50, None), ("p99", 99, Goal(1.0, at_least=False)))
        ]
    return figures


def _serve(prompt_tokens: int, requests: int, progress: Callable[[float], None]) -> list[float]:
    """Serve prompts that share their first half; return each one's seconds, once the arena is full."""
    generator = np.random.default_rng(7)
    engine = _PlayedEngine(slots=8 * prompt_tokens // _BLOCK_TOKENS)
    shared = generator.integers(0, 128_000, prompt_tokens // 2).tolist()
    seconds = []
    try:
        for index in range(_WARM_UP_REQUESTS + requests):
            tail = generator.integers(0, 128_000, prompt_tokens // 2).tolist()
            seconds.append(engine.request(shared + tail))
            progress((index + 1) / (_WARM_UP_REQUESTS + requests))
    finally:
        engine.service.close(1.0)
    return seconds[_WARM_UP_REQUESTS:]


SCHEDULER = BenchCase("scheduler", "time a request spends in kvferry's scheduler side", _measure)
