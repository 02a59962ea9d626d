"""TensorRT-LLM's pages in kvferry's terms: what follows from a checkpoint, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_device import PlayedDevice
from staging_kit import finish, follow

from kvferry.connector.arena import Arena
from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import HostStaging, Staging
from kvferry.cuda import choice
from kvferry.cuda.staging import DeviceStaging
from kvferry.engines.roundtrip import RoundTrip
from kvferry.engines.trtllm.geometry import block_layout, cache_layout, checkpoint_folder, pool_layout
from kvferry.engines.trtllm.pages import RankPages, cache_pages, pool_pages

TOKENS, PAGES = 32, 6
BLOCK = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=64, head_dim=16, itemsize=2, dtype="bfloat16")
MLA = BlockLayout(num_layers=3, num_kv_heads=1, block_tokens=64, head_dim=24, kv_factor=1, itemsize=2)
CONFIG = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "torch_dtype": "bfloat16",
}


class Pool:
    """As much of a tensor as a layout is taken from, over numpy."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.shape = array.shape

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def checkpoint(folder: Path, files: dict[str, object] | None = None, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def args(folder: Path, dtype: str = "auto", tokens: int | None = TOKENS) -> SimpleNamespace:
    return SimpleNamespace(
        model=str(folder), kv_cache_config=SimpleNamespace(dtype=dtype, tokens_per_block=tokens)
    )


def test_a_block_follows_from_the_checkpoint(tmp_path: Path) -> None:
    assert block_layout(args(checkpoint(tmp_path)), 0) == BLOCK


def test_the_text_model_of_a_multimodal_checkpoint_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CONFIG, "num_hidden_layers": 99}))
    assert block_layout(args(tmp_path), 0) == BLOCK


@pytest.mark.parametrize(
    ("dtype", "fits"),
    [
        ("torch.bfloat16", True),
        ("DataType.BF16", True),
        ("torch.float16", False),
        ("DataType.HALF", False),
        ("torch.uint8", True),
        (None, True),
    ],
)
def test_pages_of_another_type_of_the_same_size_are_refused(dtype: str | None, fits: bool) -> None:
    pool = Pool(np.zeros((PAGES, 3, 2, 4 * TOKENS * 16), np.uint16))
    pool.dtype = dtype  # type: ignore[attr-defined]
    if fits:
        assert pool_layout(pool, BLOCK, BLOCK.shard(0, 1), TOKENS).num_pages == PAGES
        return
    with pytest.raises(LayoutError, match="float16"):
        pool_layout(pool, BLOCK, BLOCK.shard(0, 1), TOKENS)
    described = SimpleNamespace(groups=[object()], tokens_per_block=TOKENS, dtype=dtype)
    with pytest.raises(LayoutError, match="float16"):
        cache_layout(described, BLOCK, BLOCK.shard(0, 1), TOKENS)


def test_latent_attention_has_one_head_and_no_v(tmp_path: Path) -> None:
    checkpoint(tmp_path, kv_lora_rank=16, qk_rope_head_dim=8)
    made = block_layout(args(tmp_path), 0)
    assert (made.num_kv_heads, made.head_dim, made.kv_factor) == (1, 24, 1)


@pytest.mark.parametrize(
    ("wanted", "files", "itemsize", "dtype"),
    [
        ("auto", {}, 2, "bfloat16"),
        ("fp8", {}, 1, "float8_e4m3fn"),
        (
            "auto",
            {"hf_quant_config.json": {"quantization": {"kv_cache_quant_algo": "FP8"}}},
            1,
            "float8_e4m3fn",
        ),
        ("float16", {"hf_quant_config.json": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, 2, "float16"),
    ],
)
def test_what_is_configured_decides_the_dtype_then_the_quantisation(
    tmp_path: Path, wanted: str, files: dict[str, object], itemsize: int, dtype: str
) -> None:
    made = block_layout(args(checkpoint(tmp_path, files), wanted), 0)
    assert (made.itemsize, made.dtype) == (itemsize, dtype)


def test_without_tokens_per_block_a_page_has_32(tmp_path: Path) -> None:
    assert block_layout(args(checkpoint(tmp_path), tokens=None), 96).block_tokens == 96


@pytest.mark.parametrize(
    ("changes", "dtype", "block_tokens", "said"),
    [
        ({}, "auto", 48, "not a multiple of TensorRT-LLM's tokens_per_block 32"),
        ({}, "nvfp4", 0, "a KV cache of nvfp4"),
        ({"num_hidden_layers": None}, "auto", 0, "num_hidden_layers None"),
        ({"num_attention_heads": -1}, "auto", 0, "num_attention_heads -1"),
    ],
)
def test_what_cannot_be_known_is_refused(
    tmp_path: Path, changes: dict[str, object], dtype: str, block_tokens: int, said: str
) -> None:
    with pytest.raises(LayoutError, match=said):
        block_layout(args(checkpoint(tmp_path, **changes), dtype), block_tokens)


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LayoutError, match=r"config\.json is no"):
        block_layout(args(tmp_path), 0)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no checkpoint"):
        checkpoint_folder(args(tmp_path / "nowhere"))


