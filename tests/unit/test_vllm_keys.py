"""What keys a vLLM request and a vLLM model: no two things that compute differently may share a key."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.connector.keys import Extra
from kvferry.engines.identity import adapter_identity, weights_digest
from kvferry.engines.vllm.pages import PageTables
from kvferry.engines.vllm.requests import RequestTranslator


def request(**changes: object) -> Any:
    facts: dict[str, object] = {
        "request_id": "r",
        "num_prompt_tokens": 40,
        "cache_salt": None,
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": [1, 2, 3],
        "pooling_params": None,
        "resumable": False,
    }
    return SimpleNamespace(**(facts | changes))


def image(identifier: str, offset: int, length: int) -> SimpleNamespace:
    position = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(modality="image", identifier=identifier, mm_position=position)


def lora(path: Path, name: str = "adapter", number: int = 1, load_inplace: bool = False) -> SimpleNamespace:
    return SimpleNamespace(lora_int_id=number, lora_name=name, lora_path=str(path), load_inplace=load_inplace)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


def test_salt_and_tenant_are_part_of_the_scope() -> None:
    scope = RequestTranslator(16, "tenant").describe(request(cache_salt="salt")).scope
    assert (scope.tenant, scope.cache_salt, scope.adapter) == ("tenant", "salt", "")


def test_adapters_differ_by_name_and_by_weights(adapter: Path) -> None:
    first = adapter_identity("one", str(adapter))
    assert adapter_identity("two", str(adapter)) != first
    (adapter / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    assert adapter_identity("one", str(adapter)) != first


def test_an_adapter_that_is_reloaded_in_place_is_looked_at_again(adapter: Path) -> None:
    translator = RequestTranslator(16, "")
    before = translator.describe(request(lora_request=lora(adapter))).scope
    (adapter / "adapter_model.safetensors").write_bytes(b"retrained")
    again = translator.describe(request(lora_request=lora(adapter, load_inplace=True))).scope
    assert before.adapter != again.adapter


def test_an_image_keys_every_block_it_reaches_into() -> None:
    described = RequestTranslator(16, "").describe(request(mm_features=[image("hash", 12, 24)]))
    digest = b"image\x0024\x00hash"
    assert described.extras == {
        0: [Extra("mm", 12, digest)],
        1: [Extra("mm", -4, digest)],
        2: [Extra("mm", -20, digest)],
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_embeds": object()}, "prompt embeddings"),
        ({"prompt_token_ids": None}, "prompt embeddings"),
        ({"pooling_params": object()}, "pooling request"),
        ({"resumable": True}, "streaming session"),
    ],
)
def test_what_cannot_be_keyed_is_passed_through(changes: dict[str, object], reason: str) -> None:
    assert reason in RequestTranslator(16, "").describe(request(**changes)).uncacheable


def checkpoint(path: Path, weights: bytes = b"w" * 100, config: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "README.md").write_text(str(path))
    return path


def test_equal_checkpoints_have_equal_digests_wherever_they_lie(tmp_path: Path) -> None:
    assert weights_digest(checkpoint(tmp_path / "a")) == weights_digest(checkpoint(tmp_path / "b"))


def test_one_byte_of_weights_or_configuration_changes_the_digest(tmp_path: Path) -> None:
    digests = {
        weights_digest(checkpoint(tmp_path / "a")),
        weights_digest(checkpoint(tmp_path / "b", weights=b"w" * 99 + b"x")),
        weights_digest(checkpoint(tmp_path / "c", config='{"rope_theta": 1}')),
    }
    assert len(digests) == 3


def test_a_large_file_is_sampled_and_its_modification_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    checkpoint(path)
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(300 << 20)
        stream.seek(150 << 20)
        stream.write(b"x")
    before = weights_digest(path)
    assert weights_digest(path) == before
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert weights_digest(path) != before


def output(new: dict[str, list[int]], cached: dict[str, list[int] | None], resumed: set[str]) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=(pages,)) for name, pages in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            new_block_ids=[None if pages is None else (pages,) for pages in cached.values()],
            resumed_req_ids=resumed,
        ),
    )


def test_page_tables_grow_and_are_replaced_when_a_request_resumes() -> None:
    tables = PageTables()
    assert tables.update(output({"a": [1, 2]}, {}, set())) == [1, 2]
    assert tables.update(output({}, {"a": [3]}, set())) == [3]
    assert tables.update(output({}, {"a": None}, set())) == []
    assert tables.get("a") == [1, 2, 3]
    tables.update(output({}, {"a": [7, 8]}, {"a"}))
    assert tables.get("a") == [7, 8]
    tables.update(output({"a": [4]}, {}, set()))
    assert tables.get("a") == [4]
    tables.drop("a")
    assert tables.get("a") == []
