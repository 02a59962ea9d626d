"""What a load waits for while the same rank saves: a stager on engine pages in host memory.

    python benchmarks/load_beside_saves.py

A load of 8 blocks of 8 MiB is timed from its submission to its report, alone and 5 ms behind a save of 64 blocks; and
how long both take together, against the sum of either alone. Medians of 15 rounds; sides take turns.
"""

from __future__ import annotations

import time

import numpy as np

from kvferry.connector.arena import Arena
from kvferry.connector.bench.host import engine_memory, page_layout
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import HostStaging
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs
from kvferry.engines.stager import Stager

BLOCK = BlockLayout(num_layers=32, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2)
PAGE_TOKENS = 16
SAVED, LOADED = 64, 8
HEAD_START_S = 0.005
ROUNDS = 15


class Rank:
    """A stager over pages of its own."""

    def __init__(self) -> None:
        self.per_block = BLOCK.block_tokens // PAGE_TOKENS
        layout = page_layout(BLOCK, "heads", PAGE_TOKENS, (SAVED + LOADED) * self.per_block)
        self.arena = Arena.create(SAVED + LOADED, BLOCK.slot_bytes)
        self.arena.slots_array[:] = 1
        shard = BLOCK.shard(0, 1)
        staging = HostStaging(engine_memory(layout.extent_bytes()), layout, BLOCK, shard)
        self.stager = Stager(staging, BLOCK, shard)
        self.load_seconds: list[float] = []
        self.job = 0

    def copies(self, first: int, count: int) -> tuple[BlockCopy, ...]:
        blocks = range(first, first + count)
        return tuple(
            BlockCopy(block, 0, 0, tuple(range(block * self.per_block, (block + 1) * self.per_block)))
            for block in blocks
        )

    def jobs(self) -> StepJobs:
        return StepJobs(arena=self.arena.handle, layout=BLOCK)

    def save(self) -> int:
        jobs = self.jobs()
        self.job += 1
        jobs.saves.append(SaveJob(self.job, "saved", self.copies(0, SAVED)))
        self.stager.submit_saves(jobs)
        return self.job

    def load(self) -> None:
        jobs = self.jobs()
        jobs.loads.append(LoadJob("loaded", self.copies(SAVED, LOADED)))
        self.stager.submit_loads(jobs)

    def wait(self, is_loading: bool, saves: set[int]) -> float:
        """Wait for what is under way; return when the load was reported."""
        loaded_at = 0.0
        while is_loading or saves:
            found = self.stager.take_results()
            assert not found.failed_loads
            assert not found.report.failed_saves
            saves -= set(found.report.saved)
            if found.loaded:
                loaded_at, is_loading = time.perf_counter(), False
            time.sleep(0.0002)
        return loaded_at

    def both(self, repetition: int) -> None:
        saves = {self.save()}
        time.sleep(HEAD_START_S)
        started = time.perf_counter()
        self.load()
        taken = self.wait(True, saves) - started
        if repetition >= 0:
            self.load_seconds.append(taken)


def main() -> None:
    rank = Rank()

    def load(_: int) -> None:
        rank.load()
        rank.wait(True, set())

    def save(_: int) -> None:
        rank.wait(False, {rank.save()})

    sides = {"load": load, "save": save, "both": rank.both}
    seconds = interleaved(sides, ROUNDS, lambda part: None)
    beside = float(np.median(rank.load_seconds))
    print(f"load alone          {seconds['load'] * 1e3:7.1f} ms")
    print(f"load beside a save  {beside * 1e3:7.1f} ms, {beside / seconds['load']:.1f} times")
    alone = seconds["load"] + seconds["save"]
    print(
        f"both together       {seconds['both'] * 1e3:7.1f} ms, {seconds['both'] / alone:.2f} of one after the other"
    )
    rank.stager.close()
    rank.arena.close()


if __name__ == "__main__":
    main()
