"""Pools: one for each model of each tenant, isolated, bounded in number, opened once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest
from server_kit import DEADLINE_S, LAYOUT, ServerInside, disk, prefix, soon

from kvferry.connector.config import Config, HostConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.server.config import ServerSettings, TenantConfig
from kvferry.connector.server.pools import Pool, PoolRefused, check_tiers

KEYS = prefix(8)


def test_tenants_see_nothing_of_one_another(tmp_path: Path) -> None:
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        ours, theirs = inside.engine(inside.pool("ours")), inside.engine(inside.pool("theirs"))
        ours.save(KEYS)
        assert ours.lookup(KEYS).ready == 8
        assert theirs.lookup(KEYS).reachable == 0
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        assert inside.engine(inside.pool("theirs")).lookup(KEYS).reachable == 0
        assert inside.engine(inside.pool("ours")).lookup(KEYS).reachable == 8, "its disk index is still there"


def test_a_tier_that_all_share_keeps_tenants_apart(tmp_path: Path) -> None:
    common = [{"type": "common", "place": str(tmp_path), "admission": "always"}]
    with ServerInside(tiers=common) as inside:
        inside.client(inside.pool("ours")).store(KEYS)
    with ServerInside(tiers=common) as inside:
        assert inside.client(inside.pool("theirs")).load(KEYS) == [False] * 8, "frames of another tenant"


def test_a_tenant_that_fills_its_arena_evicts_nobody_elses() -> None:
    with ServerInside(slots=16) as inside:
        ours, greedy = inside.engine(inside.pool("ours")), inside.engine(inside.pool("greedy"))
        ours.save(KEYS)
        for round_ in range(10):
            greedy.save(prefix(16, f"{round_}"))
        assert ours.read(KEYS) == 8


def test_two_models_of_one_tenant_are_two_pools() -> None:
    other = msgspec.structs.replace(LAYOUT, num_layers=3)
    with ServerInside() as inside:
        first = inside.engine(inside.pool())
        first.save(KEYS)
        second = inside.engine(inside.pool(fingerprint=b"g" * 32, layout=other))
        assert second.lookup(KEYS).ready == 0


def test_a_tenants_own_arena_and_tiers_come_first(tmp_path: Path) -> None:
    small = TenantConfig(
        name="small", host=HostConfig(capacity=5 * LAYOUT.slot_bytes), tiers=(disk(tmp_path),)
    )
    with ServerInside(slots=16, tenants=[small]) as inside:
        assert inside.pool("small").service.arena.num_slots == 4
        assert inside.pool("small").tiers == ("disk",)
        assert inside.pool("other").service.arena.num_slots == 16


def test_an_idle_model_makes_room_for_a_new_one(tmp_path: Path) -> None:
    with ServerInside(tiers=[disk(tmp_path)], max_models=2) as inside:
        first = inside.pool(fingerprint=b"1" * 32)
        inside.client(first).store(KEYS)
        second = inside.pool(fingerprint=b"2" * 32)
        with pytest.raises(PoolRefused, match="2 models in use"):
            inside.pool(fingerprint=b"3" * 32)
        inside.pools.release(second)
        third = inside.pool(fingerprint=b"3" * 32)
        served = inside.index.call(lambda: [pool.fingerprint[:1] for pool in inside.index.pools], soon())
        assert served == [b"1", b"3"]
        inside.pools.release(third)
        assert inside.pool(fingerprint=b"2" * 32) is not second
        assert inside.pool("another", b"4" * 32).tenant == "another", "the bound is each tenant's own"


def test_a_model_that_comes_back_while_its_cache_is_being_closed_waits_for_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServerInside(tiers=[disk(tmp_path)], max_models=2) as inside:
        for name in (b"1", b"2"):
            inside.pools.release(inside.pool(fingerprint=name * 32))
        is_closing, may_close, close = threading.Event(), threading.Event(), EmbeddedService.close

        def close_first_slowly(self: EmbeddedService, deadline_s: float) -> None:
            if not is_closing.is_set():
                is_closing.set()
                assert may_close.wait(DEADLINE_S)
            close(self, deadline_s)

        monkeypatch.setattr(EmbeddedService, "close", close_first_slowly)
        other = threading.Thread(target=lambda: inside.pool(fingerprint=b"3" * 32))
        other.start()
        assert is_closing.wait(DEADLINE_S)
        with pytest.raises(PoolRefused, match="try again"):
            inside.pools.acquire("", b"1" * 32, LAYOUT, time.monotonic() + 0.1)
        may_close.set()
        back = inside.pool(fingerprint=b"1" * 32)
        other.join(DEADLINE_S)
        assert (back.tiers, back.service.problems()) == (("disk",), [])


def test_many_engines_that_start_at_once_get_the_same_pool() -> None:
    with ServerInside() as inside:
        pools: list[Pool] = []
        threads = [threading.Thread(target=lambda: pools.append(inside.pool())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(pools) == 8
        assert len(set(map(id, pools))) == 1
        assert inside.pools.users(pools[0]) == 8


def test_a_failed_opening_is_tried_again_by_the_next() -> None:
    with ServerInside() as inside:
        large = msgspec.structs.replace(LAYOUT, num_layers=LAYOUT.num_layers * 1000)
        for _ in range(2):
            with pytest.raises(PoolRefused, match="capacity") as caught:
                inside.pool(layout=large)
            assert caught.value.is_mistake
        assert inside.pool().layout == LAYOUT


def test_a_model_in_another_layout_is_refused() -> None:
    with ServerInside() as inside:
        inside.pool()
        with pytest.raises(PoolRefused, match="block_tokens") as caught:
            inside.pool(layout=msgspec.structs.replace(LAYOUT, block_tokens=32))
        assert caught.value.is_mistake


@pytest.mark.parametrize(
    "layout",
    [
        BlockLayout(num_layers=0, num_kv_heads=1, block_tokens=16, head_dim=8, itemsize=2),
        BlockLayout(num_layers=-1, num_kv_heads=-1, block_tokens=16, head_dim=8, itemsize=2),
        BlockLayout(num_layers=1 << 20, num_kv_heads=1 << 20, block_tokens=16, head_dim=8, itemsize=2),
        BlockLayout(num_layers=1 << 60, num_kv_heads=1, block_tokens=16, head_dim=8, itemsize=2),
        BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=16, head_dim=8, itemsize=2, dtype="x" * 100),
    ],
)
def test_layouts_that_no_model_has_are_refused(layout: BlockLayout) -> None:
    with ServerInside() as inside, pytest.raises(PoolRefused, match="layout"):
        inside.pool(layout=layout)


def test_nothing_is_opened_while_the_server_stops() -> None:
    with ServerInside() as inside:
        inside.pools.drain()
        with pytest.raises(PoolRefused, match="stopping"):
            inside.pool()


def test_a_codec_that_loses_precision_is_refused(tmp_path: Path) -> None:
    tenant = TenantConfig(name="a", tiers=(disk(tmp_path, codec="fp8"),))
    settings = ServerSettings(tenants=(tenant,), cache=Config())
    with pytest.raises(ConfigError, match=r"tenants\[a\].*codec.*precision"):
        check_tiers(settings, PluginRegistry())


def test_an_opened_pool_is_polled(tmp_path: Path) -> None:
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        pool = inside.pool()
        inside.index.call(lambda: None, soon())
        assert pool.next_poll > 0


def test_the_disk_keeps_no_more_models_than_may_be_served(tmp_path: Path) -> None:
    for number in range(5):
        with ServerInside(tiers=[disk(tmp_path)], max_models=2) as inside:
            for tenant in ("ours", "theirs"):
                inside.client(inside.pool(tenant, bytes([number]) * 32))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        f"{tenant}-{number:02x}" + f"{number:02x}" * 7 for tenant in ("ours", "theirs") for number in (3, 4)
    ]


def test_a_directory_that_is_not_plainly_ours_is_never_removed(tmp_path: Path) -> None:
    for number in range(2):
        with ServerInside(tiers=[disk(tmp_path)], max_models=1) as inside:
            if number == 1:
                (tmp_path / f"default-{'00' * 8}" / "holiday.jpg").write_bytes(b"precious")
                (tmp_path / f"default-{'ff' * 8}").mkdir()
            inside.pool(fingerprint=bytes([number]) * 32)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / f"default-{'00' * 8}" / "holiday.jpg").exists()
