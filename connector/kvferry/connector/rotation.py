"""Bounded files of lines: private to the user, rotated, pruned, and read without trusting them.

``explain`` keeps its request records in them. One writer per file; a lock shared for as long as the
writer lives tells ``prune`` which files are in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MAX_LINE_BYTES", "RotatedFile", "file_name", "make_private", "prune", "read_lines"]

MAX_LINE_BYTES = 64 << 10
"""Longer lines are not read."""
SUFFIX = ".jsonl"


class RotatedFile:
    """A file that becomes its own predecessor (``NAME.1``) when it is full. Used by one thread.

    Args:
        path: Created with mode 0600; an existing one is continued.
        max_bytes: Bound on this file; with its predecessor it is twice that.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self._size = 0
        self._open()

    def append(self, lines: list[bytes]) -> None:
        """Write whole lines, starting a new file where the bound would be passed."""
        start = 0
        for index, line in enumerate(lines):
            if self._size + len(line) > self._max_bytes and self._size:
                self._write(lines[start:index])
                start = index
                self._rotate()
            self._size += len(line)
        self._write(lines[start:])

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._size = os.fstat(self._fd).st_size
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._size += os.write(self._fd, b"\n")  # a crash tore the last line; keep it apart

    def _rotate(self) -> None:
        os.replace(self._path, _predecessor(self._path))
        self.close()
        self._open()

    def _write(self, lines: list[bytes]) -> None:
        if self._fd < 0:
            self._open()
        if lines:
            os.write(self._fd, b"".join(lines))


def _predecessor(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def file_name(identity: str) -> str:
    """Return a file name for any identity; one that had to be changed stays distinct by a digest."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", identity)[:64]
    if safe and safe == identity:
        return safe + SUFFIX
    return f"{safe}-{hashlib.blake2s(identity.encode(), digest_size=4).hexdigest()}{SUFFIX}"


def make_private(directory: Path) -> None:
    """Create a directory only its owner can enter, or make it one.

    Raises:
        OSError: It cannot be made, or belongs to somebody else.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{directory} belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        directory.chmod(0o700)


def prune(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest files and their predecessors; those in use are locked and stay."""
    logs = sorted(directory.glob(f"*{SUFFIX}"), key=_modified, reverse=True)
    for path in logs[keep:]:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _predecessor(path).unlink(missing_ok=True)
            path.unlink()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def read_lines(directory: Path) -> Iterator[bytes | None]:
    """Yield the lines of all files of a directory, and None for each that is torn or too long.

    Raises:
        OSError: A file cannot be read.
    """
    for path in sorted(directory.glob(f"*{SUFFIX}*"), key=_modified):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    yield line if line.endswith(b"\n") else None
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
