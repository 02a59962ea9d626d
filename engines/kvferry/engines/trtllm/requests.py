"""TensorRT-LLM's requests in kvferry's terms: who may share their blocks, and what besides tokens keys them.

Requests are the engine's own objects, in the form that a binding gives: attributes may be missing, and may be methods.
What cannot be keyed with certainty is not cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kvferry.connector.keys import Extra, Scope
from kvferry.engines.request import RequestInfo
from kvferry.engines.trtllm.compat import cache_salt, fact

__all__ = ["RequestTranslator", "media_tokens"]

_MEDIA = ("image", "video", "audio", "vision", "speech", "mm_")
"""What a checkpoint's configuration calls its parts that are not text."""
_MEDIA_TOKEN = ("_token_id", "_token_index")
_INPUTS = ("multimodal_embedding", "prompt_embedding_table", "py_multimodal_data")
"""Inputs besides tokens, by the attributes that some binding has."""


def media_tokens(config: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the tokens that stand for images and the like.

    Args:
        config: A checkpoint's.

    Returns:
        None when the model takes such inputs but does not say by which tokens.
    """
    named = {name: value for name, value in config.items() if name.startswith(_MEDIA)}
    if not named:
        return frozenset()
    tokens = {value for name, value in named.items() if name.endswith(_MEDIA_TOKEN) and type(value) is int}
    return frozenset(tokens) or None


class RequestTranslator:
    """Describes requests for keying.

    Args:
        block_tokens: Tokens per block.
        tenant: The configured tenant.
        adapters: Identity of each LoRA adapter by the engine's number.
        media: Of ``media_tokens``.
    """

    def __init__(
        self, block_tokens: int, tenant: str, adapters: Mapping[int, str], media: frozenset[int] | None
    ) -> None:
        self._block_tokens = block_tokens
        self._tenant = tenant
        self._adapters = adapters
        self._media = media

    def describe(self, request: object, tokens: Sequence[int]) -> RequestInfo:
        """Return what kvferry must know about a request.

        Args:
            request: The engine's.
            tokens: All its tokens.
        """
        lora = fact(request, "lora_task_id")
        adapter = "" if lora is None else self._adapters.get(cast(int, lora), "")
        items = _items(request)
        uncacheable = _uncacheable(request)
        if lora is not None and not adapter:
            uncacheable = f"LoRA adapter {lora} is not in trtllm.adapters"
        elif items is None:
            uncacheable = "multimodal items without a hash, a position or a length"
        elif not items and (self._media is None or self._holds_media(tokens)):
            uncacheable = "multimodal items that the engine does not hash"
        return RequestInfo(
            id=str(fact(request, "request_id")),
            prompt_tokens=int(cast(int, fact(request, "prompt_len"))),
            scope=Scope(tenant=self._tenant, cache_salt=cache_salt(request), adapter=adapter),
            extras=self._extras(items or ()),
            uncacheable=uncacheable,
        )

    def _holds_media(self, tokens: Sequence[int]) -> bool:
        return any(token in tokens for token in self._media or ())

    def _extras(self, items: Sequence[tuple[str, int, int]]) -> Mapping[int, Sequence[Extra]]:
        extras: dict[int, list[Extra]] = {}
        for digest, start, length in items:
            last = (start + max(length, 1) - 1) // self._block_tokens
            for block in range(start // self._block_tokens, last + 1):
                offset = start - block * self._block_tokens
                extras.setdefault(block, []).append(Extra("mm", offset, f"{length}\0{digest}".encode()))
        return extras


def _items(request: object) -> Sequence[tuple[str, int, int]] | None:
    """Return hash, position and length of each multimodal item; None if the engine does not say all of it."""
    hashes, starts, lengths = (
        fact(request, f"multimodal_{name}") for name in ("hashes", "positions", "lengths")
    )
    if not hashes and not starts and not lengths:
        return None if any(_is_there(request, name) for name in _INPUTS) else ()
    every = (list(cast("Sequence[Any]", part or ())) for part in (hashes, starts, lengths))
    try:
        found = [(_digest(item), int(start), int(length)) for item, start, length in zip(*every, strict=True)]
    except (TypeError, ValueError):
        return None
    return found if all(digest and start >= 0 and length >= 0 for digest, start, length in found) else None


def _digest(item: Sequence[int] | bytes | str) -> str:
    """Spell a hash, which comes in words of any size, so that different ones stay different."""
    if isinstance(item, str):
        return item
    return item.hex() if isinstance(item, bytes) else " ".join(str(int(word)) for word in item)


def _is_there(request: object, name: str) -> bool:
    value = fact(request, name)
    return value is not None and not (isinstance(value, Mapping | Sequence) and len(value) == 0)


def _uncacheable(request: object) -> str:
    if fact(request, "is_generation_only_request"):
        return "its prompt is prefilled elsewhere"
    if fact(request, "return_context_logits"):
        return "logits of the whole prompt are wanted"
    return ""
