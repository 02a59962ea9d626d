"""Block keys: which bytes may stand in for which computation.

A key is the hash chain over everything that determines a block's KV: the model's fingerprint, the
tenant, the cache salt, the adapter, and every token (and multimodal item) from the start of the
prompt. Equal keys mean interchangeable bytes, in every process, on every machine and in every
engine; nothing here depends on ``PYTHONHASHSEED`` or on the engine's own hashes.

    root   = H("root"  | fingerprint | tenant | cache_salt | adapter)
    key[i] = H("block" | key[i-1] | tokens[i] as little-endian u32 | extras[i])

H is BLAKE3, 256 bits, never truncated. Every field is length-prefixed, so that no two different
inputs concatenate to the same bytes. Only full blocks have keys.

Pure functions and plain values; a ``KeyChain`` is owned by one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

import msgspec
from blake3 import blake3

__all__ = [
    "FORMAT_VERSION",
    "KEY_BYTES",
    "BlockKey",
    "Extra",
    "KeyChain",
    "ModelIdentity",
    "Scope",
    "content_digest",
    "epoch_fingerprint",
    "pages_fingerprint",
    "root_key",
    "tenant_fingerprint",
]

BlockKey = NewType("BlockKey", bytes)
"""32 bytes that name one block."""

KEY_BYTES = 32
FORMAT_VERSION = 1
"""Version of the canonical block format; part of the fingerprint."""

_DOMAIN = b"kvferry/1"


def _length(count: int) -> bytes:
    return count.to_bytes(8, "little")


def _digest(fields: Iterable[bytes]) -> bytes:
    parts = [_DOMAIN]
    for field in fields:
        parts += (_length(len(field)), field)
    return blake3(b"".join(parts)).digest()


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must agree for the bytes of two blocks to be interchangeable.

    The engine's name and the tensor-parallel size are absent on purpose: the canonical format is
    the same for all of them.
    """

    model: str
    """Model id as the operator knows it; two copies under different paths should share one id."""
    revision: str
    """Commit of the weights, or a digest of configuration and weights where there is none."""
    kv_dtype: str
    """Element type of the KV cache (``bfloat16``, ``fp8_e4m3``)."""
    quantisation: str = ""
    """How weights and KV scales are quantised; empty for none."""
    num_layers: int
    num_kv_heads: int
    """KV heads of the whole model, not of one rank."""
    head_dim: int
    kv_factor: int = 2
    """2 where K and V are stored, 1 for MLA latents."""
    rope: str = ""
    """Canonical JSON of the rotary-embedding parameters."""
    block_tokens: int
    page_encoding: str = "plain"
    """``plain`` when a block holds tokens in order, whatever its pages do; otherwise the name of the order
    in which it was taken out of the engine's pages, so that blocks of two orders are never mixed."""
    format_version: int = FORMAT_VERSION

    def fingerprint(self) -> bytes:
        """Return the 32-byte digest of all fields."""
        named = sorted(msgspec.structs.asdict(self).items())
        return _digest([b"model", *(f"{name}={value}".encode() for name, value in named)])


class Scope(msgspec.Struct, frozen=True):
    """Who may share a block: requests of one scope see each other's blocks, others never do."""

    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    """Identity of the LoRA adapter, empty for the base model."""


class Extra(msgspec.Struct, frozen=True):
    """A part of a block's input that is not a token: a multimodal item or an embedding."""

    kind: str
    """``mm`` or ``embeds``."""
    offset: int
    """Position of the item relative to the block's first token; negative if it began earlier."""
    digest: bytes
    """The item's content hash at full width."""


def epoch_fingerprint(fingerprint: bytes, nonce: bytes) -> bytes:
    """Return the fingerprint of a model whose weights were changed in place.

    Args:
        fingerprint: The model's fingerprint until now.
        nonce: 32 random bytes, so that these blocks are shared with nobody, now or later.
    """
    return _digest([b"epoch", fingerprint, nonce])


