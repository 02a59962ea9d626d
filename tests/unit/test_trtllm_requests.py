"""Requests of TensorRT-LLM: what determines their KV is in their key, and what cannot be keyed is not cached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.connector.keys import Extra, Scope
from kvferry.engines.request import RequestInfo
from kvferry.engines.trtllm.requests import RequestTranslator, media_tokens

TOKENS = list(range(100))
IMAGE_TOKEN = 7000


def described(
    tokens: list[int] = TOKENS, media: frozenset[int] | None = frozenset(), **facts: Any
) -> RequestInfo:
    request = SimpleNamespace(request_id=11, prompt_len=len(tokens), **facts)
    return RequestTranslator(32, "me", {5: "sql\0digest"}, media).describe(request, tokens)


def test_a_plain_request() -> None:
    info = described(lora_task_id=None, multimodal_hashes=None)
    assert info == RequestInfo(id="11", prompt_tokens=100, scope=Scope("me", "", ""))


@pytest.mark.parametrize("salt", [{"cache_salt": "a"}, {"cache_salt_id": 3}])
def test_a_salt_is_in_the_scope(salt: dict[str, Any]) -> None:
    assert described(**salt).scope not in (Scope("me"), described(cache_salt="b", cache_salt_id=4).scope)


def test_an_adapter_is_known_by_its_identity() -> None:
    assert described(lora_task_id=5).scope.adapter == "sql\0digest"


def test_an_unknown_adapter_is_not_cached() -> None:
    assert "LoRA adapter 6" in described(lora_task_id=6).uncacheable
    assert "LoRA adapter 0" in described(lora_task_id=0).uncacheable


def test_what_bindings_have_as_methods_is_called() -> None:
    info = described(
        is_generation_only_request=lambda: False, lora_task_id=lambda: 5, multimodal_hashes=lambda: None
    )
    assert info.scope.adapter
    assert not info.uncacheable
    assert "elsewhere" in described(is_generation_only_request=lambda: True).uncacheable


def test_items_are_in_every_block_they_touch() -> None:
    info = described(
        multimodal_hashes=[[1, -2], [3, 4]], multimodal_positions=[30, 70], multimodal_lengths=[10, 2]
    )
    first = b"10\x001 -2"
    assert info.extras == {
        0: [Extra("mm", 30, first)],
        1: [Extra("mm", -2, first)],
        2: [Extra("mm", 6, b"2\x003 4")],
    }
    assert not info.uncacheable


@pytest.mark.parametrize(
    "facts",
    [
        {"multimodal_hashes": [[1]], "multimodal_positions": [3], "multimodal_lengths": None},
        {"multimodal_hashes": [[1]], "multimodal_positions": [3, 4], "multimodal_lengths": [1, 1]},
        {"multimodal_hashes": [[]], "multimodal_positions": [3], "multimodal_lengths": [1]},
        {"multimodal_hashes": [[1]], "multimodal_positions": [-3], "multimodal_lengths": [1]},
        {"multimodal_hashes": [None], "multimodal_positions": [3], "multimodal_lengths": [1]},
        {"multimodal_positions": [3], "multimodal_lengths": [1]},
        {"multimodal_embedding": object()},
        {"prompt_embedding_table": lambda: [0.5]},
        {"py_multimodal_data": {"image": object()}},
        {"return_context_logits": True},
    ],
)
def test_what_cannot_be_keyed_is_not_cached(facts: dict[str, Any]) -> None:
    assert described(**facts).uncacheable


def test_media_that_the_engine_did_not_hash_are_seen_by_their_tokens() -> None:
    media = frozenset({IMAGE_TOKEN})
    assert not described(media=media).uncacheable
    assert described([*TOKENS, IMAGE_TOKEN], media).uncacheable
    hashed = {"multimodal_hashes": [[1]], "multimodal_positions": [100], "multimodal_lengths": [1]}
    assert not described([*TOKENS, IMAGE_TOKEN], media, **hashed).uncacheable


def test_a_model_that_hides_its_media_tokens_is_cached_only_with_hashes() -> None:
    assert described(media=None).uncacheable
    hashed = {"multimodal_hashes": [[1]], "multimodal_positions": [3], "multimodal_lengths": [1]}
    assert not described(media=None, **hashed).uncacheable


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"num_hidden_layers": 2, "bos_token_id": 1}, frozenset()),
        ({"image_token_id": 9, "video_token_index": 8, "vision_config": {}}, frozenset({8, 9})),
        ({"vision_config": {}}, None),
        ({"vision_config": {}, "image_token_id": None}, None),
    ],
)
def test_media_tokens(config: dict[str, Any], tokens: frozenset[int] | None) -> None:
    assert media_tokens(config) == tokens
