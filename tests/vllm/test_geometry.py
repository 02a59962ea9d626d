"""vLLM's cache tensors in every physical order: described, proved by the self-test, refused when odd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.staging import Bytes, Copies, HostStaging, Staging
from kvferry.engines import roundtrip
from kvferry.engines.roundtrip import RoundTrip
from kvferry.engines.vllm.geometry import page_layout, pages_array
from kvferry.engines.vllm.packing import PageOrder, known_packings, page_order, token_writer
from kvferry.engines.vllm.worker import _ManagerPages, _staging

LAYERS, PAGES, TOKENS, HEAD_DIM = 3, 8, 16, 8


def cache(order: KVCacheLayout, heads: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Each layer's ``[pages, heads, tokens, content]`` view of one allocation in this physical order."""
    logical = (LAYERS, PAGES, heads, TOKENS, 2 * HEAD_DIM)
    physical = [logical[axis] for axis in order.stride_order]
    allocation = torch.zeros(math.prod(logical), dtype=dtype).view(physical)
    inverse = [order.stride_order.index(axis) for axis in range(5)]
    return list(allocation.permute(inverse).unbind(0))


def block(heads: int, dtype: torch.dtype = torch.bfloat16, pages_per_block: int = 2) -> BlockLayout:
    return BlockLayout(
        num_layers=LAYERS,
        num_kv_heads=heads,
        block_tokens=TOKENS * pages_per_block,
        head_dim=HEAD_DIM,
        itemsize=dtype.itemsize,
    )


@pytest.mark.parametrize(
    ("order", "dtype", "tp_size"),
    list(itertools.product(KVCacheLayout, (torch.bfloat16, torch.float32, torch.uint8), (1, 2))),
)
def test_blocks_survive_in_every_physical_order(
    order: KVCacheLayout, dtype: torch.dtype, tp_size: int
) -> None:
    heads = 4
    for rank in range(tp_size):
        shard = block(heads, dtype).shard(rank, tp_size)
        layers = cache(order, shard.num_heads, dtype)
        layout = page_layout(layers, block(heads, dtype))
        staging = HostStaging(pages_array(layers[0]), layout, block(heads, dtype), shard)
        RoundTrip(layers, block(heads, dtype), shard)(staging)
        assert not any(layer.any() for layer in layers), "the self-test leaves the cache as it was"


def test_what_one_tp_size_writes_another_reads() -> None:
    whole, order = block(4), KVCacheLayout.LBHNC
    layers = cache(order, 4)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    slots, arena = np.array([0]), np.zeros((1, whole.slot_bytes), np.uint8)
    one = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    one.gather(np.array([[5, 2]], np.int32), slots, arena)
    for rank in range(2):
        shard = whole.shard(rank, 2)
        halves = cache(KVCacheLayout.BLNHC, 2)
        half = HostStaging(pages_array(halves[0]), page_layout(halves, whole), whole, shard)
        half.scatter(np.array([[1, 6]], np.int32), slots, arena)
        for layer, full in zip(halves, layers, strict=True):
            assert torch.equal(layer[[1, 6]], full[[5, 2]][:, shard.first_head : shard.first_head + 2])


