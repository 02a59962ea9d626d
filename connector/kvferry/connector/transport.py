"""Transports: how one engine's rank reads pages out of another engine's memory, for a handoff.

A rank *exports* its pages once; what it then says of itself, an *offer*, reaches readers over an authenticated
side channel (``kvferry.engines.handoff``). A rank of the other engine *connects* to an offer and reads pages.
Which pages may be read, for how long, and whether what was read may be used is not a transport's business:
leases and checks are the side channel's.

Contract for implementers
  * ``PageReader.read`` blocks. Once it has returned or raised, no byte of that call lands any more, whatever the other
    side does: late data in a page that the engine has given to another request is a wrong byte in a model.
  * A read reaches the target's memory only inside the pages that were exported.
  * An offer comes from outside: it is bounded, checked and refused, never believed.
  * The one-sided or the copying party may vanish at any instant. The other one must survive it.

Methods of one exporter or reader may be called from several threads; a reader's ``read`` by one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, PageIds, SlotIds

__all__ = [
    "MAX_OFFER_BYTES",
    "Heads",
    "PageExporter",
    "PageIds",
    "PageMemory",
    "PageReader",
    "PageStaging",
    "RemotePages",
    "TransportContext",
    "TransportType",
    "narrow",
    "page_block",
]

MAX_OFFER_BYTES = 16 << 10
"""What a rank may say of itself per transport."""


class Heads(msgspec.Struct, frozen=True):
    """A range of the model's KV heads."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """The first head behind the range."""
        return self.first + self.count


class PageStaging(Protocol):
    """Copies whole pages of some heads between the engine's memory and canonical bytes on the host.

    As ``kvferry.connector.staging.Staging``, with blocks of one page, and complete when a call returns.
    """

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy page ``page_ids[i, 0]`` to the start of row ``slots[i]`` of ``arena``, for all i.

        There it is ``[head][layer][token][k_or_v][head_dim]``, where ``PageLayout.order`` names no other order of
        what lies within a head and layer.
        """

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy the start of row ``slots[i]`` of ``arena`` into page ``page_ids[i, 0]``, for all i."""


class PageMemory:
    """One rank's own pages.

    Args:
        address: Virtual address of the allocation; ``layout``'s offsets count from it.
        nbytes: Its length.
        device: ``cpu`` or ``cuda``.
        device_id: Which GPU; 0 for the CPU.
        layout: Where each vector lies. Pages go as they are: what it says of ``packing`` is dropped.
        block: The model's canonical block.
        shard: Which heads this rank owns.
        stage: Makes a staging for a range of this rank's heads; its slots hold exactly those heads of one page.
    """

    def __init__(
        self,
        *,
        address: int,
        nbytes: int,
        device: str,
        device_id: int,
        layout: PageLayout,
        block: BlockLayout,
        shard: Shard,
        stage: Callable[[Heads], PageStaging],
    ) -> None:
        layout.check(block, shard)
        if layout.extent_bytes() > nbytes:
            raise LayoutError(f"the pages span {layout.extent_bytes()} bytes, the allocation has {nbytes}")
        self.address = address
        self.nbytes = nbytes
        self.device = device
        self.device_id = device_id
        self.layout = msgspec.structs.replace(layout, packing=None)
        self.block = block
        self.shard = shard
        self.stage = stage

    @property
    def heads(self) -> Heads:
        """This rank's heads."""
        return Heads(self.shard.first_head, self.shard.num_heads)

    def page_bytes(self, heads: Heads) -> int:
        """Return the canonical bytes of one page of some heads."""
        return heads.count * self.block.num_layers * self.layout.page_tokens * self.block.token_bytes


