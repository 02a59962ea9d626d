"""What every staging is held to: ``StagingTests``, and engines' pages to try it with.

The bytes that should arrive are found by index arithmetic, apart from the code that stages. A test of a staging
subclasses ``StagingTests`` and says how one is made over an engine's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.connector.arena import Arena
from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, PageIds, SlotIds, Staging

KINDS = ["nhd_fused", "hnd_fused", "cross_layer", "kv_separate", "ragged_layers", "mla"]


def page_layout(kind: str, rng: np.random.Generator, heads: int, layers: int, tokens: int, head_bytes: int):
    """Describe pages the way engines lay them out; a random gap keeps strides from being guessable."""
    pages = int(rng.integers(3, 9))
    gap = int(rng.integers(0, 3)) * 32
    kv = 1 if kind == "mla" else 2
    token_bytes = kv * head_bytes
    page_bytes = heads * tokens * token_bytes + gap
    common = {
        "num_pages": pages,
        "page_tokens": tokens,
        "num_heads": heads,
        "head_bytes": head_bytes,
        "kv_factor": kv,
    }
    offsets = tuple(layer * pages * page_bytes for layer in range(layers))
    nhd = {"head_stride": token_bytes, "token_stride": heads * token_bytes, "kv_stride": head_bytes}
    hnd = {"head_stride": tokens * token_bytes, "token_stride": token_bytes, "kv_stride": head_bytes}
    if kind in ("nhd_fused", "mla"):
        return PageLayout(**common, layer_offsets=offsets, page_stride=page_bytes, **nhd)
    if kind == "hnd_fused":
        return PageLayout(**common, layer_offsets=offsets, page_stride=page_bytes, **hnd)
    if kind == "cross_layer":
        within = tuple(layer * page_bytes for layer in range(layers))
        return PageLayout(**common, layer_offsets=within, page_stride=layers * page_bytes, **hnd)
    if kind == "kv_separate":
        half = heads * tokens * head_bytes
        far = tuple(2 * layer * pages * half for layer in range(layers))
        strides = {"head_stride": head_bytes, "token_stride": heads * head_bytes, "kv_stride": pages * half}
        return PageLayout(**common, layer_offsets=far, page_stride=half, **strides)
    order = rng.permutation(layers)
    ragged = tuple(int(place) * (pages * page_bytes + 64) + int(place) ** 2 * 8 for place in order)
    return PageLayout(**common, layer_offsets=ragged, page_stride=page_bytes, **hnd)


class Case(NamedTuple):
    """One rank's pages and some blocks of them."""

    rng: np.random.Generator
    block: BlockLayout
    shard: Shard
    layout: PageLayout

    def batch(self, num_slots: int, most_blocks: int = 4) -> tuple[PageIds, SlotIds]:
        """Some whole blocks: no page and no slot twice."""
        per_block = self.block.block_tokens // self.layout.page_tokens
        blocks = min(most_blocks, num_slots, self.layout.num_pages // per_block)
        pages = self.rng.permutation(self.layout.num_pages)[: blocks * per_block]
        return pages.astype(np.int32).reshape(blocks, per_block), self.rng.permutation(num_slots)[:blocks]

    def partial(self, num_slots: int) -> tuple[PageIds, SlotIds]:
        """As ``batch``, with some pages of some blocks missing."""
        page_ids, slots = self.batch(num_slots)
        page_ids[self.rng.random(page_ids.shape) < 0.4] = -int(self.rng.integers(1, 1 << 31))
        return page_ids, slots

    def memory(self) -> Bytes:
        """An engine's memory, longer than needed, with every byte random."""
        return self.rng.integers(0, 256, self.layout.extent_bytes() + 50, dtype=np.uint8)


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    tp_size = 1 if kind == "mla" else int(rng.choice([1, 2, 4]))
    heads = 1 if kind == "mla" else tp_size * int(rng.integers(1, 3))
    layers, tokens = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    head_dim, itemsize = int(rng.choice([1, 4, 6, 8])), int(rng.choice([1, 2, 4]))
    block = BlockLayout(
        num_layers=layers,
        num_kv_heads=heads,
        block_tokens=tokens * int(rng.integers(1, 4)),
        head_dim=head_dim,
        kv_factor=1 if kind == "mla" else 2,
        itemsize=itemsize,
    )
    shard = block.shard(int(rng.integers(tp_size)), tp_size)
    layout = page_layout(kind, rng, shard.num_heads, layers, tokens, head_dim * itemsize)
    return Case(rng, block, shard, layout)


def pairs(
    block: BlockLayout, shard: Shard, layout: PageLayout, page_ids: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(bytes in the engine's memory, bytes in the slot) for every byte of the given pages of one block."""
    ids = np.repeat(np.asarray(page_ids, np.int64), layout.page_tokens)
    head_bytes = block.head_dim * block.itemsize
    head, layer, token, kv, byte = np.ogrid[
        : shard.num_heads, : block.num_layers, : ids.size, : block.kv_factor, :head_bytes
    ]
    in_pages = (
        np.array(layout.layer_offsets)[layer]
        + ids[token] * layout.page_stride
        + head * layout.head_stride
        + token % layout.page_tokens * layout.token_stride
        + kv * layout.kv_stride
        + byte
    )
    vector = (shard.first_head + head) * block.num_layers + layer
    vector = (vector * block.block_tokens + token) * block.kv_factor + kv
    in_slot = vector * head_bytes + byte
    is_copied = np.broadcast_to(ids[token] >= 0, in_slot.shape)
    return in_pages[is_copied], in_slot[is_copied]


def gathered(case: Case, memory: Bytes, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> Bytes:
    """What the arena holds after a gather."""
    expected = arena.copy()
    for row, slot in zip(page_ids, slots, strict=True):
        in_pages, in_slot = pairs(case.block, case.shard, case.layout, row)
        expected[slot, in_slot] = memory[in_pages]
    return expected


def scattered(case: Case, memory: Bytes, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> Bytes:
    """What the engine's memory holds after a scatter."""
    expected = memory.copy()
    for row, slot in zip(page_ids, slots, strict=True):
        in_pages, in_slot = pairs(case.block, case.shard, case.layout, row)
        expected[in_pages] = arena[slot, in_slot]
    return expected


class Rig(NamedTuple):
    """A staging over an engine's memory."""

    staging: Staging
    memory: Callable[[], Bytes]
    """What the engine's memory holds now."""


MakeRig = Callable[[Bytes, PageLayout, BlockLayout, Shard], Rig]
"""Makes a rig whose engine's memory begins with the given bytes."""


@contextmanager
def slots_of(rng: np.random.Generator, num_slots: int, slot_bytes: int) -> Iterator[Bytes]:
    """An arena's slots, full of random bytes."""
    arena = Arena.create(num_slots, slot_bytes)
    arena.slots_array[:] = rng.integers(0, 256, arena.slots_array.shape, dtype=np.uint8)
    try:
        yield arena.slots_array
    finally:
        arena.close()


SMALL = BlockLayout(num_layers=2, num_kv_heads=4, block_tokens=8, head_dim=4, itemsize=2)


def small_case() -> Case:
    """Pages of four tokens, two to a block."""
    rng = np.random.default_rng(0)
    return Case(rng, SMALL, SMALL.shard(0, 1), page_layout("hnd_fused", rng, 4, 2, 4, 8))


def ids(*rows: list[int]) -> PageIds:
    return np.array(rows, np.int32)


HOSTILE: dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.generic], str]] = {
    "a page behind the last": (ids([0, 99]), np.array([0]), "outside the engine's"),
    "the largest page": (ids([0, (1 << 31) - 1]), np.array([0]), "outside the engine's"),
    "a slot behind the last": (ids([0, 1]), np.array([3]), "outside the arena's"),
    "a slot before the first": (ids([0, 1]), np.array([-1]), "outside the arena's"),
    "a slot far away": (ids([0, 1]), np.array([1 << 62]), "outside the arena's"),
    "too few pages": (ids([0]), np.array([0]), "a block has 2 pages"),
    "too many pages": (ids([0, 1, 2]), np.array([0]), "a block has 2 pages"),
    "more blocks than slots": (ids([0, 1], [2, 0]), np.array([0]), "do not go with"),
    "pages without rows": (np.array([0, 1], np.int32), np.array([0]), "do not go with"),
    "wide page ids": (np.array([[0, 1 << 32]]), np.array([0]), "int32"),
    "narrow slots": (ids([0, 1]), np.array([0], np.int32), "int64"),
    "fractions": (np.array([[0.0, 1.0]]), np.array([0]), "int32"),
}


def follow(staging: Staging) -> None:
    """Have all later copies come after the engine's work so far."""
    mark = staging.mark()
    for direction in (staging.gathers, staging.scatters):
        direction.wait(mark)


def finish(staging: Staging) -> None:
    """Wait until all copies are complete."""
    for direction in (staging.gathers, staging.scatters):
        direction.finish()


class StagingTests:
    """The contract of ``kvferry.connector.staging.Staging``."""

    @pytest.fixture
    def make(self) -> MakeRig:
        """Return how the staging under test is made."""
        raise NotImplementedError

    @pytest.mark.parametrize("is_whole", [True, False])
    @pytest.mark.parametrize("seed", range(60))
    def test_exactly_the_shards_bytes_move(self, make: MakeRig, seed: int, is_whole: bool) -> None:
        case = random_case(seed)
        with slots_of(case.rng, 5, case.block.slot_bytes) as arena:
            memory = case.memory()
            page_ids, slots = case.batch(5) if is_whole else case.partial(5)
            rig = make(memory, case.layout, case.block, case.shard)
            expected = gathered(case, memory, page_ids, slots, arena)
            follow(rig.staging)
            rig.staging.gathers.copy(page_ids, slots, arena)
            finish(rig.staging)
            assert np.array_equal(arena, expected)
            assert np.array_equal(rig.memory(), memory)

            page_ids, slots = case.batch(5) if is_whole else case.partial(5)
            expected_memory = scattered(case, memory, page_ids, slots, arena)
            follow(rig.staging)
            rig.staging.scatters.copy(page_ids, slots, arena)
            finish(rig.staging)
            assert np.array_equal(rig.memory(), expected_memory)
            assert np.array_equal(arena, expected)
            rig.staging.close()

    @pytest.mark.parametrize(("writers", "readers"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)])
    def test_what_one_tp_size_writes_another_reads(self, make: MakeRig, writers: int, readers: int) -> None:
        rng = np.random.default_rng(writers * 8 + readers)
        page_ids, slots = ids([2, 0]), np.array([1])
        with slots_of(rng, 2, SMALL.slot_bytes) as arena:
            payload = rng.integers(0, 256, SMALL.payload_bytes, dtype=np.uint8)
            before = arena.copy()
            for kind, tp_size, is_write in (("nhd_fused", writers, True), ("kv_separate", readers, False)):
                for rank in range(tp_size):
                    shard = SMALL.shard(rank, tp_size)
                    case = Case(rng, SMALL, shard, page_layout(kind, rng, shard.num_heads, 2, 4, 8))
                    in_pages, in_slot = pairs(SMALL, shard, case.layout, page_ids[0])
                    memory = case.memory()
                    if is_write:
                        memory[in_pages] = payload[in_slot]
                    rig = make(memory, case.layout, SMALL, shard)
                    follow(rig.staging)
                    copy = rig.staging.gathers.copy if is_write else rig.staging.scatters.copy
                    copy(page_ids, slots, arena)
                    finish(rig.staging)
                    assert np.array_equal(rig.memory()[in_pages], payload[in_slot])
                    rig.staging.close()
            before[1, : SMALL.payload_bytes] = payload
            assert np.array_equal(arena, before)

    def test_several_batches_need_one_finish(self, make: MakeRig) -> None:
        case = random_case(8)
        per_block = case.block.block_tokens // case.layout.page_tokens
        with slots_of(case.rng, 8, case.block.slot_bytes) as arena:
            memory = case.memory()
            rig = make(memory, case.layout, case.block, case.shard)
            pages = np.arange(case.layout.num_pages // per_block * per_block, dtype=np.int32)
            page_ids = pages.reshape(-1, per_block)
            slots = np.arange(len(page_ids))[::-1]
            expected = gathered(case, memory, page_ids, slots, arena)
            follow(rig.staging)
            for row in range(len(slots)):
                rig.staging.gathers.copy(page_ids[row : row + 1], slots[row : row + 1], arena)
            finish(rig.staging)
            assert np.array_equal(arena, expected)
            expected_memory = scattered(case, memory, page_ids, slots[::-1], arena)
            follow(rig.staging)
            for row in range(len(slots)):
                rig.staging.scatters.copy(page_ids[row : row + 1], slots[::-1][row : row + 1], arena)
            finish(rig.staging)
            assert np.array_equal(rig.memory(), expected_memory)
            rig.staging.close()

    @pytest.mark.parametrize("page_ids", [ids([-1, -1], [-5, -(1 << 31)]), ids([0, 1])[:0]])
    def test_a_batch_of_nothing_copies_nothing(self, make: MakeRig, page_ids: PageIds) -> None:
        self._unchanged(
            make, lambda staging, arena: staging.gathers.copy(page_ids, np.arange(len(page_ids)), arena)
        )
        self._unchanged(
            make, lambda staging, arena: staging.scatters.copy(page_ids, np.arange(len(page_ids)), arena)
        )

    @pytest.mark.parametrize("how", HOSTILE)
    def test_ids_that_do_not_exist_are_refused(self, make: MakeRig, how: str) -> None:
        page_ids, slots, why = HOSTILE[how]

        def refused(staging: Staging, arena: Bytes) -> None:
            for copy in (staging.gathers.copy, staging.scatters.copy):
                with pytest.raises(LayoutError, match=why):
                    copy(page_ids, slots, arena)  # type: ignore[arg-type]

        self._unchanged(make, refused)

    def test_nothing_is_written_twice_by_a_batch(self, make: MakeRig) -> None:
        def refused(staging: Staging, arena: Bytes) -> None:
            with pytest.raises(LayoutError, match="slot 1 is written twice"):
                staging.gathers.copy(ids([0, 1], [2, -1]), np.array([1, 1]), arena)
            with pytest.raises(LayoutError, match="page 2 is written twice"):
                staging.scatters.copy(ids([0, 2], [2, -1]), np.array([0, 1]), arena)

        self._unchanged(make, refused)

    def test_slots_of_another_form_are_refused(self, make: MakeRig) -> None:
        case = small_case()
        rig = make(case.memory(), case.layout, SMALL, case.shard)
        wide = np.zeros((2, 2 * SMALL.slot_bytes), np.uint8)
        for arena, why in (
            (np.zeros((2, SMALL.payload_bytes - 1), np.uint8), "cannot hold"),
            (wide[:, ::2], "contiguous"),
            (wide[0], "contiguous"),
            (wide.view(np.int8), "uint8"),
        ):
            for copy in (rig.staging.gathers.copy, rig.staging.scatters.copy):
                with pytest.raises(LayoutError, match=why):
                    copy(ids([0, 1]), np.array([0]), arena)
        rig.staging.close()

    def test_arenas_come_and_go(self, make: MakeRig) -> None:
        case = small_case()
        memory = case.memory()
        rig = make(memory, case.layout, SMALL, case.shard)
        for slot in range(3):
            with slots_of(case.rng, 3, SMALL.slot_bytes) as arena:
                batch = ids([0, 1]), np.array([slot])
                expected = gathered(case, memory, *batch, arena)
                follow(rig.staging)
                rig.staging.gathers.copy(*batch, arena)
                finish(rig.staging)
                assert np.array_equal(arena, expected)
                rig.staging.detach(arena)
                rig.staging.detach(arena)
        rig.staging.close()
        rig.staging.close()

    def _unchanged(self, make: MakeRig, copy: Callable[[Staging, Bytes], None]) -> None:
        """Make sure that neither pages nor slots change."""
        case = small_case()
        memory = case.memory()
        rig = make(memory.copy(), case.layout, SMALL, case.shard)
        with slots_of(case.rng, 3, SMALL.slot_bytes) as arena:
            before = arena.copy()
            follow(rig.staging)
            copy(rig.staging, arena)
            finish(rig.staging)
            assert np.array_equal(arena, before)
            assert np.array_equal(rig.memory(), memory)
            rig.staging.close()