def pages_fingerprint(fingerprint: bytes, order: str) -> bytes:
    """Return the fingerprint under which engines hand one another pages as they are.

    Args:
        fingerprint: What their blocks are keyed under.
        order: Name of the order of elements within a page (``PageLayout.order``); empty for token after token,
            which leaves the fingerprint as it is.
    """
    return _digest([b"pages", fingerprint, order.encode()]) if order else fingerprint


def tenant_fingerprint(fingerprint: bytes, tenant: str) -> bytes:
    """Return the fingerprint under which a cache server keeps a tenant's blocks, in every tier.

    Args:
        fingerprint: The model's fingerprint, as the engine gave it.
        tenant: The tenant that the credential belongs to; empty for the one without a name, whose
            blocks engines with a cache of their own share.
    """
    return _digest([b"tenant", fingerprint, tenant.encode()]) if tenant else fingerprint


def root_key(fingerprint: bytes, scope: Scope) -> BlockKey:
    """Return the key that precedes a prompt's first block."""
    fields = [b"root", fingerprint, scope.tenant.encode(), scope.cache_salt.encode(), scope.adapter.encode()]
    return BlockKey(_digest(fields))


_BLOCK_START = _DOMAIN + _length(5) + b"block" + _length(KEY_BYTES)
"""All that is hashed before a block's parent; the same for every block, so it is composed once."""


def _extra_fields(extras: Sequence[Extra]) -> bytes:
    parts: list[bytes] = []
    for extra in extras:
        for field in (extra.kind.encode(), extra.offset.to_bytes(8, "little", signed=True), extra.digest):
            parts += (_length(len(field)), field)
    return b"".join(parts)


class KeyChain:
    """The keys of one request's full blocks, extended as tokens become known.

    Args:
        root: From :func:`root_key`.
        block_tokens: Tokens per block.
    """

    __slots__ = ("_block_tokens", "_keys", "_root")

    def __init__(self, root: BlockKey, block_tokens: int) -> None:
        self._root = root
        self._block_tokens = block_tokens
        self._keys: list[BlockKey] = []

    @property
    def root(self) -> BlockKey:
        """What precedes the first block."""
        return self._root

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""
        return self._block_tokens

    @property
    def keys(self) -> Sequence[BlockKey]:
        """The keys so far, one per full block, first block first."""
        return self._keys

    def extend(
        self, tokens: Sequence[int], extras: Mapping[int, Sequence[Extra]] | None = None
    ) -> Sequence[BlockKey]:
        """Bring the chain up to the full blocks of ``tokens`` and return all keys.

        Args:
            tokens: All tokens of the request so far, ids in [0, 2**32). Tokens already covered
                are not looked at again, so the prefix must not have changed.
            extras: Extras by block index.

        Returns:
            One key per full block of ``tokens``.
        """
        done = len(self._keys)
        full = len(tokens) // self._block_tokens
        if full > done:
            size = self._block_tokens
            packed = struct.pack(f"<{(full - done) * size}I", *tokens[done * size : full * size])
            length = _length(size * 4)
            parent = self._keys[-1] if self._keys else self._root
            for index in range(done, full):
                start = (index - done) * size * 4
                block = packed[start : start + size * 4]
                rest = _extra_fields(extras.get(index, ())) if extras else b""
                parent = BlockKey(blake3(b"".join((_BLOCK_START, parent, length, block, rest))).digest())
                self._keys.append(parent)
        return self._keys[:full] if full < len(self._keys) else self._keys


def content_digest(
    chain: KeyChain, tokens: Sequence[int], extras: Mapping[int, Sequence[Extra]] | None = None
) -> bytes:
    """Return 32 bytes that name all of ``tokens``, also those behind the last full block.

    Equal digests mean interchangeable KV for every one of the tokens, as equal keys do for a block's.

    Args:
        chain: The request's; it is extended by what is missing.
        tokens: From the prompt's first one on, ids in [0, 2**32).
        extras: Extras by block index.
    """
    keys = chain.extend(tokens, extras)
    tail = tokens[len(keys) * chain.block_tokens :]
    rest = _extra_fields(extras.get(len(keys), ())) if extras else b""
    parent = keys[-1] if keys else chain.root
    return _digest([b"content", parent, struct.pack(f"<{len(tail)}I", *tail), rest])
