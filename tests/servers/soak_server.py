"""A soak of the cache server: many clients that are killed at random, a server that is too, every byte checked.

    PYTHONPATH=tests/unit python tests/servers/soak_server.py --clients 64 --minutes 10 --seed 1

A real ``kvferry serve`` with arenas smaller than what is used and a disk below them, for two models of each of three
tenants. Three of four clients are engines on this machine, the others stream. Clients and their workers are killed at
any moment and replaced; the server is killed and started again. What is checked: no byte is wrong, everybody goes on
after each start of the server, its memory and descriptors don't grow, and when everybody has gone every slot is free
or holds a block, and nothing is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from cache_server import CacheServer
from fuzz_targets import footprint
from soak_client import CHAIN_BLOCKS, CHAINS, LAYOUTS, MODELS, Identity, Rows, run_engine, run_stream

TENANTS = {
    "": "a token of the nameless",
    "red": "a token of the red tenant",
    "blue": "a token of the blue tenant",
}
SLOTS = CHAINS * CHAIN_BLOCKS // 3
"""Of each arena: a third of what is used."""
KILL_S = 0.5
"""Pause between kills, on average."""
RECOVER_S = 60.0
"""Time in which everybody has to get on after a start of the server; far more than it takes."""
END_S = 60.0
SAMPLE_S = 1.0
MOST_GROWTH_BYTES = 16 << 20
"""From the middle of a life of the server to its end. What is bounded (notes on lost blocks, the disk's index) has
not reached its bound by then, a leak of a kilobyte a request would be several times as much."""
MOST_MORE_FILES = 4
"""What may be between the two halves of a sample: connections come and go."""


_PR_SET_PDEATHSIG = 1


class Sample(NamedTuple):
    """What the server takes of the machine, apart from what its connections do and the files of its disk, whose
    number is bounded by the capacity."""

    resident_bytes: int
    files: int


class Soak:
    """The server, its clients, and what became of them."""

    def __init__(self, directory: Path, clients: int, seed: int) -> None:
        self._directory = directory
        self._seed = seed
        self._random = Random(f"{seed}/kills")
        self._memory = mmap.mmap(-1, Rows.bytes_for(clients))
        self.rows = Rows(memoryview(self._memory))
        self._pids: dict[int, int] = {}
        """Process of each row."""
        self._clients = range(1, clients + 1)
        self._incarnations = 0
        self.kills = 0
        self.growth: list[Sample] = []
        self.log = directory / "wrong.log"
        host = {"capacity": (SLOTS + 1) * max(layout.slot_bytes for layout in LAYOUTS)}
        disk = {
            "type": "disk", "path": str(directory / "disk"), "capacity": "16MiB", "admission": "always",
        }  # fmt: skip
        self.server = CacheServer(
            directory,
            {
                "server": {"token": TENANTS[""]},
                "tenants": [{"name": name, "token": token} for name, token in TENANTS.items() if name],
                "host": host,
                "tiers": [disk],
            },
        )
        self.rows.set(0, "life", 1)

    # Clients

    def start_clients(self) -> None:
        for row in self._clients:
            self._start(row)

    def _start(self, row: int) -> None:
        self._incarnations += 1
        tenant, token = list(TENANTS.items())[row % len(TENANTS)]
        does_stream = row % 4 == 0
        identity = Identity(
            row=row,
            seed=f"{self._seed}/{self._incarnations}",
            address=self.server.tcp if does_stream else self.server.unix,
            tenant=tenant,
            token=token,
            model=row // 2 % len(MODELS),
            log=str(self.log),
        )
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self._pids[row] = pid
            return
        ctypes.CDLL(None).prctl(
            _PR_SET_PDEATHSIG, signal.SIGKILL
        )  # or it would outlive a soak that is killed
        try:
            (run_stream if does_stream else run_engine)(identity, self.rows)
        except EOFError:
            pass  # its worker was killed
        except BaseException:  # noqa: BLE001  # boundary: the child must not go on as its parent
            self.rows.add(row, "problems")
            identity.complain(traceback.format_exc())
        os._exit(0)

    def kill_one(self) -> None:
        """Kill a client, its worker, or both, and have another take its place."""
        row = self._random.choice(self._clients)
        pid, worker = self._pids[row], self.rows.get(row, "worker")
        match self._random.randrange(5):
            case 0 if worker:
                victims = [worker]
            case 1 if worker:
                victims = [worker, pid]
            case _:
                victims = [pid]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.kills += 1

    def replace_the_dead(self) -> None:
        for row, pid in list(self._pids.items()):
            ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.rows.set(row, "worker", 0)
                self._start(row)

    # The server

    def restart(self, is_crash: bool) -> None:
        if is_crash:
            self.server.kill()
        else:
            self.server.stop()
        self.server.start()
        self.rows.add(0, "life")

    def laggards(self) -> list[int]:
        """Return who has not achieved anything in the server's present life."""
        life = self.rows.life
        return [row for row in self._clients if self.rows.get(row, "life") != life]

    def sample(self) -> Sample:
        status = self.server.status()
        resident, files, _ = footprint(self.server.pid, f"{self._directory}/disk/")
        own = sum(2 if one["mode"] == "map" else 1 for one in status["connections"])
        own += sum(pool["dead_writers"] for pool in status["pools"])
        return Sample(resident, files - own)

    # The run

    def live(self, seconds: float) -> None:
        """One life of the server: until everybody got on, then kills, then what has grown."""
        end = time.monotonic() + seconds
        self._kill_for(lambda: not self.laggards(), time.monotonic() + RECOVER_S, does_kill=False)
        assert not self.laggards(), f"clients {self.laggards()} did nothing since the server's start"
        middle = time.monotonic() + max(0.0, end - time.monotonic()) / 2
        self._kill_for(lambda: time.monotonic() >= middle, middle)
        before = self._least_sample()
        self._kill_for(lambda: time.monotonic() >= end, end)
        after = self._least_sample()
        grown = Sample(after.resident_bytes - before.resident_bytes, after.files - before.files)
        self.growth.append(grown)
        assert grown.resident_bytes < MOST_GROWTH_BYTES, grown
        assert grown.files <= MOST_MORE_FILES, grown

    def _kill_for(self, is_over: Any, deadline: float, does_kill: bool = True) -> None:
        next_kill = 0.0
        while not is_over() and time.monotonic() < deadline:
            if does_kill and time.monotonic() >= next_kill:
                self.kill_one()
                next_kill = time.monotonic() + self._random.uniform(0.0, 2 * KILL_S)
            self.replace_the_dead()
            time.sleep(0.05)

    def _least_sample(self) -> Sample:
        """The least of several, because connections come and go between the two halves of one."""
        samples = []
        for _ in range(5):
            samples.append(self.sample())
            time.sleep(SAMPLE_S / 5)
            self.replace_the_dead()
        return Sample(min(one.resident_bytes for one in samples), min(one.files for one in samples))

    def finish(self) -> dict[str, int]:
        """Have everybody go, and check what is left; return the server's totals."""
        self.rows.set(0, "life", -1)
        deadline = time.monotonic() + END_S
        for pid in self._pids.values():
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, f"client process {pid} does not end"
                time.sleep(0.02)
        self._pids.clear()
        while (held := self._held()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not held, held
        pools = self.server.status()["pools"]
        totals = {
            "from_disk": sum(pool["counters"]["decisions"]["hits"].get("disk", 0) for pool in pools),
            "host_evictions": sum(pool["counters"]["host_evictions"] for pool in pools),
        }
        self.server.stop()
        assert not Path(self.server.unix.removeprefix("unix://")).exists(), "the socket's file is left over"
        return totals

    def _held(self) -> list[str]:
        """Return what is somebody's although nobody is there."""
        status = self.server.status()
        held = [f"connection of {one['engine']}" for one in status["connections"]]
        for pool in status["pools"]:
            counters = pool["counters"]
            for what in ("leases", "reservations"):
                held += [f"{counters[what]} {what}"] if counters[what] else []
            held += [f"{pool['dead_writers']} dead writers"] if pool["dead_writers"] else []
            lost = counters["used_slots"] - counters["host_blocks"]
            held += [f"{lost} slots"] if lost and not counters["pending_transfers"] else []
        return held

    def kill_all(self) -> None:
        """Whatever happened: leave no process."""
        for row, pid in self._pids.items():
            for victim in (pid, self.rows.get(row, "worker")):
                with contextlib.suppress(ProcessLookupError):
                    if victim:
                        os.kill(victim, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.server.kill()


def soak(clients: int, seconds: float, seed: int, lives: int) -> dict[str, Any]:
    """Run one; return what was seen. Raises AssertionError for whatever is wrong."""
    logging.getLogger("kvferry").setLevel(logging.ERROR)  # that it is lost, every client tells
    directory = Path(tempfile.mkdtemp(prefix="kvs-"))
    run = Soak(directory, clients, seed)
    try:
        run.start_clients()
        for number in range(lives):
            if number:
                run.restart(is_crash=number % 4 != 0)
            run.live(seconds / lives)
        totals = run.finish()
        problems = run.log.read_text() if run.log.exists() else ""
        assert run.rows.total("wrong") == 0, problems
        assert not run.rows.total("problems"), problems
        errors = [line for line in run.server.log.splitlines() if "Traceback" in line or " ERROR " in line]
        assert not errors, errors[:5]
        seen = {column: run.rows.total(column) for column in ("steps", "saved", "read", "given_up", "wrong")}
        growth = [f"{one.resident_bytes / 2**20:+.1f} MiB, {one.files:+d} descriptors" for one in run.growth]
        return seen | totals | {"kills": run.kills, "starts": lives, "growth": growth}
    finally:
        run.kill_all()
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Let many clients use a cache server, and kill them.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lives", type=int, default=5, help="how often the server is started")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args()
    seen = soak(options.clients, options.minutes * 60, options.seed, options.lives)
    print(json.dumps(seen) if options.json else "\n".join(f"{name}: {value}" for name, value in seen.items()))


if __name__ == "__main__":
    main()