class RemotePages(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank of another engine says of its pages. From outside: see :meth:`check`."""

    shard: Shard
    layout: PageLayout
    nbytes: Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]
    device: Annotated[str, msgspec.Meta(max_length=16)]
    offers: dict[
        Annotated[str, msgspec.Meta(max_length=64)],
        Annotated[bytes, msgspec.Meta(max_length=MAX_OFFER_BYTES)],
    ]
    """Transport name -> what its ``connect`` needs."""

    def check(self, own: PageMemory) -> None:
        """Raise LayoutError unless these pages hold what this rank's pages can take."""
        if self.layout.page_tokens != own.layout.page_tokens:
            raise LayoutError(
                f"the peer's pages hold {self.layout.page_tokens} tokens, these {own.layout.page_tokens}; "
                "give both engines the same block size"
            )
        if self.layout.order != own.layout.order or self.layout.packing is not None:
            raise LayoutError(
                f"the peer's pages hold their elements in {_order(self.layout)}, these in {_order(own.layout)}; "
                "give both engines the same instruction set, block size and build"
            )
        self.layout.check(own.block, self.shard)
        first, end = self.shard.first_head, self.shard.first_head + self.shard.num_heads
        if first < 0 or not first < end <= own.block.num_kv_heads:
            raise LayoutError(
                f"the peer's heads {self.shard} are outside the model's {own.block.num_kv_heads}"
            )
        layout = self.layout
        lowest = min(
            layout.page_stride,
            layout.head_stride,
            layout.token_stride,
            layout.kv_stride,
            *layout.layer_offsets,
        )
        if layout.num_pages < 1 or lowest < 0 or layout.extent_bytes() > self.nbytes:
            raise LayoutError("the peer's pages do not fit its own memory")


class TransportContext(msgspec.Struct, frozen=True, kw_only=True):
    """What kvferry gives a transport."""

    host: str
    """Address that this side listens on, where the transport has to; loopback unless the operator says otherwise."""
    advertised: str
    """The same as peers reach it."""
    token: str
    """Credential of both sides; empty for none."""
    name: str
    """Unique to this process's life: engine, rank and a random part."""
    is_only: bool = False
    """The operator named this transport, so none takes its place: it serves as well as it can."""


class PageExporter(Protocol):
    """Makes a rank's pages readable until it is closed."""

    @property
    def offer(self) -> bytes:
        """What a reader needs, at most ``MAX_OFFER_BYTES``."""

    def close(self) -> None:
        """Stop. Idempotent; waits at most a few seconds."""


class PageReader(Protocol):
    """Reads pages of one rank of another engine into own ones: the heads that both hold."""

    @property
    def description(self) -> str:
        """How bytes travel, for a log: ``nixl, one-sided``."""

    def read(self, remote_pages: PageIds, local_pages: PageIds, deadline: float) -> None:
        """Copy page ``remote_pages[i]`` over page ``local_pages[i]``, for all i. Blocks; see the module's contract.

        Args:
            remote_pages: Page ids on the other side, each inside its layout.
            local_pages: As many own page ids, all different.
            deadline: ``time.monotonic`` until which it may take.

        Raises:
            HandoffFailed: ``timeout``, ``disconnected`` or ``transport``; the pages' contents are undefined, and this
                reader is of no use any more.
        """

    def close(self) -> None:
        """Let go of the other side. Idempotent."""


class TransportType(msgspec.Struct, frozen=True):
    """A transport, as a plugin registers it."""

    name: str
    """The value of ``peer.transport``."""
    unusable: Callable[[PageMemory], str]
    """Why it cannot serve these pages here, in words that say what to do; empty when it can."""
    export: Callable[[PageMemory, TransportContext], PageExporter]
    """Makes pages readable; raises HandoffFailed (``transport``) where that fails."""
    connect: Callable[[RemotePages, bytes, PageMemory, TransportContext, float], PageReader]
    """``connect(remote, offer, own, context, deadline)``; blocks; raises HandoffFailed. The heads are those that both
    ranks hold, at least one."""
    summary: str
    """One line for ``kvferry plugins``."""
    priority: int = 0
    """With ``auto`` the usable transport of the highest priority that both sides offer is used."""


def _order(layout: PageLayout) -> str:
    return f"the order {layout.order[:64]!r}" if layout.order else "the order of tokens"


def narrow(layout: PageLayout, shard: Shard, heads: Heads) -> PageLayout:
    """Return the part of ``layout`` that holds ``heads``.

    Raises:
        LayoutError: The rank does not hold all of them.
    """
    skipped = heads.first - shard.first_head
    if skipped < 0 or heads.count < 1 or heads.end > shard.first_head + shard.num_heads:
        raise LayoutError(f"heads {heads.first} to {heads.end} are not within {shard}")
    offsets = tuple(offset + skipped * layout.head_stride for offset in layout.layer_offsets)
    return msgspec.structs.replace(layout, num_heads=heads.count, layer_offsets=offsets)


def page_block(block: BlockLayout, page_tokens: int, heads: Heads) -> BlockLayout:
    """Return the canonical form of one page of some heads, as a block of its own."""
    return msgspec.structs.replace(block, num_kv_heads=heads.count, block_tokens=page_tokens)
