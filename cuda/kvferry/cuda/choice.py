"""Which way blocks go between a GPU's pages and slots: by kernel, by one batch of copies, or copy by copy.

Which one is fastest depends on the pages' layout, the GPU, the driver and the link, and nobody can tell beforehand.
So every worker tries the ways it has for about a second before it serves, on memory of its own, takes the fastest, and
says so in one line of the log. Speed is not all: the way is then proved on the engine's own pages, and where bytes do
not survive it, the next best is. A way that is not there, fails or is wrong is left out with its reason.

``make_staging`` is what engines call, on the thread that will serve them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import msgspec

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import ArenaError, DeviceError, LayoutError
from kvferry.connector.staging import Staging
from kvferry.cuda.batch import DirectPath, copy_batch, copy_each
from kvferry.cuda.driver import Device, open_device
from kvferry.cuda.geometry import CopyGeometry, copy_geometry
from kvferry.cuda.program import kept_kernels
from kvferry.cuda.ring import KernelPath, RingSize
from kvferry.cuda.scratch import Scratch, miniature
from kvferry.cuda.staging import CopyPath, DevicePages, DeviceStaging

__all__ = [
    "PATHS",
    "PathName",
    "Paths",
    "Proof",
    "Trial",
    "blocks_at_once",
    "choose",
    "make_staging",
    "staging_by",
    "unproved",
]

logger = logging.getLogger(__name__)

PathName = Literal["batch", "copies", "kernel"]
PATHS: tuple[PathName, ...] = get_args(PathName)
"""Those that leave the multiprocessors to the model first: they win a tie."""

_UNMEASURED: tuple[PathName, ...] = ("kernel", "batch", "copies")
"""The order in which paths are tried where nothing was measured."""

_RING_PARTS = 2
"""Of each direction: one is on the link, a kernel works on the other."""
_DEADLINE_S = 1.0
"""For all trials together. A copy that has begun is not cut off, but no other follows it."""
_ROUNDS = 5
_SCRATCH_BYTES = 64 << 20
"""Pages on the GPU and slots on the host have this much each, or one block."""
_MOST_COPIES = 1 << 15
"""Of a call of the paths that copy run by run: at a few microseconds each, well below the deadline."""
_TIE = 1.05
"""What takes no longer than this part of the fastest is as fast."""


Proof = Callable[[Staging], None]
"""Raises LayoutError where blocks do not survive the way by a staging, DeviceError where the GPU refuses to copy them.
Whatever else it raises is not the staging's fault."""


def unproved(staging: Staging) -> None:
    """Take a staging as it is."""


class Trial(NamedTuple):
    """How fast a path was."""

    path: PathName
    gather: float
    """Bytes a second, pages to slots."""
    scatter: float
    """Bytes a second, slots to pages."""

    @property
    def seconds(self) -> float:
        """What a byte takes, there and back."""
        return 1 / self.gather + 1 / self.scatter

    def __str__(self) -> str:
        return f"{self.path} {self.gather / 1e9:.3g} GB/s out and {self.scatter / 1e9:.3g} GB/s in"


class Paths:
    """The ways that a GPU may have.

    Args:
        device: The GPU.
        config: What they may take of it.
        compiled: Returns the kernels' machine code for an architecture; may raise DeviceError.
    """

    def __init__(
        self, device: Device, config: CudaConfig, compiled: Callable[[str], bytes] | None = None
    ) -> None:
        self._device = device
        self._ring = RingSize(config.ring_bytes, _RING_PARTS, config.thread_blocks)
        self._compiled = functools.cache(compiled or kept_kernels)

    def make(self, name: PathName, pages: int, geometry: CopyGeometry) -> CopyPath:
        """Return a path.

        Args:
            name: Which.
            pages: Address of the pages.
            geometry: How they are copied.

        Raises:
            DeviceError: This GPU has no such path, or no memory for it.
        """
        device = self._device
        if name == "copies":
            return DirectPath(device, pages, geometry, copy_each)
        if name == "batch":
            if not device.has_batch_copies:
                raise DeviceError("cuMemcpyBatchAsync", "the driver has none", "it needs one of CUDA 12.8")
            return DirectPath(device, pages, geometry, copy_batch)
        copy = copy_batch if device.has_batch_copies else copy_each
        kernels = device.load(self._compiled(device.architecture))
        try:
            return KernelPath(device, pages, geometry, kernels, copy, self._ring)
        except BaseException:
            kernels.close()
            raise