def test_a_path_that_the_hub_takes_for_no_name_is_refused_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, file: str, revision: str | None) -> None:
        raise ValueError(f"{name} is no repository's name")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(try_to_load_from_cache=refuse))
    with pytest.raises(LayoutError, match="no checkpoint"):
        checkpoint_folder(args(tmp_path / "nowhere"))


@pytest.mark.parametrize(("block", "tp_size"), [(BLOCK, 1), (BLOCK, 2), (BLOCK, 8), (MLA, 4)])
def test_every_vector_of_a_pool_is_where_it_is_said_to_be(block: BlockLayout, tp_size: int) -> None:
    shard = block.shard(tp_size - 1, tp_size)
    inside = (block.num_layers, block.kv_factor, shard.num_heads * TOKENS * block.head_dim)
    array = np.arange(PAGES * np.prod(inside), dtype=np.uint32).astype(np.uint16).reshape(PAGES, *inside)
    layout = pool_layout(Pool(array), block, shard, TOKENS)
    assert layout.extent_bytes() == array.nbytes
    seen = array.view(np.uint8).ravel()
    logical = array.reshape(*array.shape[:3], shard.num_heads, TOKENS, block.head_dim)
    for page, layer, kv, head, token in np.ndindex(logical.shape[:-1]):
        at = layout.layer_offsets[layer] + page * layout.page_stride + kv * layout.kv_stride
        at += head * layout.head_stride + token * layout.token_stride
        assert seen[at : at + layout.head_bytes].tobytes() == logical[page, layer, kv, head, token].tobytes()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((PAGES, 3, 2), np.uint16),
        ((PAGES, 2, 2, 4 * TOKENS * 16), np.uint16),
        ((PAGES, 3, 1, 4 * TOKENS * 16), np.uint16),
        ((PAGES, 3, 2, 4 * TOKENS * 8), np.uint16),
        ((PAGES, 3, 2, 4 * TOKENS * 16), np.uint8),
    ],
)
def test_a_pool_of_another_shape_is_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(LayoutError, match="the KV cache pool has"):
        pool_layout(Pool(np.zeros(shape, dtype)), BLOCK, BLOCK.shard(0, 1), TOKENS)


def test_a_pool_that_is_not_dense_is_refused() -> None:
    array = np.zeros((PAGES, 3, 2, 8 * TOKENS * 16), np.uint16)[..., ::2]
    with pytest.raises(LayoutError, match="not dense"):
        pool_layout(Pool(array), BLOCK, BLOCK.shard(0, 1), TOKENS)


VECTOR = 4 * TOKENS * 16 * 2


def described(*regions: tuple[int, str], base: int = 1 << 20, stride: int | None = None) -> SimpleNamespace:
    """A layout of one group; each region is named by its layers and by the roles of each of these."""
    made = []
    for index, (first, roles) in enumerate(regions):
        buffers = [
            SimpleNamespace(
                layer_id=layer, role={"k": "key", "v": "value", "s": "key_scale"}[role], expansion=1
            )
            for layer in ([0, 1, 2] if first < 0 else [first])
            for role in roles
        ]
        size = len(buffers) * VECTOR
        made.append(
            SimpleNamespace(
                base=base + index * (1 << 16),
                size=size,
                stride=stride or size,
                num_slots=PAGES,
                buffers=buffers,
            )
        )
    group = SimpleNamespace(layer_group_id=0, layer_ids=(0, 1, 2), window_size=None, regions=tuple(made))
    return SimpleNamespace(tokens_per_block=TOKENS, groups=(group,))


def test_one_region_lies_as_a_pool() -> None:
    found = cache_layout(described((-1, "kv")), BLOCK, BLOCK.shard(0, 1), TOKENS)
    pool = Pool(np.zeros((PAGES, 3, 2, 4 * TOKENS * 16), np.uint16))
    assert found.layout == pool_layout(pool, BLOCK, BLOCK.shard(0, 1), TOKENS)
    assert found.address == 1 << 20
    assert found.regions == ((0, 0), (0, 2 * VECTOR), (0, 4 * VECTOR))


