"""The two classes that TensorRT-LLM instantiates: the leader's, in rank 0, and the worker's, in every rank.

They only route the engine's hooks to the two halves, and are the boundary at which an error of ours stops: the hook
answers as if there were no cache, the cache switches itself off with one clear line, and the engine goes on. With one
exception: the engine counts a load's tokens as computed once they are promised. While a promise is open that may not
be kept, the error is let through, which stops the engine; its output would be wrong.

Source of the interface: ``tensorrt_llm/_torch/pyexecutor/connectors/kv_cache_connector.py``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from kvferry.connector.config import Config
from kvferry.connector.errors import KVFerryError, LayoutError
from kvferry.engines.trtllm.compat import installed, interface, mpi_rank
from kvferry.engines.trtllm.geometry import tp_size
from kvferry.engines.trtllm.options import load_config
from kvferry.engines.trtllm.plan import StepPlan
from kvferry.engines.trtllm.refusals import cautions, unservable
from kvferry.engines.trtllm.scheduler import SchedulerSide
from kvferry.engines.trtllm.worker import WorkerSide

__all__ = ["KVFerryScheduler", "KVFerryWorker"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

_interface: Any = interface()
_leaders: weakref.WeakValueDictionary[str, SchedulerSide] = weakref.WeakValueDictionary()
"""This process's leaders by their mailbox's name. Rank 0's worker runs in its leader's thread and looks into the
mailbox in every turn of the engine's loop, also when no step is planned."""


class KVFerryScheduler(_interface.KvCacheConnectorScheduler):  # type: ignore[misc]
    """TensorRT-LLM's view of kvferry in the leader. See the package docstring for how it is selected."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._side: SchedulerSide | None = None
        self._has_failed = False
        try:
            config, reason = _servable(llm_args)
            if reason:
                logger.warning("kvferry is off, the engine runs without external cache: %s", reason)
                return
            for caution in cautions(llm_args):
                logger.warning("%s", caution)
            logger.info("TensorRT-LLM %s, connector dialect %s", *installed())
            self._side = SchedulerSide(llm_args, config)
        except KVFerryError as error:
            logger.error("kvferry cannot start: %s", error)
            raise
        _leaders[self._side.mailbox.name] = self._side
        # The interface has no hook for the engine's end.
        weakref.finalize(self, self._side.close)

    def _fail(self, hook: str, error: Exception) -> None:
        _log_failure(hook, error, is_first=not self._has_failed)
        self._has_failed = True
        if self._side is not None:
            self._side.disable(f"internal error in {hook}: {error!r}")

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int, *_: object
    ) -> tuple[int, bool]:
        """Offer tokens that are certain, and tell whether they are loaded beside the engine's steps."""
        if self._side is None:
            return 0, False
        try:
            return self._side.query(request, num_computed_tokens)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail("get_num_new_matched_tokens", error)
            return 0, False

    def update_state_after_alloc(self, request: Any, block_ids: Sequence[int], *_: object) -> None:
        """Plan the load into the pages that the engine made."""
        self._allocated(request, [block_ids])

    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids: Any, *_: object) -> None:
        """Plan the load into the pages that the engine made, of the one layer group."""
        self._allocated(request, block_ids)

    def _allocated(self, request: Any, by_group: Any) -> None:
        if self._side is None:
            return
        try:
            self._side.allocated(request, _one_group(by_group))
        except Exception as error:
            self._fail("update_state_after_alloc", error)
            if self._side.has_offered(request):
                raise

    def build_connector_meta(self, scheduler_output: Any, *_: object) -> StepPlan:
        """Plan the step's copies."""
        if self._side is None:
            return StepPlan()
        try:
            return self._side.plan_step(scheduler_output)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail("build_connector_meta", error)
        try:
            return self._side.planned()
        except Exception:
            if self._side.has_promised():
                raise
            return StepPlan()

    def request_finished(self, request: Any, cache_block_ids: Sequence[int], *_: object) -> bool:
        """Forget a request; its pages stay while they are saved or loaded."""
        return self._finished(request)

    def request_finished_by_layer_group(self, request: Any, cache_block_ids: Any, *_: object) -> bool:
        """Forget a request; its pages stay while they are saved or loaded."""
        return self._finished(request)

    def _finished(self, request: Any) -> bool:
        if self._side is None:
            return False
        try:
            return self._side.finished(request)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail("request_finished", error)
            # The ranks answer for it once their copies are through.
            return True


