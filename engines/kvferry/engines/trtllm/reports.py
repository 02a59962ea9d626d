"""What ranks finished, on its way to the leader: TensorRT-LLM has no way for it, so there is a mailbox.

The leader listens on a socket with a name that cannot be guessed, which travels with each step's plan. A rank connects
and sends; a message is whole or is not there at all (``SOCK_SEQPACKET``), and each is sent once. Both ends make sure
that the other is a process of the same user. Nothing here blocks, and there is no thread: the leader looks into its
mailbox whenever the engine calls it.

Each object is owned by one thread: the executor's of its process.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterable
from typing import Annotated

import msgspec

from kvferry.connector.dialing import PEER_CREDENTIALS
from kvferry.engines.jobs import WorkerReport

__all__ = ["Mailbox", "Outbox", "RankReport", "Reporter"]

logger = logging.getLogger(__name__)

_PREFIX = "kvferry-trtllm-"
_MOST_BYTES = 128 << 10
"""Of a message: less than what any system lets a socket hold by default."""
_MOST_SAVES = 2048
_MOST_LOADS = 512
_MOST_PROBLEM = 2000
"""Characters: what is wrong with a rank is for people."""
_MOST_CONNECTIONS = 256
_MOST_AT_ONCE = 256
"""Messages of one connection that are taken in before the engine goes on."""
_BACKLOG = 128

_Id = Annotated[str, msgspec.Meta(max_length=64)]


class RankReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank finished since its last report."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    report: WorkerReport = msgspec.field(default_factory=WorkerReport)
    loaded: Annotated[list[_Id], msgspec.Meta(max_length=_MOST_LOADS)] = []
    """Requests whose load is over on this rank, whether the engine waited for it or not; each load once."""
    failed: Annotated[list[_Id], msgspec.Meta(max_length=_MOST_LOADS)] = []
    """Those among them that failed: the rank stops the engine."""


class Mailbox:
    """Where the leader finds what ranks finished.

    Raises:
        OSError: The system gives no socket.
    """

    def __init__(self) -> None:
        self.name = _PREFIX + secrets.token_hex(16)
        """By which ranks find it."""
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(_address(self.name))
        self._listener.listen(_BACKLOG)
        self._connections: list[socket.socket] = []

    def take(self) -> list[RankReport]:
        """Return what has come since the last call. Never blocks; what is no report is left out and logged."""
        self._accept()
        reports: list[RankReport] = []
        for connection in list(self._connections):
            if not _drain(connection, reports):
                self._connections.remove(connection)
                connection.close()
        return reports

    def close(self) -> None:
        """Take nothing any more. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        while self._connections:
            self._connections.pop().close()

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, or the other end is gone already: whoever waits is still there next time.
                logger.warning("a rank could not be let in: %s", error)
                return
            connection.setblocking(False)
            if not _is_of_this_user(connection) or len(self._connections) >= _MOST_CONNECTIONS:
                logger.error("somebody who is no rank of this engine wants to report to it; not let in")
                connection.close()
                continue
            self._connections.append(connection)


class Reporter:
    """A rank's way to the leader's mailbox.

    Args:
        mailbox: Its name.
        rank: This rank.
    """

    def __init__(self, mailbox: str, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank
        self._socket: socket.socket | None = None
        self._is_over = False

    def send(self, report: RankReport) -> bool:
        """Send a report; False: not now, it was not sent and may be later. Never blocks.

        Where there is no mailbox any more, nobody waits for reports: they are dropped, with True and one line of the
        log.
        """
        body = msgspec.msgpack.encode(report)
        assert len(body) <= _MOST_BYTES, "an Outbox splits reports"
        try:
            if self._is_over or not self._connect():
                return self._is_over
            assert self._socket is not None
            self._socket.send(body)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._give_up(str(error))
        return True

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._is_over = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> bool:
        if self._socket is not None:
            return True
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect(_address(self._mailbox))
            if not _is_of_this_user(connection):
                connection.close()
                self._give_up("it belongs to another user")
                return False
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        return True

    def _give_up(self, why: str) -> None:
        self.close()
        logger.error("rank %d: the leader's mailbox takes nothing any more: %s", self._rank, why)


class Outbox:
    """What a rank has not reported yet; each of it is sent once.

    Args:
        rank: The rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._report = WorkerReport()
        self._loaded: list[str] = []
        self._failed: set[str] = set()
        self._has_reported = False
        self._told_problem = ""

    def add(self, report: WorkerReport, loaded: Iterable[str] = (), failed: Iterable[str] = ()) -> None:
        """Add what was finished. A problem is told once."""
        self._report.merge(report)
        if self._report.problem == self._told_problem:
            self._report.problem = ""
        self._loaded += loaded
        self._failed |= set(failed)

    def flush(self, reporter: Reporter) -> bool:
        """Send what there is, the first time even if it is nothing: the leader learns that this rank is there.

        Returns:
            Whether all of it is sent; if not, the rest stays.
        """
        while self._loaded or not self._report.is_empty() or not self._has_reported:
            saves = dict(list(self._report.saved.items())[:_MOST_SAVES])
            loads = self._loaded[:_MOST_LOADS]
            part = RankReport(
                rank=self._rank,
                report=WorkerReport(
                    saved=saves,
                    failed_saves=self._report.failed_saves & saves.keys(),
                    bytes_loaded=self._report.bytes_loaded,
                    bytes_saved=self._report.bytes_saved,
                    load_seconds=self._report.load_seconds,
                    save_seconds=self._report.save_seconds,
                    problem=self._report.problem[:_MOST_PROBLEM],
                ),
                loaded=loads,
                failed=[load for load in loads if load in self._failed],
            )
            if not reporter.send(part):
                return False
            self._sent(part)
        return True

    def _sent(self, part: RankReport) -> None:
        self._has_reported = True
        self._told_problem = self._report.problem or self._told_problem
        saved = {job: ranks for job, ranks in self._report.saved.items() if job not in part.report.saved}
        self._report = WorkerReport(saved=saved, failed_saves=self._report.failed_saves & saved.keys())
        self._loaded = self._loaded[len(part.loaded) :]
        self._failed &= set(self._loaded)


def _drain(connection: socket.socket, reports: list[RankReport]) -> bool:
    """Take in what a rank has sent; False when nothing comes any more."""
    for _ in range(_MOST_AT_ONCE):
        try:
            body, _, flags, _ = connection.recvmsg(_MOST_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError as error:
            logger.warning("a rank's connection broke: %s", error)
            return False
        if not body:
            return False
        if flags & socket.MSG_TRUNC:
            logger.error("a report of more than %d bytes was dropped", _MOST_BYTES)
            continue
        try:
            report = msgspec.msgpack.decode(body, type=RankReport)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            logger.error("something that is no report was dropped: %s", error)
            continue
        if _is_sound(report):
            reports.append(report)
        else:
            logger.error("a report of rank %d that speaks for others was dropped", report.rank)
    return True


def _is_sound(report: RankReport) -> bool:
    """Tell whether a rank speaks for itself alone, of each save and load once."""
    return (
        set(report.report.saved.values()) <= {1}
        and report.report.failed_saves <= report.report.saved.keys()
        and set(report.failed) <= set(report.loaded)
        and not report.report.digests
    )


def _is_of_this_user(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    _, uid, _ = PEER_CREDENTIALS.unpack(raw)
    return bool(uid == os.geteuid())


def _address(name: str) -> str:
    """In the abstract namespace: it needs no folder, and is gone with its socket."""
    return "\0" + name
