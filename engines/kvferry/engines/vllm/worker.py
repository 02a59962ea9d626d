"""The worker half: this rank's pages, the start-up self-test, and the stager that copies.

Owned by vLLM's worker thread; ``connector`` calls it and catches what it raises.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError, KVFerryError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import Settings
from kvferry.connector.staging import Bytes, Copies, HostStaging, PageIds, SlotIds, Staging
from kvferry.connector.transport import RemotePages
from kvferry.cuda.choice import PathName, Proof, staging_by, unproved
from kvferry.cuda.staging import DevicePages, DeviceStaging
from kvferry.engines.gpu_staging import gpu_staging
from kvferry.engines.handoff.exporting import PageExports, export_pages
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.handoff.roles import ROLES
from kvferry.engines.handoff.transports import chosen, context, usable
from kvferry.engines.jobs import StepJobs, WorkerReport
from kvferry.engines.roundtrip import RoundTrip
from kvferry.engines.stager import Stager, StagerResults
from kvferry.engines.vllm.affinity import unbound
from kvferry.engines.vllm.geometry import attention_spec, block_layout, page_layout, pages_array
from kvferry.engines.vllm.gpu_pages import GpuPages
from kvferry.engines.vllm.memory import page_memory
from kvferry.engines.vllm.packing import PLAIN, PageOrder, page_order, token_writer

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["WorkerSide"]

logger = logging.getLogger(__name__)

_HANDOFF_RING_BYTES = 4 << 20
"""``cuda.ring_bytes`` of each range of heads that others read: pages go in small pieces there."""


class WorkerSide:
    """What the connector does in one of vLLM's worker processes.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: vLLM's KV cache plan, of one attention group.
        settings: kvferry's effective configuration.
        tp_rank: This worker's tensor-parallel rank.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings, tp_rank: int
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = settings.config
        self._layout = block_layout(vllm_config, kv_cache_config, settings.config.block_tokens)
        self._shard = self._layout.shard(tp_rank, vllm_config.parallel_config.tensor_parallel_size)
        transfer = vllm_config.kv_transfer_config
        self._role = ROLES[transfer.kv_role]
        self._name = f"{transfer.engine_id[:64]}-{tp_rank}-{secrets.token_hex(4)}"
        self._stager: Stager | None = None
        self._exports: PageExports | None = None
        self._gpu_pages: GpuPages | None = None
        self._problem = ""

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take this rank's pages and prove that blocks survive the way through them."""
        names = self._kv_cache_config.kv_cache_groups[0].layer_names
        layers = [kv_caches[name] for name in names]
        try:
            num_pages, cuda = self._kv_cache_config.num_blocks, self._config.cuda
            page_tokens = page_layout(layers, self._layout).page_tokens
            order = page_order(self._vllm_config, attention_spec(self._kv_cache_config), page_tokens)
            # Also where nothing is tested: layers that something else writes are refused.
            write = token_writer(self._vllm_config, names, layers) if order.packing is not None else None
            proof = RoundTrip(layers, self._layout, self._shard, write) if self._config.self_test else None
            staging = _staging(layers, num_pages, self._layout, self._shard, cuda, proof or unproved, order)
        except KVFerryError as error:
            self._problem = f"rank {self._shard.rank}: the start-up self-test failed: {error}"
            logger.error("kvferry is off on %s", self._problem)
            return
        if isinstance(staging.kernel_pages, DeviceStaging):
            path = cast(PathName, staging.kernel_pages.path_name)
            self._gpu_pages = _gpu_pages(layers, self._layout, self._shard, cuda, path)
        has_doubts = proof is not None and proof.has_refused and self._gpu_pages is None
        with unbound():
            peers = self._open_handoffs(layers, order, has_doubts)
            self._stager = Stager(staging, self._layout, self._shard, peers, order.encoding)

    def _open_handoffs(
        self, layers: list[torch.Tensor], order: PageOrder, has_doubts: bool
    ) -> PeerReads | None:
        """Make this rank's pages readable for others, and others' for it, as far as the role goes.

        Others read pages by their addresses. With doubts about these, which torch's copies do without, nobody may.
        """
        peer = self._config.peer
        if not self._role.is_on(peer.enabled):
            return None
        try:
            if has_doubts:
                raise LayoutError("blocks that go by the addresses of its pages come back different")
            num_pages = self._kv_cache_config.num_blocks
            memory = page_memory(layers, num_pages, self._layout, self._shard, self._gpu_pages, order)
            transports = chosen(PluginRegistry(self._config.plugins), peer)
        except KVFerryError as error:
            logger.error("rank %d takes part in no handoff: %s", self._shard.rank, error)
            return None
        about = context(self._config, self._name)
        if self._role.gives:
            self._exports = export_pages(memory, transports, about, peer.verify)
        return PeerReads(memory, usable(transports, memory), about, peer) if self._role.takes else None

    def exported(self) -> RemotePages | None:
        """Return how other engines read this rank's pages; None when they cannot."""
        return self._exports.pages if self._exports is not None else None

    def fence(self, jobs: StepJobs) -> None:
        """Wait for the saves whose pages this step overwrites."""
        if self._stager is not None:
            self._stager.fence(jobs.fences)

    def submit_loads(self, jobs: StepJobs) -> None:
        """Queue the step's loads; without a stager they fail at once."""
        if self._stager is not None:
            self._stager.submit_loads(jobs)

    def submit_saves(self, jobs: StepJobs) -> None:
        """Queue the step's saves and releases. If others are told of the step, wait until they are through."""
        if self._exports is not None:
            self._exports.submit(jobs.exports)
        if self._stager is not None:
            self._stager.submit_saves(jobs)
            if jobs.is_awaited:
                self._stager.wait_saved(jobs, self._config.peer.commit_wait_s)

    def take_results(self, jobs: StepJobs) -> StagerResults:
        """Return what was finished; ``jobs`` are this step's, answered at once when nothing works."""
        if self._stager is not None:
            results = self._stager.take_results()
            if self._exports is not None:
                results.report.digests = self._exports.take_digests()
            return results
        return _all_failed(jobs, self._problem or "the KV cache was never registered")

    def close(self) -> None:
        """Stop the stager, and let nobody read any more."""
        if self._stager is not None:
            self._stager.close()
        if self._exports is not None:
            self._exports.close()
        if self._gpu_pages is not None:
            try:
                self._gpu_pages.close()
            except DeviceError:
                logger.exception("rank %d could not close its pages", self._shard.rank)


