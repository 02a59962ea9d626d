"""Checks that what goes in comes out, and that buffers are left alone."""

from __future__ import annotations

import threading

import pytest

from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.layout import BlockLayout
from kvferry.connector.testing.blocks import DIRT, Blocks, hostile_keys
from kvferry.connector.testing.case import FINGERPRINT, TierCase
from kvferry.connector.tier import Frame, Outcome, Tier

__all__ = ["RoundTripChecks"]

_MAX_BATCH = 64
"""Blocks in the largest batch that kvferry hands to a tier."""
_WATCH_S = 0.1
"""How long a buffer is watched after a call returned."""
_LAYOUTS = {
    "1 B": BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=1, head_dim=1, kv_factor=1, itemsize=1),
    "4 KiB": BlockLayout(num_layers=2, num_kv_heads=1, block_tokens=16, head_dim=32, itemsize=2),
    "4 KiB + 1": BlockLayout(
        num_layers=17, num_kv_heads=1, block_tokens=241, head_dim=1, kv_factor=1, itemsize=1
    ),
    "1 MiB": BlockLayout(num_layers=16, num_kv_heads=4, block_tokens=32, head_dim=128, itemsize=2),
}


class RoundTripChecks(TierCase):
    """Blocks come back bit for bit, in any number, of any length, under any key."""

    def test_a_block_comes_back_bit_for_bit(self, tier: Tier) -> None:
        """The simplest thing that a tier does."""
        (key,) = self.keys(1)
        assert self.store(tier, [key]) == [Outcome.OK]
        assert self.load(tier, [key]) == [Outcome.OK]

    def test_many_blocks_come_back_one_by_one(self, tier: Tier) -> None:
        """Calls of one block each."""
        keys = self.keys(20)
        self.store_all(tier, keys)
        for key in reversed(keys):
            assert self.load(tier, [key]) == [Outcome.OK]

    def test_a_batch_comes_back_in_any_order(self, tier: Tier) -> None:
        """The order of a load owes nothing to that of the store."""
        keys = self.keys(12)
        assert self.store(tier, keys) == [Outcome.OK] * 12
        assert self.load(tier, keys) == [Outcome.OK] * 12
        assert self.load(tier, keys[::-1]) == [Outcome.OK] * 12
        assert self.load(tier, keys[::3] + keys[1::3]) == [Outcome.OK] * 8

    def test_the_largest_batch_comes_back(self, tier: Tier) -> None:
        """As many blocks as kvferry ever hands over in one call."""
        keys = self.keys(_MAX_BATCH)
        assert self.store(tier, keys) == [Outcome.OK] * _MAX_BATCH
        assert self.load(tier, keys) == [Outcome.OK] * _MAX_BATCH

    @pytest.mark.parametrize("size", _LAYOUTS)
    def test_blocks_of_any_size_come_back(self, size: str) -> None:
        """Payloads from one byte to a mebibyte, on and beside the boundaries of alignment."""
        layout = _LAYOUTS[size]
        tier = self.open(layout=layout)
        self.blocks = Blocks(layout, FINGERPRINT)
        keys = self.keys(3)
        assert self.store(tier, keys) == [Outcome.OK] * 3
        assert self.load(tier, keys) == [Outcome.OK] * 3

    @pytest.mark.parametrize("length", [1, 255, 4095, 4096, 4097, 42272])
    def test_a_shorter_body_comes_back(self, tier: Tier, length: int) -> None:
        """A codec makes blocks shorter; the load asks for as much as a block can have."""
        keys = self.keys(3)
        assert self.store(tier, keys, length) == [Outcome.OK] * 3
        assert self.load(tier, keys, length) == [Outcome.OK] * 3

    def test_bodies_of_different_lengths_share_a_batch(self, tier: Tier) -> None:
        """Each block keeps its own length."""
        keys, lengths = self.keys(4), [42273, 1, 4096, 777]
        sources = [
            self.blocks.sealed([key], length).sources()[0] for key, length in zip(keys, lengths, strict=True)
        ]
        assert tier.store(sources) == [Outcome.OK] * 4
        batch = self.blocks.empty(keys)
        assert tier.load(batch.frames) == [Outcome.OK] * 4
        batch.check_guards()
        for frame, length in zip(batch.frames, lengths, strict=True):
            self.blocks.verify(frame, length)

    def test_an_empty_batch_is_nothing(self, tier: Tier) -> None:
        """Every method takes no blocks and does nothing."""
        self.store(tier, self.keys(1))
        assert list(tier.store([])) == []
        assert list(tier.load([])) == []
        assert list(tier.contains([])) == []
        tier.delete([])
        assert self.load(tier, self.keys(1)) == [Outcome.OK]

    def test_a_key_may_come_twice_in_a_store(self, tier: Tier) -> None:
        """Both are ``OK``, and it is one block."""
        first, second = self.keys(2)
        assert self.store(tier, [first, second, first]) == [Outcome.OK] * 3
        assert self.load(tier, [first, second]) == [Outcome.OK] * 2

    def test_a_key_may_come_twice_in_a_load(self, tier: Tier) -> None:
        """Both buffers are filled."""
        first, second = self.keys(2)
        self.store_all(tier, [first, second])
        assert self.load(tier, [first, second, first]) == [Outcome.OK] * 3

    def test_storing_again_changes_nothing(self, tier: Tier) -> None:
        """A key that is held is ``OK``."""
        keys = self.keys(3)
        for _ in range(3):
            assert self.store(tier, keys) == [Outcome.OK] * 3
        assert self.load(tier, keys) == [Outcome.OK] * 3

    def test_hostile_keys_come_back(self, tier: Tier) -> None:
        """Keys are 32 arbitrary bytes: no name of a file, no text, no prefix of one another is special."""
        keys = hostile_keys()
        assert self.store(tier, keys) == [Outcome.OK] * len(keys)
        assert self.load(tier, keys) == [Outcome.OK] * len(keys)

    def test_hostile_keys_are_all_different(self, tier: Tier) -> None:
        """Storing one makes none of the others appear; deleting one removes no other."""
        keys = hostile_keys()
        self.store_all(tier, keys[::2])
        assert list(tier.contains(keys)) == [index % 2 == 0 for index in range(len(keys))]
        tier.delete(keys[::4])
        assert list(tier.contains(keys)) == [index % 4 == 2 for index in range(len(keys))]

    def test_a_load_leaves_everything_outside_its_buffers_alone(self, tier: Tier) -> None:
        """Neighbouring slots belong to other requests."""
        keys = self.keys(5)
        self.store(tier, keys[::2])
        batch = self.blocks.empty(keys)
        tier.load(batch.frames)
        batch.check_guards()

    def test_a_block_that_is_missing_leaves_the_others_whole(self, tier: Tier) -> None:
        """Absent blocks between present ones shift nothing."""
        keys = self.keys(9)
        self.store(tier, keys[1::2])
        expected = [Outcome.OK if index % 2 else Outcome.MISSING for index in range(9)]
        assert self.load(tier, keys) == expected

    def test_a_load_overwrites_what_the_buffer_held(self, tier: Tier) -> None:
        """Also where the buffer held a whole frame of another block."""
        first, second = self.keys(2)
        self.store_all(tier, [first, second])
        batch = self.blocks.empty([first, second])
        tier.load(batch.frames)
        swapped = [
            Frame(key, frame.header, frame.payload, frame.length)
            for key, frame in zip([second, first], batch.frames, strict=True)
        ]
        assert tier.load(swapped) == [Outcome.OK] * 2
        for frame in swapped:
            self.blocks.verify(frame)

    def test_read_only_buffers_can_be_stored(self, tier: Tier) -> None:
        """``store`` gets buffers that cannot be written, and keeps what they held."""
        sources = self.blocks.sealed(self.keys(2)).sources()
        assert all(frame.header.readonly and frame.payload.readonly for frame in sources)
        assert tier.store(sources) == [Outcome.OK] * 2
        assert self.load(tier, self.keys(2)) == [Outcome.OK] * 2

    def test_a_stored_buffer_may_be_reused_at_once(self, tier: Tier) -> None:
        """What ``store`` reported is kept: the slot holds another block a moment later."""
        keys = self.keys(6)
        batch = self.blocks.sealed(keys)
        assert tier.store(batch.sources()) == [Outcome.OK] * 6
        batch.overwrite(0x33)
        assert self.load(tier, keys) == [Outcome.OK] * 6
        tier.close()
        if tier.capabilities.is_persistent:
            assert self.load(self.open(), keys) == [Outcome.OK] * 6

    def test_a_loaded_buffer_is_left_alone_afterwards(self, tier: Tier) -> None:
        """After a load returned, nothing writes into its buffers any more."""
        keys = self.keys(6)
        self.store_all(tier, keys[:4])
        batch = self.blocks.empty(keys)
        tier.load(batch.frames)
        batch.overwrite(DIRT)
        image = batch.image()
        threading.Event().wait(_WATCH_S)
        tier.close()
        assert batch.image() == image, "a buffer was written after the load had returned"

    def test_a_loaded_block_may_be_stored_elsewhere(self, tier: Tier) -> None:
        """A frame that came from one tier goes into another as it is."""
        keys = self.keys(3)
        self.store_all(tier, keys)
        batch = self.blocks.empty(keys)
        assert tier.load(batch.frames) == [Outcome.OK] * 3
        other = self.open(self.make_place())
        assert other.store(batch.sources()) == [Outcome.OK] * 3
        assert self.load(other, keys) == [Outcome.OK] * 3

    def test_the_header_comes_back_as_it_was(self, tier: Tier) -> None:
        """Also where it is none that the tier could understand."""
        (key,) = self.keys(1)
        batch = self.blocks.sealed([key])
        batch.frames[0].header[:] = bytes(range(256))
        assert HEADER_BYTES == 256
        assert tier.store(batch.sources()) == [Outcome.OK]
        loaded = self.blocks.empty([key])
        assert tier.load(loaded.frames) == [Outcome.OK]
        assert bytes(loaded.frames[0].header) == bytes(range(256))