class KVFerryWorker(_interface.KvCacheConnectorWorker):  # type: ignore[misc]
    """TensorRT-LLM's view of kvferry in a rank."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._side: WorkerSide | None = None
        self._has_failed = False
        self._rank = mpi_rank()
        self._mailbox = ""
        try:
            config, reason = _servable(llm_args)
            if reason:
                return
            self._side = WorkerSide(llm_args, config, self._rank, tp_size(llm_args))
        except KVFerryError as error:
            logger.error("kvferry cannot start in rank %d: %s", self._rank, error)
            raise
        weakref.finalize(self, self._side.close)

    def _fail(self, hook: str, error: Exception) -> None:
        _log_failure(hook, error, is_first=not self._has_failed)
        self._has_failed = True
        if self._side is not None:
            self._side.fail(f"internal error in {hook} of rank {self._rank}: {error!r}")

    def _fail_or_stop(self, hook: str, error: Exception, *, is_promised: bool) -> None:
        """Go on without the cache, unless tokens count as computed that may never come."""
        if is_promised or (self._side is not None and self._side.has_loads()):
            logger.critical("the engine is stopped, its output would be wrong: %s", error)
            raise error
        self._fail(hook, error)

    def register_forward_pass_callable(self) -> None:
        """Nothing to be called: saves begin in ``wait_for_save``, behind a mark on the engine's stream."""

    def register_kv_caches(self, kv_cache_tensor: Any, *_: object) -> None:
        """Take the rank's pages, from the first cache manager."""
        if self._side is not None:
            self._side.register(kv_cache_tensor)

    def register_kv_cache_layout(self, layout: Any, *_: object) -> None:
        """Take the rank's pages, from the second cache manager."""
        if self._side is not None:
            self._side.register_layout(layout)

    def bind_connector_meta(self, metadata: object) -> None:
        """Take the step's plan."""
        super().bind_connector_meta(metadata)
        if self._side is None or not isinstance(metadata, StepPlan):
            return
        self._mailbox = metadata.mailbox or self._mailbox
        try:
            self._side.bind(metadata)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail_or_stop("bind_connector_meta", error, is_promised=bool(metadata.jobs.loads))

    def start_load_kv(self, stream: Any) -> None:
        """Submit the step's loads, and wait for those that its forward pass needs."""
        if self._side is None:
            return
        is_promised = self._side.has_loads()
        try:
            self._side.start_loads(stream)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail_or_stop("start_load_kv", error, is_promised=is_promised)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing to wait for: what the forward pass reads is there before it begins."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing per layer: blocks are saved whole, after the step."""

    def wait_for_save(self, stream: Any) -> None:
        """Submit the step's saves; their pages stay valid until they are reported."""
        if self._side is None:
            return
        try:
            self._side.save(stream)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            # Never let through: the engine would go on, with pages of failed requests up for reuse.
            self._fail("wait_for_save", error)
        self._with_leader("wait_for_save", SchedulerSide.settle)

    def get_finished(
        self, finished_gen_req_ids: Iterable[int], started_loading_req_ids: Iterable[int]
    ) -> tuple[list[int], list[int]]:
        """Tell which pages are not touched any more, and which loads are over. Does not block."""
        if self._side is None:
            return list(finished_gen_req_ids), []
        finished: tuple[list[int], list[int]] = [], []
        try:
            finished = self._side.take_finished(
                finished_gen_req_ids, started_loading_req_ids, self._is_settled
            )
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            self._fail_or_stop("get_finished", error, is_promised=False)
        self._with_leader("get_finished", SchedulerSide.iteration_ended)
        return finished

    def _leader(self) -> SchedulerSide | None:
        return _leaders.get(self._mailbox) if self._rank == 0 else None

    def _is_settled(self, request_id: int) -> bool:
        """Whether the saves of a finished request are settled; the leader's rank alone waits for that."""
        is_settled = self._with_leader("get_finished", lambda leader: leader.is_settled(request_id))
        return is_settled is not False

    def _with_leader(self, hook: str, ask: Callable[[SchedulerSide], R]) -> R | None:
        """Have the leader do something, if it is in this process; None if not, or if it fails."""
        leader = self._leader()
        if leader is None:
            return None
        try:
            return ask(leader)
        except Exception as error:  # noqa: BLE001  # boundary: an engine must survive its cache
            _log_failure(hook, error, is_first=not self._has_failed)
            self._has_failed = True
            leader.disable(f"internal error in {hook}: {error!r}")
            return None


def _servable(llm_args: object) -> tuple[Config, str]:
    """Return the configuration, and why this engine runs without kvferry; empty if it does not."""
    config = load_config(llm_args)
    return config, unservable(llm_args) if config.enabled else "enabled = false"


def _one_group(by_group: Any) -> Sequence[int]:
    groups = list(by_group.values() if isinstance(by_group, Mapping) else by_group)
    if len(groups) != 1:
        raise LayoutError(f"pages of {len(groups)} layer groups; kvferry serves one")
    pages: Sequence[int] = groups[0]
    return pages


def _log_failure(hook: str, error: Exception, *, is_first: bool) -> None:
    level = logging.ERROR if is_first else logging.DEBUG
    logger.log(level, "kvferry failed in %s and is off, the engine goes on without it", hook, exc_info=error)
