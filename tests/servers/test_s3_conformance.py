"""The S3 tier is held to the conformance kit, on a SeaweedFS of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from s3_server import BUCKET, Weed, client, running_weed

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, TierTests
from kvferry.connector.tier import Tier
from kvferry.plugins.s3.tier import S3Tier


class TestS3(TierTests):
    """Blocks as objects; the server is frozen, killed and started again."""

    plugins = ("kvferry.plugins.s3",)
    weed: ClassVar[Weed]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with running_weed(tmp_path_factory.mktemp("weed") / "kit") as cls.weed:
            yield

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        return {"type": "s3", **self.weed.options(prefix=place.name)}

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        assert isinstance(tier, S3Tier)
        behind, name = client(self.weed.endpoint), tier._name(key)
        raw = behind.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        behind.put_object(Bucket=BUCKET, Key=name, Body=self.damaged(raw, how))

    def suspend(self) -> None:
        self.weed.freeze()

    def resume(self) -> None:
        self.weed.thaw()

    def kill(self) -> None:
        self.weed.kill()

    def revive(self) -> None:
        if not self.weed.is_running:
            self.weed.start()

    def test_a_full_medium_is_an_outcome(self, tier: Tier) -> None:
        pytest.skip("a full SeaweedFS only says that it failed; test_s3_faults.py covers full stores")
