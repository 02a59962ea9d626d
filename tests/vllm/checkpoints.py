"""Small checkpoints for tests on the real engine.

vLLM's ``load_format="dummy"`` fills weights with values so small that the output hardly depends on the KV cache:
a test on it passes whatever bytes were loaded. These checkpoints have weights of a trained model's scale, and
attention so peaked that single tokens matter.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ATTENTION_GAIN = 2.0
"""Widens Q and K: scores then spread by about 4, and a handful of tokens get most of the weight."""

LOGIT_GAIN = 3.0
"""Widens the logits, so that the first token leads the second by more than rounding."""


def tiny_llama(
    directory: Path,
    *,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 512,
    context: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a random Llama checkpoint without a tokenizer and return its directory.

    Use it with ``skip_tokenizer_init=True`` and prompts given as token ids. The same arguments give the same
    bytes. With the defaults it has 3.5 million parameters (14 MB in float32), KV of 4 KiB a token in
    float32, and can be split over two ranks.

    Args:
        directory: Made if absent.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Query heads; a multiple of ``kv_heads``.
        kv_heads: Key and value heads; a multiple of the tensor-parallel size.
        head_dim: Of queries, keys and values.
        vocab: Token ids run from 0 to ``vocab - 1``.
        context: The longest sequence.
        seed: Of the weights.
    """
    rng = np.random.default_rng(seed)
    inner = 3 * hidden

    def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": rng.standard_normal((vocab, hidden)).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": linear(vocab, hidden, LOGIT_GAIN),
    }
    for layer in range(layers):
        parts = {
            "input_layernorm": np.ones(hidden, np.float32),
            "self_attn.q_proj": linear(heads * head_dim, hidden, ATTENTION_GAIN),
            "self_attn.k_proj": linear(kv_heads * head_dim, hidden, ATTENTION_GAIN),
            "self_attn.v_proj": linear(kv_heads * head_dim, hidden),
            "self_attn.o_proj": linear(hidden, heads * head_dim),
            "post_attention_layernorm": np.ones(hidden, np.float32),
            "mlp.gate_proj": linear(inner, hidden),
            "mlp.up_proj": linear(inner, hidden),
            "mlp.down_proj": linear(hidden, inner),
        }
        weights.update({f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()})

    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def lora_adapter(
    directory: Path, *, layers: int = 4, hidden: int = 256, inner: int = 256, rank: int = 8, seed: int = 0
) -> Path:
    """Write a random LoRA adapter for ``tiny_llama`` and return its directory.

    Args:
        directory: Made if absent.
        layers: Decoder layers of the model.
        hidden: Width of the model's residual stream.
        inner: Width of all its query heads together.
        rank: Of the update.
        seed: Of the weights.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = rng.standard_normal((rank, hidden)).astype(np.float32)
        weights[f"{name}.lora_B.weight"] = rng.standard_normal((inner, rank)).astype(np.float32) / 50
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
