"""What the query costs: TensorRT-LLM's whole engine stands still while kvferry answers it.

Engine and ranks are played; the leader's half, sessions, service and arena are the real ones. Nothing is waited for and
no bytes are copied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure, Goal
from kvferry.connector.bench.measure import percentile
from kvferry.connector.config import Config, ExplainConfig, HostConfig
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.trtllm.geometry import block_layout
from kvferry.engines.trtllm.reports import RankReport, Reporter
from kvferry.engines.trtllm.scheduler import SchedulerSide

__all__ = ["QUERY"]

_PAGE_TOKENS = 32
_PROMPTS_TOKENS = (2048, 8192, 32768)
_WARM_UP_REQUESTS = 12
"""More than the arena holds."""
_MODEL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "torch_dtype": "bfloat16",
}


class _PlayedEngine:
    """Takes prompts through the leader's hooks as the engine would, timing the query."""

    def __init__(self, folder: Path, prompt_tokens: int) -> None:
        (folder / "config.json").write_text(json.dumps(_MODEL))
        args = SimpleNamespace(
            model=str(folder), kv_cache_config=SimpleNamespace(tokens_per_block=_PAGE_TOKENS)
        )
        layout = block_layout(args, 0)
        slots = 8 * prompt_tokens // layout.block_tokens
        host = HostConfig(capacity=(slots + 1) * layout.slot_bytes + (1 << 20))
        self._side = SchedulerSide(args, Config(host=host, explain=ExplainConfig(enabled=False)))
        self._reporter = Reporter(self._side.mailbox.name, 0)
        self._next_id = 0
        self.offered_tokens = 0
        """In the last request."""
        self._report(RankReport(rank=0))

    def request(self, tokens: list[int]) -> float:
        """Serve one request; return the seconds that its query took."""
        self._next_id += 1
        pages = list(range(len(tokens) // _PAGE_TOKENS + 1))
        request = SimpleNamespace(
            request_id=self._next_id,
            prompt_len=len(tokens),
            max_new_tokens=16,
            get_tokens=lambda beam: list(tokens),
        )
        started = time.perf_counter()
        self.offered_tokens, _ = self._side.query(request, 0)
        seconds = time.perf_counter() - started
        self._side.allocated(request, pages)
        data = SimpleNamespace(
            request_id=self._next_id,
            new_tokens=tokens,
            new_block_ids=pages,
            computed_position=0,
            num_scheduled_tokens=len(tokens) - self.offered_tokens,
        )
        plan = self._side.plan_step(SimpleNamespace(new_requests=[data], cached_requests=[]))
        saved = {save.id: 1 for save in plan.jobs.saves}
        loaded = [load.request_id for load in plan.jobs.loads]
        self._report(RankReport(rank=0, report=WorkerReport(saved=saved), loaded=loaded))
        self._side.finished(request)
        self._side.iteration_ended()
        return seconds

    def _report(self, report: RankReport) -> None:
        while not self._reporter.send(report):
            self._side.take_reports()
        self._side.take_reports()

    def close(self) -> None:
        self._reporter.close()
        self._side.close()


def _measure(context: BenchContext) -> Sequence[Figure]:
    figures: list[Figure] = []
    for index, tokens in enumerate(_PROMPTS_TOKENS):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(_PROMPTS_TOKENS))

        engine = _PlayedEngine(context.directory(f"{tokens}-tokens"), tokens)
        try:
            seconds = _serve(engine, tokens, 20 if context.quick else 500, progress)
        finally:
            engine.close()
        goal = Goal(1.0, at_least=False) if tokens < 10_000 else None
        figures += [
            Figure(
                name=f"query for a {tokens:,}-token prompt, {what}",
                value=percentile(seconds, percent) * 1e3,
                unit="ms",
                goal=goal if percent == 99 else None,
                note="half of each shared, all of that leased, 64-token blocks",
            )
            for what, percent in (("median", 50), ("p99", 99))
        ]
    return figures


def _serve(
    engine: _PlayedEngine, prompt_tokens: int, requests: int, progress: Callable[[float], None]
) -> list[float]:
    """Serve prompts that share their first half; return each query's seconds, once the arena is full."""
    generator = np.random.default_rng(7)
    shared = generator.integers(0, 128_000, prompt_tokens // 2).tolist()
    seconds = []
    for index in range(_WARM_UP_REQUESTS + requests):
        tail = generator.integers(0, 128_000, prompt_tokens // 2).tolist()
        seconds.append(engine.request(shared + tail))
        progress((index + 1) / (_WARM_UP_REQUESTS + requests))
    return seconds[_WARM_UP_REQUESTS:]


QUERY = BenchCase("trtllm-query", "time that TensorRT-LLM stands still for a query", _measure)
