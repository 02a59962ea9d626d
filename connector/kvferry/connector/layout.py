"""Shapes: the canonical block, a rank's shard of it, and an engine's pages.

A block's canonical form is ``[kv_head][layer][token][k_or_v][head_dim]``, contiguous, in the model's
KV dtype. Heads are outermost, so a tensor-parallel rank's shard is one contiguous byte range and any
TP size reads what any other wrote. Engines describe their pages by byte strides; ``staging`` turns
the two descriptions into copies.

Values only: frozen, no I/O, usable from any thread.
"""

from __future__ import annotations

import math

import msgspec

from kvferry.connector.errors import LayoutError

__all__ = [
    "SLOT_ALIGNMENT_BYTES",
    "BlockLayout",
    "ElementOrder",
    "Packing",
    "PageLayout",
    "Shard",
    "default_block_tokens",
]

SLOT_ALIGNMENT_BYTES = 4096
"""Slots start and end on this boundary, which O_DIRECT and page registration need."""

_MIN_BLOCK_TOKENS = 64


def default_block_tokens(page_tokens: int) -> int:
    """Return the smallest multiple of the engine's page size that is at least 64 tokens."""
    return page_tokens * math.ceil(_MIN_BLOCK_TOKENS / page_tokens)


class Shard(msgspec.Struct, frozen=True):
    """The part of a block that one tensor-parallel rank owns: a range of KV heads."""

    rank: int
    first_head: int
    num_heads: int
    is_writer: bool
    """False for ranks that hold a replica of another rank's heads: they load but do not save."""


class BlockLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Geometry of one canonical block."""

    num_layers: int
    """Layers with a KV cache."""
    num_kv_heads: int
    """KV heads of the whole model (1 for MLA)."""
    block_tokens: int
    """Tokens of a block."""
    head_dim: int
    """Elements per token and head of K (or of V); the full latent width for MLA."""
    kv_factor: int = 2
    """2 for K and V, 1 where they are one (MLA)."""
    itemsize: int
    """Bytes per element."""
    dtype: str = ""
    """Element type by its usual name (``bfloat16``); empty when unknown. Only codecs that must
    understand elements ask for it."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head of one layer: K then V."""
        return self.kv_factor * self.head_dim * self.itemsize

    @property
    def run_bytes(self) -> int:
        """Bytes of one (head, layer): the longest run every layout keeps together."""
        return self.block_tokens * self.token_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of one whole block."""
        return self.num_kv_heads * self.num_layers * self.run_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one arena slot: the payload rounded up to ``SLOT_ALIGNMENT_BYTES``."""
        return -(-self.payload_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES

    def shard(self, rank: int, tp_size: int) -> Shard:
        """Return the heads that ``rank`` of ``tp_size`` ranks owns.

        With more ranks than heads (and always for MLA) ranks hold replicas; the first rank of each
        replica group is its writer.

        Raises:
            LayoutError: ``num_kv_heads`` and ``tp_size`` do not divide one another.
        """
        if not 0 <= rank < tp_size:
            raise LayoutError(f"rank {rank} is outside a group of {tp_size}")
        heads = self.num_kv_heads
        if heads % tp_size == 0:
            per_rank = heads // tp_size
            return Shard(rank, rank * per_rank, per_rank, True)
        if tp_size % heads == 0:
            replicas = tp_size // heads
            return Shard(rank, rank // replicas, 1, rank % replicas == 0)
        raise LayoutError(f"{heads} KV heads cannot be split over {tp_size} ranks")


class ElementOrder(msgspec.Struct, frozen=True):
    """In which order the elements of one page's K (or V) of one head lie.

    Its elements, as an array of ``shape`` (outermost first) whose axes are transposed to ``axes``, are those of
    ``[page_tokens][head_dim]`` row by row. Axes before some point make up the tokens, those behind it the head's
    dimension.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape once transposed."""
        return tuple(self.shape[axis] for axis in self.axes)

    def token_axes(self, page_tokens: int) -> int:
        """Return how many of the transposed axes make up the tokens.

        Raises:
            LayoutError: The order is none of a page of so many tokens.
        """
        if sorted(self.axes) == list(range(len(self.shape))) and min(self.shape, default=0) > 0:
            plain = self.plain_shape
            for count in range(len(plain) + 1):
                if math.prod(plain[:count]) == page_tokens:
                    return count
        raise LayoutError(f"{self} is no order of a page of {page_tokens} tokens")


class Packing(msgspec.Struct, frozen=True):
    """An engine's own order of elements within a (layer, page, head): all of K, then all of V, each in its order."""

    k: ElementOrder
    v: ElementOrder


class PageLayout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one rank's engine pages lie in memory, as byte strides from one base address.

    The byte of (layer, page, head, token, k_or_v) is ``layer_offsets[layer] + page * page_stride +
    head * head_stride + token * token_stride + k_or_v * kv_stride``; ``head_dim`` elements follow.

    Where ``order`` names another order of elements, that is true only of the (layer, page, head) as a whole: a dense
    run of ``page_tokens * kv_factor * head_bytes`` bytes. Whoever copies such runs as they are may do so between
    pages of equal ``order`` only.
    """

    num_pages: int
    page_tokens: int
    num_heads: int
    """KV heads on this rank."""
    head_bytes: int
    """``head_dim * itemsize``: the contiguous run of one K (or V) vector."""
    kv_factor: int
    layer_offsets: tuple[int, ...]
    page_stride: int
    head_stride: int
    token_stride: int
    kv_stride: int
    packing: Packing | None = None
    """How staging makes canonical bytes of a (layer, page, head), and the other way; None where it copies strides."""
    order: str = ""
    """Names the order of elements within a (layer, page, head): equal names, equal orders. Empty: token after token."""

    def extent_bytes(self) -> int:
        """Return the number of bytes from the base that the pages span."""
        last = (
            max(self.layer_offsets)
            + (self.num_pages - 1) * self.page_stride
            + (self.num_heads - 1) * self.head_stride
            + (self.page_tokens - 1) * self.token_stride
            + (self.kv_factor - 1) * self.kv_stride
        )
        return last + self.head_bytes

    def check(self, block: BlockLayout, shard: Shard) -> None:
        """Raise LayoutError unless these pages can hold ``shard`` of ``block``."""
        facts = [
            ("layers", len(self.layer_offsets), block.num_layers),
            ("KV heads on this rank", self.num_heads, shard.num_heads),
            ("bytes per head vector", self.head_bytes, block.head_dim * block.itemsize),
            ("K/V factor", self.kv_factor, block.kv_factor),
        ]
        for what, have, want in facts:
            if have != want:
                raise LayoutError(f"the engine's pages have {have} {what}, the block has {want}")
        if block.block_tokens % self.page_tokens:
            raise LayoutError(
                f"block_tokens {block.block_tokens} is not a multiple of the page's {self.page_tokens} tokens"
            )
        if self.packing is not None:
            self._check_packing(self.packing, block)

    def _check_packing(self, packing: Packing, block: BlockLayout) -> None:
        if self.kv_factor != 2 or (self.token_stride, self.kv_stride) != (
            2 * self.head_bytes,
            self.head_bytes,
        ):
            raise LayoutError("packed pages must keep the K and V of a head in one dense run")
        for order in (packing.k, packing.v):
            order.token_axes(self.page_tokens)
            if math.prod(order.shape) != self.page_tokens * block.head_dim:
                raise LayoutError(
                    f"{order} is no order of {self.page_tokens} tokens of {block.head_dim} elements"
                )
