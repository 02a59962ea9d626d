"""torch's copies, the last resort on a GPU: the contract of a staging, on torch's CPU build.

Only the three names that need a GPU are played; layers, views and copies are torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from staging_kit import MakeRig, Rig, StagingTests, ids, small_case

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes
from kvferry.engines.torch_pages import TorchPages


class Event:
    """Of a stream that runs at once."""

    def record(self) -> None:
        pass


class Stream:
    """Runs at once; notes what it was made to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Stream]]:
    """The streams that copies were made on, in turn."""
    used: list[Stream] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        used.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return used


def layers_in(memory: Bytes, layout: PageLayout) -> list[torch.Tensor]:
    """Each layer's bytes ``[pages, heads, tokens, K and V, bytes of a vector]``, where the layout says."""
    whole = torch.from_numpy(memory)
    shape = (layout.num_pages, layout.num_heads, layout.page_tokens, layout.kv_factor, layout.head_bytes)
    strides = (layout.page_stride, layout.head_stride, layout.token_stride, layout.kv_stride, 1)
    return [whole.as_strided(shape, strides, offset) for offset in layout.layer_offsets]


def rig(memory: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard) -> Rig:
    own = memory.copy()
    return Rig(TorchPages(layers_in(own, layout), layout, block, shard), lambda: own)


class TestTorchPages(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return rig


def test_each_direction_has_a_stream_and_its_own_marks(cuda: list[Stream]) -> None:
    case = small_case()
    staging = rig(case.memory(), case.layout, case.block, case.shard).staging
    marks = staging.mark(), staging.mark()
    slots = np.zeros((1, case.block.slot_bytes), np.uint8)
    for direction, mark in zip((staging.gathers, staging.scatters), marks, strict=True):
        direction.wait(mark)
        direction.copy(ids([0, 1]), np.array([0]), slots)
        direction.finish()
    out, back = cuda
    assert out is not back
    assert (out.waited, back.waited) == ([marks[0]], [marks[1]])
