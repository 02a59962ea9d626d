"""KVFerryConnector: the class vLLM instantiates, once per worker and once in the scheduler.

It only routes vLLM's hooks to the half that this process runs, and is the boundary at which an error of
ours stops: the hook answers as if there were no cache, the cache switches itself off with one clear
line, and the engine goes on.

Source of the interface: ``vllm/distributed/kv_transfer/kv_connector/v1/base.py``.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from kvferry.connector.errors import KVFerryError
from kvferry.connector.settings import Settings, load_settings
from kvferry.connector.transport import RemotePages
from kvferry.engines.jobs import StepJobs, WorkerReport
from kvferry.engines.stager import StagerResults
from kvferry.engines.vllm.compat import TransferResults, hit_sources
from kvferry.engines.vllm.geometry import unservable
from kvferry.engines.vllm.scheduler import SchedulerSide
from kvferry.engines.vllm.stats import KVFerryPromMetrics, KVFerryStats
from kvferry.engines.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KVFerryConnector"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class KVFerryMetadata(KVConnectorMetadata):
    """Scheduler to workers: the step's copies."""

    jobs: StepJobs = field(default_factory=StepJobs)


@dataclass
class KVFerryHandshakeMetadata(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: how other engines read this rank's pages."""

    pages: bytes = b""
    """A ``RemotePages`` in msgpack."""


@dataclass
class KVFerryWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler: what is through."""

    report: WorkerReport = field(default_factory=WorkerReport)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVFerryWorkerMetadata:
        """Merge another rank's report into this one."""
        assert isinstance(other, KVFerryWorkerMetadata)
        self.report.merge(other.report)
        return self


def _contained(
    neutral: Callable[[KVFerryConnector], R],
) -> Callable[[Callable[Concatenate[KVFerryConnector, P], R]], Callable[Concatenate[KVFerryConnector, P], R]]:
    """Answer ``neutral(self)`` instead of raising into the engine, and switch the cache off."""

    def wrap(
        hook: Callable[Concatenate[KVFerryConnector, P], R],
    ) -> Callable[Concatenate[KVFerryConnector, P], R]:
        @functools.wraps(hook)
        def contained(self: KVFerryConnector, *args: P.args, **kwargs: P.kwargs) -> R:
            started = time.perf_counter()
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
                self._fail(hook.__name__, error)
                return neutral(self)
            finally:
                self._hook_seconds += time.perf_counter() - started

        return contained

    return wrap


class KVFerryConnector(KVConnectorBase_V1):
    """vLLM's view of kvferry. See the package docstring for the flag that selects it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._results: StagerResults | None = None
        self._hook_seconds = 0.0
        _log_through_vllm()
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        try:
            settings = load_settings(extra, environ=os.environ)
            self._start(vllm_config, role, kv_cache_config, settings)
        except KVFerryError as error:
            logger.error("kvferry cannot start: %s", error)
            raise

    def _start(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
        settings: Settings,
    ) -> None:
        reason = unservable(vllm_config, kv_cache_config) if settings.config.enabled else "enabled = false"
        if reason:
            logger.warning("kvferry is off, the engine runs without external cache: %s", reason)
            return
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, settings)
            if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
                logger.warning(
                    'kv_load_failure_policy is "fail": a block that cannot be loaded ends its request with '
                    'an error; set it to "recompute"'
                )
            return
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self._worker = WorkerSide(vllm_config, kv_cache_config, settings, get_tensor_model_parallel_rank())

    def _fail(self, hook: str, error: Exception) -> None:
        logger.error("kvferry failed in %s and is off, the engine goes on without it", hook, exc_info=error)
        if self._scheduler is not None:
            self._scheduler.disable(f"internal error in {hook}: {error!r}")

    # -- worker ------------------------------------------------------------------------------------

    @_contained(lambda _: None)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the rank's pages."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    @_contained(lambda _: None)
    def get_handshake_metadata(self) -> KVFerryHandshakeMetadata | None:
        """Tell how other engines read this rank's pages; None when they cannot."""
        pages = self._worker.exported() if self._worker is not None else None
        return KVFerryHandshakeMetadata(msgspec.msgpack.encode(pages)) if pages is not None else None

    @_contained(lambda _: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata, *args: Any, **kw: Any) -> None:
        """Wait for the copies that still read pages which this step overwrites."""
        if self._worker is not None:
            self._worker.fence(_jobs(kv_connector_metadata))

    @_contained(lambda _: None)
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Submit the step's loads."""
        if self._worker is not None:
            self._worker.submit_loads(_jobs(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are asynchronous."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing per layer: blocks are saved whole, after the step."""

    @_contained(lambda _: None)
    def wait_for_save(self) -> None:
        """Submit the step's saves; their pages stay valid until they are reported. Waits where others are told next."""
        if self._worker is not None:
            self._worker.submit_saves(_jobs(self._get_connector_metadata()))

    def get_transfer_results(self, finished_req_ids: set[str]) -> TransferResults:
        """Report the loads and held requests that are through (vLLM 0.30 and newer)."""
        results = self._take_results()
        if results is None:
            return TransferResults()
        return TransferResults(
            finished_sending=results.released,
            finished_recving=results.loaded,
            failed_recving=results.failed_loads,
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report the loads and held requests that are through (vLLM 0.29)."""
        results = self._take_results()
        return (results.released or None, results.loaded or None) if results else (None, None)

    def _take_results(self) -> StagerResults | None:
        if self._worker is None:
            return None
        self._results = self._worker.take_results(_jobs(self._get_connector_metadata()))
        return self._results

    def build_connector_worker_meta(self) -> KVFerryWorkerMetadata | None:
        """Report the saves that are through."""
        results, self._results = self._results, None
        if results is None or results.report.is_empty():
            return None
        return KVFerryWorkerMetadata(results.report)

    # -- scheduler ---------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose blocks; nobody waits for them."""
        return False

    @_contained(lambda _: None)
    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Take in how other engines read the ranks' pages, by rank."""
        if self._scheduler is not None:
            ranks = [
                rank for _, rank in sorted(metadata.items()) if isinstance(rank, KVFerryHandshakeMetadata)
            ]
            self._scheduler.ranks_exported(
                [msgspec.msgpack.decode(rank.pages, type=RemotePages) for rank in ranks]
            )

    @_contained(lambda _: None)
    def on_new_request(self, request: Request) -> None:
        """Take note of a request."""
        if self._scheduler is not None:
            self._scheduler.new_request(request)

    @_contained(lambda _: (0, False))
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Offer tokens, always to be loaded asynchronously; None while slower tiers deliver."""
        if self._scheduler is None:
            return 0, False
        offered = self._scheduler.offer(request, num_computed_tokens)
        return offered, bool(offered)

    @_contained(lambda _: None)
    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the pages that vLLM made."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    @_contained(lambda _: {})
    def get_external_cache_hit_sources(self, request: Request, num_hit_tokens: int) -> dict[Any, int]:
        """Split hit tokens over vLLM's sources."""
        if self._scheduler is None:
            return {}
        return hit_sources(self._scheduler.hit_tokens_by_tier(request, num_hit_tokens))

    @_contained(lambda self: self._rescued())
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVFerryMetadata:
        """Plan the step's copies."""
        if self._scheduler is None:
            return KVFerryMetadata()
        return KVFerryMetadata(self._scheduler.plan_step(scheduler_output))

    def _rescued(self) -> KVFerryMetadata:
        """What was planned before planning failed: the engine waits for these loads."""
        return KVFerryMetadata(self._scheduler.planned() if self._scheduler else StepJobs())

    @_contained(lambda _: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what the workers report."""
        if self._scheduler is None:
            return
        meta = connector_output.kv_connector_worker_meta
        self._scheduler.workers_reported(
            connector_output.finished_recving or (),
            getattr(connector_output, "failed_recving", None) or (),
            meta.report if isinstance(meta, KVFerryWorkerMetadata) else None,
        )

    @_contained(lambda _: (False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; hold its pages while they are still being saved, or for another engine."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, block_ids)

    @_contained(lambda _: False)
    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping until the workers have reported their copies."""
        return self._scheduler is not None and self._scheduler.has_pending()

    @_contained(lambda _: ())
    def take_events(self) -> Iterable[KVCacheEvent]:
        """Return KV cache events for vLLM's publisher."""
        return () if self._scheduler is None else self._scheduler.take_events()

    @_contained(lambda _: False)
    def reset_cache(self) -> bool:
        """Forget every block in every tier: the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.clear()
        return True

    # -- both --------------------------------------------------------------------------------------

    @_contained(lambda _: None)
    def get_kv_connector_stats(self) -> KVFerryStats | None:
        """Return what was counted since the last call."""
        if self._scheduler is None:
            return None
        seconds, self._hook_seconds = self._hook_seconds, 0.0
        return self._scheduler.stats.take(seconds)

    @_contained(lambda _: None)
    def shutdown(self) -> None:
        """Release everything."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVFerryStats:
        """Rebuild stats in another process."""
        return KVFerryStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVFerryPromMetrics:
        """Create kvferry's metrics beside vLLM's."""
        return KVFerryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _log_through_vllm() -> None:
    """Give kvferry's loggers the handlers and the level that the operator chose for vLLM's."""
    ours, theirs = logging.getLogger("kvferry"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = theirs.propagate
        ours.setLevel(theirs.level)


def _jobs(metadata: KVConnectorMetadata) -> StepJobs:
    assert isinstance(metadata, KVFerryMetadata)
    return metadata.jobs
