"""Records against a model: each is in one state, none is lost, none is written while it is read."""

from __future__ import annotations

from disk_kit import Fifo, key_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvferry.connector.keys import BlockKey
from kvferry.plugins.disk.records import Records

KEYS = st.integers(0, 15).map(key_of)


class RecordsMachine(RuleBasedStateMachine):
    """Drives every transition; the model is who may write to, and who reads from, each record."""

    reserved = Bundle("reserved")
    leaving = Bundle("leaving")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.records = Records(Fifo())
        self.total = 0
        self.held: dict[BlockKey, int] = {}
        self.writing: dict[BlockKey, int] = {}
        self.readers: list[int] = []

    @rule(count=st.integers(1, 3))
    def grow(self, count: int) -> None:
        self.records.add_free(range(self.total, self.total + count))
        self.total += count

    @rule(target=reserved, key=KEYS)
    def reserve(self, key: BlockKey) -> object:
        claimed = self.records.announce(key)
        assert claimed == (key not in self.held and key not in self.writing)
        if not claimed:
            return multiple()
        record = self.records.reserve(key)
        assert (record is None) == (not self.free_before)
        if record is None:
            self.records.withdraw(key)
            return multiple()
        assert record not in self.readers
        assert record not in self.held.values()
        assert record not in self.writing.values()
        assert self.records.reserve(key) == record
        self.writing[key] = record
        return key

    @rule(key=consumes(reserved))
    def publish(self, key: BlockKey) -> None:
        self.records.publish(key)
        self.held[key] = self.writing.pop(key)

    @rule(key=consumes(reserved), is_bad=st.booleans())
    def withdraw(self, key: BlockKey, is_bad: bool) -> None:
        self.records.withdraw(key, is_bad=is_bad)
        del self.writing[key]

    @rule(target=pins, key=KEYS)
    def pin(self, key: BlockKey) -> object:
        record = self.records.pin(key)
        assert record == self.held.get(key)
        if record is None:
            return multiple()
        self.readers.append(record)
        return record

    @rule(record=consumes(pins))
    def unpin(self, record: int) -> None:
        self.records.unpin(record)
        self.readers.remove(record)

    @rule(target=leaving, key=KEYS, is_elsewhere=st.booleans())
    def remove(self, key: BlockKey, is_elsewhere: bool) -> object:
        if is_elsewhere:
            assert self.records.remove(key, only=-1) is None
            return multiple()
        record = self.records.remove(key)
        assert record == self.held.pop(key, None)
        return multiple() if record is None else (key, record)

    @rule(target=leaving, count=st.integers(1, 4))
    def evict(self, count: int) -> object:
        victims = self.records.evict(count)
        assert len(victims) == min(count, len(set(self.held.values()) - set(self.readers)))
        for key, record in victims:
            assert self.held.pop(key) == record
            assert record not in self.readers
        return multiple(*victims)

    @rule(left=consumes(leaving), is_bad=st.booleans())
    def settle(self, left: tuple[BlockKey, int], is_bad: bool) -> None:
        self.records.settle(left[1], is_bad=is_bad)

    @rule(left=consumes(leaving))
    def reinstate(self, left: tuple[BlockKey, int]) -> None:
        key, record = left
        if key not in self.held and key not in self.writing:
            self.held[key] = record
        self.records.reinstate(key, record)

    @invariant()
    def every_record_is_in_one_state(self) -> None:
        census = self.records.census()
        assert sum(census) == self.total
        assert (census.held, census.reserved) == (len(self.held), len(self.writing))
        assert set(self.records) == self.held.keys()
        assert len(set(self.held.values()) | set(self.writing.values())) == len(self.held) + len(self.writing)
        self.free_before = census.free
        assert self.records.has_free() == bool(census.free)


RecordsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestRecords = RecordsMachine.TestCase
