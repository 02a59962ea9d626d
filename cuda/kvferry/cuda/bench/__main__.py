"""``python -m kvferry.cuda.bench``: the staging path against the link, as a table for docs/performance.md."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from kvferry.connector import __version__
from kvferry.connector.bench.case import BenchSkipped, Figure
from kvferry.connector.bench.run import processor
from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.cuda.bench.copies import CACHES, DIRECTIONS, ORDERS, Comparison, compare
from kvferry.cuda.bench.matmul import slowdown, torch_work
from kvferry.cuda.choice import PATHS, PathName, Paths
from kvferry.cuda.driver import Device, open_device

__all__ = ["bench", "tables"]

NO_GPU = 2
"""The exit code without a GPU."""
BLOCKS = (64, 256, 1024)
_REPETITIONS, _QUICK_REPETITIONS = 7, 2


@click.command()
@click.option("--gpu", default=0, show_default=True, help="As CUDA counts the GPUs that it sees.")
@click.option("--cache", "caches", multiple=True, type=click.Choice(list(CACHES)), help="[default: all]")
@click.option(
    "--order", "orders", multiple=True, type=click.Choice(ORDERS), help="First in a page. [default: all]"
)
@click.option(
    "--blocks", multiple=True, type=click.IntRange(2), help="Blocks of 64 tokens. [default: 64, 256 and 1024]"
)
@click.option("--path", "names", multiple=True, type=click.Choice(PATHS), help="[default: all]")
@click.option("--thread-blocks", default=CudaConfig().thread_blocks, show_default=True, help="Of a kernel.")
@click.option("--quick", is_flag=True, help="Only show that everything runs; the figures mean little.")
def bench(
    gpu: int,
    caches: tuple[str, ...],
    orders: tuple[str, ...],
    blocks: tuple[int, ...],
    names: tuple[PathName, ...],
    thread_blocks: int,
    quick: bool,
) -> None:
    """Measure the CUDA staging path on this GPU and print the result as Markdown.

    Blocks of 8B- and 70B-shaped caches (bf16, 16-token pages) go out of pages into pinned memory (D2H), back (H2D), and
    both ways at once, by every path that the GPU has. Each figure is a part of what one large cuMemcpyAsync reaches
    between the same memories in the same run; figures that reach their goal are bold. Last, what a bf16 matrix product
    loses meanwhile, where torch is installed.

    Takes some minutes, and as much memory as the blocks, on the GPU and on the host: up to 20 GiB; sizes that do not
    fit are left out. Nothing else should run on GPU and machine. Without a GPU nothing is measured and the exit code
    is 2.
    """
    try:
        device = open_device(gpu)
    except DeviceError as error:
        click.echo(f"nothing was measured: {' '.join(str(error).split())}", err=True)
        raise click.exceptions.Exit(NO_GPU) from None
    paths = Paths(device, CudaConfig(thread_blocks=thread_blocks))
    repetitions = _QUICK_REPETITIONS if quick else _REPETITIONS
    plan = [
        (cache, order, count)
        for cache in caches or ((next(iter(CACHES)),) if quick else tuple(CACHES))
        for order in orders or ORDERS
        for count in blocks or (BLOCKS[:1] if quick else BLOCKS)
    ]
    chosen = names or PATHS
    compared: list[Comparison] = []
    for cache, order, count in plan:
        with _progress(f"{cache}, {order} first, {count} blocks") as told:
            compared += compare(device, paths, chosen, cache, order, count, repetitions, told)
    losses, left_out = _slowdowns(device, gpu, paths, chosen, repetitions)
    click.echo(
        f"kvferry {__version__}, GPU {gpu} ({device.architecture}), {thread_blocks} thread blocks, {_host()}"
    )
    if quick:
        click.echo("\nA quick run: these figures show that everything runs, and mean little.")
    click.echo("\n" + "\n".join(tables(compared, losses, left_out)))


def tables(
    compared: Sequence[Comparison], losses: Sequence[Figure], left_out: Sequence[str]
) -> Iterator[str]:
    """Yield the figures as lines of Markdown.

    Args:
        compared: Every path of every cache.
        losses: What a model loses, by path.
        left_out: Why there is no such figure, for each that is missing.
    """
    names = [name for name in PATHS if any(one.path == name for one in compared)]
    yield f"| cache | first in a page | blocks | way | raw, GB/s | {' | '.join(names)} | goal |"
    yield "|---" * (6 + len(names)) + "|"
    reasons = {f"{one.path}: {one.left_out}": None for one in compared if one.left_out}
    places = dict.fromkeys((one.cache, one.order, one.blocks) for one in compared)
    for place in places:
        by_path = {one.path: one for one in compared if one[:3] == place}
        for direction, goal in DIRECTIONS.items():
            found = {
                name: figure
                for name, one in by_path.items()
                for figure in one.figures
                if figure.name == direction
            }
            raw = max((figure.raw or 0.0 for figure in found.values()), default=None)
            cells = [*map(str, place), direction, "" if raw is None else f"{raw:.3g}"]
            cells += [_ratio(found.get(name)) for name in names]
            yield f"| {' | '.join([*cells, f'{goal.bound:g}'])} |"
    notes = {
        f"{one.path}, {one.cache}, {one.order} first, of {one.blocks} blocks: {one.figures[0].note}": None
        for one in compared
        if one.figures and one.figures[0].note
    }
    if losses:
        yield from ("", "| path | a matrix product takes longer by | goal |", "|---|---|---|")
        for figure in losses:
            text = f"{100 * figure.value:.1f} %"
            goal_text = f"at most {100 * figure.goal.bound:g} %" if figure.goal else ""
            yield f"| {figure.name} | {_bold(text, figure)} | {goal_text} |"
    remarks = [*reasons, *notes, *left_out]
    if remarks:
        yield ""
    yield from (f"- {' '.join(remark.split())}" for remark in remarks)


def _slowdowns(
    device: Device, gpu: int, paths: Paths, names: Sequence[PathName], repetitions: int
) -> tuple[list[Figure], list[str]]:
    try:
        work = torch_work(gpu)
    except BenchSkipped as skipped:
        return [], [str(skipped)]
    losses, left_out = [], []
    for name in names:
        try:
            losses.append(slowdown(device, paths, name, work, repetitions))
        except BenchSkipped as skipped:
            left_out.append(str(skipped))
    return losses, left_out


def _ratio(figure: Figure | None) -> str:
    return "" if figure is None or figure.ratio is None else _bold(f"{figure.ratio:.2f}", figure)


def _bold(text: str, figure: Figure) -> str:
    return f"**{text}**" if figure.is_met else text


@contextmanager
def _progress(label: str) -> Iterator[Callable[[float], None]]:
    """Show a bar on standard error, so that the table can be redirected; yield who is told the part that is done."""
    with click.progressbar(length=1000, label=f"{label:<32}", show_eta=False, file=sys.stderr) as bar:
        yield lambda part: bar.update(round(part * 1000) - bar.pos)


def _host() -> str:
    return f"{processor()}, {os.cpu_count()} CPUs, Linux {platform.release()}"


if __name__ == "__main__":
    bench(prog_name="python -m kvferry.cuda.bench")
