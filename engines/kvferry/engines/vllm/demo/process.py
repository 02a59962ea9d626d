"""A command and all of its children as one group that can be stopped without leaving anything behind.

Run as a program, this module is the guard of such a group: it waits until its standard input ends, which it does
when the process that started it is gone, and then kills the group. So not even SIGKILL leaves an engine running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ProcessGroup"]

_LOG_LINES = 15
_DEADLINE_S = 20.0


class ProcessGroup:
    """A started command, its children, and the file that all of them print to.

    Not safe for use from several threads. The group is killed when the process that started it dies, however it dies.

    Args:
        command: The program and its arguments.
        environment: All of its environment variables.
        log: Where its output goes; overwritten.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._leader = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        guard = [sys.executable, "-m", __name__, str(self._leader.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def exit_status(self) -> int | None:
        """Return the command's exit status; None while it runs."""
        return self._leader.poll()

    def stop(self, deadline_s: float) -> None:
        """Ask the command to end, wait for at most ``deadline_s`` seconds, and kill what is left."""
        if self._leader.poll() is None:
            self._leader.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._leader.wait(deadline_s)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to all processes, and wait until they and their shared memory are gone.

        Calling it again does nothing.
        """
        _kill(self._leader.pid)
        self._leader.wait()
        self._guard.kill()
        self._guard.communicate()

    def log_tail(self) -> str:
        """Return the last lines that were printed, indented."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(f"  | {line[:200]}" for line in lines[-_LOG_LINES:])


def _kill(group: int) -> None:
    """Kill a process group and wait until it is gone.

    Python's resource trackers are spared: when the last process they serve is dead they remove its shared memory
    and semaphores, which nobody else would do, and end.
    """
    deadline = time.monotonic() + _DEADLINE_S
    while processes := _alive(group):
        is_late = time.monotonic() > deadline
        for process in processes:
            if is_late or not _is_tracker(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.02)


def _alive(group: int) -> list[Path]:
    """Return the /proc directory of each process of a group that is not a zombie."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, process_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(process)
    return found


def _is_tracker(process: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in (process / "cmdline").read_bytes()
    return False


if __name__ == "__main__":
    sys.stdin.read()
    _kill(int(sys.argv[1]))
