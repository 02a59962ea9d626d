"""The conformance kit on the disk tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, TierTests
from kvferry.connector.tier import Tier
from kvferry.plugins.disk.options import SECTOR_BYTES


class TestDisk(TierTests):
    small_capacity_bytes = 2 << 20

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        return {"type": "disk", "path": str(place), "capacity": capacity_bytes}

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        if how in (Damage.TRUNCATE, Damage.EMPTY, Damage.EXTEND):
            pytest.skip("a record of a slab has no length of its own; see test_disk_damage.py")
        header, body = self.blocks.raw(key)[:HEADER_BYTES], self.blocks.raw(key)[HEADER_BYTES:]
        for slab in place.glob("slab-*"):
            whole = slab.read_bytes()
            at = whole.find(header)
            if at >= 0:
                assert whole[at + SECTOR_BYTES :].startswith(body)
                changed = self.damaged(header + body, how)
                with slab.open("r+b", buffering=0) as file:
                    file.seek(at)
                    file.write(changed[:HEADER_BYTES])
                    file.seek(at + SECTOR_BYTES)
                    file.write(changed[HEADER_BYTES:])
                return
        raise AssertionError("the block is in no slab")
