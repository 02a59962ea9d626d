"""What every transport is held to: ``TransportTests``, and ranks of engines to try it with.

A test of a transport subclasses ``TransportTests`` and says how pages are exported: in this process or in another one.
The bytes that should arrive are found by index arithmetic, apart from the code that stages pages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from staging_kit import KINDS, page_layout

from kvferry.connector.errors import HandoffFailed, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import HostStaging
from kvferry.connector.transport import (
    MAX_OFFER_BYTES,
    Heads,
    PageMemory,
    PageReader,
    PageStaging,
    RemotePages,
    TransportContext,
    TransportType,
    narrow,
    page_block,
)

Bytes = npt.NDArray[np.uint8]
Exported = Callable[..., AbstractContextManager[bytes]]
Connect = Callable[..., PageReader]

TOKEN = "the token of prefill and decode"
MARGIN = 64
"""Bytes behind the pages, which nobody may touch."""
TP_PAIRS = [(1, 1), (1, 2), (2, 1), (2, 4), (4, 1), (4, 8)]
"""Ranks of the engine that hands over, and of the one that takes."""


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def context(token: str = "", name: str = "an engine, rank 0") -> TransportContext:
    return TransportContext(host="127.0.0.1", advertised="127.0.0.1", token=token, name=name)


class Rank(NamedTuple):
    """A rank's pages. Its bytes are final before it is exported, so that another process may do that with a copy."""

    pages: Bytes
    """The whole allocation."""
    memory: PageMemory

    @property
    def layout(self) -> PageLayout:
        return self.memory.layout

    @property
    def block(self) -> BlockLayout:
        return self.memory.block

    @property
    def shard(self) -> Shard:
        return self.memory.shard

    def remote(self, **offers: bytes) -> RemotePages:
        """What it says of itself to the other engine."""
        return RemotePages(
            shard=self.shard, layout=self.layout, nbytes=self.pages.nbytes, device="cpu", offers=offers
        )


def rank_over(pages: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard) -> Rank:
    """Return a rank whose pages lie in ``pages``, whatever their layout."""

    def stage(heads: Heads) -> PageStaging:
        return HostStaging(
            pages,
            narrow(layout, shard, heads),
            page_block(block, layout.page_tokens, heads),
            Shard(0, 0, heads.count, True),
        )

    memory = PageMemory(
        address=pages.ctypes.data,
        nbytes=pages.nbytes,
        device="cpu",
        device_id=0,
        layout=layout,
        block=block,
        shard=shard,
        stage=stage,
    )
    return Rank(pages, memory)


def random_rank(kind: str, block: BlockLayout, page_tokens: int, shard: Shard, seed: int) -> Rank:
    """Return a rank of 3 to 8 pages full of random bytes, in one of the layouts of ``KINDS``."""
    rng = np.random.default_rng(seed)
    vector = block.head_dim * block.itemsize
    layout = page_layout(kind, rng, shard.num_heads, block.num_layers, page_tokens, vector)
    pages = rng.integers(0, 256, layout.extent_bytes() + MARGIN, dtype=np.uint8)
    return rank_over(pages, layout, block, shard)


def two_ranks(seed: int, tp_sizes: tuple[int, int] | None = None) -> tuple[Rank, Rank]:
    """Return a rank that hands over and one that takes, which share at least one head."""
    rng = np.random.default_rng(seed)
    is_mla = seed % len(KINDS) == KINDS.index("mla")
    kinds = ["mla"] if is_mla else [kind for kind in KINDS if kind != "mla"]
    tokens = int(rng.choice([1, 2, 4, 16]))
    block = BlockLayout(
        num_layers=int(rng.integers(1, 4)),
        num_kv_heads=1 if is_mla else 4,
        block_tokens=tokens * int(rng.integers(1, 4)),
        head_dim=int(rng.choice([1, 6, 8, 64])),
        kv_factor=1 if is_mla else 2,
        itemsize=int(rng.choice([1, 2])),
    )
    giving_size, taking_size = tp_sizes or TP_PAIRS[int(rng.integers(len(TP_PAIRS)))]
    taker = block.shard(int(rng.integers(taking_size)), taking_size)
    givers = [block.shard(rank, giving_size) for rank in range(giving_size)]
    givers = [giver for giver in givers if shared_heads(giver, taker).count > 0]
    giver = givers[int(rng.integers(len(givers)))]
    return (
        random_rank(str(rng.choice(kinds)), block, tokens, giver, seed + 1),
        random_rank(str(rng.choice(kinds)), block, tokens, taker, seed + 2),
    )


