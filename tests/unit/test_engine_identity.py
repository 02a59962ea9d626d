"""One checkpoint has one identity, whichever engine runs it; and what computes differently has another."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.connector.config import Config, TrtllmAdapterConfig, TrtllmConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import ModelIdentity, Scope, root_key
from kvferry.engines.identity import checkpoint_name, checkpoint_revision, quantisation, rope_json
from kvferry.engines.trtllm import identity as trtllm
from kvferry.engines.trtllm.geometry import block_layout
from kvferry.engines.vllm import identity as vllm
from kvferry.engines.vllm.packing import PLAIN

RAW: dict[str, object] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "rope_scaling": None,
    "sliding_window": None,
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HfConfig(SimpleNamespace):
    """A configuration of transformers."""

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


def checkpoint(folder: Path, config: dict[str, object] | None = None, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**RAW, **(config or {})}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def filled_in(config: dict[str, Any], **changes: object) -> HfConfig:
    """What transformers 5 makes of a ``config.json``."""
    new = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    rope = dict(config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope["rope_theta"] = float(config.get("rope_theta", 10000.0))
    more = {"rope_parameters": rope, "layer_types": ["full_attention"] * 2, "attention_bias": False}
    return HfConfig(**{**new, **more, **changes})


def of_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: Config | None = None, **changes: Any
) -> ModelIdentity:
    config = config or Config()
    raw = json.loads((folder / "config.json").read_text())
    hf_config = changes.pop("hf_config", None) or filled_in(raw)
    facts = {
        "model": str(folder),
        "hf_config": hf_config,
        "hf_text_config": hf_config,
        "hf_overrides": {},
        "dtype": "torch.bfloat16",
        "quantization": None,
        "max_model_len": 4096,
        "seed": 0,
        "revision": None,
    }
    engine = SimpleNamespace(
        model_config=SimpleNamespace(**{**facts, **changes}),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        load_config=SimpleNamespace(load_format=changes.get("load_format", "auto")),
    )
    dtype = changes.get("kv_dtype", "torch.bfloat16")
    spec = SimpleNamespace(dtype=dtype)
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    monkeypatch.setattr(vllm, "page_order", lambda *_: PLAIN)  # vLLM is asked for its platform
    layout = block_layout(SimpleNamespace(model=str(folder)), config.block_tokens)
    return vllm.model_identity(engine, cache, layout, config)  # type: ignore[arg-type]


def of_trtllm(folder: Path, config: Config | None = None, **changes: Any) -> ModelIdentity:
    config = config or Config()
    args = SimpleNamespace(**{"model": str(folder), "max_seq_len": 2048, **changes})
    return trtllm.model_identity(args, block_layout(args, config.block_tokens), config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 10000.0},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"dtype": "bfloat16", "torch_dtype": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"sliding_window": 4096, "use_sliding_window": False},
    ],
)
def test_both_engines_have_one_identity_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, object]
) -> None:
    folder = checkpoint(tmp_path / "model", config)
    method = "fp8" if "quantization_config" in config else None
    theirs = of_vllm(folder, monkeypatch, quantization=method)
    assert of_trtllm(folder) == theirs
    assert of_trtllm(folder).fingerprint() == theirs.fingerprint()


def test_an_explicit_dtype_is_the_one_that_the_checkpoint_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model")
    spelled = of_trtllm(folder, dtype="bfloat16", kv_cache_config=SimpleNamespace(dtype="bfloat16"))
    assert spelled == of_vllm(folder, monkeypatch, cache_dtype="bfloat16") == of_trtllm(folder)


def test_adapters_have_the_identity_that_requests_to_vllm_give_them(tmp_path: Path) -> None:
    from test_vllm_keys import lora, request

    from kvferry.engines.vllm.requests import RequestTranslator

    path = checkpoint(tmp_path / "adapter")
    table = {"7": TrtllmAdapterConfig(name="support", path=str(path))}
    of_config = trtllm.adapters(Config(trtllm=TrtllmConfig(adapters=table)))
    described = RequestTranslator(64, "").describe(request(lora_request=lora(path, "support")))
    assert of_config == {7: described.scope.adapter}
    other = checkpoint(tmp_path / "retrained", weights=b"others")
    table["8"] = TrtllmAdapterConfig(name="support", path=str(other))
    of_config = trtllm.adapters(Config(trtllm=TrtllmConfig(adapters=table)))
    keys = {root_key(b"f" * 32, Scope(adapter=adapter)) for adapter in ("", *of_config.values())}
    assert len(keys) == 3


def test_an_adapter_that_cannot_be_read_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "broken.bin").symlink_to(tmp_path / "nowhere")
    table = {"7": TrtllmAdapterConfig(name="support", path=str(tmp_path))}
    with pytest.raises(ConfigError, match=r"trtllm\.adapters"):
        trtllm.adapters(Config(trtllm=TrtllmConfig(adapters=table)))


def test_what_computes_differently_has_another_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "a" / "model")
    fp8 = SimpleNamespace(dtype="fp8")
    identities = [
        of_trtllm(folder),
        of_trtllm(folder, dtype="float16"),
        of_trtllm(folder, kv_cache_config=SimpleNamespace(dtype="float16")),
        of_trtllm(folder, kv_cache_config=fp8),
        of_vllm(folder, monkeypatch, cache_dtype="fp8", kv_dtype="torch.float8_e4m3fn"),
        of_trtllm(folder, quant_config=SimpleNamespace(quant_algo=SimpleNamespace(value="FP8"))),
        of_vllm(folder, monkeypatch, quantization="fp8"),
        of_trtllm(folder, Config(model="other")),
        of_trtllm(folder, Config(revision="r2")),
        of_trtllm(folder, Config(block_tokens=128)),
        of_trtllm(checkpoint(tmp_path / "b" / "model", weights=b"retrained")),
        of_vllm(folder, monkeypatch, hf_overrides={"rope_theta": 1}),
    ]
    assert len({identity.fingerprint() for identity in identities}) == len(identities)


def test_a_configured_revision_leaves_everything_else_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(revision="r1")
    folder = checkpoint(tmp_path / "a" / "model")
    slower = checkpoint(tmp_path / "b" / "model", {"rope_theta": 1000})
    identities = [
        of_trtllm(folder, config),
        of_trtllm(slower, config),
        of_vllm(folder, monkeypatch, config, hf_overrides={"rope_theta": 1}),
    ]
    assert len({identity.fingerprint() for identity in identities}) == 3


def test_latents_are_each_engines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model", {"kv_lora_rank": 16, "qk_rope_head_dim": 8})
    assert of_trtllm(folder).fingerprint() != of_vllm(folder, monkeypatch).fingerprint()


def test_invented_weights_are_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")
    dummy = {"load_format": SimpleNamespace(name="DUMMY")}
    assert of_trtllm(folder, **dummy).revision != of_trtllm(folder, **dummy).revision
    assert of_vllm(folder, monkeypatch, load_format="dummy").revision == "dummy weights, seed 0"


def test_what_was_downloaded_is_known_by_name_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "models--org--some--model" / "snapshots" / COMMIT)
    assert checkpoint_name(folder) == "org/some/model"
    assert checkpoint_revision(folder) == COMMIT
    named = of_vllm(checkpoint(tmp_path / "model"), monkeypatch, revision=COMMIT)
    assert named.revision != COMMIT
    plain = checkpoint(tmp_path / "snapshots" / COMMIT)
    assert (checkpoint_name(plain), checkpoint_revision(plain) == COMMIT) == (COMMIT, False)


def test_a_name_on_the_hub_needs_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")
    downloaded = of_vllm(folder, monkeypatch, model="org/model", revision=COMMIT)
    assert (downloaded.model, downloaded.revision) == ("org/model", COMMIT)
    with pytest.raises(ConfigError, match="revision"):
        of_vllm(folder, monkeypatch, model="org/model")
    with pytest.raises(ConfigError, match="hf_overrides"):
        of_vllm(folder, monkeypatch, hf_overrides=lambda config: config)
    named = of_vllm(folder, monkeypatch, Config(revision="r"), hf_overrides=lambda config: config)
    assert named.revision == "r"


def rope(config: dict[str, object], engine: str = "vllm", max_tokens: int | None = 4096) -> Any:
    return json.loads(rope_json(config, engine, max_tokens))


def test_what_says_nothing_is_left_out() -> None:
    assert rope({"rope_theta": 10000, "rope_scaling": None, "sliding_window": None}) == {"rope": {}}
    assert rope({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}) == {"rope": {}}
    assert rope({"partial_rotary_factor": 1.0, "hidden_size": 7}) == {"rope": {}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000, **LLAMA3}},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_theta": 1e6},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1]}, "original_max_position_embeddings": 4096},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "original_max_position_embeddings": 4096,
                    "rope_theta": 10000,
                }
            },
        ),
    ],
)
def test_both_spellings_of_transformers_are_one(old: dict[str, object], new: dict[str, object]) -> None:
    assert rope_json(old, "vllm", 1) == rope_json(new, "vllm", 1)


def test_what_changes_positions_changes_the_text() -> None:
    texts = [
        rope_json(config, "vllm", 4096)
        for config in (
            {},
            {"rope_theta": 1e6},
            {"rms_norm_eps": 1e-6},
            {"max_position_embeddings": 8192},
            {"sliding_window": 512},
            {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]},
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 2e4},
                }
            },
            {"rope_interleave": False},
        )
    ]
    assert len(set(texts)) == len(texts)


def test_engines_that_may_compute_differently_are_told_apart() -> None:
    for kind, is_alike, needs_length in (
        ("linear", True, False),
        ("llama3", True, False),
        ("yarn", False, False),
        ("longrope", False, True),
        ("dynamic", False, True),
    ):
        config: dict[str, object] = {"rope_scaling": {"rope_type": kind, "factor": 2}}
        assert (rope(config, "vllm") == rope(config, "tensorrt-llm")) is is_alike
        assert (rope(config, max_tokens=4096) != rope(config, max_tokens=8192)) is needs_length


def test_weights_are_quantised_as_the_checkpoint_says_or_as_the_engine_does() -> None:
    def weights(engine: str, declared: dict[str, object] | None, method: str | None) -> str:
        return quantisation(engine, declared, method, "bfloat16", "bfloat16", "auto")

    gptq = {"quant_method": "gptq"}
    assert weights("vllm", gptq, "gptq_marlin") == weights("tensorrt-llm", gptq, None)
    assert weights("vllm", None, None) == weights("tensorrt-llm", {}, None)
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    assert weights("vllm", {"quant_method": "modelopt"}, "modelopt") == weights(
        "tensorrt-llm", modelopt, None
    )
    others = [
        weights("vllm", None, "fp8"),
        weights("tensorrt-llm", None, "fp8"),
        weights("vllm", gptq, "gptq"),
        weights("vllm", gptq, "awq"),
        weights("vllm", {"bits": 4}, None),
        weights("vllm", None, None),
    ]
    assert len(set(others)) == len(others)
