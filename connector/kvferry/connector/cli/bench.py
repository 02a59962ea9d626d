"""``kvferry bench``: measure this machine and what kvferry makes of it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from kvferry.connector import __version__
from kvferry.connector.bench import run
from kvferry.connector.bench.case import BenchCase, Figure
from kvferry.connector.cli.output import table
from kvferry.connector.errors import ConfigError
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.schema import nearest

__all__ = ["bench"]


@click.command()
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--quick", is_flag=True, help="Only show that everything runs; the figures mean little.")
@click.option(
    "--path",
    type=click.Path(file_okay=False),
    help="Directory on the disk to measure. [default: $XDG_CACHE_HOME/kvferry]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--list", "list_only", is_flag=True, help="List the cases.")
def bench(cases: tuple[str, ...], quick: bool, path: str | None, as_json: bool, list_only: bool) -> None:
    """Compare kvferry with the raw limits of this machine, in one run.

    Each figure is a median of repetitions that alternate with those of its limit, so that other load hits
    both alike. A goal that is missed is marked; the exit code stays 0. Measures all cases unless some are
    named; uses up to 10 GiB of disk (for s3; the others 3) and 2 GiB of memory meanwhile. The cases of the
    cache server, redis and s3 start servers of their own; the last two don't where KVFERRY_BENCH_REDIS_URL or
    KVFERRY_BENCH_S3_URL (and _ENDPOINT) name one; KVFERRY_BENCH_TRACE names a trace for admission.
    """
    known = {case.name: case for case in run.all_cases(PluginRegistry())}
    if list_only:
        click.echo("\n".join(table([(case.name, case.summary) for case in known.values()])))
        return
    chosen = [_known(name, known) for name in cases] or list(known.values())
    with _scratch(path) as scratch:
        if not as_json:
            click.echo(f"kvferry {__version__}, {_machine()}, disk {Path(scratch).parent}\n")
        results = [_run(case, quick, scratch, as_json) for case in chosen]
    if as_json:
        click.echo(json.dumps(_as_json(results), indent=2))
    elif not quick:
        met = [figure.is_met for result in results for figure in result.figures if figure.goal]
        click.echo(f"{sum(map(bool, met))} of {len(met)} goals met")


def _known(name: str, known: dict[str, BenchCase]) -> BenchCase:
    if name not in known:
        guess = nearest(name, known)
        raise click.UsageError(
            f"no case {name!r}; " + (f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}")
        )
    return known[name]


def _scratch(path: str | None) -> tempfile.TemporaryDirectory[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = Path(path) if path else Path(cache).expanduser() / "kvferry"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="bench-", dir=parent)
    except OSError as error:
        raise ConfigError("--path", f"{parent} cannot be used: {error.strerror}") from error


def _run(case: BenchCase, quick: bool, scratch: str, silent: bool) -> run.CaseResult:
    """Run one case behind a progress bar and print its figures."""
    if silent:
        return run.run_case(case, quick, scratch, lambda part: None)
    with click.progressbar(length=1000, label=f"{case.name:<13}", show_eta=False) as bar:
        result = run.run_case(case, quick, scratch, lambda part: bar.update(round(part * 1000) - bar.pos))
        bar.update(1000 - bar.pos)
    click.echo("\n".join(_lines(result, quick)) + "\n")
    return result


def _lines(result: run.CaseResult, quick: bool) -> Iterator[str]:
    if result.skipped:
        yield f"  skipped: {result.skipped}"
    if result.figures:
        yield from table([_row(figure, quick) for figure in result.figures], indent="  ", right=(1, 3))


def _row(figure: Figure, quick: bool) -> Sequence[str]:
    raw = f"{figure.raw_name} {figure.raw:.3g}" if figure.raw else ""
    ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else ""
    goal = ""
    if figure.goal:
        goal = f"goal {'>=' if figure.goal.at_least else '<='} {figure.goal.bound:g}"
        if not quick:
            goal += click.style(" met", fg="green") if figure.is_met else click.style(" missed", fg="yellow")
    return figure.name, f"{figure.value:.3g} {figure.unit}", raw, ratio, goal, figure.note


def _as_json(results: Sequence[run.CaseResult]) -> dict[str, object]:
    return {
        "version": __version__,
        "machine": _machine(),
        "cases": [
            {
                "name": result.name,
                "skipped": result.skipped,
                "figures": [
                    {**msgspec.to_builtins(figure), "ratio": figure.ratio, "is_met": figure.is_met}
                    for figure in result.figures
                ],
            }
            for result in results
        ],
    }


def _machine() -> str:
    return f"{run.processor()}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
