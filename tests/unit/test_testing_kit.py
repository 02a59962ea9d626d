"""The conformance kit itself: it passes tiers that are right, and each of its checks finds something.

A tier that is right (``world_tier``) passes everything. For every check there is a tier with one fault
(``broken_tiers``) on which it fails.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_tiers import BROKEN, Shared
from hypothesis import given, settings
from hypothesis import strategies as st
from world_tier import WorldKit

from kvferry.connector import testing
from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import FaultyTier, SlowTier, TierCase, TierTests, hostile_keys
from kvferry.connector.testing.strategies import batches, block_keys, body_lengths
from kvferry.connector.tier import Outcome, Tier

CHECKS = [name for name in dir(TierTests) if name.startswith("test_")]


class TestARightTier(WorldKit):
    """Persistent, bounded, with every back door."""


class TestARightSharedTier(WorldKit):
    """The same with several users at a time."""

    kind = Shared


class TestAWrappedTier(WorldKit):
    """Slow is not wrong, and a faulty tier without faults is as right as what it wraps."""

    def make_tier(self, *args: object) -> Tier:
        return SlowTier(FaultyTier(super().make_tier(*args), rate=0.0), 0.0005)  # type: ignore[arg-type]


def arguments(check: object) -> Iterator[dict[str, object]]:
    """Yield the arguments of each parametrised run of a check."""
    marks = [mark for mark in getattr(check, "pytestmark", ()) if mark.name == "parametrize"]
    if not marks:
        yield {}
    for mark in marks:
        name, values = mark.args
        yield from ({name: value} for value in values)


def verdict(kit: type[TierTests], name: str, root: Path) -> str:
    """Run all forms of one check outside of pytest; ``failed`` when one of them fails."""
    verdicts = set()
    for number, values in enumerate(arguments(getattr(kit, name))):
        folder = root / str(number)
        folder.mkdir()
        case = kit()
        check = getattr(case, name)
        try:
            with case.prepared(folder):
                if "tier" in inspect.signature(check).parameters:
                    values = {**values, "tier": case.open()}
                check(**values)
        except pytest.skip.Exception:
            verdicts.add("skipped")
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  # boundary: a broken tier, any way it breaks
            verdicts.add("failed")
        else:
            verdicts.add("passed")
    return next(one for one in ("failed", "passed", "skipped") if one in verdicts)


@pytest.mark.parametrize(
    ("kit", "check"),
    [(kit, check) for kit, checks in BROKEN for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_check_finds_its_fault(kit: type[TierTests], check: str, tmp_path: Path) -> None:
    assert verdict(kit, f"test_{check}", tmp_path) == "failed"


def test_every_check_finds_something() -> None:
    shown = {f"test_{check}" for _, checks in BROKEN for check in checks}
    assert sorted(set(CHECKS) - shown) == []
    assert sorted(shown - set(CHECKS)) == []


def test_the_faults_are_not_just_anywhere(tmp_path: Path) -> None:
    """The harness above says ``passed`` and ``skipped`` too."""
    (tmp_path / "passes").mkdir()
    (tmp_path / "skips").mkdir()
    assert verdict(WorldKit, "test_a_block_comes_back_bit_for_bit", tmp_path / "passes") == "passed"
    assert verdict(WorldKit, "test_a_killed_process_leaves_whole_blocks", tmp_path / "skips") == "skipped"


def test_there_are_enough_checks_and_each_says_what_it_wants() -> None:
    assert len(CHECKS) >= 40
    assert [name for name in CHECKS if not getattr(TierTests, name).__doc__] == []


def test_the_author_is_told_what_is_missing(tmp_path: Path) -> None:
    case = TierCase()
    with case.prepared(tmp_path), pytest.raises(NotImplementedError, match=r"TierCase\.make_tier"):
        case.open()


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match="modes: unknown: tired"):
        FaultyTier(None, modes=["tired"])  # type: ignore[arg-type]


def test_faults_are_repeatable_and_counted(tmp_path: Path) -> None:
    def run(folder: Path) -> tuple[list[Outcome], dict[str, int]]:
        folder.mkdir()
        case = WorldKit()
        with case.prepared(folder):
            tier = FaultyTier(case.open(), 5, rate=0.5, modes=["failed", "no_room", "lie_missing"])
            keys = case.keys(30)
            batch = case.blocks.sealed(keys)
            stored = tier.store(batch.sources())
            return stored + tier.load(case.blocks.empty(keys).frames), tier.injected

    first, injected = run(tmp_path / "first")
    assert (first, injected) == run(tmp_path / "second")
    assert set(injected) == {"failed", "no_room", "lie_missing"}
    assert {Outcome.OK, Outcome.FAILED, Outcome.NO_ROOM, Outcome.MISSING} == set(first)


@given(batches(), body_lengths(TierCase.layout), st.data())
@settings(max_examples=60, deadline=None)
def test_what_the_strategies_make_goes_through_a_tier(
    keys: list[BlockKey], length: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = WorldKit()
        with case.prepared(Path(folder)):
            tier = case.open()
            assert case.store(tier, keys, length) == [Outcome.OK] * len(keys)
            other = data.draw(block_keys())
            found = Outcome.OK if other in keys else Outcome.MISSING
            assert case.load(tier, [*keys, other], length) == [Outcome.OK] * len(keys) + [found]


def test_hostile_keys_are_32_bytes_and_different() -> None:
    assert {len(key) for key in hostile_keys()} == {32}
    assert len(set(hostile_keys())) == len(hostile_keys()) > 20


def test_the_public_names_are_these() -> None:
    assert testing.__all__ == sorted(testing.__all__)
    assert [name for name in testing.__all__ if not getattr(testing, name).__doc__] == []
