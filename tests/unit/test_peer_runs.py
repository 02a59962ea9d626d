"""Which bytes a read between two engines copies, against a model that walks over every byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nixl_kit import LAYOUTS, dense

from kvferry.connector.errors import HandoffFailed, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.transport import Heads, narrow
from kvferry.plugins.peer.runs import (
    MAX_INDEX,
    Runs,
    Side,
    batches,
    check_pages,
    common_heads,
    common_runs,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[PageLayout, Shard], tuple[PageLayout, Shard]]:
    """Two ranks of engines with different layouts and numbers of ranks, that have a head in common."""
    is_latent = draw(st.booleans())
    model_heads = 1 if is_latent else draw(st.sampled_from([1, 2, 4]))
    kv, vector = (1, draw(st.integers(1, 5))) if is_latent else (2, draw(st.integers(1, 4)))
    layers, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    block = BlockLayout(
        num_layers=layers,
        num_kv_heads=model_heads,
        block_tokens=tokens,
        head_dim=vector,
        kv_factor=kv,
        itemsize=1,
    )
    sides, wanted = [], draw(st.integers(0, model_heads - 1))
    for _ in range(2):
        tp_size = draw(st.sampled_from([1, 2, 4]))
        shards = [block.shard(rank, tp_size) for rank in range(tp_size)]
        holding = [one for one in shards if one.first_head <= wanted < one.first_head + one.num_heads]
        shard = draw(st.sampled_from(holding))
        layout = dense(
            draw(st.sampled_from(LAYOUTS)),
            draw(st.integers(1, 5)),
            layers,
            shard.num_heads,
            tokens,
            kv,
            vector,
            draw(st.sampled_from([0, 0, 5])),
        )
        layout.check(block, shard)
        sides.append((layout, shard))
    return sides[0], sides[1]


def bytes_of(layout: PageLayout, shard: Shard, heads: Heads, page: int) -> Iterator[int]:
    """Yield the place of every byte of some heads of a page, always in the same order."""
    part = narrow(layout, shard, heads)
    for layer, head, token, kv, byte in itertools.product(
        range(len(part.layer_offsets)),
        range(part.num_heads),
        range(part.page_tokens),
        range(part.kv_factor),
        range(part.head_bytes),
    ):
        inside = head * part.head_stride + token * part.token_stride + kv * part.kv_stride + byte
        yield part.layer_offsets[layer] + page * part.page_stride + inside


def expanded(rows: np.ndarray, index: int) -> range:
    """Return the bytes that NIXL takes an index to mean: all of a row's pages, then the next row's."""
    ends = np.cumsum(rows[:, 4])
    row = int(np.searchsorted(ends, index, side="right"))
    address, length, _, stride, count = (int(value) for value in rows[row])
    start = address + (index - (int(ends[row]) - count)) * stride
    return range(start, start + length)


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_exactly_the_bytes_of_the_common_heads_are_copied(
    case: tuple[tuple[PageLayout, Shard], tuple[PageLayout, Shard]], data: st.DataObject
) -> None:
    (own, own_shard), (remote, remote_shard) = case
    heads = common_heads(own_shard, remote_shard)
    runs = common_runs(own, own_shard, remote, remote_shard, heads)
    count = data.draw(st.integers(0, min(own.num_pages, remote.num_pages)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    local_pages = rng.permutation(own.num_pages)[:count].astype(np.int32)
    remote_pages = rng.integers(0, remote.num_pages, count, dtype=np.int32)
    source = rng.integers(1, 256, remote.extent_bytes(), dtype=np.uint8)
    into = np.zeros(own.extent_bytes(), np.uint8)
    check_pages(runs, remote_pages, local_pages)

    part = slice(0, len(runs.own.offsets))
    assert runs.parts() == [part]
    ours = runs.own.rows(part, runs.run_bytes, 0, 0)
    theirs = runs.remote.rows(part, runs.run_bytes, 0, 0)
    copied = 0
    for own_indices, remote_indices in batches(runs, part, remote_pages, local_pages, 3):
        assert 0 < len(own_indices) == len(remote_indices) <= 3
        assert own_indices.dtype == remote_indices.dtype == np.int32
        for own_index, remote_index in zip(own_indices, remote_indices, strict=True):
            to, start = expanded(ours, own_index), expanded(theirs, remote_index)
            into[to.start : to.stop] = source[start.start : start.stop]
            copied += len(to)

    expected = np.zeros_like(into)
    for there, here in zip(remote_pages, local_pages, strict=True):
        places = bytes_of(own, own_shard, heads, int(here)), bytes_of(remote, remote_shard, heads, int(there))
        for to, start in zip(*places, strict=True):
            expected[to] = source[start]
    assert np.array_equal(into, expected)
    assert copied == count * runs.page_bytes == np.count_nonzero(expected)


@pytest.mark.parametrize(
    ("own", "remote", "ranks", "run", "rows"),
    [
        ("hnd", "hnd", (1, 1), 4 * 16 * 32, 3),
        ("pages_outermost", "pages_outermost", (1, 1), 3 * 4 * 16 * 32, 1),
        ("hnd", "pages_outermost", (1, 1), 4 * 16 * 32, 3),
        ("hnd", "hnd", (2, 1), 2 * 16 * 32, 3),
        ("pages_outermost", "pages_outermost", (2, 1), 2 * 16 * 32, 3),
        ("nhd", "nhd", (1, 1), 4 * 16 * 32, 3),
        ("nhd", "nhd", (2, 1), 2 * 32, 3 * 16),
        ("nhd", "hnd", (1, 1), 32, 3 * 16 * 4),
        ("kv_separate", "kv_separate", (1, 1), 4 * 16 * 16, 3 * 2),
        ("kv_separate", "hnd", (1, 1), 16, 3 * 16 * 4 * 2),
    ],
)
def test_runs_are_as_long_as_both_sides_allow(
    own: str, remote: str, ranks: tuple[int, int], run: int, rows: int
) -> None:
    block = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=16, head_dim=8, itemsize=2)
    shards = [block.shard(0, count) for count in ranks]
    layouts = [
        dense(kind, 7, 3, shard.num_heads, 16, 2, 16, 0)
        for kind, shard in zip((own, remote), shards, strict=True)
    ]
    runs = common_runs(layouts[0], shards[0], layouts[1], shards[1], common_heads(*shards))
    assert (runs.run_bytes, len(runs.own.offsets), len(runs.remote.offsets)) == (run, rows, rows)


def test_descriptors_do_not_grow_with_the_number_of_pages() -> None:
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=4, head_dim=8, itemsize=2)
    shard = block.shard(0, 1)
    layout = dense("hnd", 10**6, 2, 2, 4, 2, 16, 0)
    runs = common_runs(layout, shard, layout, shard, common_heads(shard, shard))
    rows = runs.own.rows(slice(0, 2), runs.run_bytes, 4096, 3)
    page = 2 * 4 * 2 * 16
    assert rows.tolist() == [
        [4096, page, 3, page, 10**6],
        [4096 + 10**6 * page, page, 3, page, 10**6],
    ]


def side(pages: int, rows: int = 3) -> Side:
    return Side(np.arange(rows, dtype=np.int64) * 8, 8, pages)


def test_indices_stay_within_32_bits() -> None:
    pages = MAX_INDEX // 2 - 1
    runs = Runs(8, side(4), side(pages))
    assert runs.parts() == [slice(0, 2), slice(2, 3)]
    (indices,) = batches(runs, runs.parts()[0], np.array([pages - 1], np.int32), np.array([3], np.int32), 64)
    assert [one.tolist() for one in indices] == [[3, 7], [pages - 1, 2 * pages - 1]]
    with pytest.raises(LayoutError, match="cannot number"):
        Runs(8, side(4), side(MAX_INDEX)).parts()


@pytest.mark.parametrize(
    ("remote_pages", "local_pages", "why"),
    [
        ([0, 1], [0], "2 pages cannot be read into 1"),
        ([5], [0], "remote page ids are outside the 5 pages"),
        ([-1], [0], "remote page ids are outside"),
        ([0], [4], "own page ids are outside the 4 pages"),
        ([0], [-1], "own page ids are outside"),
        ([0, 1], [2, 2], "named twice"),
        ([[0]], [[0]], "cannot be read"),
    ],
)
def test_pages_that_are_not_there_are_refused(
    remote_pages: list[int], local_pages: list[int], why: str
) -> None:
    runs = Runs(8, side(4), side(5))
    with pytest.raises(HandoffFailed, match=why) as caught:
        check_pages(runs, np.array(remote_pages, np.int32), np.array(local_pages, np.int32))
    assert caught.value.reason == "transport"


def test_page_ids_of_another_width_are_refused() -> None:
    with pytest.raises(HandoffFailed, match="32 bits"):
        check_pages(Runs(8, side(4), side(5)), np.array([0]), np.array([0], np.int32))


def test_one_page_may_be_read_into_several() -> None:
    check_pages(Runs(8, side(4), side(5)), np.array([4, 4], np.int32), np.array([0, 3], np.int32))


def test_ranks_without_a_common_head_have_nothing_to_read() -> None:
    with pytest.raises(LayoutError, match="no head in common"):
        common_heads(Shard(0, 0, 2, True), Shard(1, 2, 2, True))
    assert common_heads(Shard(0, 0, 3, True), Shard(1, 2, 2, True)) == Heads(2, 1)


def test_pages_that_overlap_are_refused() -> None:
    block = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=4, head_dim=8, itemsize=2)
    shard = block.shard(0, 1)
    good = dense("hnd", 3, 1, 1, 4, 2, 16, 0)
    bad = PageLayout(**{name: getattr(good, name) for name in good.__struct_fields__} | {"page_stride": 0})
    with pytest.raises(LayoutError, match="overlap"):
        common_runs(good, shard, bad, shard, common_heads(shard, shard))
