"""Who a model is, in words that every engine's adapter uses alike.

Two engines share blocks only when every field of their ``ModelIdentity`` agrees. So one fact has one spelling here,
whatever the engine, its release or its transformers call it: the rotary embedding in canonical form, how weights and
KV are quantised, which weights they are, which adapter. Where two engines may compute differently from the same
checkpoint the engine's name goes into the identity: that costs a miss, the other mistake costs a wrong answer.

Functions of plain values and files; no engine is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

__all__ = [
    "adapter_identity",
    "checkpoint_name",
    "checkpoint_revision",
    "overridden",
    "quantisation",
    "rope_json",
    "weights_digest",
]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_WHOLE_BYTES = 256 << 20
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = ("bfloat16", "float16", "float32")
"""Elements of a KV cache that need no scale."""

_POSITION_KEYS = ("rope", "partial_rotary", "max_position", "sliding_window", "layer_types", "rms_norm_eps")
"""How the keys begin, of a checkpoint's configuration, that say how positions enter a token's KV."""
_PARAMETERS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Stand beside the rotary embedding's own parameters, or among them."""
_USUAL = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
_KINDS = {"su": "longrope", "mrope": "default", "deepseek_yarn": "yarn"}
"""Other names of a kind of rotary embedding. ``mrope`` is told by its sections."""
_ALIKE = ("default", "linear", "llama3")
"""Kinds that every engine computes alike from the same parameters."""
_OF_ANY_LENGTH = (*_ALIKE, "yarn")
"""Kinds for which it does not matter how long prompts may be."""


def rope_json(text_config: Mapping[str, object], engine: str, max_tokens: int | None) -> str:
    """Return how positions enter a token's KV, as canonical JSON.

    transformers writes the same facts in several ways, and fills in what a checkpoint leaves out. So there is one name
    for each, numbers are floats, and what says nothing is left out: nulls, usual values, windows that no layer uses.

    Args:
        text_config: The language model's configuration: what ``config.json`` says, or transformers made of it.
        engine: The engine's name.
        max_tokens: Longest prompt that the engine takes, if known.
    """
    facts = {name: value for name, value in text_config.items() if name.startswith(_POSITION_KEYS)}
    layer_types = facts.get("layer_types")
    if isinstance(layer_types, list | tuple) and set(layer_types) <= {"full_attention"}:
        facts.pop("layer_types")
        facts.pop("sliding_window", None)
    if text_config.get("use_sliding_window") is False:
        facts.pop("sliding_window", None)
    beside = {name: text_config[name] for name in _PARAMETERS if text_config.get(name) is not None}
    for name in _PARAMETERS:
        facts.pop(name, None)
    given = [facts.pop(name, None) for name in ("rope_scaling", "rope_parameters")]
    parameters = {name: value for part in given if isinstance(part, Mapping) for name, value in part.items()}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        facts |= beside
        facts["rope"] = {
            kind: _rope(value, engine, max_tokens) if isinstance(value, Mapping) else value
            for kind, value in parameters.items()
        }
    else:
        facts["rope"] = _rope({**beside, **parameters}, engine, max_tokens)
    return json.dumps(_canonical(facts), sort_keys=True, default=str)


def _rope(parameters: Mapping[str, object], engine: str, max_tokens: int | None) -> dict[str, object]:
    """Return one rotary embedding's parameters, those that say something."""
    named = {name: value for name, value in parameters.items() if name not in ("rope_type", "type")}
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = _KINDS.get(kind, kind)
    said = {name: value for name, value in named.items() if value != _USUAL.get(name)}
    if kind != "default":
        said["rope_type"] = kind
    if kind not in _ALIKE:
        said["engine"] = engine
    if kind not in _OF_ANY_LENGTH:
        said["max_tokens"] = max_tokens
    return said


def _canonical(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _canonical(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def quantisation(
    engine: str,
    declared: Mapping[str, object] | None,
    method: str | None,
    compute_dtype: str,
    kv_dtype: str,
    cache_dtype: str,
) -> str:
    """Return how the weights, the computation and the KV cache are quantised.

    Args:
        engine: The engine's name.
        declared: What the checkpoint says about its weights (``quantization_config``), if anything.
        method: What the engine was asked or has decided to do with them, by its own name, if anything.
        compute_dtype: Element type of activations (``bfloat16``).
        kv_dtype: Element type of the KV cache.
        cache_dtype: The KV cache's type as the engine calls it. Scales are each engine's own affair.
    """
    of_checkpoint = _declared_method(declared)
    if of_checkpoint and (not method or method.startswith(of_checkpoint)):
        weights = f"checkpoint's {of_checkpoint}"
    else:
        weights = f"{engine}'s {method}" if method else "none"
    is_plain = kv_dtype in _PLAIN and cache_dtype in ("auto", kv_dtype)
    cache = "plain" if is_plain else f"{engine}'s {cache_dtype}"
    return f"weights={weights} compute={compute_dtype} cache={cache}"


def _declared_method(declared: Mapping[str, object] | None) -> str:
    if not declared:
        return ""
    producer = declared.get("producer")
    by_producer = producer.get("name") if isinstance(producer, Mapping) else None
    return str(declared.get("quant_method") or by_producer or "unnamed")


def checkpoint_name(path: Path) -> str:
    """Return the model's name where the operator gave a path: the hub's if it was downloaded, else the folder's."""
    folder = path.absolute()
    return _downloaded(folder)[0] or folder.name


def checkpoint_revision(path: Path) -> str:
    """Return which weights are at ``path``: the hub's commit if they were downloaded, else a digest."""
    return _downloaded(path.absolute())[1] or weights_digest(path)


def _downloaded(folder: Path) -> tuple[str, str]:
    """Return the name and commit of a folder in the hub's cache, ``models--ORG--NAME/snapshots/COMMIT``."""
    snapshots = folder.parent
    kind, *names = snapshots.parent.name.split("--")
    if kind == "models" and names and snapshots.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return "/".join(names), folder.name
    return "", ""


def overridden(revision: str, overrides: Mapping[str, object] | None) -> str:
    """Return a revision whose configuration is changed at start."""
    if not overrides:
        return revision
    return f"{revision} with overrides {json.dumps(overrides, sort_keys=True, default=str)}"


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
