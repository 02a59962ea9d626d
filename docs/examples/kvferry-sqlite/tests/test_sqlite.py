"""What the conformance kit cannot know: this tier's file, and who else uses it."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from kvferry.connector.errors import ConfigError, TierTimeout, TierUnavailable
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.testing import TierCase
from kvferry.connector.tier import Outcome


class TestFile(TierCase):
    """``TierCase`` is the kit without its tests: ``open``, ``store`` and ``load`` that check every byte."""

    capacity_bytes = 1 << 20

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        return {"type": "sqlite", "path": str(place / "blocks.db"), "capacity": capacity_bytes}

    def test_kvferry_finds_the_plugin(self) -> None:
        (report,) = [report for report in PluginRegistry().reports() if report.name == "sqlite"]
        assert (report.origin, report.error) == ("kvferry-sqlite", "")

    def test_the_file_is_for_its_owner_alone(self) -> None:
        self.store_all(self.open(), self.keys(1))
        assert {stat.S_IMODE(file.stat().st_mode) for file in self.place.iterdir()} == {0o600}

    def test_the_file_stays_within_the_capacity(self) -> None:
        tier = self.open()
        self.store(tier, self.keys(60))
        tier.close()
        assert (self.place / "blocks.db").stat().st_size <= self.capacity_bytes

    def test_a_smaller_capacity_holds_from_the_start(self) -> None:
        tier = self.open()
        self.store_all(tier, self.keys(12))
        tier.close()
        smaller = self.open(capacity_bytes=self.capacity_bytes // 2)
        assert 0 < smaller.stats().blocks < 12
        assert smaller.stats().used_bytes <= self.capacity_bytes // 2
        assert len(self.removed) == 12 - smaller.stats().blocks

    def test_what_was_used_last_stays(self) -> None:
        tier = self.open()
        first, *others = self.keys(60)
        self.store_all(tier, [first])
        for key in others:
            self.store_all(tier, [key])
            assert self.load(tier, [first]) == [Outcome.OK]

    def test_the_head_of_a_batch_outlives_its_tail(self) -> None:
        tier = self.open()
        keys = self.keys(6)
        self.store(tier, keys)
        fresh = iter(self.keys(100, "fresh"))
        while all(tier.contains(keys)):
            self.store_all(tier, [next(fresh)])
        assert list(tier.contains(keys)) == [True] * 5 + [False]

    def test_another_program_s_database_is_refused_and_left_as_it_is(self) -> None:
        path = self.place / "blocks.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        connection.close()
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=r"tiers\.kit\.path: .* another program"):
            self.open()
        assert path.read_bytes() == before

    def test_what_is_no_database_is_refused(self) -> None:
        (self.place / "blocks.db").write_bytes(b"no database at all " * 400)
        with pytest.raises(TierUnavailable, match="not a database"):
            self.open()

    def test_a_directory_that_is_not_there_is_named(self) -> None:
        with pytest.raises(TierUnavailable, match="name a file in a directory that is there"):
            self.open(self.place / "absent")

    def test_too_little_capacity_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="give at least"):
            self.open(capacity_bytes=100_000)

    def test_several_may_create_the_file_at_once(self) -> None:
        self.together(*[lambda: self.store_all(self.open(), self.keys(2))] * 4)
        assert self.load(self.open(), self.keys(2)) == [Outcome.OK] * 2

    def test_a_store_gives_up_when_another_writer_holds_the_file(self) -> None:
        tier = self.open(deadline_s=0.2)
        self.store_all(tier, self.keys(1))
        other = sqlite3.connect(self.place / "blocks.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TierTimeout, match="locked by another writer"):
            self.store(tier, self.keys(2))
        assert self.load(tier, self.keys(2)) == [Outcome.OK, Outcome.MISSING]
        other.execute("COMMIT")
        other.close()
        assert self.store(tier, self.keys(2)) == [Outcome.OK] * 2
