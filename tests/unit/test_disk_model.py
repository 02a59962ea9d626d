"""The disk tier against a dictionary: random calls, restarts and changes of capacity."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from disk_kit import (
    ALL_POLICIES,
    bytes_on_disk,
    capacity_for,
    key_of,
    load_verified,
    make_context,
    open_tier,
    store,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome

KEYS = st.lists(st.integers(0, 40).map(key_of), min_size=1, max_size=9)
CAPACITIES = {blocks: capacity_for(blocks) for blocks in (6, 14, 33)}


class DiskMachine(RuleBasedStateMachine):
    """The model is the set of keys that are held; the bytes follow from the key."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="kvferry-model-"))
        self.model: set[BlockKey] = set()

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.path)

    def on_removed(self, keys: Sequence[BlockKey]) -> None:
        assert set(keys) <= self.model
        self.model -= set(keys)

    @initialize(blocks=st.sampled_from(sorted(CAPACITIES)), eviction=st.sampled_from(sorted(ALL_POLICIES)))
    def open(self, blocks: int, eviction: str) -> None:
        self.blocks = blocks
        self.eviction = eviction
        context = make_context(on_removed=self.on_removed)
        self.tier = open_tier(self.path, CAPACITIES[blocks], context, eviction=eviction)

    @rule(keys=KEYS)
    def store(self, keys: list[BlockKey]) -> None:
        outcomes = store(self.tier, keys)
        stored = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.OK}
        refused = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.NO_ROOM}
        assert stored | refused == set(keys)
        assert not refused or len(set(keys)) > self.blocks
        self.model |= {key for key in stored if self.tier.contains([key]) == [True]}

    @rule(keys=KEYS)
    def load(self, keys: list[BlockKey]) -> None:
        outcomes = load_verified(self.tier, keys)
        assert outcomes == [Outcome.OK if key in self.model else Outcome.MISSING for key in keys]

    @rule(keys=KEYS)
    def delete(self, keys: list[BlockKey]) -> None:
        self.tier.delete(keys)
        self.model -= set(keys)

    @rule(blocks=st.sampled_from(sorted(CAPACITIES)))
    def restart(self, blocks: int) -> None:
        order = list(self.tier.scan())
        self.tier.close()
        is_shrunk = blocks < self.blocks
        self.open(blocks, self.eviction)
        held = set(self.tier.scan())
        assert held <= self.model if is_shrunk else held == self.model
        assert list(self.tier.scan()) == [key for key in order if key in held]
        self.model = held

    @invariant()
    def the_tier_holds_what_the_model_holds(self) -> None:
        assert set(self.tier.scan()) == self.model
        assert self.tier.stats().blocks == len(self.model) <= self.blocks
        census = self.tier.census()
        assert census.reserved == census.leaving == census.aside == 0
        assert census.held + census.free <= self.blocks
        assert bytes_on_disk(self.path) <= CAPACITIES[self.blocks]


DiskMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestDiskTier = DiskMachine.TestCase
