"""Codecs end to end: an embedded service over real tiers, restarts, other configurations, damage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import disk_kit
import ml_dtypes
import msgspec
import numpy as np
import pytest

from kvferry.connector.arena import Arena
from kvferry.connector.coding import block_fingerprint
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.counters import TierCounters
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey, KeyChain, Scope, root_key
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.tier import Frame, Outcome

LAYOUT = BlockLayout(num_layers=4, num_kv_heads=2, block_tokens=64, head_dim=32, itemsize=2, dtype="bfloat16")
MODEL = b"f" * 32
CODECS = ("none", "lz4", "zstd", "fp8")
DEADLINE_S = 60.0
SECTOR_BYTES = 4096


def content(key: BlockKey) -> np.ndarray:
    """Return KV that belongs to ``key``: floats of a few magnitudes, so that every codec can shrink it."""
    chance = np.random.default_rng(list(key[:8]))
    values = chance.standard_normal((LAYOUT.payload_bytes // 64, 32))
    values[::2] = 0
    return values.astype(ml_dtypes.bfloat16)


class Engine:
    """A service and a worker's mapping of its arena."""

    def __init__(self, tier: dict[str, object], slots: int = 32, fingerprint: bytes | None = None) -> None:
        host = HostConfig(capacity=(slots + 1) * LAYOUT.slot_bytes, eviction="lru")
        tier = {"name": "t", "ask": "always", **tier}
        config = msgspec.convert({"plugins": ["faulty"], "tiers": [tier], "retry_failed_s": 0.01}, Config)
        config = msgspec.structs.replace(config, host=host)
        registry = PluginRegistry(config.plugins)
        self.fingerprint = fingerprint or block_fingerprint(MODEL, config, registry)
        self.service = EmbeddedService(config, LAYOUT, self.fingerprint, registry)
        self.arena = Arena.attach(self.service.arena)

    @property
    def tier(self) -> TierCounters:
        return self.service.counters().tiers["t"]

    def prefix(self, length: int, salt: str = "") -> list[BlockKey]:
        return list(KeyChain(root_key(self.fingerprint, Scope(cache_salt=salt)), 1).extend(range(length)))

    def save(self, keys: Sequence[BlockKey]) -> None:
        reservation = self.service.reserve("save", keys)
        for place in reservation.places:
            self.arena.slot(place.slot)[: LAYOUT.payload_bytes] = content(place.key).tobytes()
        self.service.commit(reservation, [place.key for place in reservation.places])
        self.settle()

    def load(self, keys: Sequence[BlockKey]) -> list[np.ndarray]:
        """Return the blocks of ``keys`` that can be had."""
        self.service.prefetch("load", keys)
        self.settle()
        lease = self.service.lease("load", keys)
        slots = [bytes(self.arena.slot(place.slot)[: LAYOUT.payload_bytes]) for place in lease.places]
        self.service.release(lease)
        self.service.release_owner("load")
        return [np.frombuffer(slot, ml_dtypes.bfloat16).reshape(-1, 32) for slot in slots]

    def settle(self) -> None:
        end = time.monotonic() + DEADLINE_S
        self.service.poll()
        while self.service.has_pending():
            assert time.monotonic() < end, "transfers never end"
            time.sleep(0.0005)
            self.service.poll()

    def close(self) -> None:
        self.service.close(DEADLINE_S)
        self.arena.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def make(tier: dict[str, object], **options: object) -> Engine:
        started.append(Engine(tier, **options))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for engine in started:
        engine.close()


def disk(path: Path, codec: str = "none") -> dict[str, object]:
    return {"type": "disk", "path": str(path), "capacity": 64 << 20, "codec": codec}


def check(blocks: Sequence[np.ndarray], keys: Sequence[BlockKey], codec: str) -> None:
    for key, block in zip(keys, blocks, strict=True):
        exact, found = content(key).astype(np.float64), block.astype(np.float64)
        if codec == "fp8":
            near = np.maximum(np.abs(exact) / 16, np.abs(exact).max(axis=1, keepdims=True) / 224 / 1024)
            assert (np.abs(exact - found) <= near).all()
            assert (exact != found).any(), "nothing was lost, so nothing was encoded"
        else:
            assert (exact == found).all()


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_come_back_from_a_tier_with_a_codec(start: Callable[..., Engine], codec: str) -> None:
    engine = start({"type": "memory", "codec": codec}, slots=8)
    keys = engine.prefix(6)
    engine.save(keys)
    engine.save(engine.prefix(8, "other"))  # the arena has no room for both
    check(engine.load(keys), keys, codec)
    assert engine.tier.loaded_blocks == 6


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_survive_a_restart_on_disk(start: Callable[..., Engine], codec: str, tmp_path: Path) -> None:
    engine = start(disk(tmp_path, codec))
    keys = engine.prefix(20)
    engine.save(keys)
    engine.close()
    again = start(disk(tmp_path, codec))
    assert again.prefix(20) == keys
    check(again.load(keys), keys, codec)


def stored_codecs(path: Path) -> set[int]:
    """Return the codec ids in the frames of a disk tier's directory."""
    step = SECTOR_BYTES + LAYOUT.slot_bytes
    ids = set()
    for slab in path.glob("slab-*"):
        data = slab.read_bytes()
        headers = [data[at : at + 14] for at in range(0, len(data), step)]
        ids |= {
            int.from_bytes(header[12:14], "little") for header in headers if header.startswith(b"KVFERRY")
        }
    return ids


