"""Both ends of what crosses from one engine to another: canonical blocks as they are stored, and an engine that is
played and computes nothing else than what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cache_server import toml
from engine import wait_until
from prompts import Prompt
from standin.model import Bytes, Scope
from standin.options import EngineOptions, llm_args

from kvferry.connector.arena import Arena
from kvferry.connector.choosing import open_service
from kvferry.connector.coding import block_fingerprint
from kvferry.connector.config import Config
from kvferry.connector.keys import KeyChain, root_key
from kvferry.connector.keys import Scope as KeyScope
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import CacheService
from kvferry.connector.settings import load_settings
from kvferry.engines.trtllm.geometry import block_layout
from kvferry.engines.trtllm.identity import model_identity

__all__ = ["KnownModel", "read_blocks", "trtllm_toml"]


class KnownModel:
    """A model for the stand-in: the KV of some prompts' full blocks is what another engine computed, the rest is zero.

    Args:
        layout: Of the canonical block.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._blocks: dict[Prompt, Bytes] = {}
        """By all tokens up to a block's last: ``[tokens, layers, kv_factor, kv_heads, bytes of a vector]``."""
        self.layers = layout.num_layers
        self.kv_factor = layout.kv_factor
        self.kv_heads = layout.num_kv_heads
        self.head_dim = layout.head_dim
        self.dtype = layout.dtype
        self.itemsize = layout.itemsize

    def learn(self, prefix: Prompt, block: Bytes) -> None:
        """Take a canonical block, ``[kv_head][layer][token][k_or_v][head_dim]``, for the end of ``prefix``."""
        layout = self._layout
        shape = (layout.num_kv_heads, layout.num_layers, layout.block_tokens, layout.kv_factor, -1)
        self._blocks[prefix] = block.reshape(shape).transpose(2, 1, 3, 0, 4).copy()

    def kv(self, scope: Scope, tokens: Sequence[int]) -> Bytes:
        """Return what the other engine computed, whoever the request belongs to."""
        vector = self.head_dim * self.itemsize
        found = np.zeros((len(tokens), self.layers, self.kv_factor, self.kv_heads, vector), np.uint8)
        step = self._layout.block_tokens
        for end in range(step, len(tokens) + 1, step):
            block = self._blocks.get(tuple(tokens[:end]))
            if block is None:
                break
            found[end - step : end] = block
        return found

    def next_token(self, tokens: Sequence[int], attended: Bytes) -> int:
        """Return some token: what follows is not asked of this model."""
        return 2


def read_blocks(checkpoint: Path, tables: dict[str, Any], prompts: Iterable[Prompt]) -> KnownModel:
    """Fetch the full blocks of prompts, under TensorRT-LLM's keys, from where another engine put them.

    Args:
        checkpoint: The model's.
        tables: kvferry's configuration, with ``block_tokens``.
        prompts: Whose every full block must be there.
    """
    config = load_settings(tables, environ={}).config
    arguments = llm_args(EngineOptions(page_tokens=16), str(checkpoint), dtype="float32")
    layout = block_layout(arguments, config.block_tokens)
    model = KnownModel(layout)
    service, fingerprint = _open(arguments, layout, config)
    try:
        for prompt in prompts:
            chain = KeyChain(root_key(fingerprint, KeyScope()), layout.block_tokens)
            keys = chain.extend(prompt, {})

            def is_there(keys: Any = keys) -> bool:
                service.poll()
                service.prefetch("reader", keys)
                return service.lookup(keys).ready == len(keys)

            wait_until("every block has come", is_there)
            lease = service.lease("reader", keys)
            assert len(lease.places) == len(keys) > 0
            assert service.arena is not None
            arena = Arena.attach(service.arena)
            for index, place in enumerate(lease.places, start=1):
                payload = np.frombuffer(arena.slot(place.slot), np.uint8)[: layout.payload_bytes]
                model.learn(prompt[: index * layout.block_tokens], payload)
            service.release(lease)
    finally:
        service.close(20)
    return model


def trtllm_toml(tables: dict[str, Any]) -> str:
    """Return kvferry's configuration as ``Ferry`` takes it."""
    lines = "".join(f"{name} = {toml(value)}\n" for name, value in tables.items())
    return lines.replace("{", "{{").replace("}", "}}")


def _open(arguments: SimpleNamespace, layout: BlockLayout, config: Config) -> tuple[CacheService, bytes]:
    registry = PluginRegistry(config.plugins)
    identity = model_identity(arguments, layout, config)
    fingerprint = block_fingerprint(identity.fingerprint(), config, registry)
    return open_service(config, layout, fingerprint, registry, engine="reader"), fingerprint
