"""Engines of different tensor-parallel sizes read each other's blocks from the disk tier.

What is real here: page layouts with an engine's strides, staging on every rank, arena slots, sealed
frames, and a disk tier that is closed and opened again between the two engines.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.connector.arena import Arena
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey, KeyChain, ModelIdentity, Scope, root_key
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.connector.tier import Frame, Outcome, Tier, TierContext

BLOCK = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=32, head_dim=16, itemsize=2)
IDENTITY = ModelIdentity(
    model="m", revision="1", kv_dtype="bfloat16", num_layers=3, num_kv_heads=4, head_dim=16, block_tokens=32
)
BLOCKS = 5
MakeLayout = Callable[[int, int], PageLayout]


def fused_hnd(heads: int, page_tokens: int) -> PageLayout:
    """[layer][page][head][token][k_or_v][dim]: current vLLM on CPU and with HND attention."""
    token = BLOCK.token_bytes
    page = heads * page_tokens * token
    return _layout(heads, page_tokens, page, page_tokens * token, token, token // 2, 1)


def fused_nhd(heads: int, page_tokens: int) -> PageLayout:
    """[layer][page][token][head][k_or_v][dim]."""
    token = BLOCK.token_bytes
    return _layout(heads, page_tokens, heads * page_tokens * token, token, heads * token, token // 2, 1)


def split_nhd(heads: int, page_tokens: int) -> PageLayout:
    """[layer][k_or_v][page][token][head][dim]: K and V in separate halves."""
    vector = BLOCK.token_bytes // 2
    page = heads * page_tokens * vector
    return _layout(heads, page_tokens, page, vector, heads * vector, PAGES * page, 2)


PAGES = 24


def _layout(
    heads: int, page_tokens: int, page: int, head: int, token: int, kv: int, pages_per_layer: int
) -> PageLayout:
    return PageLayout(
        num_pages=PAGES,
        page_tokens=page_tokens,
        num_heads=heads,
        head_bytes=BLOCK.head_dim * BLOCK.itemsize,
        kv_factor=2,
        layer_offsets=tuple(layer * PAGES * page * pages_per_layer for layer in range(BLOCK.num_layers)),
        page_stride=page,
        head_stride=head,
        token_stride=token,
        kv_stride=kv,
    )


class Rank(NamedTuple):
    """One rank's KV memory and how to reach a vector of it."""

    memory: npt.NDArray[np.uint8]
    layout: PageLayout
    shard: Shard
    staging: HostStaging

    def vector(self, layer: int, head: int, page: int, token: int, kv: int) -> npt.NDArray[np.uint8]:
        at = (
            self.layout.layer_offsets[layer]
            + page * self.layout.page_stride
            + head * self.layout.head_stride
            + token * self.layout.token_stride
            + kv * self.layout.kv_stride
        )
        return self.memory[at : at + self.layout.head_bytes]


