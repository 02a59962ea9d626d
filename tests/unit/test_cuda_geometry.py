"""What is folded into a run, how wide vectors are, and where every run lies."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from staging_kit import pairs, random_case

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, ElementOrder, Packing, PageLayout
from kvferry.cuda.geometry import GEOMETRY_FORMAT, CopyGeometry, copy_geometry

BLOCK = BlockLayout(num_layers=4, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2)


_ROWS = ElementOrder((16, BLOCK.head_dim), (0, 1))
PACKING = Packing(_ROWS, _ROWS)


def vllm_pages(order: str, block: BlockLayout = BLOCK, tokens: int = 16, tp_size: int = 2) -> PageLayout:
    """Lay out dense pages: axes from the slowest to the fastest."""
    heads = block.num_kv_heads // tp_size
    sizes = {"L": block.num_layers, "B": 10, "H": heads, "N": tokens, "K": block.kv_factor}
    strides, reach = {}, block.head_dim * block.itemsize
    for axis in reversed(order):
        strides[axis] = reach
        reach *= sizes[axis]
    return PageLayout(
        num_pages=10,
        page_tokens=tokens,
        num_heads=heads,
        head_bytes=block.head_dim * block.itemsize,
        kv_factor=block.kv_factor,
        layer_offsets=tuple(layer * strides["L"] for layer in range(block.num_layers)),
        page_stride=strides["B"],
        head_stride=strides["H"],
        token_stride=strides["N"],
        kv_stride=strides["K"],
    )


def geometry_of(order: str, block: BlockLayout = BLOCK, tokens: int = 16, tp_size: int = 2) -> CopyGeometry:
    return copy_geometry(vllm_pages(order, block, tokens, tp_size), block, block.shard(tp_size - 1, tp_size))


@pytest.mark.parametrize(
    ("order", "tokens", "run_bytes", "steps"),
    [
        ("LBNHK", 16, 512, (4, 4, 16, 1)),  # NHD: K and V of a token
        ("LBHNK", 16, 16 * 512, (4, 4, 1, 1)),  # HND: the tokens of a page
        ("BLHNK", 16, 16 * 512, (4, 4, 1, 1)),
        ("BLKHN", 16, 256, (4, 4, 16, 2)),  # TensorRT-LLM: K and V lie apart
        ("BHLNK", 64, 4 * 4 * 64 * 512, (1, 1, 1, 1)),  # a page is a shard
        ("BLHNK", 64, 64 * 512, (4, 4, 1, 1)),
    ],
)
def test_what_is_contiguous_on_both_sides_is_one_run(
    order: str, tokens: int, run_bytes: int, steps: tuple[int, ...]
) -> None:
    geometry = geometry_of(order, tokens=tokens)
    assert geometry.run_bytes == run_bytes
    assert (geometry.num_heads, geometry.num_layers, geometry.num_tokens, geometry.num_kv) == steps
    assert geometry.runs_per_page * geometry.run_bytes * geometry.pages_per_block == geometry.shard_bytes
    assert geometry.vector_bytes == 16


def test_mla_is_one_run_for_each_layer() -> None:
    block = BlockLayout(num_layers=4, num_kv_heads=1, block_tokens=64, head_dim=576, kv_factor=1, itemsize=2)
    geometry = copy_geometry(vllm_pages("LBNHK", block, tp_size=1), block, block.shard(3, 4))
    assert (geometry.run_bytes, geometry.runs_per_page) == (16 * 576 * 2, 4)
    assert geometry.slot_offset == 0


def test_uneven_layers_are_never_folded() -> None:
    layout = vllm_pages("BHLNK", tokens=64)
    first, second, *rest = layout.layer_offsets
    layout = msgspec.structs.replace(layout, layer_offsets=(second, first, *rest))
    geometry = copy_geometry(layout, BLOCK, BLOCK.shard(0, 2))
    assert geometry.layer_offsets == layout.layer_offsets
    assert geometry.run_bytes == 64 * 512


def test_a_shard_begins_where_its_heads_do() -> None:
    assert geometry_of("LBNHK").slot_offset == 4 * BLOCK.num_layers * BLOCK.run_bytes
    assert geometry_of("LBNHK").shard_bytes == BLOCK.payload_bytes // 2


@pytest.mark.parametrize(
    ("addresses", "width"),
    [((0, 4096), 16), ((1 << 40,), 16), ((8, 16), 8), ((4, 16), 4), ((16, 2), 2), ((3, 16), 1)],
)
def test_base_addresses_narrow_the_vectors(addresses: tuple[int, ...], width: int) -> None:
    geometry = geometry_of("LBNHK").at(*addresses)
    assert geometry.vector_bytes == width
    assert geometry.kernel_name("gather") == f"kvferry_gather_v{width}"
    assert geometry.kernel_name("scatter") == f"kvferry_scatter_v{width}"


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "width"), [(64, 2, 16), (36, 2, 8), (3, 4, 4), (3, 2, 2), (3, 1, 1)]
)
def test_odd_heads_narrow_the_vectors(head_dim: int, itemsize: int, width: int) -> None:
    block = BlockLayout(
        num_layers=2, num_kv_heads=2, block_tokens=4, head_dim=head_dim, kv_factor=1, itemsize=itemsize
    )
    assert geometry_of("LBNHK", block, tokens=1, tp_size=1).vector_bytes == width


def test_an_odd_layer_offset_narrows_the_vectors() -> None:
    layout = vllm_pages("LBNHK")
    shifted = tuple(offset + 4 * index for index, offset in enumerate(layout.layer_offsets))
    layout = msgspec.structs.replace(layout, layer_offsets=shifted)
    assert copy_geometry(layout, BLOCK, BLOCK.shard(0, 2)).vector_bytes == 4


@pytest.mark.parametrize(
    ("order", "lanes", "slices"), [("BLKHN", 8, 8), ("LBNHK", 8, 8), ("LBHNK", 32, 32 * 4)]
)
def test_a_run_is_shared_by_as_few_lanes_as_cover_it(order: str, lanes: int, slices: int) -> None:
    geometry = geometry_of(order)
    assert (geometry.lanes, geometry.slices) == (lanes, slices)
    assert geometry.steps(3) == 3 * geometry.runs_per_page * slices


@pytest.mark.parametrize("seed", range(60))
def test_runs_are_every_byte_of_the_pages_once(seed: int) -> None:
    case = random_case(seed)
    geometry = copy_geometry(case.layout, case.block, case.shard)
    page_ids, _ = case.partial(1)
    in_page, in_shard = geometry.runs()
    assert in_page.dtype == in_shard.dtype == np.int64
    assert len(in_page) == geometry.runs_per_page
    copied = {}
    for index, page in enumerate(page_ids[0].tolist()):
        if page < 0:
            continue
        for source, target in zip(in_page.tolist(), in_shard.tolist(), strict=True):
            for byte in range(geometry.run_bytes):
                at = geometry.slot_offset + index * geometry.page_shard_stride + target + byte
                assert at not in copied
                copied[at] = page * geometry.page_stride + source + byte
    in_pages, in_slot = pairs(case.block, case.shard, case.layout, page_ids[0])
    assert copied == dict(zip(in_slot.tolist(), in_pages.tolist(), strict=True))


def test_the_struct_has_its_size() -> None:
    assert len(geometry_of("LBNHK").pack()) == GEOMETRY_FORMAT.size == 120


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token_stride": -1}, "negative"),
        ({"layer_offsets": (0, -8, 16, 32)}, "negative"),
        ({"layer_offsets": (0, 8)}, "layers"),
        ({"num_heads": 3}, "KV heads"),
        ({"num_pages": 1 << 31}, "31 bits"),
        ({"page_tokens": 48}, "multiple"),
        ({"packing": PACKING, "token_stride": 2 * BLOCK.head_dim * BLOCK.itemsize}, "no packing"),
    ],
)
def test_pages_that_cannot_be_copied_are_refused(change: dict[str, object], why: str) -> None:
    layout = msgspec.structs.replace(vllm_pages("LBNHK"), **change)
    with pytest.raises(LayoutError, match=why):
        copy_geometry(layout, BLOCK, BLOCK.shard(0, 2))
