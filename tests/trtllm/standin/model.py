"""Models of which every byte is known, so that a wrong one is found.

The executor takes any ``Model``. ``HashModel`` is the one of these tests: a token's KV depends on the whole prefix, the
multimodal items in it, and on whom the request belongs to (salt and adapter), so that bytes of another place, time or
tenant are wrong bytes. Its next token is a hash of the bytes that lie in the pages, whatever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

__all__ = ["Bytes", "HashModel", "Model", "Scope", "prefix_digests"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Scope:
    """What besides its tokens makes a request's KV what it is."""

    salt: str = ""
    lora: int | None = None
    images: tuple[tuple[int, int, bytes], ...] = ()
    """Start, length and hash of each multimodal item."""

    def content(self, position: int) -> bytes:
        """Return the item that the token at a position belongs to; empty for text."""
        for start, length, digest in self.images:
            if start <= position < start + length:
                return digest
        return b""


class Model(Protocol):
    """What the executor needs to know: the KV cache's geometry, what belongs into it, and what follows from it."""

    @property
    def layers(self) -> int: ...

    @property
    def kv_factor(self) -> int:
        """2 for K and V, 1 where they are one."""

    @property
    def kv_heads(self) -> int:
        """Of the whole model; ranks share them, or hold copies where there are fewer heads than ranks."""

    @property
    def head_dim(self) -> int: ...

    @property
    def dtype(self) -> str:
        """Of the KV cache, as torch names it."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""

    def kv(self, scope: Scope, tokens: Sequence[int]) -> Bytes:
        """Return the KV of a prefix: ``[tokens, layers, kv_factor, kv_heads, head_dim * itemsize]``. Not changed."""

    def next_token(self, tokens: Sequence[int], attended: Bytes) -> int:
        """Return what follows from tokens, and from their KV as it was read from all ranks' pages; shape as ``kv``."""


@dataclass(frozen=True)
class HashModel:
    """KV and tokens by hashes. Vectors are bytes here; the engine calls them numbers."""

    layers: int = 2
    kv_factor: int = 2
    kv_heads: int = 4
    head_dim: int = 8
    dtype: str = "bfloat16"
    itemsize: int = 2
    vocab: int = 1000

    def kv(self, scope: Scope, tokens: Sequence[int]) -> Bytes:
        shape = (self.layers, self.kv_factor, self.kv_heads, self.head_dim * self.itemsize)
        if not tokens:
            return np.zeros((0, *shape), np.uint8)
        size = int(np.prod(shape))
        raw = b"".join(_kv(digest, size) for digest in prefix_digests(scope, tokens))
        return np.frombuffer(raw, np.uint8).reshape(-1, *shape)

    def next_token(self, tokens: Sequence[int], attended: Bytes) -> int:
        digest = blake3(np.ascontiguousarray(attended).data).digest()
        return int.from_bytes(digest[:8], "little") % self.vocab

    def output(self, scope: Scope, prompt: Sequence[int], count: int) -> list[int]:
        """Return what an engine answers that does not err."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next_token(tokens, self.kv(scope, tokens)))
        return tokens[len(prompt) :]


def prefix_digests(scope: Scope, tokens: Sequence[int]) -> list[bytes]:
    """Return for each token the digest of everything up to it."""
    digest = blake3(repr((scope.salt, scope.lora)).encode()).digest()
    digests = []
    for position, token in enumerate(tokens):
        digest = _step(digest, token, scope.content(position))
        digests.append(digest)
    return digests


_KV: dict[tuple[bytes, int], bytes] = {}
_STEPS: dict[tuple[bytes, int, bytes], bytes] = {}


def _kv(digest: bytes, size: int) -> bytes:
    found = _KV.get((digest, size))
    if found is None:
        found = _KV[digest, size] = blake3(digest).digest(length=size)
    return found


def _step(digest: bytes, token: int, content: bytes) -> bytes:
    key = digest, token, content
    found = _STEPS.get(key)
    if found is None:
        found = _STEPS[key] = blake3(digest + token.to_bytes(8, "little") + content).digest()
    return found
