"""The tier against kvferry's conformance kit: this is all that it takes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from kvferry_sqlite.tier import SqliteTier

from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, TierTests
from kvferry.connector.tier import Tier

_MINE = "WHERE id = (SELECT id FROM blocks WHERE key = ?)"


class TestSqlite(TierTests):
    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        return {"type": "sqlite", "path": str(place / "blocks.db"), "capacity": capacity_bytes}

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        connection = sqlite3.connect(place / "blocks.db")
        ((header, body),) = connection.execute(f"SELECT header, body FROM frames {_MINE}", (key,))
        raw = self.damaged(header + body, how)
        connection.execute(
            f"UPDATE frames SET header = ?, body = ? {_MINE}", (raw[:HEADER_BYTES], raw[HEADER_BYTES:], key)
        )
        connection.commit()
        connection.close()

    def exhaust(self, tier: Tier, place: Path) -> None:
        self.limit_pages(tier, 1)  # SQLite makes it as many as there are

    def relieve(self, tier: Tier, place: Path) -> None:
        self.limit_pages(tier, 1 << 20)

    def limit_pages(self, tier: Tier, pages: int) -> None:
        assert isinstance(tier, SqliteTier)
        for connection in tier._pool._free:
            connection.execute(f"PRAGMA max_page_count = {pages}")