@pytest.mark.parametrize(("codec", "number"), [("none", 0), ("lz4", 1), ("zstd", 2), ("fp8", 3)])
def test_the_frame_names_the_codec(
    start: Callable[..., Engine], codec: str, number: int, tmp_path: Path
) -> None:
    engine = start(disk(tmp_path, codec))
    engine.save(engine.prefix(5))
    engine.close()
    assert stored_codecs(tmp_path) == {number}


@pytest.mark.parametrize(("before", "after"), [("zstd", "none"), ("none", "lz4"), ("lz4", "zstd")])
def test_a_lossless_codec_can_be_changed_and_the_blocks_are_kept(
    start: Callable[..., Engine], before: str, after: str, tmp_path: Path
) -> None:
    engine = start(disk(tmp_path, before))
    keys = engine.prefix(10)
    engine.save(keys[:6])
    engine.close()
    again = start(disk(tmp_path, after))
    check(again.load(keys[:6]), keys[:6], after)
    again.save(keys)
    again.close()
    check(start(disk(tmp_path, before)).load(keys), keys, before)


def test_exact_and_lossy_blocks_never_have_the_same_key(start: Callable[..., Engine]) -> None:
    exact, lossy = (start({"type": "memory", "codec": codec}).prefix(20) for codec in ("zstd", "fp8"))
    assert not set(exact) & set(lossy)


def test_a_disk_directory_of_exact_blocks_is_not_opened_for_lossy_ones(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    start(disk(tmp_path)).close()
    (problem,) = start(disk(tmp_path, "fp8")).service.problems()
    assert "tier 't' is left out" in problem


def test_lossy_frames_are_refused_where_that_codec_is_not_configured(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    """Even under equal keys, which different fingerprints rule out already."""
    engine = start(disk(tmp_path, "fp8"))
    keys = engine.prefix(5)
    engine.save(keys)
    engine.close()
    exact = start(disk(tmp_path, "zstd"), fingerprint=engine.fingerprint)
    assert exact.load(keys) == []
    assert exact.tier.refused == {"codec": 5}
    assert exact.service.lookup(keys).reachable == 0


@pytest.mark.parametrize("codec", ["lz4", "zstd", "fp8"])
def test_a_flipped_bit_in_an_encoded_body_is_refused(
    start: Callable[..., Engine], codec: str, tmp_path: Path
) -> None:
    engine = start(disk(tmp_path, codec))
    keys = engine.prefix(5)
    engine.save(keys)
    engine.close()
    step = SECTOR_BYTES + LAYOUT.slot_bytes
    for slab in tmp_path.glob("slab-*"):
        data = bytearray(slab.read_bytes())
        for at in range(SECTOR_BYTES + 1000, len(data), step):
            data[at] ^= 0x10
        slab.write_bytes(data)
    again = start(disk(tmp_path, codec))
    assert again.load(keys) == []
    assert again.tier.refused == {"checksum": 5}


@pytest.mark.parametrize("codec", ["zstd", "fp8"])
def test_whatever_a_tier_does_to_encoded_blocks_no_wrong_byte_is_read(
    start: Callable[..., Engine], codec: str
) -> None:
    modes = ["truncated", "bit_flip", "header_flip", "other_block", "zeroed"]
    faulty = {"type": "faulty", "inner": {"type": "memory"}, "rate": 0.3, "modes": modes, "seed": 5}
    engine = start({**faulty, "codec": codec}, slots=4)
    read = 0
    for salt in range(40):
        engine.save(engine.prefix(4, str(salt % 8)))
        others = engine.prefix(4, str((salt + 4) % 8))
        blocks = engine.load(others)
        check(blocks, others[: len(blocks)], codec)
        read += len(blocks)
    assert read > 20
    assert sum(engine.tier.refused.values()) > 5


def test_only_the_sectors_that_carry_meaning_are_written_to_disk(tmp_path: Path) -> None:
    """A record keeps its length, so what an earlier block left behind the body is read, and means nothing."""
    tier = disk_kit.open_tier(tmp_path, disk_kit.capacity_for(1))
    long, short = disk_kit.key_of(1), disk_kit.key_of(2)
    assert disk_kit.store(tier, [long]) == [Outcome.OK]
    tier.delete([long])
    frame = disk_kit.sealed_frame(short)
    disk_kit.SEAL.seal(short, frame.header, frame.payload, 7, 5000)
    assert tier.store([Frame(short, frame.header, frame.payload, 5000)]) == [Outcome.OK]
    into = disk_kit.empty_frame(short)
    assert tier.load([into]) == [Outcome.OK]
    assert disk_kit.SEAL.verify(short, into.header, into.payload, {7}) == (7, 5000)
    written = 2 * SECTOR_BYTES
    assert into.payload[:written] == frame.payload[:written]
    rest = slice(written, disk_kit.LAYOUT.payload_bytes)
    assert bytes(into.payload[rest]) == disk_kit.payload_of(long)[rest]
    assert len(into.header) == HEADER_BYTES
    tier.close()
