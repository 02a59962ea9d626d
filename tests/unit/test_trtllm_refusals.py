"""Which engines of TensorRT-LLM run without kvferry, each for a reason of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.engines.trtllm.refusals import cautions, unservable

CONFIG = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "max_position_embeddings": 4096,
}


def engine(folder: Path, config: dict[str, object] | None = None, **changes: Any) -> SimpleNamespace:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    cache = {"dtype": "auto", "tokens_per_block": 32, "enable_block_reuse": True, **changes.pop("cache", {})}
    facts = {"model": str(folder), "kv_cache_config": SimpleNamespace(**cache), **changes}
    return SimpleNamespace(**facts)


def test_an_ordinary_engine_is_served(tmp_path: Path) -> None:
    usual = {
        "backend": "pytorch",
        "max_beam_width": 1,
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "enable_attention_dp": False,
        "speculative_config": None,
        "attn_backend": "TRTLLM",
        "max_seq_len": 4096,
        "cache": {"host_cache_size": 0, "max_attention_window": [4096]},
    }
    assert unservable(engine(tmp_path, **usual)) == ""


def test_an_engine_that_says_little_is_served(tmp_path: Path) -> None:
    engine(tmp_path)
    assert unservable(SimpleNamespace(model=str(tmp_path))) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "_autodeploy"}, "_autodeploy"),
        ({"max_beam_width": 4}, "beam search"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"context_parallel_size": 2}, "context"),
        ({"enable_attention_dp": True}, "data parallelism"),
        ({"speculative_config": object()}, "speculative"),
        ({"sparse_attention_config": object()}, "sparse"),
        ({"model_kwargs": {"num_hidden_layers": 2}}, "model_kwargs"),
        ({"attn_backend": "FLASHINFER"}, "attn_backend"),
        ({"quant_config": SimpleNamespace(kv_cache_quant_algo="NVFP4")}, "NVFP4"),
        ({"cache": {"dtype": "nvfp4"}}, "NVFP4"),
        ({"cache": {"dtype": "fp4"}}, "fp4"),
        ({"cache": {"enable_block_reuse": False}}, "enable_block_reuse"),
        ({"cache": {"host_cache_size": 1}}, "host_cache_size"),
        ({"cache": {"disk_cache_size": 1}}, "disk_cache_size"),
        ({"cache": {"sink_token_length": 4}}, "sink_token_length"),
        ({"cache": {"max_attention_window": [4096]}}, "max_attention_window"),
        ({"cache": {"max_attention_window": [512, 4096]}, "max_seq_len": 4096}, "max_attention_window"),
    ],
)
def test_what_an_engine_does_may_be_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in unservable(engine(tmp_path, **changes))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"hybrid_override_pattern": "M-M*"}, "Mamba"),
        ({"state_size": 16}, "Mamba"),
        ({"full_attention_interval": 4}, "Mamba"),
        ({"index_topk": 2048}, "index_topk"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 1024}, "window"),
        ({"sliding_window": 1024, "max_position_embeddings": None}, "window"),
        ({"text_config": {**CONFIG, "sliding_window": 1024}}, "window"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_a_model_is_may_be_refused(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    assert reason in unservable(engine(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": None},
        {"sliding_window": 1024, "use_sliding_window": False},
        {"sliding_window": 4096},
        {"sliding_window": 1024, "layer_types": ["full_attention"] * 3},
        {"attention_chunk_size": None},
    ],
)
def test_a_window_that_is_not_used_does_not_matter(tmp_path: Path, config: dict[str, object]) -> None:
    assert unservable(engine(tmp_path, config)) == ""


def test_a_checkpoint_that_is_not_there_is_a_reason(tmp_path: Path) -> None:
    assert "config.json" in unservable(SimpleNamespace(model=str(tmp_path / "nowhere")))


def test_partial_reuse_is_warned_of(tmp_path: Path) -> None:
    assert cautions(engine(tmp_path)) == []
    (caution,) = cautions(engine(tmp_path, cache={"enable_partial_reuse": True}))
    assert "enable_partial_reuse" in caution
