"""The mailbox: reports arrive whole and once, in order, and whatever else comes is left out."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from kvferry.engines.jobs import WorkerReport
from kvferry.engines.trtllm import reports
from kvferry.engines.trtllm.reports import Mailbox, Outbox, RankReport, Reporter


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    made = Mailbox()
    yield made
    made.close()


@pytest.fixture
def reporter(mailbox: Mailbox) -> Iterator[Reporter]:
    made = Reporter(mailbox.name, 1)
    yield made
    made.close()


def stranger(mailbox: Mailbox) -> socket.socket:
    """A connection of this user that is no reporter's."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.connect("\0" + mailbox.name)
    return made


def saved(*jobs: int, failed: bool = False) -> WorkerReport:
    return WorkerReport(saved=dict.fromkeys(jobs, 1), failed_saves=set(jobs) if failed else set())


def test_reports_of_all_ranks_arrive_in_their_order(mailbox: Mailbox) -> None:
    ranks = [Reporter(mailbox.name, rank) for rank in range(4)]
    for job in range(10):
        assert all(
            reporter.send(RankReport(rank=rank, report=saved(job), loaded=[str(job)]))
            for rank, reporter in enumerate(ranks)
        )
    taken = mailbox.take()
    assert len(taken) == 40
    for rank in range(4):
        assert [list(one.report.saved) for one in taken if one.rank == rank] == [[job] for job in range(10)]
    assert mailbox.take() == []
    for reporter in ranks:
        reporter.close()


def test_two_mailboxes_have_names_that_nobody_guesses(mailbox: Mailbox) -> None:
    other = Mailbox()
    assert other.name != mailbox.name
    assert len(other.name) > 32
    other.close()


