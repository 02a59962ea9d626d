"""Staging on the host: the contract, and what is its own."""

import sys
import threading

import numpy as np
import pytest
from staging_kit import MakeRig, Rig, StagingTests, ids, page_layout

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import HostStaging


class TestHostStaging(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return lambda memory, *about: Rig(HostStaging(memory, *about), lambda: memory)


def test_pages_beyond_the_engines_memory_are_refused() -> None:
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=8, head_dim=4, itemsize=2)
    layout = page_layout("hnd_fused", np.random.default_rng(0), 2, 2, 4, 8)
    with pytest.raises(LayoutError, match="span"):
        HostStaging(np.zeros(layout.extent_bytes() - 1, np.uint8), layout, block, block.shard(0, 1))
    with pytest.raises(LayoutError, match="contiguous"):
        HostStaging(np.zeros(2 * layout.extent_bytes(), np.uint8)[::2], layout, block, block.shard(0, 1))


def test_copies_release_the_gil() -> None:
    block = BlockLayout(num_layers=32, num_kv_heads=16, block_tokens=64, head_dim=64, itemsize=2)
    layout = page_layout("kv_separate", np.random.default_rng(0), 16, 32, 64, 128)
    staging = HostStaging(np.ones(layout.extent_bytes(), np.uint8), layout, block, block.shard(0, 1))
    arena = np.zeros((1, block.slot_bytes), np.uint8)

    def runs_during_a_copy() -> bool:
        started, ended = threading.Event(), threading.Event()

        def copy() -> None:
            started.set()
            staging.gather(ids([0]), np.array([0]), arena)
            ended.set()

        thread = threading.Thread(target=copy, name="copier")
        thread.start()
        started.wait(20)
        met_it = not ended.is_set()
        thread.join(20)
        return met_it

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is asked to give the GIL up: this thread runs if it is released
    try:
        assert any(runs_during_a_copy() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
