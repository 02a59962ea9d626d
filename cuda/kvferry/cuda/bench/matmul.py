"""What a model loses while blocks move: bf16 matrix products by torch, alone and beside copies."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Protocol

from kvferry.connector.bench.case import BenchSkipped, Figure, Goal
from kvferry.connector.bench.host import page_layout
from kvferry.connector.errors import ArenaError, DeviceError
from kvferry.cuda.bench.copies import CACHES, PAGE_TOKENS, path_sides
from kvferry.cuda.choice import PathName, Paths, blocks_at_once
from kvferry.cuda.driver import Device
from kvferry.cuda.geometry import copy_geometry
from kvferry.cuda.scratch import Scratch

__all__ = ["Work", "slowdown", "torch_work"]

GOAL = Goal(0.05, at_least=False)

_SIZE = 8192
"""Of the matrices: each product keeps every multiprocessor of a large GPU busy."""
_PRODUCTS = 200
_BLOCKS = 16
_MOST_COPIES = 1 << 14
"""A call of a path ends well before the products do."""

Work = Callable[[Callable[[], None]], float]
"""``work(beside)``: does the model's work, calls ``beside`` again and again meanwhile, returns the GPU's seconds."""


class _Event(Protocol):
    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: _Event) -> float: ...


def torch_work(index: int) -> Work:
    """Return products by torch on a GPU.

    Raises:
        BenchSkipped: torch is not there, or cannot use the GPU.
    """
    try:
        import torch

        torch.cuda.set_device(index)
        left, right = (
            torch.randn(_SIZE, _SIZE, device=f"cuda:{index}", dtype=torch.bfloat16) for _ in range(2)
        )
    except ImportError as error:
        raise BenchSkipped("the slowdown of a model is left out: torch is not installed") from error
    except Exception as error:  # boundary: torch without CUDA, or a GPU that is full
        raise BenchSkipped(f"the slowdown of a model is left out: torch says {error}") from error
    product = torch.empty_like(left)

    def work(beside: Callable[[], None]) -> float:
        start: _Event = torch.cuda.Event(enable_timing=True)
        end: _Event = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_PRODUCTS):
            torch.matmul(left, right, out=product)
        end.record()
        while not end.query():
            beside()
        return start.elapsed_time(end) / 1e3

    return work


def slowdown(device: Device, paths: Paths, name: PathName, work: Work, repetitions: int) -> Figure:
    """Return how much longer the work takes while blocks of an 8B-shaped cache go out and come back.

    Raises:
        BenchSkipped: There is no such path here, or no memory.
    """
    block = CACHES["8B"]
    layout = page_layout(block, "tokens", PAGE_TOKENS, _BLOCKS * block.block_tokens // PAGE_TOKENS)
    geometry = copy_geometry(layout, block, block.shard(0, 1))
    num_blocks = max(2, min(_BLOCKS, blocks_at_once(name, geometry, _MOST_COPIES)))
    try:
        with Scratch(device, layout, block) as scratch:
            staging = scratch.staging(functools.partial(paths.make, name))
            try:
                sides = path_sides(scratch, staging, num_blocks)

                def beside() -> None:
                    sides["D2H"](0)
                    sides["H2D"](0)

                beside()
                alone, busy = _medians(work, beside, repetitions)
            finally:
                staging.close()
    except (ArenaError, DeviceError) as error:
        raise BenchSkipped(f"{name}: {error}") from error
    return Figure(name=name, value=busy / alone - 1, unit="", goal=GOAL)


def _medians(work: Work, beside: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Return seconds alone and beside copies, taking turns."""

    def idle() -> None:
        time.sleep(0.001)

    work(idle)
    pairs = [(work(idle), work(beside)) for _ in range(repetitions)]
    alone, busy = zip(*pairs, strict=True)
    return statistics.median(alone), statistics.median(busy)
