"""Pages in an engine's own order: what a block holds of them, and that they get it back.

Where each byte should be is found from the formulas of the orders, apart from the code that copies.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from staging_kit import ids

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, ElementOrder, Packing, PageLayout
from kvferry.connector.packed import PackedRuns
from kvferry.connector.staging import HostStaging
from kvferry.engines.vllm.packing import known_packings, positions_of, probe, recognise

Positions = npt.NDArray[np.int64]


def formula(name: str, n: int, d: int) -> Positions:
    """Where the kernels put (token t, element i) of K and V, by their sources' arithmetic."""
    t, i = np.meshgrid(np.arange(n), np.arange(d), indexing="ij")
    if name == "vec":
        return np.stack([i * n + t, t * d + i])
    if name == "amx":
        return np.stack(
            [
                (t // 16) * 16 * d + (i // 2) * 32 + (t % 16) * 2 + i % 2,
                (i // 16) * 16 * n + (t // 2) * 32 + (i % 16) * 2 + t % 2,
            ]
        )
    return np.stack(
        [
            (t // 8) * 8 * d + (i // 4) * 32 + ((t % 8) // 2) * 8 + (t % 2) * 4 + i % 4,
            (i // 2) * 2 * n + (t // 4) * 8 + (i % 2) * 4 + t % 4,
        ]
    )


def pages_of(
    n: int, d: int, itemsize: int, heads: int, layers: int, name: str, num_pages: int = 7
) -> PageLayout:
    run = 2 * n * d * itemsize
    return PageLayout(
        num_pages=num_pages,
        page_tokens=n,
        num_heads=heads,
        head_bytes=d * itemsize,
        kv_factor=2,
        layer_offsets=tuple(layer * (num_pages * heads * run + 64) for layer in range(layers)),
        page_stride=heads * run,
        head_stride=run,
        token_stride=2 * d * itemsize,
        kv_stride=d * itemsize,
        packing=known_packings(n, d)[name],
        order=name,
    )


def block_of(n: int, d: int, itemsize: int, heads: int, layers: int, pages: int) -> BlockLayout:
    return BlockLayout(
        num_layers=layers, num_kv_heads=heads, block_tokens=n * pages, head_dim=d, itemsize=itemsize
    )


def canonical(
    memory: npt.NDArray[np.uint8], layout: PageLayout, name: str, pages: list[int]
) -> npt.NDArray[np.uint8]:
    """``[head][layer][token][k_or_v][head_dim]`` of these pages, a vector at a time."""
    n, d = layout.page_tokens, known_head_dim(layout)
    itemsize, where = layout.head_bytes // d, formula(name, n, d)
    out = np.empty((layout.num_heads, len(layout.layer_offsets), len(pages) * n, 2, d, itemsize), np.uint8)
    for head in range(layout.num_heads):
        for layer, offset in enumerate(layout.layer_offsets):
            for index, page in enumerate(pages):
                start = offset + page * layout.page_stride + head * layout.head_stride
                run = memory[start : start + 2 * n * layout.head_bytes].reshape(2, n * d, itemsize)
                for kv in (0, 1):
                    out[head, layer, index * n : (index + 1) * n, kv] = run[kv][where[kv]]
    return out.reshape(-1)


def known_head_dim(layout: PageLayout) -> int:
    assert layout.packing is not None
    return math.prod(layout.packing.k.shape) // layout.page_tokens


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    name = draw(st.sampled_from(["vec", "amx", "bfmmla"]))
    tokens, dims = {"vec": (1, 1), "amx": (16, 16), "bfmmla": (8, 4)}[name]
    n = tokens * draw(st.integers(1, 6 if tokens > 1 else 40))
    d = dims * draw(st.integers(1, 8 if dims > 1 else 70))
    return name, n, d, draw(st.sampled_from([1, 2, 4, 8]))


@given(shape=shapes())
@example(shape=("vec", 128, 64, 4))
@example(shape=("vec", 16, 128, 2))
@example(shape=("amx", 128, 128, 2))
@example(shape=("amx", 32, 80, 2))
@example(shape=("bfmmla", 32, 80, 2))
@example(shape=("bfmmla", 128, 128, 2))
@settings(max_examples=150, deadline=None)
def test_a_run_is_put_in_order_and_back(shape: tuple[str, int, int, int]) -> None:
    name, n, d, itemsize = shape
    assert np.array_equal(positions_of(known_packings(n, d)[name], n, d), formula(name, n, d))
    runs = PackedRuns(pages_of(n, d, itemsize, 1, 1, name))
    packed = np.random.default_rng(n * d).integers(0, 256, (3, 2, n * d * itemsize), dtype=np.uint8)
    plain, back = np.zeros((3, n, 2, d * itemsize), np.uint8), np.zeros_like(packed)
    runs.unpack(packed, plain)
    halves = packed.reshape(3, 2, n * d, itemsize)
    expected = np.stack([halves[:, kv][:, where] for kv, where in enumerate(formula(name, n, d))], axis=2)
    assert np.array_equal(plain, expected.reshape(plain.shape))
    runs.pack(plain, back)
    assert np.array_equal(back, packed)


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, int, int, int, int, int, int, int]:
    name = draw(st.sampled_from(["vec", "amx", "bfmmla"]))
    n, d = draw(st.sampled_from([16, 32, 48])), draw(st.sampled_from([16, 64, 80]))
    itemsize, tp_size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    return (
        name,
        n,
        d,
        itemsize,
        tp_size,
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )


@given(case=batches(), seed=st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_exactly_the_shards_canonical_bytes_move(
    case: tuple[str, int, int, int, int, int, int, int], seed: int
) -> None:
    name, n, d, itemsize, tp_size, own_heads, layers, per_block = case
    rng = np.random.default_rng(seed)
    block = block_of(n, d, itemsize, tp_size * own_heads, layers, per_block)
    shard = block.shard(int(rng.integers(tp_size)), tp_size)
    layout = pages_of(n, d, itemsize, own_heads, layers, name)
    if rng.random() < 0.5:  # layers that are not evenly spaced, and not in memory's order
        offsets = [offset + 8 * index**2 for index, offset in enumerate(layout.layer_offsets)]
        layout = msgspec.structs.replace(layout, layer_offsets=tuple(offsets[::-1]))
    memory = rng.integers(0, 256, layout.extent_bytes() + 33, dtype=np.uint8)
    staging = HostStaging(memory, layout, block, shard)
    page_ids = rng.permutation(7)[: 2 * per_block].astype(np.int32).reshape(2, per_block)
    page_ids[rng.random(page_ids.shape) < 0.3] = -4
    slots, arena = rng.permutation(3)[:2], rng.integers(0, 256, (3, block.slot_bytes), dtype=np.uint8)
    before, expected, untouched = arena.copy(), arena.copy(), memory.copy()
    shape = (block.num_kv_heads, layers, per_block, n * block.token_bytes)
    own = slice(shard.first_head, shard.first_head + shard.num_heads)
    for row, slot in zip(page_ids, slots, strict=True):
        view = expected[slot, : block.payload_bytes].reshape(shape)
        for index, page in enumerate(row):
            if page >= 0:
                view[own, :, index] = canonical(memory, layout, name, [int(page)]).reshape(
                    own_heads, layers, -1
                )
    staging.gather(page_ids, slots, arena)
    assert np.array_equal(arena, expected)
    assert np.array_equal(memory, untouched)

    memory[:] = rng.integers(0, 256, memory.shape, dtype=np.uint8)
    poisoned = memory.copy()
    staging.scatter(page_ids, slots, arena)
    assert np.array_equal(arena, expected)
    for layer in layout.layer_offsets:
        for page in page_ids[page_ids >= 0].tolist():
            start = layer + page * layout.page_stride
            poisoned[start : start + layout.page_stride] = untouched[start : start + layout.page_stride]
    assert np.array_equal(memory, poisoned)
    assert not np.array_equal(before, expected) or not (page_ids >= 0).any()


@pytest.mark.parametrize("writer", [("vec", 16), ("amx", 64), ("bfmmla", 32), ("amx", 16)])
@pytest.mark.parametrize("reader", [("vec", 64), ("amx", 32), ("bfmmla", 8), ("plain", 16), ("plain", 64)])
def test_a_block_does_not_tell_which_pages_it_is_of(writer: tuple[str, int], reader: tuple[str, int]) -> None:
    """Page size, order and tensor-parallel size of whoever wrote it, and plain pages too."""
    d, heads, layers, rng = 32, 4, 2, np.random.default_rng(5)
    block = block_of(64, d, 2, heads, layers, 1)
    payload = rng.integers(0, 256, block.payload_bytes, dtype=np.uint8)
    arena = np.zeros((2, block.slot_bytes), np.uint8)
    arena[0, : block.payload_bytes] = payload
    for (name, n), tp_size, copy_in in ((writer, 1, 0), (reader, 2, 1)):
        for rank in range(tp_size):
            shard = block.shard(rank, tp_size)
            layout = pages_of(n, d, 2, shard.num_heads, layers, "vec" if name == "plain" else name, 8)
            if name == "plain":
                layout = msgspec.structs.replace(layout, packing=None, order="")
            memory = np.zeros(layout.extent_bytes(), np.uint8)
            staging = HostStaging(memory, layout, block, shard)
            pages = rng.permutation(8)[: 64 // n].astype(np.int32)[np.newaxis]
            staging.scatter(pages, np.array([copy_in]), arena)
            arena[1] = 0 if not copy_in else arena[1]
            staging.gather(pages, np.array([1]), arena)
            if name != "plain":
                first = shard.first_head * layers * block.run_bytes
                own = payload[first : first + shard.num_heads * layers * block.run_bytes]
                assert np.array_equal(canonical(memory, layout, name, pages[0].tolist()), own)
        assert np.array_equal(arena[1, : block.payload_bytes], payload)


def test_large_batches_go_where_they_belong() -> None:
    layout, block = pages_of(128, 128, 4, 2, 2, "vec", 20), block_of(128, 128, 4, 2, 2, 1)
    memory = np.random.default_rng(1).integers(0, 256, layout.extent_bytes(), dtype=np.uint8)
    arena = np.zeros((9, block.slot_bytes), np.uint8)
    pages = np.arange(18, 0, -2, dtype=np.int32)[:, np.newaxis]
    HostStaging(memory, layout, block, block.shard(0, 1)).gather(pages, np.arange(9), arena)
    for slot, page in enumerate(pages[:, 0].tolist()):
        assert np.array_equal(arena[slot, : block.payload_bytes], canonical(memory, layout, "vec", [page]))


def test_hostile_ids_copy_nothing() -> None:
    layout, block = pages_of(16, 16, 2, 1, 1, "amx"), block_of(16, 16, 2, 1, 1, 1)
    memory = np.ones(layout.extent_bytes(), np.uint8)
    staging = HostStaging(memory, layout, block, block.shard(0, 1))
    arena = np.zeros((2, block.slot_bytes), np.uint8)
    for pages, slots in ((ids([7]), [0]), (ids([0]), [2]), (ids([0]), [-1]), (ids([0], [0]), [0, 1])):
        with pytest.raises(LayoutError):
            staging.scatter(pages, np.array(slots), arena)
        assert memory.all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token_stride": 32}, "one dense run"),
        ({"kv_stride": 64}, "one dense run"),
        ({"packing": Packing(ElementOrder((16, 16), (1, 0)), ElementOrder((16, 8), (0, 1)))}, "elements"),
        ({"packing": Packing(ElementOrder((16, 16), (1, 1)), ElementOrder((16, 16), (0, 1)))}, "no order"),
        ({"packing": Packing(ElementOrder((8, 32), (0, 1)), ElementOrder((16, 16), (0, 1)))}, "no order"),
        ({"packing": Packing(ElementOrder((), ()), ElementOrder((16, 16), (0, 1)))}, "no order"),
    ],
)
def test_packings_that_do_not_fit_are_refused(change: dict[str, object], why: str) -> None:
    layout = msgspec.structs.replace(pages_of(16, 16, 2, 1, 1, "vec"), **change)
    block = block_of(16, 16, 2, 1, 1, 1)
    with pytest.raises(LayoutError, match=why):
        HostStaging(np.zeros(1 << 16, np.uint8), layout, block, block.shard(0, 1))


def digit_writer(where: Positions):
    """A page written by an engine that puts elements there."""

    def write(digits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        halves = np.full((2, digits.size), -1, np.int64)
        for half, positions in zip(halves, where, strict=True):
            half[positions.ravel()] = digits.ravel()
        return halves

    return write


@pytest.mark.parametrize("name", ["vec", "amx", "bfmmla"])
@pytest.mark.parametrize(("n", "d"), [(16, 64), (32, 80), (128, 128), (16, 16)])
def test_an_order_is_found_by_writing_a_page(name: str, n: int, d: int) -> None:
    positions = probe(digit_writer(formula(name, n, d)), n, d)
    assert np.array_equal(positions, formula(name, n, d))
    found = recognise(positions, "whatever it is called")
    assert (found.encoding, found.packing) == ("plain", known_packings(n, d)[name])


def test_orders_have_names_of_their_own() -> None:
    names = {
        recognise(formula(name, n, 64), "neon").order for name in ("vec", "amx", "bfmmla") for n in (16, 32)
    }
    assert len(names) == 6
    assert "" not in names


def test_an_unknown_order_stays_opaque_under_its_digest() -> None:
    one, other = formula("vec", 32, 64), formula("vec", 32, 64)
    one[0, :, [3, 9]] = one[0, :, [9, 3]]
    other[1, [3, 9]] = other[1, [9, 3]]
    found = [recognise(probe(digit_writer(where), 32, 64), "neon") for where in (one, other)]
    assert all(order.packing is None and order.encoding.startswith("vllm-cpu-neon-32-") for order in found)
    assert found[0].encoding != found[1].encoding
    assert found[0].order != found[1].order


def test_what_is_quantised_stays_opaque_in_a_known_order_too() -> None:
    vec, amx = (recognise(formula(name, 32, 64), "amx", can_unpack=False) for name in ("vec", "amx"))
    assert vec.packing is None
    assert vec.encoding != amx.encoding
    assert vec.encoding.startswith("vllm-cpu-amx-32-")


@pytest.mark.parametrize("how", ["drops one", "writes one twice", "mixes K and V", "changes numbers"])
def test_what_is_no_order_is_refused(how: str) -> None:
    right = digit_writer(formula("vec", 16, 32))

    def write(digits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        page = right(digits)
        if how == "drops one":
            page[0, 5] = -1
        elif how == "writes one twice":
            page[1, 7] = page[1, 8]
        elif how == "mixes K and V":
            return page.reshape(1, -1)
        else:
            page[0] //= 2
        return page

    with pytest.raises(LayoutError, match="CPU attention"):
        probe(write, 16, 32)