def even_ranks(pages: int = 8) -> tuple[Rank, Rank]:
    """Return two ranks of one layout, for tests in which the layout does not matter."""
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=64, itemsize=2)
    made = random_rank("hnd_fused", block, 16, block.shard(0, 1), 0)
    layer_bytes = made.layout.page_stride * pages
    layout = msgspec.structs.replace(made.layout, num_pages=pages, layer_offsets=(0, layer_bytes))
    rng = np.random.default_rng(1)
    giver, taker = (rng.integers(0, 256, layout.extent_bytes() + MARGIN, dtype=np.uint8) for _ in range(2))
    return rank_over(giver, layout, block, made.shard), rank_over(taker, layout, block, made.shard)


def shared_heads(one: Shard, other: Shard) -> Heads:
    first = max(one.first_head, other.first_head)
    end = min(one.first_head + one.num_heads, other.first_head + other.num_heads)
    return Heads(first, end - first)


def vectors(rank: Rank, heads: Heads, page: int) -> npt.NDArray[np.int64]:
    """Where in a rank's memory each byte of some heads of a page lies: [head, layer, token, k_or_v, byte]."""
    layout = rank.layout
    own = np.arange(heads.first, heads.end) - rank.shard.first_head
    at = np.asarray(layout.layer_offsets, np.int64) + page * layout.page_stride
    at = own[:, None] * layout.head_stride + at
    at = at[..., None] + np.arange(layout.page_tokens) * layout.token_stride
    at = at[..., None] + np.arange(layout.kv_factor) * layout.kv_stride
    return at[..., None] + np.arange(layout.head_bytes)


def expected(giver: Rank, taker: Rank, pairs: Iterable[tuple[int, int]], before: Bytes) -> Bytes:
    """What the taker's memory should hold after pages (given, taken) were read."""
    heads = shared_heads(giver.shard, taker.shard)
    after = before.copy()
    for given, taken in pairs:
        after[vectors(taker, heads, taken)] = giver.pages[vectors(giver, heads, given)]
    return after


def ids(pages: Iterable[int]) -> npt.NDArray[np.int32]:
    return np.fromiter(pages, np.int32)