def test_an_empty_mailbox_answers_at_once(mailbox: Mailbox) -> None:
    before = time.monotonic()
    assert mailbox.take() == []
    assert time.monotonic() - before < 1


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"no report",
        msgspec.msgpack.encode({"rank": 1, "unknown": 2}),
        msgspec.msgpack.encode({"rank": -1}),
        msgspec.msgpack.encode({"rank": "1"}),
        msgspec.msgpack.encode({"rank": 1, "loaded": ["x"] * 100_000})[:100_000],
        msgspec.msgpack.encode({"rank": 1, "loaded": ["x" * 65]}),
        msgspec.msgpack.encode(RankReport(rank=1, report=WorkerReport(saved={1: 2}))),
        msgspec.msgpack.encode(RankReport(rank=1, report=WorkerReport(failed_saves={1}))),
        msgspec.msgpack.encode(RankReport(rank=1, failed=["1"])),
        b"\x91" * 100_000,
        b"x" * ((128 << 10) + 1),
    ],
    ids=range(12),
)
def test_what_is_no_report_is_dropped_and_said(
    mailbox: Mailbox, reporter: Reporter, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = stranger(mailbox)
    hostile.send(body)
    hostile.send(msgspec.msgpack.encode(RankReport(rank=3)))
    assert reporter.send(RankReport(rank=1))
    assert sorted(report.rank for report in mailbox.take()) == [1, 3]
    assert "dropped" in caplog.text
    hostile.close()


def test_other_users_are_not_let_in(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = stranger(mailbox)
    hostile.send(msgspec.msgpack.encode(RankReport(rank=3)))
    monkeypatch.setattr(reports.os, "geteuid", lambda: os.getuid() + 1)
    assert mailbox.take() == []
    assert "not let in" in caplog.text
    hostile.close()


def test_a_rank_tells_nothing_to_another_users_mailbox(
    mailbox: Mailbox, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reports.os, "geteuid", lambda: os.getuid() + 1)
    assert reporter.send(RankReport(rank=1))
    assert "another user" in caplog.text


def test_a_full_mailbox_is_not_now_and_loses_nothing(mailbox: Mailbox, reporter: Reporter) -> None:
    sent = 0
    while reporter.send(RankReport(rank=1, report=saved(sent), loaded=["x" * 64] * 500)):
        sent += 1
        assert sent < 10_000
    taken = mailbox.take()
    assert [list(report.report.saved) for report in taken] == [[job] for job in range(sent)]
    assert reporter.send(RankReport(rank=1, report=saved(sent)))
    assert [list(report.report.saved) for report in mailbox.take()] == [[sent]]


def test_without_a_leader_reports_are_dropped_and_one_line_says_so(
    mailbox: Mailbox, reporter: Reporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert reporter.send(RankReport(rank=1))
    mailbox.take()
    mailbox.close()
    assert [reporter.send(RankReport(rank=1)) for _ in range(3)] == [True] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert mailbox.take() == []


def test_a_rank_that_goes_away_takes_no_report_with_it(mailbox: Mailbox, reporter: Reporter) -> None:
    assert reporter.send(RankReport(rank=1))
    reporter.close()
    assert [report.rank for report in mailbox.take()] == [1]
    assert mailbox.take() == []


class Slow(Reporter):
    """Takes so many reports, then none until it is told to go on."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.taken: list[RankReport] = []

    def send(self, report: RankReport) -> bool:
        if len(self.taken) >= self.takes:
            return False
        self.taken.append(msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=RankReport))
        return True


def test_an_outbox_reports_first_that_the_rank_is_there(mailbox: Mailbox) -> None:
    outbox, reporter = Outbox(2), Slow(9)
    assert outbox.flush(reporter)
    assert outbox.flush(reporter)
    assert reporter.taken == [RankReport(rank=2)]


def test_an_outbox_sends_everything_once_in_bounded_parts() -> None:
    outbox, reporter = Outbox(0), Slow(1)
    jobs = range(5000)
    outbox.add(
        WorkerReport(saved=dict.fromkeys(jobs, 1), failed_saves={7, 4999}, bytes_saved=3, bytes_loaded=2)
    )
    outbox.add(WorkerReport(bytes_saved=4, problem="p" * 9000), map(str, range(1300)), ["1299"])
    assert not outbox.flush(reporter)
    reporter.takes = 2
    assert not outbox.flush(reporter)
    outbox.add(saved(5000))
    reporter.takes = 99
    assert outbox.flush(reporter)
    of_all = WorkerReport()
    for part in reporter.taken:
        assert len(msgspec.msgpack.encode(part)) <= 128 << 10
        of_all.merge(part.report)
    assert of_all.saved == dict.fromkeys(range(5001), 1)
    assert of_all.failed_saves == {7, 4999}
    assert (of_all.bytes_saved, of_all.bytes_loaded) == (7, 2)
    assert [load for part in reporter.taken for load in part.loaded] == list(map(str, range(1300)))
    assert [load for part in reporter.taken for load in part.failed] == ["1299"]


def test_the_largest_part_fits_a_message(mailbox: Mailbox, reporter: Reporter) -> None:
    outbox = Outbox(1)
    jobs = range(1 << 62, (1 << 62) + 5000)
    loads = [f"{number:064d}" for number in range(2000)]
    outbox.add(WorkerReport(dict.fromkeys(jobs, 1), set(jobs), problem="\U0001f600" * 3000), loads, loads)
    taken: list[RankReport] = []
    end = time.monotonic() + 10
    while not outbox.flush(reporter):
        taken += mailbox.take()
        assert time.monotonic() < end
    taken += mailbox.take()
    assert sum(len(report.loaded) for report in taken) == 2000
    assert sum(len(report.report.saved) for report in taken) == 5000


def test_a_problem_is_told_once() -> None:
    outbox, reporter = Outbox(0), Slow(9)
    for _ in range(3):
        outbox.add(WorkerReport(problem="no GPU"))
        assert outbox.flush(reporter)
    outbox.add(WorkerReport(problem="worse"))
    assert outbox.flush(reporter)
    assert [part.report.problem for part in reporter.taken] == ["no GPU", "worse"]