class _ManagerPages:
    """Stages by vLLM's page ids where the kernel splits each page into several smaller ones."""

    def __init__(self, kernel_pages: Staging, ratio: int) -> None:
        self.kernel_pages = kernel_pages
        self.pages_per_block = kernel_pages.pages_per_block // ratio
        self.gathers: Copies = _SplitPages(kernel_pages.gathers, ratio)
        self.scatters: Copies = _SplitPages(kernel_pages.scatters, ratio)

    def mark(self) -> object:
        return self.kernel_pages.mark()

    def detach(self, arena: Bytes) -> None:
        self.kernel_pages.detach(arena)

    def close(self) -> None:
        self.kernel_pages.close()


class _SplitPages:
    """One direction by vLLM's page ids."""

    def __init__(self, by_kernel_pages: Copies, ratio: int) -> None:
        self._by_kernel_pages = by_kernel_pages
        self._ratio = ratio

    def wait(self, mark: object) -> None:
        self._by_kernel_pages.wait(mark)

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._by_kernel_pages.copy(self._split(page_ids), slots, arena)

    def finish(self) -> None:
        self._by_kernel_pages.finish()

    def _split(self, page_ids: PageIds) -> PageIds:
        """Name the kernel's pages; ids too large for the engine stay too large, negative ones stay negative."""
        if self._ratio == 1:
            return page_ids
        parts = page_ids.astype(np.int64)[:, :, np.newaxis] * self._ratio + np.arange(self._ratio)
        parts[page_ids < 0] = -1
        return np.minimum(parts, np.iinfo(np.int32).max).astype(np.int32).reshape(len(page_ids), -1)


def _staging(
    layers: list[torch.Tensor],
    num_pages: int,
    block: BlockLayout,
    shard: Shard,
    cuda: CudaConfig,
    prove: Proof,
    order: PageOrder = PLAIN,
) -> _ManagerPages:
    """Return what stages this rank's blocks, once ``prove`` has let it through by the kernel's pages."""
    layout = page_layout(layers, block, order)
    ratio = layout.num_pages // num_pages
    if layers[0].device.type == "cpu":
        on_host = HostStaging(pages_array(layers[0]), layout, block, shard)
        prove(on_host)
        return _ManagerPages(on_host, ratio)
    pages = _device_pages(layers, layout, block, shard)
    return _ManagerPages(gpu_staging(layers, pages, cuda, prove), ratio)


def _device_pages(
    layers: list[torch.Tensor], layout: PageLayout, block: BlockLayout, shard: Shard
) -> DevicePages:
    storage = layers[0].untyped_storage()
    return DevicePages(storage.data_ptr(), storage.nbytes(), layout, block, shard)


def _gpu_pages(
    layers: list[torch.Tensor], block: BlockLayout, shard: Shard, cuda: CudaConfig, path: PathName
) -> GpuPages:
    """Return what stages single pages, by the path that was chosen for blocks.

    No other path takes its place where there is no room for it: an engine that serves has no pages to prove one on.
    """
    index = layers[0].device.index or 0
    config = msgspec.structs.replace(cuda, ring_bytes=min(cuda.ring_bytes, _HANDOFF_RING_BYTES))
    pages = _device_pages(layers, page_layout(layers, block), block, shard)
    return GpuPages(pages, lambda some: staging_by(index, some, config, path, lambda: 0))


def _all_failed(jobs: StepJobs, problem: str) -> StagerResults:
    loads = {load.request_id for load in jobs.loads}
    saves = [save.id for save in jobs.saves]
    report = WorkerReport(saved=dict.fromkeys(saves, 1), failed_saves=set(saves), problem=problem)
    return StagerResults(set(jobs.releases), loads, set(loads), report)
