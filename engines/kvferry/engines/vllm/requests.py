"""vLLM's requests in kvferry's terms: who may share their blocks, and what besides tokens keys them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvferry.connector.keys import Extra, Scope
from kvferry.engines.identity import adapter_identity
from kvferry.engines.request import RequestInfo

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

__all__ = ["RequestTranslator"]


class RequestTranslator:
    """Describes requests for keying.

    Args:
        block_tokens: Tokens per block.
        tenant: The configured tenant.
    """

    def __init__(self, block_tokens: int, tenant: str) -> None:
        self._block_tokens = block_tokens
        self._tenant = tenant
        self._adapters: dict[tuple[int, str, str], str] = {}

    def describe(self, request: Request) -> RequestInfo:
        """Return what kvferry must know about a request."""
        scope = Scope(
            tenant=self._tenant,
            cache_salt=request.cache_salt or "",
            adapter=self._adapter(request.lora_request),
        )
        return RequestInfo(
            id=request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            scope=scope,
            extras=self._extras(request),
            uncacheable=_uncacheable(request),
        )

    def _adapter(self, lora: LoRARequest | None) -> str:
        if lora is None:
            return ""
        key = (lora.lora_int_id, lora.lora_name, lora.lora_path)
        if lora.load_inplace or key not in self._adapters:
            self._adapters[key] = adapter_identity(lora.lora_name, lora.lora_path)
        return self._adapters[key]

    def _extras(self, request: Request) -> Mapping[int, Sequence[Extra]]:
        extras: dict[int, list[Extra]] = {}
        for feature in request.mm_features:
            start, length = feature.mm_position.offset, feature.mm_position.length
            digest = f"{feature.modality}\0{length}\0{feature.identifier}".encode()
            last = (start + max(length, 1) - 1) // self._block_tokens
            for block in range(start // self._block_tokens, last + 1):
                offset = start - block * self._block_tokens
                extras.setdefault(block, []).append(Extra("mm", offset, digest))
        return extras


def _uncacheable(request: Request) -> str:
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "prompt embeddings"
    if request.pooling_params is not None:
        return "pooling request"
    if getattr(request, "resumable", False):
        return "streaming session, whose prompt may change"
    return ""
