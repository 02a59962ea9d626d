"""Saves under way: which pages must not be written yet, and when a save is through."""

from __future__ import annotations

from kvferry.connector.service import Reservation
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.saves import OpenSaves

SLOTS = Reservation(1, ())


def test_a_page_that_two_saves_read_is_read_until_both_are_through() -> None:
    saves = OpenSaves(1)
    first, second = saves.begin("a", SLOTS, (0, 1)), saves.begin("b", SLOTS, (0, 2))
    assert saves.reading([0]) == {first, second}
    saves.report(WorkerReport(saved={second: 1}, failed_saves={second}))
    assert saves.reading([0, 1, 2]) == {first}
    saves.report(WorkerReport(saved={first: 1}))
    assert saves.reading([0, 1, 2]) == set()


def test_a_save_is_through_when_every_rank_has_reported_and_good_if_all_made_it() -> None:
    saves = OpenSaves(2)
    good, bad = saves.begin("a", SLOTS, (0,)), saves.begin("a", SLOTS, (1,))
    assert saves.report(WorkerReport(saved={good: 1, bad: 1}, failed_saves={bad})) == []
    assert saves.is_reading("a")
    through = saves.report(WorkerReport(saved={good: 1, bad: 1, 99: 1}))
    assert [(save.id, save.is_good) for save in through] == [(good, True), (bad, False)]
    assert not saves.is_reading("a")
