"""Pages of a GPU as transports copy them: some heads, page by page, for any number of threads, on a played GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from played_device import PlayedDevice
from staging_kit import HOSTILE, Case, ids, random_case, small_case

from kvferry.connector.errors import ClosedError, DeviceError, LayoutError
from kvferry.connector.layout import Shard
from kvferry.connector.staging import Bytes, HostStaging
from kvferry.connector.transport import Heads, PageStaging, narrow, page_block
from kvferry.cuda.batch import DirectPath, copy_each
from kvferry.cuda.staging import DevicePages, DeviceStaging
from kvferry.engines.vllm import gpu_pages
from kvferry.engines.vllm.gpu_pages import GpuPages


class Rank:
    """A rank's pages on a played GPU, and the same on the host."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.device = PlayedDevice(seed)
        self.device.activate()
        content = case.memory()
        held, self.memory = self.device.memory(content.nbytes)
        self.memory[:] = content
        self.host = content.copy()
        pages = DevicePages(held.address, content.nbytes, case.layout, case.block, case.shard)
        self.made: list[DevicePages] = []
        self.pages = GpuPages(pages, self._staging)

    @property
    def heads(self) -> Heads:
        return Heads(self.case.shard.first_head, self.case.shard.num_heads)

    def on_host(self, heads: Heads) -> PageStaging:
        layout, own = self.case.layout, Shard(0, 0, heads.count, True)
        block = page_block(self.case.block, layout.page_tokens, heads)
        return HostStaging(self.host, narrow(layout, self.case.shard, heads), block, own)

    def page_bytes(self, heads: Heads) -> int:
        return page_block(self.case.block, self.case.layout.page_tokens, heads).payload_bytes

    def _staging(self, pages: DevicePages) -> DeviceStaging:
        self.made.append(pages)

        def path(geometry):
            return DirectPath(self.device, pages.address, geometry, copy_each)

        return DeviceStaging(self.device, pages, path, lambda: 1)


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pages, "_ROOM_BYTES", 100)


def ranges(heads: Heads) -> Iterator[Heads]:
    for first in range(heads.first, heads.end):
        for end in range(first + 1, heads.end + 1):
            yield Heads(first, end - first)


def batches(rank: Rank, heads: Heads) -> tuple[np.ndarray, np.ndarray, Bytes]:
    rng = rank.case.rng
    pages = rng.permutation(rank.case.layout.num_pages)[:4].astype(np.int32).reshape(-1, 1)
    pages[rng.random(pages.shape) < 0.2] = -1
    arena = rng.integers(0, 256, (6, rank.page_bytes(heads) + int(rng.integers(0, 9))), dtype=np.uint8)
    return pages, rng.permutation(6)[: len(pages)], arena


@pytest.mark.parametrize("seed", range(40))
def test_every_range_of_heads_is_copied_as_on_the_host(seed: int) -> None:
    rank = Rank(random_case(seed), seed)
    for heads in ranges(rank.heads):
        staging, expected = rank.pages.stage(heads), rank.on_host(heads)
        page_ids, slots, arena = batches(rank, heads)
        found = arena.copy()
        expected.gather(page_ids, slots, arena)
        staging.gather(page_ids, slots, found)
        assert np.array_equal(found, arena)

        page_ids, slots, arena = batches(rank, heads)
        expected.scatter(page_ids, slots, arena)
        staging.scatter(page_ids, slots, arena)
        assert np.array_equal(rank.memory, rank.host)
    rank.pages.close()
    assert len(rank.device.allocations) == 1
    assert rank.device.registrations == []


def test_threads_share_what_is_held() -> None:
    rank = Rank(small_case())
    row = np.zeros((1, rank.page_bytes(rank.heads)), np.uint8)
    rank.on_host(rank.heads).gather(ids([1]), np.array([0]), row)
    found: list[bool] = []

    def read() -> None:
        staging, own = rank.pages.stage(rank.heads), np.zeros_like(row)
        for _ in range(10):
            own[:] = 0
            staging.gather(ids([1]), np.array([0]), own)
            found.append(np.array_equal(own, row))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40
    assert len(rank.made) == 1
    assert len(rank.device.registrations) == 1
    rank.pages.close()


def test_only_so_many_ranges_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pages, "_MOST_RANGES", 2)
    rank = Rank(small_case())
    stagings = [rank.pages.stage(Heads(first, 1)) for first in range(4)]
    for heads, staging in enumerate(stagings):
        row, expected = (np.zeros((1, rank.page_bytes(Heads(heads, 1))), np.uint8) for _ in range(2))
        staging.gather(ids([0]), np.array([0]), row)
        rank.on_host(Heads(heads, 1)).gather(ids([0]), np.array([0]), expected)
        assert np.array_equal(row, expected)
        assert len(rank.device.registrations) <= 2
    rank.pages.close()
    assert rank.device.registrations == []


@pytest.mark.parametrize(
    "how", ["a page behind the last", "a slot behind the last", "fractions", "narrow slots"]
)
def test_ids_that_do_not_exist_are_refused(how: str) -> None:
    page_ids, slots, why = HOSTILE[how]
    rank = Rank(small_case())
    before = rank.memory.copy()
    staging, arena = rank.pages.stage(rank.heads), np.zeros((3, rank.page_bytes(rank.heads)), np.uint8)
    for copy in (staging.gather, staging.scatter):
        with pytest.raises(LayoutError, match=why):
            copy(page_ids[:, 1:], slots, arena)
    assert not arena.any()
    assert np.array_equal(rank.memory, before)
    rank.pages.close()


def test_heads_of_other_ranks_are_refused() -> None:
    rank = Rank(small_case())
    with pytest.raises(LayoutError):
        rank.pages.stage(Heads(3, 2))
    assert rank.made == []


def test_after_close_nothing_is_copied() -> None:
    rank = Rank(small_case())
    staging = rank.pages.stage(rank.heads)
    rank.pages.close()
    rank.pages.close()
    with pytest.raises(ClosedError):
        staging.gather(ids([0]), np.array([0]), np.zeros((1, rank.page_bytes(rank.heads)), np.uint8))
    with pytest.raises(ClosedError):
        rank.pages.stage(rank.heads)


@pytest.mark.parametrize("is_save", [True, False])
def test_a_fault_of_the_gpu_leaves_nothing_under_way(is_save: bool) -> None:
    rank = Rank(small_case())
    staging, row = rank.pages.stage(rank.heads), np.zeros((1, rank.page_bytes(rank.heads)), np.uint8)
    rank.device.fails_at = len(rank.device.calls) + 4
    with pytest.raises(DeviceError):
        (staging.gather if is_save else staging.scatter)(ids([0]), np.array([0]), row)
    assert rank.device.is_idle()
    rank.pages.close()