class TransportTests:
    """The contract of ``transport``. A subclass gives the fixtures ``transport`` and ``exported``.

    ``exported(rank, token="")`` is a context manager around a rank whose pages can be read; it gives the offer.
    """

    asks_for_token: ClassVar[bool] = True
    """False for a transport whose offer is the credential."""

    @pytest.fixture
    def transport(self) -> TransportType:
        raise NotImplementedError

    @pytest.fixture
    def exported(self) -> Exported:
        raise NotImplementedError

    @pytest.fixture
    def connect(self, transport: TransportType) -> Iterable[Connect]:
        """Connects a taker to a giver's offer; what is connected is closed in the end."""
        readers: list[PageReader] = []

        def connected(
            giver: Rank, offer: bytes, taker: Rank, token: str = "", deadline: float | None = None
        ) -> PageReader:
            remote = giver.remote(**{transport.name: offer})
            by = deadline if deadline is not None else soon()
            reader = transport.connect(remote, offer, taker.memory, context(token, "a decoding engine"), by)
            readers.append(reader)
            return reader

        yield connected
        for reader in readers:
            reader.close()

    # What is read

    @pytest.mark.parametrize("seed", range(24))
    def test_exactly_the_shared_heads_of_the_pages_arrive(
        self, seed: int, exported: Exported, connect: Connect
    ) -> None:
        giver, taker = two_ranks(seed, TP_PAIRS[seed % len(TP_PAIRS)] if seed < 12 else None)
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, min(giver.layout.num_pages, taker.layout.num_pages) + 1))
        given = rng.choice(giver.layout.num_pages, count, replace=False)
        taken = rng.choice(taker.layout.num_pages, count, replace=False)
        own, other = taker.pages.copy(), giver.pages.copy()
        with exported(giver) as offer:
            connect(giver, offer, taker).read(ids(given), ids(taken), soon())
        pairs = zip(given.tolist(), taken.tolist(), strict=True)
        assert np.array_equal(taker.pages, expected(giver, taker, pairs, own))
        assert np.array_equal(giver.pages, other)

    def test_one_page_may_be_read_into_several(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            connect(giver, offer, taker).read(ids([3, 3, 3]), ids([0, 5, 2]), soon())
        assert np.array_equal(taker.pages, expected(giver, taker, [(3, 0), (3, 5), (3, 2)], before))

    def test_many_pages_in_one_read(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks(pages=700)
        before = taker.pages.copy()
        with exported(giver) as offer:
            connect(giver, offer, taker).read(ids(range(700)), ids(reversed(range(700))), soon())
        pairs = zip(range(700), reversed(range(700)), strict=True)
        assert np.array_equal(taker.pages, expected(giver, taker, pairs, before))

    def test_nothing_is_read_where_nothing_is_asked_for(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            reader = connect(giver, offer, taker)
            reader.read(ids([]), ids([]), soon())
            assert np.array_equal(taker.pages, before)
            reader.read(ids([1]), ids([2]), soon())
        assert np.array_equal(taker.pages, expected(giver, taker, [(1, 2)], before))

    def test_a_reader_reads_many_times(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            reader = connect(giver, offer, taker)
            for page in range(8):
                reader.read(ids([page]), ids([7 - page]), soon())
        pairs = [(page, 7 - page) for page in range(8)]
        assert np.array_equal(taker.pages, expected(giver, taker, pairs, before))

    def test_two_readers_do_not_disturb_each_other(self, exported: Exported, connect: Connect) -> None:
        giver, first = even_ranks()
        _, second = even_ranks()
        before = first.pages.copy()
        with exported(giver) as offer:
            one, other = connect(giver, offer, first), connect(giver, offer, second)
            one.read(ids([1]), ids([0]), soon())
            other.read(ids([2]), ids([0]), soon())
            one.close()
            other.read(ids([3]), ids([1]), soon())
        assert np.array_equal(first.pages, expected(giver, first, [(1, 0)], before))
        assert np.array_equal(second.pages, expected(giver, second, [(2, 0), (3, 1)], before))

    # What is refused

    @pytest.mark.parametrize("bad", [-1, 8, 1 << 20, (1 << 31) - 1, -(1 << 31)])
    def test_pages_that_the_other_side_does_not_have_are_refused(
        self, bad: int, exported: Exported, connect: Connect
    ) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            with pytest.raises(HandoffFailed) as failed:
                connect(giver, offer, taker).read(ids([0, bad]), ids([0, 1]), soon())
        assert failed.value.reason == "transport"
        assert np.array_equal(taker.pages, before)

    @pytest.mark.parametrize("taken", [[0, -1], [0, 8], [0, 1 << 20], [0], [0, 1, 2], [4, 4]])
    def test_own_pages_that_cannot_be_meant_are_refused(
        self, taken: list[int], exported: Exported, connect: Connect
    ) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            with pytest.raises(HandoffFailed) as failed:
                connect(giver, offer, taker).read(ids([0, 1]), ids(taken), soon())
        assert failed.value.reason == "transport"
        assert np.array_equal(taker.pages, before)

    def test_offers_that_are_none_are_refused(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        with exported(giver) as offer:
            assert len(offer) <= MAX_OFFER_BYTES
            middle = len(offer) // 2
            hostile = [
                b"",
                b"\x00",
                b"\xff" * 64,
                b"\xc1" * MAX_OFFER_BYTES,
                bytes(MAX_OFFER_BYTES),
                offer[:-1],
                offer[:middle],
                offer[middle:],
                offer + offer,
                b"\x81\xa2\x00\x80\x01",  # a name that is no text
                b"\x91" * MAX_OFFER_BYTES,  # lists in lists
                b"\x81\xa4more" + b"\x91" * 10_000,
                msgspec.msgpack.encode({}),
                msgspec.msgpack.encode([1, "127.0.0.1", 1, b""]),
            ]
            for bad in hostile:
                with pytest.raises(HandoffFailed) as failed:
                    connect(giver, bad, taker, deadline=soon(2.0))
                assert failed.value.reason in ("transport", "incompatible")

    def test_a_rank_without_a_common_head_is_refused(self, exported: Exported, connect: Connect) -> None:
        block = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=16, head_dim=8, itemsize=2)
        giver, taker = (random_rank("hnd_fused", block, 16, block.shard(rank, 2), rank) for rank in range(2))
        with exported(giver) as offer:
            with pytest.raises(HandoffFailed) as failed:
                connect(giver, offer, taker)
        assert failed.value.reason == "incompatible"

    def test_the_token_has_to_be_the_same(self, exported: Exported, connect: Connect) -> None:
        if not self.asks_for_token:
            pytest.skip("the offer is the credential")
        giver, taker = even_ranks()
        with exported(giver, TOKEN) as offer:
            for token in ("", "the token of somebody else"):
                with pytest.raises(HandoffFailed) as failed:
                    connect(giver, offer, taker, token)
                assert failed.value.reason == "refused"
            before = taker.pages.copy()
            connect(giver, offer, taker, TOKEN).read(ids([0]), ids([1]), soon())
        assert np.array_equal(taker.pages, expected(giver, taker, [(0, 1)], before))

    # Time, and the end

    def test_a_deadline_that_is_over_is_kept(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            with pytest.raises(HandoffFailed) as failed:
                connect(giver, offer, taker, deadline=time.monotonic() - 1.0)
            assert failed.value.reason == "timeout"
            reader = connect(giver, offer, taker)
            with pytest.raises(HandoffFailed) as failed:
                reader.read(ids([0]), ids([0]), time.monotonic() - 1.0)
            assert failed.value.reason == "timeout"
            assert np.array_equal(taker.pages, before)

    def test_closing_twice_is_closing_once(self, exported: Exported, connect: Connect) -> None:
        giver, taker = even_ranks()
        before = taker.pages.copy()
        with exported(giver) as offer:
            reader = connect(giver, offer, taker)
            reader.close()
            reader.close()
            with pytest.raises(HandoffFailed):
                reader.read(ids([0]), ids([0]), soon())
            assert np.array_equal(taker.pages, before)
            connect(giver, offer, taker).read(ids([0]), ids([0]), soon())
        assert np.array_equal(taker.pages, expected(giver, taker, [(0, 0)], before))

    def test_after_the_exporter_is_gone_a_read_is_right_or_an_error(
        self, exported: Exported, connect: Connect
    ) -> None:
        """It goes while a read may be under way. What a read that failed has left behind stays as it is."""
        giver, taker = even_ranks(pages=256)
        before = taker.pages.copy()
        after = expected(giver, taker, zip(range(256), range(256), strict=True), before)
        outcomes: list[str] = []
        has_begun, may_stop = threading.Event(), threading.Event()
        everything = ids(range(256))

        def read_on(reader: PageReader) -> None:
            while not (may_stop.is_set() and outcomes):
                try:
                    reader.read(everything, everything, soon())
                except HandoffFailed as failed:
                    outcomes.append(failed.reason)
                    return
                finally:
                    has_begun.set()
                if not np.array_equal(taker.pages, after):
                    outcomes.append("wrong bytes")
                    return
                if may_stop.is_set():
                    outcomes.append("ok")

        with exported(giver) as offer:
            thread = threading.Thread(target=read_on, args=(connect(giver, offer, taker),))
            thread.start()
            assert has_begun.wait(10.0)
        may_stop.set()
        thread.join(10.0)
        assert not thread.is_alive()
        assert outcomes[0] in ("ok", "disconnected", "timeout", "transport")
        taker.pages[:] = 7
        until = soon(0.2)
        while time.monotonic() < until:  # long enough for what was on its way
            assert np.array_equal(taker.pages, np.full_like(taker.pages, 7))

    def test_remote_pages_that_do_not_fit_are_refused(
        self, transport: TransportType, exported: Exported
    ) -> None:
        giver, taker = even_ranks()
        with exported(giver) as offer:
            for remote in misfits(giver):
                with pytest.raises((HandoffFailed, LayoutError)):
                    transport.connect(remote, offer, taker.memory, context(), soon())


def misfits(rank: Rank) -> list[RemotePages]:
    """What a hostile or mistaken peer may say of its pages."""
    good = rank.remote()
    layout = good.layout
    return [
        msgspec.structs.replace(good, layout=msgspec.structs.replace(layout, page_tokens=0)),
        msgspec.structs.replace(good, layout=msgspec.structs.replace(layout, page_tokens=8)),
        msgspec.structs.replace(good, layout=msgspec.structs.replace(layout, num_pages=0)),
        msgspec.structs.replace(
            good, layout=msgspec.structs.replace(layout, page_stride=-layout.page_stride)
        ),
        msgspec.structs.replace(
            good, layout=msgspec.structs.replace(layout, num_pages=layout.num_pages * 100)
        ),
        msgspec.structs.replace(good, layout=msgspec.structs.replace(layout, layer_offsets=())),
        msgspec.structs.replace(good, layout=msgspec.structs.replace(layout, kv_factor=1)),
        msgspec.structs.replace(good, shard=msgspec.structs.replace(good.shard, first_head=1)),
        msgspec.structs.replace(good, shard=msgspec.structs.replace(good.shard, first_head=-1)),
        msgspec.structs.replace(good, nbytes=1),
    ]
