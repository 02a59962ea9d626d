"""Connections to the file: opened with care, lent to one thread at a time, and SQLite's errors translated.

A call waits at most half of ``deadline_s`` for a connection and half for other writers, so that it ends in
time either way. Thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvferry.connector.errors import ClosedError, ConfigError, TierTimeout, TierUnavailable
from kvferry.connector.tier import TierContext

__all__ = ["PAGE_BYTES", "NoSpace", "Pool"]

PAGE_BYTES = 16 << 10
_OWNER, _FORMAT = 0x6B766679, 1
_SETTINGS = (f"page_size = {PAGE_BYTES}", "journal_mode = WAL", "synchronous = NORMAL")
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS blocks (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL);
    CREATE INDEX IF NOT EXISTS by_use ON blocks (used);
    CREATE TABLE IF NOT EXISTS frames (id INTEGER PRIMARY KEY, header BLOB NOT NULL, body BLOB NOT NULL);
    CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON blocks BEGIN DELETE FROM frames WHERE id = old.id; END;
    PRAGMA application_id = {_OWNER};
    PRAGMA user_version = {_FORMAT};
    COMMIT;
"""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_AGAIN_S = 0.01


class NoSpace(TierUnavailable):
    """The medium is full; the transaction has not happened."""


class Pool:
    """A few connections to one file; created when absent.

    Raises:
        ConfigError: The file is another program's.
        TierError: The file cannot be opened, or is locked for too long.
    """

    def __init__(self, path: str, capacity_bytes: int, context: TierContext) -> None:
        self._path = Path(path).expanduser().absolute()
        self._max_pages = capacity_bytes // PAGE_BYTES
        self._name = context.name
        self._wait_s = context.deadline_s / 2
        self._changed = threading.Condition()
        self._is_closed = False
        self._free: list[sqlite3.Connection] = []
        self._count = 0
        try:
            for self._count in range(1, context.threads + 2):
                self._free.append(self._open())
        except BaseException:
            self._close_free()
            raise

    @contextlib.contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Lend a connection between ``begin`` and COMMIT; what raises is rolled back.

        Raises:
            ClosedError: After ``close``.
            NoSpace: The medium is full.
            TierError: The file cannot be used.
        """
        with self._changed:
            self._wait_for(lambda: bool(self._is_closed or self._free))
            self.require_open()
            connection = self._free.pop()
        try:
            connection.execute(begin)
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._translated(error) from error
        finally:
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            with self._changed:
                self._free.append(connection)
                self._changed.notify_all()

    def require_open(self) -> None:
        """Raise ClosedError after ``close``."""
        if self._is_closed:
            raise ClosedError(f"tier {self._name!r} is closed")

    def close(self) -> None:
        """Wait for the calls under way and close all connections; TierTimeout when that takes too long."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._wait_for(lambda: len(self._free) == self._count)
            self._close_free()

    def _close_free(self) -> None:
        while self._free:
            self._free.pop().close()
        self._count = 0

    def _wait_for(self, holds: Callable[[], bool]) -> None:
        if not self._changed.wait_for(holds, self._wait_s):
            raise TierTimeout(self._name, f"{self._path} is busy with other calls", "give it more threads")

    def _open(self) -> sqlite3.Connection:
        try:
            # Created for its mode, and only when absent: closing a descriptor of a file that SQLite has open in
            # this process would drop SQLite's locks on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                self._path, timeout=self._wait_s, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            hint = "name a file in a directory that is there and writable"
            raise TierUnavailable(self._name, f"{self._path} cannot be opened: {error}", hint) from error
        end = time.monotonic() + self._wait_s
        try:
            while not self._prepare(connection, is_last_try=time.monotonic() > end):
                time.sleep(_AGAIN_S)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, *, is_last_try: bool) -> bool:
        """Make the file ours; False when others do it now, for which SQLite does not always wait by itself."""
        try:
            self._claim(connection)
        except sqlite3.Error as error:
            if is_last_try or _code(error) not in _BUSY:
                raise self._translated(error) from error
            return False
        return True

    def _claim(self, connection: sqlite3.Connection) -> None:
        query = (
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema) "
            "FROM pragma_application_id, pragma_user_version"
        )
        owner, version, tables = connection.execute(query).fetchone()
        if tables and (owner, version) != (_OWNER, _FORMAT):
            why = f"{self._path} is the database of another program, or of another version of this one"
            raise ConfigError(f"tiers.{self._name}.path", why, "name another file")
        for setting in (*_SETTINGS, f"max_page_count = {self._max_pages}"):
            connection.execute(f"PRAGMA {setting}")
        if not tables:
            connection.executescript(_SCHEMA)

    def _translated(self, error: sqlite3.Error) -> Exception:
        code = _code(error)
        if code == sqlite3.SQLITE_FULL:
            return NoSpace(self._name, f"{self._path}: {error}", "make room on its filesystem")
        if code in _BUSY:
            return TierTimeout(self._name, f"{self._path} is locked by another writer for too long")
        hint = "check the disk; the file holds nothing but copies and may be deleted"
        return TierUnavailable(self._name, f"{self._path}: {error}", hint)


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