class Engine:
    """The KV memory of all ranks of one engine, with one prompt's pages scattered over it."""

    def __init__(self, tp_size: int, make_layout: MakeLayout, page_tokens: int, seed: int) -> None:
        self.page_tokens = page_tokens
        pages = np.random.default_rng(seed).permutation(PAGES)[: BLOCKS * BLOCK.block_tokens // page_tokens]
        self.pages = [int(page) for page in pages]
        self.ranks = [self._rank(BLOCK.shard(rank, tp_size), make_layout) for rank in range(tp_size)]

    def _rank(self, shard: Shard, make_layout: MakeLayout) -> Rank:
        layout = make_layout(shard.num_heads, self.page_tokens)
        memory = np.full(layout.extent_bytes(), 0xEE, np.uint8)
        return Rank(memory, layout, shard, HostStaging(memory, layout, BLOCK, shard))

    def each_vector(self):
        """Yield (name of the vector in the model, its bytes) over the whole prompt and all ranks."""
        for rank in self.ranks:
            for position in range(BLOCKS * BLOCK.block_tokens):
                page, token = self.pages[position // self.page_tokens], position % self.page_tokens
                for layer in range(BLOCK.num_layers):
                    for head in range(rank.shard.num_heads):
                        for kv in (0, 1):
                            name = (position, layer, rank.shard.first_head + head, kv)
                            yield name, rank.vector(layer, head, page, token, kv)

    def compute(self) -> None:
        """Fill the pages with what "the model" computes: a function of position, layer, head and K or V."""
        for name, vector in self.each_vector():
            vector[:] = computed(name)

    def batch(self, arena: Arena) -> tuple[PageIds, SlotIds, Bytes]:
        """All blocks, in the slots of their numbers."""
        return np.array(self.pages, np.int32).reshape(BLOCKS, -1), np.arange(BLOCKS), arena.slots_array

    def save(self, arena: Arena) -> None:
        for rank in self.ranks:
            if rank.shard.is_writer:
                rank.staging.gather(*self.batch(arena))

    def restore(self, arena: Arena) -> None:
        for rank in self.ranks:
            rank.staging.scatter(*self.batch(arena))


def computed(name: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """32 bytes that no other vector has."""
    return np.frombuffer(hashlib.blake2b(repr(name).encode(), digest_size=32).digest(), np.uint8)


def block_keys() -> list[BlockKey]:
    chain = KeyChain(root_key(IDENTITY.fingerprint(), Scope()), BLOCK.block_tokens)
    return list(chain.extend(range(BLOCKS * BLOCK.block_tokens)))


def open_disk(path: Path) -> Tier:
    registry = PluginRegistry(["kvferry.plugins.disk"])
    tier_type = registry.tier_type("disk")
    context = TierContext(
        name="disk",
        layout=BLOCK,
        fingerprint=IDENTITY.fingerprint(),
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=registry.eviction_policy,
        logger=logging.getLogger("test"),
    )
    return tier_type.create(tier_type.options(path=str(path), capacity=16 << 20, eviction="lru"), context)


def through_disk(source: Arena, target: Arena, path: Path) -> None:
    """Seal and store every block, close the tier, open it again, load and verify."""
    seal = FrameSeal(IDENTITY.fingerprint(), BLOCK.payload_bytes, secret="shared")
    for arena, is_store in ((source, True), (target, False)):
        tier = open_disk(path)
        frames = [
            Frame(key, memoryview(bytearray(HEADER_BYTES)), arena.slot(slot), BLOCK.payload_bytes)
            for slot, key in enumerate(block_keys())
        ]
        if is_store:
            for frame in frames:
                seal.seal(frame.key, frame.header, frame.payload)
        outcomes = tier.store(frames) if is_store else tier.load(frames)
        assert outcomes == [Outcome.OK] * BLOCKS
        if not is_store:
            for frame in frames:
                seal.verify(frame.key, frame.header, frame.payload)
        tier.close()


@pytest.mark.parametrize("writer", [(1, fused_hnd, 16), (2, fused_nhd, 8), (4, split_nhd, 32)])
@pytest.mark.parametrize("reader", [(1, split_nhd, 32), (2, fused_hnd, 16), (8, fused_nhd, 16)])
def test_blocks_of_one_tp_size_are_read_by_another(
    writer: tuple[int, MakeLayout, int], reader: tuple[int, MakeLayout, int], tmp_path: Path
) -> None:
    first, second = Engine(*writer, seed=1), Engine(*reader, seed=2)
    source, target = (Arena.create(BLOCKS, BLOCK.slot_bytes) for _ in range(2))
    first.compute()
    first.save(source)
    through_disk(source, target, tmp_path)
    second.restore(target)
    for name, vector in second.each_vector():
        assert np.array_equal(vector, computed(name)), name
    source.close()
    target.close()


def test_there_and_back_leaves_every_page_as_it_was(tmp_path: Path) -> None:
    """TP 1 writes, TP 2 reads and writes, TP 1 reads: its whole memory equals the first engine's."""
    first, second, third = (
        Engine(1, fused_nhd, 16, 1),
        Engine(2, fused_hnd, 8, 2),
        Engine(1, fused_nhd, 16, 1),
    )
    arenas = [Arena.create(BLOCKS, BLOCK.slot_bytes) for _ in range(4)]
    first.compute()
    first.save(arenas[0])
    through_disk(arenas[0], arenas[1], tmp_path / "first")
    second.restore(arenas[1])
    second.save(arenas[2])
    through_disk(arenas[2], arenas[3], tmp_path / "second")
    third.restore(arenas[3])
    assert np.array_equal(third.ranks[0].memory, first.ranks[0].memory)
    assert np.array_equal(
        arenas[0].slots_array[:, : BLOCK.payload_bytes], arenas[2].slots_array[:, : BLOCK.payload_bytes]
    )
    for arena in arenas:
        arena.close()


def test_a_rank_with_a_replica_does_not_write() -> None:
    eight = Engine(8, fused_nhd, 16, 1)
    assert [rank.shard.is_writer for rank in eight.ranks] == [True, False] * 4
