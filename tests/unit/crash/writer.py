"""The process that is killed: a disk tier with four threads storing, loading, deleting and evicting.

Started once as a nursery that has everything imported; every line on stdin,
a directory, a capacity and one of these, makes it fork one writer:

    random SEED          work until killed; prints "stored" after the first store
    ack SEED             store only, printing each number once its block is stored
    at POINT COUNT       work, and die by SIGKILL at the COUNT-th passage of POINT

The nursery prints "pid N", and "reaped N" when the writer is dead.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from disk_kit import key_of, load_verified, open_tier, sealed_frame

from kvferry.plugins.disk.index import Index
from kvferry.plugins.disk.tier import DiskTier

NUMBERS = 70
"""Blocks that are written; more than fit, so that the writer evicts all the time."""
THREADS = 4


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL returned")


def write_half(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write the header and half of the payload: what a torn record looks like."""
    header, payload = buffers
    os.pwritev(descriptor, [header, payload[: len(payload) // 2 // 4096 * 4096]], offset)


def fatal(function: Callable[..., object], when: str, count: int) -> Callable[..., object]:
    """Return ``function`` such that its ``count``-th call kills the process before, within or after it."""
    passages = itertools.count(1)

    def passage(*args: object) -> object:
        is_now = next(passages) == count
        if is_now and when == "before":
            die()
        if is_now and when == "within":
            setattr(*real_pwritev)
            write_half(*args)  # type: ignore[arg-type]
            die()
        result = function(*args)
        if is_now:
            die()
        return result

    return passage


POINTS: dict[str, tuple[object, str]] = {
    "pwritev": (os, "pwritev"),
    "replace": (os, "replace"),
    "fallocate": (os, "posix_fallocate"),
    "fsync": (os, "fsync"),
    "unlink": (os, "unlink"),
    "ftruncate": (os, "ftruncate"),
    "update": (Index, "update"),
}
real_pwritev = (os, "pwritev", os.pwritev)


def arm(point: str, count: int) -> None:
    """Make the ``count``-th passage of ``point`` (``<function>-<when>``) the last thing that happens."""
    name, when = point.split("-")
    owner, attribute = POINTS[name]
    setattr(owner, attribute, fatal(getattr(owner, attribute), when, count))


def work(tier: DiskTier, seed: int, on_stored: Callable[[], None]) -> None:
    """Use the tier at random for ever."""
    rng = random.Random(seed)
    while True:
        keys = [key_of(rng.randrange(NUMBERS)) for _ in range(rng.randrange(1, 7))]
        choice = rng.random()
        if choice < 0.7:
            tier.store([sealed_frame(key) for key in keys])
            on_stored()
        elif choice < 0.9:
            load_verified(tier, keys)
        else:
            tier.delete(keys[:2])


def acknowledge(tier: DiskTier, seed: int) -> None:
    """Store blocks nobody else stores and print each number when its block is safe."""
    number = seed * 1_000_000
    while True:
        tier.store([sealed_frame(key_of(number))])
        os.write(1, b"%d\n" % number)
        number += 1


def run(path: Path, capacity: int, mode: str, arguments: list[str]) -> None:
    """Be one writer."""
    seed = 0
    if mode == "at":
        arm(arguments[0], int(arguments[1]))
    else:
        seed = int(arguments[0])
    tier = open_tier(path, capacity)
    first = threading.Event()

    def on_stored() -> None:
        if not first.is_set():
            first.set()
            os.write(1, b"stored\n")

    for one in range(seed * THREADS, (seed + 1) * THREADS):
        target, also = (acknowledge, ()) if mode == "ack" else (work, (on_stored,))
        threading.Thread(target=target, args=(tier, one, *also), name=f"writer-{one}").start()


def main() -> None:
    """Fork a writer for each line on stdin, one after the other."""
    for line in sys.stdin:
        path, capacity, mode, *arguments = line.split()
        child = os.fork()
        if not child:
            run(Path(path), int(capacity), mode, arguments)
            return
        os.write(1, b"pid %d\n" % child)
        _, status = os.waitpid(child, 0)
        os.write(1, b"reaped %d\n" % status)


if __name__ == "__main__":
    main()
