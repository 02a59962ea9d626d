"""What an engine's processes hold: descriptors, threads, memory; and stopping them for a while."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine import wait_until

__all__ = ["Holdings", "frozen", "holdings", "thread_names"]


class Holdings(NamedTuple):
    """Of several processes together."""

    descriptors: int
    threads: int
    private_bytes: int
    """Without the arena, which is bounded and filled step by step."""


def holdings(pids: Sequence[int]) -> Holdings:
    """Return what processes hold now; those that have ended hold nothing."""
    descriptors = threads = private = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            status = dict(line.split(":", 1) for line in _read(pid, "status").splitlines())
            threads += int(status["Threads"])
            private += int(status["RssAnon"].split()[0]) << 10
    return Holdings(descriptors, threads, private)


def thread_names(pids: Sequence[int]) -> list[str]:
    """Return the names of all threads, as the kernel cuts them: 15 characters."""
    found = []
    for pid in pids:
        for name in Path(f"/proc/{pid}/task").glob("*/comm"):
            with contextlib.suppress(OSError):
                found.append(name.read_text().strip())
    return sorted(found)


@contextlib.contextmanager
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Keep processes from doing anything; their connections stay open."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until("they stand still", lambda: all(_is_stopped(pid) for pid in pids))
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    return all(
        (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