def make_staging(
    index: int,
    pages: DevicePages,
    config: CudaConfig,
    engine_stream: Callable[[], int],
    prove: Proof = unproved,
) -> DeviceStaging:
    """Return the staging of a rank whose pages are on a GPU. Takes about a second where it measures.

    Args:
        index: Of the GPU, as CUDA counts those that this process sees.
        pages: The rank's.
        config: Which path, and how much of the GPU it may take.
        engine_stream: Returns the handle of the stream that the engine's work is queued on now.
        prove: Called with the staging of one path after the other, until it lets one through.

    Raises:
        DeviceError: There is no GPU or driver, the pages are not this GPU's memory, or no path works here; it says
            what to do.
        LayoutError: Pages and blocks do not fit together.
        Exception: What ``prove`` raises that is not a path's fault.
    """
    device = open_device(index)
    name = f"GPU {index} ({device.architecture})"
    return choose(device, name, pages, Paths(device, config), config.path, engine_stream, prove)


def staging_by(
    index: int, pages: DevicePages, config: CudaConfig, path: PathName, engine_stream: Callable[[], int]
) -> DeviceStaging:
    """Return a staging by one path and no other, neither measured nor proved.

    For pages of which blocks go by that path already. Arguments and errors are those of ``make_staging``.
    """
    device = open_device(index)
    make = functools.partial(Paths(device, config).make, path, pages.address)
    return DeviceStaging(device, pages, make, engine_stream, path)


