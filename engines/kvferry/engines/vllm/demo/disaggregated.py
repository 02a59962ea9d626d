"""``kvferry demo --disaggregated``: one engine reads the document, another one answers, a router sits in front.

The decode engine starts first and alone. What the router then gets from it, while no prefill engine is there, is
what the handed-over answers are compared with: the same engine, the same way to it, everything computed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from kvferry.engines.vllm.demo.ask import QUESTIONS, Answer, Client, Metrics
from kvferry.engines.vllm.demo.handoff_report import Handed, HandoffRow, HandoffRun
from kvferry.engines.vllm.demo.process import ProcessGroup
from kvferry.engines.vllm.demo.report import tell
from kvferry.engines.vllm.demo.server import Device, Server, free_port, handoff_flags, open_local

__all__ = ["NEEDED_GIB", "ask_handed_over", "measure", "router_file", "running_router"]

NEEDED_GIB = 10
"""Resident size of two engines with this model (4.4 GiB each) and their arenas."""

ROUTER_DEADLINE_S = 30.0
PREFILL_DEADLINE_S = 300
"""For the router: a prompt that takes this long on a busy machine is no reason to give up its handoff."""
READ_THROUGH = r"rank \d+ are read through (.*)"
"""What the decode engine logs about the transport that it chose."""
FAILED = r"request .+: handoff failed (.*)"
"""What it logs when a handoff failed, and why."""


def measure(checkpoint: Path, device: Device, scratch: Path) -> HandoffRun:
    """Run both engines and the router, and ask every question without and with the handoff.

    Raises:
        click.ClickException: One of them did not start, ended, or handed nothing over.
    """
    one, other = device.halves()
    prefill, decode = (
        Server(title, checkpoint, half, handoff_flags(role), scratch / role)
        for title, role, half in (
            ("2. prefill engine", "kv_producer", one),
            ("1. decode engine", "kv_consumer", other),
        )
    )
    with (
        decode,
        running_router([prefill.url], [decode.url], scratch / "router.log") as url,
    ):
        click.echo(
            "   through the router, which finds no prefill engine: the decode engine computes everything"
        )
        router = Client(url)
        router.warm_up()
        alone = [tell(number, router.ask(question)) for number, question in enumerate(QUESTIONS, start=1)]
        with prefill:
            click.echo(
                "   through the router: the prefill engine computes the prompt, the decode engine takes its KV"
            )
            Client(prefill.url).warm_up()
            taker = Client(decode.url)
            hand_over(taker, router.warm_up)  # so that the engines have met
            handed = [ask_handed_over(router, taker, number) for number in range(1, len(QUESTIONS) + 1)]
        transports, failures = decode.logged(READ_THROUGH), decode.logged(FAILED)
    rows = tuple(map(HandoffRow, QUESTIONS, alone, handed))
    return HandoffRun(rows, transports[-1] if transports else "", tuple(failures))


def ask_handed_over(router: Client, decode: Client, number: int) -> Handed:
    """Ask through the router, and read from the decode engine what was handed over for the answer.

    Args:
        router: Where the question goes.
        decode: The decode engine itself.
        number: Of the question, from 1.

    Raises:
        click.ClickException: There was no answer, or the decode engine did not count a handoff.
    """
    answers: list[Answer] = []
    grown = hand_over(decode, lambda: answers.append(tell(number, router.ask(QUESTIONS[number - 1]))))
    return Handed(
        answers[0],
        tokens=grown("kvferry_hit_tokens_total", tier="peer"),
        moved_bytes=grown("kvferry_handoff_bytes_total"),
        transfer_s=grown("kvferry_handoff_seconds_sum"),
    )


def hand_over(decode: Client, ask: Callable[[], object]) -> Callable[..., float]:
    """Ask, wait until the decode engine has counted the handoff, and return how much each of its metrics grew.

    Args:
        decode: Whose ``/metrics`` are read; asked for a word meanwhile, so that it publishes them.
        ask: Causes one handoff.

    Raises:
        click.ClickException: It did not count one, good or failed.
    """
    before = decode.metrics()
    ask()

    def grown(after: Metrics, name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    after = decode.metrics_when(
        lambda now: grown(now, "kvferry_handoffs_total", side="taken") > 0,
        "the decode engine counting a handoff",
    )
    return functools.partial(grown, after)


def router_file() -> Path:
    """Return the example router: a part of an installed kvferry, one of the examples in a clone.

    Raises:
        click.ClickException: It is in neither place.
    """
    here = Path(__file__)
    places = (
        here.with_name("router.py"),
        here.parents[5] / "docs" / "examples" / "disaggregated" / "router.py",
    )
    for path in places:
        if path.is_file():
            return path
    looked = " nor at ".join(map(str, places))
    raise click.ClickException(
        f"kvferry's example router is missing, neither at {looked}; install kvferry again"
    )


@contextlib.contextmanager
def running_router(prefill: list[str], decode: list[str], log: Path) -> Iterator[str]:
    """Run the example router and yield its URL.

    Args:
        prefill: URLs of engines, which need not be up.
        decode: The same; one must be up.
        log: Where its output goes.

    Raises:
        click.ClickException: It ended or was not ready after `ROUTER_DEADLINE_S`; or the body raised it, whereupon
            the end of the log is shown.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, str(router_file()), "--port", str(port), "--prefill-s", str(PREFILL_DEADLINE_S)),
        *("--prefill", *prefill, "--decode", *decode),
    ]
    router = ProcessGroup(command, os.environ, log)
    try:
        _wait_until_ready(router, url)
        yield url
    except click.ClickException:
        click.echo(f"The end of the router's log:\n{router.log_tail()}", err=True)
        raise
    finally:
        router.stop(deadline_s=5.0)


def _wait_until_ready(router: ProcessGroup, url: str) -> None:
    deadline = time.monotonic() + ROUTER_DEADLINE_S
    while True:
        with contextlib.suppress(OSError), open_local(f"{url}/healthz", timeout=5):
            return
        if (status := router.exit_status()) is not None:
            raise click.ClickException(f"the router ended with exit status {status}")
        if time.monotonic() > deadline:
            raise click.ClickException(f"the router was not ready after {ROUTER_DEADLINE_S:.0f} s")
        time.sleep(0.1)
