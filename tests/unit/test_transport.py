"""What ranks say of their pages, and what is believed of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_kit import Rank, even_ranks, misfits, random_rank, rank_over, two_ranks, vectors

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, ElementOrder, Packing, Shard
from kvferry.connector.staging import HostStaging
from kvferry.connector.transport import (
    MAX_OFFER_BYTES,
    Heads,
    PageMemory,
    RemotePages,
    narrow,
    page_block,
)

BLOCK = BlockLayout(num_layers=2, num_kv_heads=8, block_tokens=64, head_dim=16, itemsize=2)


# Parts of pages


@pytest.mark.parametrize("seed", range(24))
def test_the_part_of_a_layout_is_where_these_heads_lie(seed: int) -> None:
    rank, _ = two_ranks(seed)
    own = rank.memory.heads
    rng = np.random.default_rng(seed)
    first = int(rng.integers(own.first, own.end))
    heads = Heads(first, int(rng.integers(1, own.end - first + 1)))
    part = narrow(rank.layout, rank.shard, heads)
    narrowed = rank_over(rank.pages, part, rank.block, Shard(0, heads.first, heads.count, True))
    for page in range(rank.layout.num_pages):
        assert np.array_equal(vectors(narrowed, heads, page), vectors(rank, heads, page))
    assert part.extent_bytes() <= rank.layout.extent_bytes()


@pytest.mark.parametrize("seed", range(24))
def test_a_page_is_staged_as_its_heads_in_order(seed: int) -> None:
    rank, _ = two_ranks(seed)
    heads = rank.memory.heads
    page = seed % rank.layout.num_pages
    batch = np.array([[page]], np.int32), np.array([0])
    slot = np.empty(rank.memory.page_bytes(heads), np.uint8)
    rank.memory.stage(heads).gather(*batch, slot[np.newaxis])
    assert np.array_equal(slot, rank.pages[vectors(rank, heads, page)].ravel())
    parts = np.empty_like(slot).reshape(heads.count, -1)
    for head, part in zip(range(heads.first, heads.end), parts, strict=True):
        rank.memory.stage(Heads(head, 1)).gather(*batch, part[np.newaxis])
    assert np.array_equal(parts.ravel(), slot)


@pytest.mark.parametrize(
    "heads", [Heads(1, 2), Heads(2, 0), Heads(2, -1), Heads(3, 2), Heads(5, 1), Heads(4, 1), Heads(-1, 3)]
)
def test_heads_that_a_rank_does_not_hold_have_no_part(heads: Heads) -> None:
    rank = random_rank("hnd_fused", BLOCK, 16, BLOCK.shard(1, 4), 0)
    assert rank.memory.heads == Heads(2, 2)
    with pytest.raises(LayoutError, match="are not within"):
        narrow(rank.layout, rank.shard, heads)


def test_a_page_of_some_heads_is_a_block_of_its_own() -> None:
    page = page_block(BLOCK, 16, Heads(3, 2))
    assert (page.num_kv_heads, page.block_tokens, page.num_layers) == (2, 16, 2)
    assert page.payload_bytes == 2 * 2 * 16 * BLOCK.token_bytes
    rank = random_rank("nhd_fused", BLOCK, 16, BLOCK.shard(0, 1), 0)
    assert rank.memory.page_bytes(Heads(3, 2)) == page.payload_bytes
    layout = narrow(rank.layout, rank.shard, Heads(3, 2))
    HostStaging(rank.pages, layout, page, Shard(0, 0, 2, True))


def test_pages_that_do_not_fit_their_memory_are_a_mistake() -> None:
    rank, _ = even_ranks()
    for nbytes, shard in (
        (rank.layout.extent_bytes() - 1, rank.shard),
        (rank.pages.nbytes, Shard(0, 0, 1, True)),
    ):
        with pytest.raises(LayoutError):
            PageMemory(
                address=rank.memory.address,
                nbytes=nbytes,
                device="cpu",
                device_id=0,
                layout=rank.layout,
                block=rank.block,
                shard=shard,
                stage=rank.memory.stage,
            )


# What a peer says


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (8, 1), (2, 4), (16, 2), (2, 16)])
def test_ranks_of_one_model_go_together_whatever_their_number(sizes: tuple[int, int]) -> None:
    theirs, ours = (BLOCK.shard(size - 1, size) for size in sizes)
    giver = random_rank("nhd_fused", BLOCK, 16, theirs, 0)
    taker = random_rank("hnd_fused", BLOCK, 16, ours, 1)
    giver.remote(socket=b"").check(taker.memory)


def test_what_a_peer_says_comes_through_the_wire() -> None:
    giver, taker = even_ranks()
    said = msgspec.msgpack.encode(giver.remote(nixl=b"\x00\xff", socket=b"here"))
    heard = msgspec.msgpack.decode(said, type=RemotePages)
    assert heard == giver.remote(nixl=b"\x00\xff", socket=b"here")
    heard.check(taker.memory)


def test_pages_that_do_not_go_with_ours_are_refused() -> None:
    giver, taker = even_ranks()
    bad = misfits(giver)
    assert len(bad) > 5
    for remote in bad:
        with pytest.raises(LayoutError):
            remote.check(taker.memory)


def test_pages_of_another_size_say_what_to_do() -> None:
    giver, taker = even_ranks()
    smaller = msgspec.structs.replace(giver.layout, page_tokens=8)
    with pytest.raises(LayoutError, match="8 tokens, these 16; give both engines the same block size"):
        msgspec.structs.replace(giver.remote(), layout=smaller).check(taker.memory)


def test_pages_whose_elements_lie_in_another_order_are_refused() -> None:
    giver, taker = even_ranks()
    packed = msgspec.structs.replace(giver.layout, order="128x64-4711")
    with pytest.raises(LayoutError, match="in the order '128x64-4711', these in the order of tokens"):
        msgspec.structs.replace(giver.remote(), layout=packed).check(taker.memory)
    ours = rank_over(taker.pages, packed, taker.block, taker.shard)
    said = msgspec.msgpack.encode(msgspec.structs.replace(giver.remote(), layout=packed))
    msgspec.msgpack.decode(said, type=RemotePages).check(ours.memory)
    with pytest.raises(LayoutError, match="in the order of tokens, these in the order '128x64-4711'"):
        giver.remote().check(ours.memory)


def test_pages_are_handed_over_as_they_are() -> None:
    rank, taker = even_ranks()
    rows = ElementOrder((16, 64), (0, 1))
    packing = Packing(rows, rows)
    packed = msgspec.structs.replace(rank.layout, packing=packing, order="some")
    made = rank_over(rank.pages, packed, rank.block, rank.shard)
    assert (made.layout.packing, made.layout.order) == (None, "some")
    remote = msgspec.structs.replace(
        rank.remote(), layout=msgspec.structs.replace(rank.layout, packing=packing)
    )
    with pytest.raises(LayoutError, match="order"):
        remote.check(taker.memory)


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.integers(-3, 70) | st.sampled_from([2**31, 2**47, 2**48])
FIELDS = [field.name for field in msgspec.structs.fields(even_ranks()[0].layout) if field.type is int]


@st.composite
def claims(draw: st.DrawFn, giver: Rank) -> RemotePages:
    """A true statement in which some numbers are replaced."""
    layout = draw(st.dictionaries(st.sampled_from(FIELDS), NUMBERS, max_size=3))
    offsets = draw(st.just(giver.layout.layer_offsets) | st.lists(NUMBERS, max_size=3).map(tuple))
    shard = draw(st.dictionaries(st.sampled_from(["first_head", "num_heads", "rank"]), NUMBERS, max_size=2))
    return msgspec.structs.replace(
        giver.remote(),
        layout=msgspec.structs.replace(giver.layout, layer_offsets=offsets, **layout),
        shard=msgspec.structs.replace(giver.shard, **shard),
        nbytes=draw(st.just(giver.pages.nbytes) | st.integers(1, (1 << 48) - 1)),
    )


GIVER, TAKER = even_ranks()


@settings(deadline=None)
@given(remote=claims(GIVER))
def test_what_is_believed_lies_within_the_peers_own_memory(remote: RemotePages) -> None:
    """Whatever numbers a peer sends: it is refused, or no address that is computed from them leaves its allocation."""
    try:
        remote.check(TAKER.memory)
    except LayoutError:
        return
    layout, shard = remote.layout, remote.shard
    assert (layout.page_tokens, layout.head_bytes, layout.kv_factor) == (16, 128, 2)
    assert 0 <= shard.first_head < shard.first_head + shard.num_heads <= TAKER.block.num_kv_heads
    heads = Heads(shard.first_head, shard.num_heads)
    for page in {0, layout.num_pages - 1}:
        corners = corner_bytes(remote, heads, page)
        assert min(corners) >= 0
        assert max(corners) < remote.nbytes


def corner_bytes(remote: RemotePages, heads: Heads, page: int) -> Sequence[int]:
    layout = remote.layout
    return [
        offset + page * layout.page_stride + head * layout.head_stride + token * layout.token_stride
        + k_or_v * layout.kv_stride + byte
        for offset in layout.layer_offsets
        for head in (0, heads.count - 1)
        for token in (0, layout.page_tokens - 1)
        for k_or_v in (0, layout.kv_factor - 1)
        for byte in (0, layout.head_bytes - 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": 0},
        {"nbytes": 1 << 48},
        {"device": "x" * 17},
        {"offers": {"socket": bytes(MAX_OFFER_BYTES + 1)}},
        {"offers": {"x" * 65: b""}},
        {"more": 1},
        {"shard": None},
        {"layout": {}},
    ],
)
def test_what_is_out_of_bounds_is_not_even_read(change: dict[str, object]) -> None:
    said = msgspec.to_builtins(GIVER.remote(socket=b"here"), builtin_types=(bytes,))
    msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=RemotePages)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({**said, **change}), type=RemotePages)