def test_a_region_for_each_layer_is_served_where_its_memory_is() -> None:
    regions = described((2, "kv"), (0, "kv"), (1, "kv"), stride=6 * VECTOR)
    found = cache_layout(regions, BLOCK, BLOCK.shard(0, 1), TOKENS)
    assert found.layout.layer_offsets == (1 << 16, 2 << 16, 0)
    assert found.layout.page_stride == 6 * VECTOR


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: setattr(made, "groups", made.groups * 2), "2 layer groups"),
        (lambda made: setattr(made, "tokens_per_block", 64), "64 tokens"),
        (lambda made: setattr(made.groups[0], "window_size", 128), "sliding window"),
        (lambda made: setattr(made.groups[0].regions[0], "size", 7), "7 bytes"),
        (lambda made: setattr(made.groups[0].regions[0], "stride", 7), "bytes of 7"),
        (lambda made: setattr(made.groups[0].regions[0].buffers[0], "expansion", 2), "several pieces"),
        (lambda made: setattr(made.groups[0].regions[0].buffers[0], "role", "value"), "several pieces"),
        (lambda made: setattr(made.groups[0].regions[0].buffers[0], "role", "index"), "by the checkpoint"),
        (lambda made: setattr(made.groups[0], "regions", ()), "differ"),
    ],
)
def test_other_regions_are_refused(change: Any, said: str) -> None:
    made = described((-1, "kv"))
    change(made)
    with pytest.raises(LayoutError, match=said):
        cache_layout(made, BLOCK, BLOCK.shard(0, 1), TOKENS)


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ([(-1, "kvs")], "by the checkpoint"),
        ([(0, "vk"), (1, "kv"), (2, "kv")], "one behind the other"),
        ([(-1, "k"), (-1, "v")], "one behind the other"),
        ([(0, "kv"), (1, "kv")], "by the checkpoint"),
    ],
)
def test_other_contents_are_refused(regions: list[tuple[int, str]], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        cache_layout(described(*regions), BLOCK, BLOCK.shard(0, 1), TOKENS)


@pytest.mark.parametrize("block", [BLOCK, MLA])
@pytest.mark.parametrize("path", ["kernel", "batch", "copies"])
def test_a_pool_on_a_gpu_is_staged_by_it_as_one_on_the_host(
    monkeypatch: pytest.MonkeyPatch, block: BlockLayout, path: Any
) -> None:
    device = PlayedDevice()
    device.activate()
    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(current_stream=lambda _: SimpleNamespace(cuda_stream=1))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(choice, "open_device", lambda _: device)
    monkeypatch.setattr(choice, "kept_kernels", lambda _: b"cubin")
    shard = block.shard(1, 2)
    shape = (PAGES, 3, block.kv_factor, shard.num_heads * TOKENS * block.head_dim)
    held, memory = device.memory(int(np.prod(shape)) * 2)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size)
    layout = pool_layout(Pool(memory.view(np.uint16).reshape(shape)), block, shard, TOKENS)
    layers = [SimpleNamespace(device=SimpleNamespace(type="cuda", index=0))]
    proved: list[Staging] = []
    rank_pages = RankPages(held.address, layout, layers)  # type: ignore[arg-type]
    on_gpu = rank_pages.staging(block, shard, CudaConfig(path=path), proved.append)  # type: ignore[arg-type]
    assert proved == [on_gpu]
    assert isinstance(on_gpu, DeviceStaging)
    arenas = [Arena.create(2, block.slot_bytes) for _ in range(2)]
    batch = np.array([[5, 1], [-1, 3]], np.int32), np.array([1, 0])
    for staging, arena in zip((on_gpu, HostStaging(memory, layout, block, shard)), arenas, strict=True):
        follow(staging)
        staging.gathers.copy(*batch, arena.slots_array)
        finish(staging)
        staging.detach(arena.slots_array)
    assert arenas[0].slots_array.any()
    assert np.array_equal(arenas[0].slots_array, arenas[1].slots_array)
    on_gpu.close()
    for arena in arenas:
        arena.close()


@pytest.mark.parametrize("stride", [None, 8 * VECTOR])
def test_torchs_views_of_pages_are_where_the_layout_says(stride: int | None) -> None:
    torch = pytest.importorskip("torch")
    shard = BLOCK.shard(1, 2)
    vector = VECTOR // 2
    pool = torch.randint(0, 99, (PAGES, 3, 2, vector // 2)).to(torch.bfloat16)
    step = stride // 2 if stride else 6 * vector
    memory = torch.zeros(PAGES * step, dtype=torch.uint8)
    buffers = [
        SimpleNamespace(layer_id=layer, role=role, expansion=1)
        for layer in range(3)
        for role in ("key", "value")
    ]
    region = SimpleNamespace(
        base=memory.data_ptr(), size=6 * vector, stride=step, num_slots=PAGES, buffers=buffers,
        as_tensor=lambda: memory.as_strided((PAGES, 6 * vector), (step, 1)),
    )  # fmt: skip
    group = SimpleNamespace(layer_group_id=0, layer_ids=(0, 1, 2), window_size=None, regions=(region,))
    layout = SimpleNamespace(tokens_per_block=TOKENS, groups=(group,))
    for pages in (pool_pages(pool, BLOCK, shard, TOKENS), cache_pages(layout, BLOCK, shard, TOKENS)):
        before = [layer.clone() for layer in pages.layers]
        staging = pages.staging(BLOCK, shard, CudaConfig(), RoundTrip(pages.layers, BLOCK, shard))
        assert all(torch.equal(layer, kept) for layer, kept in zip(pages.layers, before, strict=True))
        arena = Arena.create(1, BLOCK.slot_bytes)
        staging.gathers.copy(np.array([[0, 5]], np.int32), np.array([0]), arena.slots_array)
        arena.close()
        wrong = [layer.flip(3) for layer in pages.layers]
        with pytest.raises(LayoutError, match="layer 0"):
            pages.staging(BLOCK, shard, CudaConfig(), RoundTrip(wrong, BLOCK, shard))
