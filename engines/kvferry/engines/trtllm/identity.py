"""Who the model is: the identity under which TensorRT-LLM's blocks are keyed.

From the engine's arguments and the checkpoint's files, in the words of ``engines.identity``; so an engine of vLLM
that runs the same checkpoint in the same way has the same blocks. Two kinds of blocks are TensorRT-LLM's own: KV with
scales, and latent attention's, whose order inside a latent each engine chooses.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvferry.connector.config import Config
from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import ModelIdentity
from kvferry.connector.layout import BlockLayout
from kvferry.engines.identity import (
    adapter_identity,
    checkpoint_name,
    checkpoint_revision,
    quantisation,
    rope_json,
)
from kvferry.engines.trtllm.geometry import (
    checkpoint_config,
    checkpoint_folder,
    compute_dtype,
    quantised,
    text_config,
)

__all__ = ["adapters", "model_identity"]

_ENGINE = "tensorrt-llm"
_LATENT_ENCODING = "tensorrt-llm-mla"


def model_identity(llm_args: object, layout: BlockLayout, config: Config) -> ModelIdentity:
    """Return the identity of the model that this engine runs.

    Args:
        llm_args: The engine's arguments.
        layout: The model's canonical block.
        config: kvferry's configuration.

    Raises:
        LayoutError: The checkpoint is not on this machine.
    """
    folder = checkpoint_folder(llm_args)
    checkpoint = checkpoint_config(folder)
    given = str(getattr(llm_args, "model", ""))
    return ModelIdentity(
        model=config.model or (checkpoint_name(Path(given)) if Path(given).exists() else given),
        revision=config.revision or _revision(llm_args, folder),
        kv_dtype=layout.dtype,
        quantisation=quantisation(
            _ENGINE,
            checkpoint.get("quantization_config") or checkpoint_config(folder, "hf_quant_config.json"),
            quantised(llm_args, "quant_algo"),
            compute_dtype(llm_args, checkpoint),
            layout.dtype,
            layout.dtype,
        ),
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        kv_factor=layout.kv_factor,
        rope=rope_json(text_config(checkpoint), _ENGINE, _max_tokens(llm_args)),
        block_tokens=layout.block_tokens,
        page_encoding="plain" if layout.kv_factor == 2 else _LATENT_ENCODING,
    )


def adapters(config: Config) -> Mapping[int, str]:
    """Return the identity of each configured LoRA adapter, by the number that requests give.

    Raises:
        ConfigError: An adapter's files cannot be read.
    """
    try:
        return {
            int(number): adapter_identity(adapter.name, adapter.path)
            for number, adapter in config.trtllm.adapters.items()
        }
    except OSError as error:
        raise ConfigError("trtllm.adapters", f"cannot read {error.filename}: {error.strerror}") from error


def _revision(llm_args: object, folder: Path) -> str:
    """Return which weights these are. Invented ones are nobody else's."""
    load_format: Any = getattr(llm_args, "load_format", None)
    if "dummy" in str(getattr(load_format, "name", load_format)).lower():
        return f"dummy weights {secrets.token_hex(16)}"
    return checkpoint_revision(folder)


def _max_tokens(llm_args: object) -> int | None:
    longest = getattr(llm_args, "max_seq_len", None)
    return longest if isinstance(longest, int) else None
