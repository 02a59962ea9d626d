"""Opening tiers: a mistake is raised, what cannot be had is left out, and nobody waits for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from disk_kit import make_context

from kvferry.connector.config import Config
from kvferry.connector.errors import TierTimeout
from kvferry.connector.hooks import hookimpl
from kvferry.connector.opening import OpenedTiers, open_tiers
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.testing.memory import MemoryTier
from kvferry.connector.tier import TierContext, TierType

DEADLINE_S = 20.0


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Reluctant(MemoryTier):
    """Is created when the test lets it."""

    may_open = threading.Event()
    closed = threading.Event()

    def __init__(self, options: Options, context: TierContext) -> None:
        assert self.may_open.wait(DEADLINE_S)
        super().__init__(1 << 20, context)

    def close(self) -> None:
        super().close()
        self.closed.set()


class Plugin:
    @staticmethod
    @hookimpl
    def kvferry_tier_types() -> Sequence[TierType]:
        return [TierType("reluctant", Options, Reluctant, "for tests", threads=7)]


@pytest.fixture(autouse=True)
def unopened() -> Iterator[None]:
    Reluctant.may_open.clear()
    Reluctant.closed.clear()
    yield
    Reluctant.may_open.set()


def open_reluctant(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> OpenedTiers:
    registry = PluginRegistry(use_entry_points=False)
    tier_type = Plugin.kvferry_tier_types()[0]
    monkeypatch.setattr(registry, "tier_type", lambda name, path: tier_type)
    config = Config(tiers=({"type": "reluctant", **fields},))
    return open_tiers(config, registry, lambda tier: make_context(), logging.getLogger("test.opening"))


def test_a_tier_that_takes_too_long_is_left_out_and_closed_when_it_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    opened = open_reluctant(monkeypatch, open_deadline_s=0.05)
    assert time.monotonic() - started < DEADLINE_S
    assert not opened.tiers
    (problem,) = opened.problems
    assert "'reluctant' is left out" in problem
    assert "longer than 0.05 s" in problem
    assert problem in caplog.text
    Reluctant.may_open.set()
    assert Reluctant.closed.wait(DEADLINE_S)


def test_a_required_tier_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TierTimeout, match="open_deadline_s"):
        open_reluctant(monkeypatch, open_deadline_s=0.05, required=True)


def test_a_tier_that_comes_in_time_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Reluctant.may_open.set()
    opened = open_reluctant(monkeypatch)
    assert [type(one.tier) for one in opened.tiers] == [Reluctant]
    assert not opened.problems
    opened.tiers[0].tier.close()


@pytest.mark.parametrize(("said", "threads"), [({}, 7), ({"threads": 3}, 3)])
def test_a_tier_has_the_threads_of_its_type_unless_the_operator_says(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, int], threads: int
) -> None:
    Reluctant.may_open.set()
    (opened,) = open_reluctant(monkeypatch, **said).tiers
    assert opened.config.threads == threads
    opened.tier.close()
