"""One rank's pages, in the form of either cache manager, and what changed in them.

The pool keeps a second copy of everything that the engine itself wrote. Whatever differs from it was written by the
connector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from standin.model import Bytes, Model

__all__ = ["CacheLayout", "Pool"]

_POISON = 0xA5
_PADDING = 64
"""Bytes behind each page of the second manager's regions."""


class Buffer(NamedTuple):
    layer_id: int
    role: str
    expansion: int = 1


@dataclass
class Region:
    """Memory that repeats for every page, as the second cache manager tells of it."""

    memory: torch.Tensor
    """``[pages, bytes]``, of which the last belong to nobody."""
    size: int
    buffers: list[Buffer]

    @property
    def base(self) -> int:
        return self.memory.data_ptr()

    @property
    def stride(self) -> int:
        return self.memory.stride(0)

    @property
    def num_slots(self) -> int:
        return self.memory.shape[0]

    def address_of(self, slot: int) -> int:
        self._check(slot)
        return self.base + slot * self.stride

    def as_tensor(self, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return self.memory[:, : self.size].view(dtype)

    def slot_tensor(self, slot: int) -> torch.Tensor:
        self._check(slot)
        return self.memory[slot, : self.size]

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")


@dataclass
class LayerGroup:
    layer_ids: list[int]
    regions: list[Region]
    layer_group_id: int = 0
    window_size: int | None = None

    @property
    def bytes_per_page(self) -> int:
        return sum(region.size for region in self.regions)


@dataclass
class CacheLayout:
    tokens_per_block: int
    dtype: torch.dtype
    groups: list[LayerGroup]

    def as_single_pool_tensor(self) -> torch.Tensor:
        if len(self.groups) != 1 or len(self.groups[0].regions) != 1:
            raise ValueError("the KV cache is not a single pool")
        return self.groups[0].regions[0].as_tensor(self.dtype)


class Pool:
    """A rank's pages.

    Args:
        model: Whose KV they hold.
        heads: KV heads of this rank, as a range of the model's.
        num_pages: How many there are.
        page_tokens: Tokens of one.
        is_v2: Whether the second cache manager describes them.
    """

    def __init__(self, model: Model, heads: range, num_pages: int, page_tokens: int, *, is_v2: bool) -> None:
        self.heads = heads
        self.num_pages = num_pages
        self.tensor: torch.Tensor | None = None
        """Of the first cache manager: ``[pages, layers, kv_factor, heads * tokens * head_dim]``."""
        self.layout: CacheLayout | None = None
        """Of the second."""
        inside = (model.kv_factor, len(heads), page_tokens, model.head_dim * model.itemsize)
        size = int(np.prod(inside))
        dtype = getattr(torch, model.dtype)
        if is_v2:
            regions = []
            self._memory = np.zeros((model.layers, num_pages, size + _PADDING), np.uint8)
            for layer in range(model.layers):
                memory = torch.from_numpy(self._memory[layer])
                buffers = [Buffer(layer, role) for role in ("key", "value")[: model.kv_factor]]
                regions.append(Region(memory, size, buffers))
            self.layout = CacheLayout(page_tokens, dtype, [LayerGroup(list(range(model.layers)), regions)])
        else:
            shape = (num_pages, model.layers, model.kv_factor, size // model.kv_factor // model.itemsize)
            self.tensor = torch.zeros(shape, dtype=dtype)
            self._memory = self.tensor.view(torch.uint8).numpy()
        self._shadow = np.zeros_like(self._memory)
        self.layers = self._by_layer(self._memory, model.layers, inside)
        """Each layer's ``[pages, kv_factor, heads, tokens, bytes]``."""
        self._shadows = self._by_layer(self._shadow, model.layers, inside)
        self.poison(range(num_pages))

    def write(self, layer: int, page: int, token: int, kv: Bytes) -> None:
        """Write a token's KV ``[kv_factor, heads of the model, bytes]``, as the engine does."""
        own = kv[:, self.heads.start : self.heads.stop]
        self.layers[layer][page, :, :, token] = own
        self._shadows[layer][page, :, :, token] = own

    def read(self, layer: int, pages: list[int], count: int) -> Bytes:
        """Return the first tokens' KV that lies in pages: ``[tokens, kv_factor, heads, bytes]``."""
        content = self.layers[layer][pages].transpose(0, 3, 1, 2, 4)
        return content.reshape(-1, *content.shape[2:])[:count]

    def poison(self, pages: Iterable[int]) -> None:
        """Make pages hold what nobody may take for KV."""
        for page in pages:
            for of_layer in (*self.layers, *self._shadows):
                of_layer[page] = _POISON

    def changed(self) -> set[int]:
        """Return the pages that somebody else wrote to; -1 stands for bytes between pages."""
        if np.array_equal(self._memory, self._shadow):
            return set()
        found: set[int] = set()
        for mine, shadow in zip(self.layers, self._shadows, strict=True):
            found.update(np.flatnonzero((mine != shadow).any(axis=(1, 2, 3, 4))).tolist())
        return found or {-1}

    def adopt(self, pages: Iterable[int]) -> None:
        """Take what pages hold for right: the connector was asked to write there."""
        for page in pages:
            for mine, shadow in zip(self.layers, self._shadows, strict=True):
                shadow[page] = mine[page]

    def _by_layer(self, memory: Bytes, layers: int, inside: tuple[int, ...]) -> list[Bytes]:
        if self.layout is None:
            return [memory[:, layer].reshape(self.num_pages, *inside) for layer in range(layers)]
        size = int(np.prod(inside))
        steps = np.zeros(inside, np.uint8).strides
        shape = (self.num_pages, *inside)
        return [
            np.lib.stride_tricks.as_strided(part[:, :size], shape, (part.strides[0], *steps))
            for part in memory
        ]
