"""Who the model is: the identity under which vLLM's blocks are keyed, in the words of ``engines.identity``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.connector.config import Config
from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import ModelIdentity
from kvferry.connector.layout import BlockLayout
from kvferry.engines.identity import (
    checkpoint_name,
    checkpoint_revision,
    overridden,
    quantisation,
    rope_json,
)
from kvferry.engines.vllm.geometry import attention_spec
from kvferry.engines.vllm.packing import page_order

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["model_identity"]

_ENGINE = "vllm"


def model_identity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layout: BlockLayout, config: Config
) -> ModelIdentity:
    """Return the identity of the model that this engine runs.

    Raises:
        ConfigError: The revision of the weights cannot be determined and none is configured.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    spec = attention_spec(kv_cache_config)
    kv_dtype = _dtype_name(spec.dtype)
    local = Path(model.model)
    declared = getattr(model.hf_config, "quantization_config", None)
    return ModelIdentity(
        model=config.model or (checkpoint_name(local) if local.exists() else model.model),
        revision=_revision(vllm_config, local, config.revision),
        kv_dtype=kv_dtype,
        quantisation=quantisation(
            _ENGINE,
            declared if declared is None or isinstance(declared, Mapping) else declared.to_dict(),
            str(model.quantization) if model.quantization else None,
            _dtype_name(model.dtype),
            kv_dtype,
            str(cache.cache_dtype),
        ),
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        kv_factor=layout.kv_factor,
        rope=rope_json(model.hf_text_config.to_dict(), _ENGINE, model.max_model_len),
        block_tokens=layout.block_tokens,
        page_encoding=page_order(vllm_config, spec).encoding,
    )


def _revision(vllm_config: VllmConfig, local: Path, configured: str) -> str:
    model = vllm_config.model_config
    if callable(model.hf_overrides):
        if configured:
            return configured
        raise ConfigError("revision", "hf_overrides is a function, which has no name", "set revision")
    return overridden(configured or _weights_revision(vllm_config, model, local), model.hf_overrides)


def _weights_revision(vllm_config: VllmConfig, model: ModelConfig, local: Path) -> str:
    if "dummy" in str(vllm_config.load_config.load_format):
        return f"dummy weights, seed {model.seed}"
    if local.exists():
        return checkpoint_revision(local)
    revision = getattr(model.hf_config, "_commit_hash", None) or model.revision
    if not revision:
        raise ConfigError(
            "revision",
            f"the revision of {model.model!r} is unknown, so its blocks cannot be told from other weights'",
            "set revision in kv_connector_extra_config, or start vLLM with --revision",
        )
    return str(revision)


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
