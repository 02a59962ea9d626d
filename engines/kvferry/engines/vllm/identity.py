"""Who the model is: the identity under which vLLM's blocks are keyed.

Two engines share blocks only when everything here agrees. Where a difference cannot be ruled out
cheaply the identity is made different: that costs a miss, the other mistake costs a wrong answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from kvferry.connector.config import Config
from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import ModelIdentity
from kvferry.connector.layout import BlockLayout
from kvferry.engines.vllm.geometry import attention_spec
from kvferry.engines.vllm.packing import page_order

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["adapter_identity", "model_identity", "weights_digest"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_WHOLE_BYTES = 256 << 20
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_ROPE_KEYS = ("rope", "partial_rotary", "max_position", "sliding_window", "layer_types", "rms_norm_eps")


def model_identity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layout: BlockLayout, config: Config
) -> ModelIdentity:
    """Return the identity of the model that this engine runs.

    Raises:
        ConfigError: The revision of the weights cannot be determined and none is configured.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    spec = attention_spec(kv_cache_config)
    local = Path(model.model)
    text_config = model.hf_text_config.to_dict()
    rope = {key: value for key, value in text_config.items() if key.startswith(_ROPE_KEYS)}
    quantisation = f"weights={model.quantization} compute={model.dtype} cache={cache.cache_dtype}"
    return ModelIdentity(
        model=config.model or (local.name if local.exists() else model.model),
        revision=config.revision or _revision(vllm_config, model, local),
        kv_dtype=str(spec.dtype).removeprefix("torch."),
        quantisation=quantisation,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        kv_factor=layout.kv_factor,
        rope=json.dumps(rope, sort_keys=True, default=str),
        block_tokens=layout.block_tokens,
        page_encoding=page_order(vllm_config, spec).encoding,
    )


def _revision(vllm_config: VllmConfig, model: ModelConfig, local: Path) -> str:
    load_format = str(vllm_config.load_config.load_format)
    if "dummy" in load_format:
        return f"dummy weights, seed {model.seed}"
    overrides = f" with overrides {model.hf_overrides}" if model.hf_overrides else ""
    if callable(model.hf_overrides):
        raise ConfigError("revision", "hf_overrides is a function, which has no name", "set revision")
    if local.exists():
        return weights_digest(local) + overrides
    revision = getattr(model.hf_config, "_commit_hash", None) or model.revision
    if not revision:
        raise ConfigError(
            "revision",
            f"the revision of {model.model!r} is unknown, so its blocks cannot be told from other weights'",
            "set revision in kv_connector_extra_config, or start vLLM with --revision",
        )
    return f"{revision}{overrides}"


def weights_digest(path: Path) -> str:
    """Return a digest of a local checkpoint: configuration and weights.

    Files up to 256 MiB are read whole. Of larger ones, size, modification time and 256 evenly spaced
    samples count: cheap at start-up, and at worst two equal copies do not share blocks until the
    operator configures a ``revision``.

    Args:
        path: A checkpoint directory or a single weights file.
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    hasher = blake3(b"kvferry weights 1")
    for file in files:
        if file == path or file.name == "config.json" or file.suffix in _WEIGHTS:
            _hash_file(hasher, file)
    return hasher.hexdigest()


def adapter_identity(name: str, path: str) -> str:
    """Return the identity of a LoRA adapter: its name and a digest of its files."""
    local = Path(path)
    digest = weights_digest(local) if local.exists() else path
    return f"{name}\0{digest}"


def _hash_file(hasher: blake3, file: Path) -> None:
    status = file.stat()
    hasher.update(f"\0{file.name}\0{status.st_size}\0".encode())
    with file.open("rb") as stream:
        if status.st_size <= _WHOLE_BYTES:
            while chunk := stream.read(4 << 20):
                hasher.update(chunk)
            return
        hasher.update(str(status.st_mtime_ns).encode())
        for index in range(_SAMPLES):
            stream.seek(index * (status.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            hasher.update(stream.read(_SAMPLE_BYTES))