def test_pages_that_the_kernel_splits_go_by_the_managers_ids() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    kernel = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    manager = _ManagerPages(kernel, 2)
    assert manager.pages_per_block == 1
    found, expected = (np.zeros((2, whole.slot_bytes), np.uint8) for _ in range(2))
    manager.gathers.copy(np.array([[3], [-1]], np.int32), np.array([1, 0]), found)
    kernel.gather(np.array([[6, 7]], np.int32), np.array([1]), expected)
    assert np.array_equal(found, expected)
    for page in (PAGES // 2, (1 << 31) - 1):
        with pytest.raises(LayoutError, match="outside the engine's"):
            manager.scatters.copy(np.array([[page]], np.int32), np.array([0]), found)


def test_pages_in_host_memory_are_proved() -> None:
    whole, layers = block(4), known_content()
    proved: list[Staging] = []
    made = _staging(layers, PAGES, whole, whole.shard(0, 1), CudaConfig(), proved.append)
    assert proved == [made.kernel_pages]


def test_the_self_test_finds_a_wrong_stride() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    swapped = page_layout(cache(KVCacheLayout.LBNHC, 4), whole)
    staging = HostStaging(pages_array(layers[0]), swapped, whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="layer 0 lies in a block in an order"):
        RoundTrip(layers, whole, whole.shard(0, 1))(staging)


def test_the_self_test_finds_swapped_layers() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    layout = page_layout([layers[1], layers[0], layers[2]], whole)
    staging = HostStaging(pages_array(layers[0]), layout, whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="layer 0"):
        RoundTrip(layers, whole, whole.shard(0, 1))(staging)


def known_content() -> list[torch.Tensor]:
    layers = cache(KVCacheLayout.LBHNC, 4)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    return layers


class Refusing(HostStaging):
    """Refuses waits for gathers, and detaching, as often as it is told to.

    What was queued goes on until a wait is granted.
    """

    waits_refused = 0
    detaches_refused = 0
    queued: Callable[[], object] | None = None

    @property
    def gathers(self) -> Copies:
        return _Refusing(self, super().gathers)

    def detach(self, arena: Bytes) -> None:
        if self.detaches_refused:
            self.detaches_refused -= 1
            raise DeviceError("cuMemHostUnregister", "refused")


class _Refusing:
    def __init__(self, staging: Refusing, copies: Copies) -> None:
        self.wait, self.copy = copies.wait, copies.copy
        self._staging = staging

    def finish(self) -> None:
        if self._staging.waits_refused:
            self._staging.waits_refused -= 1
            raise DeviceError("cuEventSynchronize", "refused")
        if self._staging.queued is not None:
            self._staging.queued()


def refusing(layers: list[torch.Tensor], layout: PageLayout | None = None) -> Refusing:
    whole = block(4)
    return Refusing(pages_array(layers[0]), layout or page_layout(layers, whole), whole, whole.shard(0, 1))


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_behind_refused_waits_the_engine_has_its_pages_back(refused: int) -> None:
    """Two more are asked for, and pages are restored when what was queued is over."""
    layers, whole = known_content(), block(4)
    before = [layer.clone() for layer in layers]
    staging = refusing(layers)
    staging.waits_refused, late = refused, []

    def copy() -> None:
        late.append(layers[0][-1].zero_())

    staging.queued = copy
    proof = RoundTrip(layers, whole, whole.shard(0, 1))
    with pytest.raises(DeviceError, match="cuEventSynchronize"):
        proof(staging)
    assert all(torch.equal(*pair) for pair in zip(layers, before, strict=True))
    assert bool(late) == (refused < 3)
    assert not proof.has_refused, "no bytes were found wrong"


@pytest.mark.parametrize("waits", [0, 1])
def test_what_is_refused_at_the_end_hides_no_wrong_bytes(waits: int) -> None:
    layers, whole = known_content(), block(4)
    before = [layer.clone() for layer in layers]
    staging = refusing(layers, page_layout([layers[1], layers[0], layers[2]], whole))
    staging.detaches_refused = 1
    compare = roundtrip._compare_slots

    def then_refuse(*arguments: object) -> None:
        staging.waits_refused = waits
        compare(*arguments)  # type: ignore[arg-type]

    proof = RoundTrip(layers, whole, whole.shard(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roundtrip, "_compare_slots", then_refuse)
        with pytest.raises(LayoutError, match="layer 0"):
            proof(staging)
    assert (staging.detaches_refused, staging.waits_refused, proof.has_refused) == (0, 0, True)
    assert all(torch.equal(*pair) for pair in zip(layers, before, strict=True))


def test_a_staging_that_cannot_let_go_of_the_arena_is_refused() -> None:
    layers, whole = known_content(), block(4)
    staging = refusing(layers)
    staging.detaches_refused = 1
    with pytest.raises(DeviceError, match="cuMemHostUnregister"):
        RoundTrip(layers, whole, whole.shard(0, 1))(staging)


def test_the_next_staging_repairs_what_one_before_wrote_too_late() -> None:
    layers, whole = known_content(), block(4)
    before = [layer.clone() for layer in layers]
    swapped = page_layout([layers[1], layers[0], layers[2]], whole)
    proof = RoundTrip(layers, whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="layer 0"):
        proof(refusing(layers, swapped))
    layers[2][-1].zero_()
    proof(refusing(layers))
    assert all(torch.equal(*pair) for pair in zip(layers, before, strict=True))


def test_separate_allocations_are_refused() -> None:
    layers = [torch.zeros(PAGES, 4, TOKENS, 2 * HEAD_DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
    with pytest.raises(LayoutError, match="separate allocations"):
        page_layout(layers, block(4))


def test_a_cache_too_small_for_one_block_is_refused() -> None:
    whole = block(4, pages_per_block=PAGES + 1)
    layers = cache(KVCacheLayout.LBHNC, 4)
    staging = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="one block alone needs"):
        RoundTrip(layers, whole, whole.shard(0, 1))(staging)


def config(
    dtype: torch.dtype, head_dim: int, page_tokens: int, cache_dtype: str = "auto"
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """What vLLM's configuration and its cache's say of such pages."""
    model = SimpleNamespace(dtype=dtype, use_mla=False)
    stored = dtype if cache_dtype == "auto" else torch.uint8
    vllm_config = SimpleNamespace(model_config=model, cache_config=SimpleNamespace(cache_dtype=cache_dtype))
    return vllm_config, SimpleNamespace(block_size=page_tokens, head_size=head_dim, dtype=stored)


def packed_by(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have vLLM choose this instruction set; its writer needs none of it."""
    monkeypatch.setattr("vllm.v1.attention.backends.cpu_attn._get_attn_isa", lambda *_: isa)


def writer(vllm_config: SimpleNamespace, layers: list[torch.Tensor], isa: str):
    """Writes tokens by vLLM's own layers."""
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    layer.impl = object.__new__(CPUAttentionBackendImpl)
    layer.impl.attn_type, layer.impl.kv_cache_dtype = "decoder", "auto"
    names = [f"layers.{index}" for index in range(len(layers))]
    vllm_config.compilation_config = SimpleNamespace(static_forward_context=dict.fromkeys(names, layer))
    return token_writer(vllm_config, names, layers)  # type: ignore[arg-type]


PACKED = [
    *itertools.product(["vec"], (torch.float32, torch.bfloat16, torch.float16), (32, 64, 128), (64, 128)),
    *itertools.product(["vec16"], (torch.float32, torch.bfloat16), (16, 32, 128), (64, 80, 128)),
    *itertools.product(["amx"], (torch.bfloat16, torch.float16), (32, 64, 128), (64, 80, 128)),
]


@pytest.mark.parametrize(("isa", "dtype", "page_tokens", "head_dim"), PACKED)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_vllms_own_op_writes_becomes_plain_and_comes_back(
    isa: str,
    dtype: torch.dtype,
    page_tokens: int,
    head_dim: int,
    tp_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed_by(isa, monkeypatch)
    vllm_config, spec = config(dtype, head_dim, page_tokens)
    order = page_order(vllm_config, spec)
    is_vec = isa != "amx" or head_dim % 32
    assert order.encoding == "plain"
    assert order.packing == known_packings(page_tokens, head_dim)["vec" if is_vec else "amx"]
    whole = BlockLayout(
        num_layers=2, num_kv_heads=4, block_tokens=2 * page_tokens, head_dim=head_dim, itemsize=dtype.itemsize
    )
    shard = whole.shard(tp_size - 1, tp_size)
    logical = (2, 5, shard.num_heads, page_tokens, 2 * head_dim)
    layers = list(torch.zeros(logical, dtype=dtype).unbind(0))
    staging = HostStaging(pages_array(layers[0]), page_layout(layers, whole, order), whole, shard)
    write = writer(vllm_config, layers, isa)
    proof = RoundTrip(layers, whole, shard, write)
    proof(staging)
    assert not any(layer.any() for layer in layers), "the self-test leaves the cache as it was"
    for wrong in ("vec", "amx", "bfmmla"):
        packing = known_packings(page_tokens, head_dim).get(wrong)
        if packing not in (None, order.packing):
            other = page_layout(layers, whole, PageOrder("plain", "other", packing))
            with pytest.raises(LayoutError, match="layer 0 lies in a block in an order"):
                proof(HostStaging(pages_array(layers[0]), other, whole, shard))


def test_pages_of_two_instruction_sets_and_sizes_make_the_same_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=128, head_dim=64, itemsize=2)
    content = torch.randn(1, 2, 128, 128).to(torch.bfloat16)
    arena, orders = np.zeros((4, whole.slot_bytes), np.uint8), set()
    cases = [("vec16", 16), ("vec", 128), ("amx", 32), ("amx", 128)]
    for slot, (isa, page_tokens) in enumerate(cases):
        packed_by(isa, monkeypatch)
        vllm_config, spec = config(torch.bfloat16, 64, page_tokens)
        order = page_order(vllm_config, spec)
        orders.add(order.order)
        count = 128 // page_tokens
        layers = [torch.zeros(count, 2, page_tokens, 128, dtype=torch.bfloat16)]
        tokens = content.reshape(2, count, page_tokens, 128).permute(1, 0, 2, 3).contiguous()
        writer(vllm_config, layers, isa)(0, 0, tokens.view(torch.uint8))
        staging = HostStaging(
            pages_array(layers[0]), page_layout(layers, whole, order), whole, whole.shard(0, 1)
        )
        staging.gather(np.arange(count, dtype=np.int32)[np.newaxis], np.array([slot]), arena)
        assert np.array_equal(arena[slot, : whole.payload_bytes], content.view(torch.uint8).numpy().ravel())
    assert len(orders) == len(cases), "handed over as they are, none of them fits another"


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2"])
def test_quantised_pages_stay_opaque_by_order_and_size(
    cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for isa, page_tokens in (("vec", 32), ("vec", 64), ("amx", 32)):
        packed_by(isa, monkeypatch)
        found.append(page_order(*config(torch.bfloat16, 64, page_tokens, cache_dtype)))
    assert all(order.packing is None and order.encoding.startswith("vllm-cpu-") for order in found)
    assert len({order.encoding for order in found}) == len({order.order for order in found}) == 3


def test_an_op_that_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_by("nonsense", monkeypatch)
    with pytest.raises(LayoutError, match="does not tell how it packs"):
        page_order(*config(torch.bfloat16, 64, 32))


def test_this_machines_pages_are_known() -> None:
    for dtype, page_tokens in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (16, 32, 128)
    ):
        order = page_order(*config(dtype, 64, page_tokens))
        assert order.encoding == "plain"
        assert order.packing is not None


def test_layers_that_something_else_writes_are_refused() -> None:
    vllm_config, _ = config(torch.bfloat16, 64, 32)
    vllm_config.compilation_config = SimpleNamespace(
        static_forward_context={"a": SimpleNamespace(impl=object())}
    )
    with pytest.raises(LayoutError, match="layer a are written by object"):
        token_writer(vllm_config, ["a"], [])  # type: ignore[arg-type]