def choose(
    device: Device,
    name: str,
    pages: DevicePages,
    paths: Paths,
    wanted: Literal["auto"] | PathName,
    engine_stream: Callable[[], int],
    prove: Proof = unproved,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceStaging:
    """Return a staging by the path that is wanted, or by the fastest; where it is not there or wrong, by the next.

    Args:
        device: Where the pages are.
        name: What to call it in the log.
        pages: The rank's.
        paths: What there is.
        wanted: ``auto`` measures.
        engine_stream: See ``make_staging``.
        prove: See ``make_staging``.
        clock: Seconds.

    Raises:
        DeviceError: The pages are not this GPU's memory, or no path works here.
        LayoutError: Pages and blocks do not fit together.
        Exception: What ``prove`` raises that is not a path's fault.
    """
    device.activate()
    pages.geometry(device)
    left_out: dict[PathName, str] = {}
    trials: list[Trial] = []
    if wanted == "auto":
        trials = _trials(device, pages, paths, left_out, clock)
        candidates = _ranked(trials) or [path for path in _UNMEASURED if path not in left_out]
    else:
        candidates = [wanted, *(path for path in _UNMEASURED if path != wanted)]
    for candidate in candidates:
        make = functools.partial(paths.make, candidate, pages.address)
        try:
            staging = DeviceStaging(device, pages, make, engine_stream, candidate)
            _prove(staging, prove)
        except DeviceError as error:
            left_out[candidate] = _in_one_line(error)
        except LayoutError as error:
            left_out[candidate] = f"the self-test failed: {error}"
        else:
            is_best = candidate == candidates[0]
            way = candidate if is_best else f"{candidate} instead of {candidates[0]}"
            level = logging.INFO if is_best else logging.WARNING
            logger.log(level, "%s: blocks go by %s%s", name, way, _reasons(trials, left_out))
            return staging
    raise DeviceError(
        f"stage blocks on {name}", "no path works here" + _reasons([], left_out), "put one of them right"
    )


def _prove(staging: DeviceStaging, prove: Proof) -> None:
    """Prove a staging. One that is not let through is closed: the next may need what it holds."""
    try:
        prove(staging)
    except BaseException:
        try:
            staging.close()
        except DeviceError as error:
            logger.warning("what %s held could not be given back: %s", staging.path_name, error)
        raise


def blocks_at_once(path: PathName, geometry: CopyGeometry, most_copies: int) -> int:
    """Return how many blocks a path should be given in one timed call."""
    if path == "kernel":
        return 1 << 31
    return max(1, most_copies // (geometry.pages_per_block * geometry.runs_per_page))


def _trials(
    device: Device,
    pages: DevicePages,
    paths: Paths,
    left_out: dict[PathName, str],
    clock: Callable[[], float],
) -> list[Trial]:
    """Try every path on memory that is given back afterwards; note why one is left out."""
    block = msgspec.structs.replace(pages.block, num_kv_heads=pages.shard.num_heads)
    per_block = block.block_tokens // pages.layout.page_tokens
    num_blocks = max(1, min(_SCRATCH_BYTES // block.slot_bytes, pages.layout.num_pages // per_block))
    num_pages = min(num_blocks * per_block, pages.layout.num_pages)
    trials: list[Trial] = []
    try:
        with Scratch(device, miniature(pages.layout, num_pages), block) as scratch:
            for path in PATHS:
                try:
                    trials.append(_trial(scratch, path, paths, clock))
                except DeviceError as error:
                    left_out[path] = _in_one_line(error)
    except (ArenaError, DeviceError) as error:
        logger.warning("the ways to move blocks cannot be compared: %s", error)
    return trials


def _trial(scratch: Scratch, path: PathName, paths: Paths, clock: Callable[[], float]) -> Trial:
    block, layout = scratch.pages.block, scratch.pages.layout
    geometry = copy_geometry(layout, block, scratch.pages.shard)
    some = slice(min(len(scratch.slot_ids), blocks_at_once(path, geometry, _MOST_COPIES)))
    batch = scratch.page_ids[some], scratch.slot_ids[some], scratch.slots
    staging = scratch.staging(functools.partial(paths.make, path))
    try:
        directions = (staging.gathers, staging.scatters)
        taken: list[list[float]] = []
        end = clock() + _DEADLINE_S / len(PATHS)
        for _ in range(_ROUNDS + 1):
            seconds = []
            for direction in directions:
                started = clock()
                direction.copy(*batch)
                direction.finish()
                seconds.append(clock() - started)
            taken.append(seconds)
            if clock() >= end:
                break
    finally:
        staging.close()
    # The first round also registers the arena and loads the kernels: it counts only where there was time for no other.
    out, back = (min(column) for column in zip(*(taken[1:] or taken), strict=True))
    moved = len(batch[1]) * geometry.shard_bytes
    return Trial(path, moved / out, moved / back)


def _ranked(trials: Sequence[Trial]) -> list[PathName]:
    """Return paths, the best first."""
    if not trials:
        return []
    fastest = min(trial.seconds for trial in trials)
    first = next(trial for trial in trials if trial.seconds <= fastest * _TIE)
    others = sorted((trial for trial in trials if trial is not first), key=lambda trial: trial.seconds)
    return [trial.path for trial in (first, *others)]


def _reasons(trials: Sequence[Trial], left_out: dict[PathName, str]) -> str:
    parts = [str(trial) for trial in trials if trial.path not in left_out]
    parts += [f"{path} left out: {why}" for path, why in left_out.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def _in_one_line(error: DeviceError) -> str:
    """Return what went wrong; a compiler's log goes to the log."""
    if error.log:
        logger.warning("%s", error)
    return str(error).partition("\n")[0]
