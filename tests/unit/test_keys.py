"""Block keys: equal exactly when the computation is equal, and the same for ever and everywhere."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.keys import (
    BlockKey,
    Extra,
    KeyChain,
    ModelIdentity,
    Scope,
    pages_fingerprint,
    root_key,
)

FINGERPRINT = bytes(range(32))
IDENTITY = ModelIdentity(
    model="org/model",
    revision="abc",
    kv_dtype="bfloat16",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    block_tokens=64,
)

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=60)
extra_lists = st.lists(
    st.builds(
        Extra, st.sampled_from(["mm", "embeds"]), st.integers(-100, 100), st.binary(min_size=32, max_size=32)
    ),
    max_size=2,
)
extras_by_block = st.dictionaries(st.integers(0, 15), extra_lists, max_size=4)


def digest(*fields: bytes) -> bytes:
    """The definition in the module's docstring, field by field."""
    hasher = blake3(b"kvferry/1")
    for field in fields:
        hasher.update(len(field).to_bytes(8, "little") + field)
    return hasher.digest()


def chained(root: bytes, tokens: list[int], size: int, extras: dict[int, list[Extra]]) -> list[bytes]:
    keys = [root]
    for index in range(len(tokens) // size):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[index * size : (index + 1) * size])
        fields = [b"block", keys[-1], block]
        for extra in extras.get(index, ()):
            fields += [extra.kind.encode(), extra.offset.to_bytes(8, "little", signed=True), extra.digest]
        keys.append(digest(*fields))
    return keys[1:]


@given(token_lists, st.integers(1, 9), extras_by_block)
def test_a_chain_is_what_its_definition_says(
    tokens: list[int], size: int, extras: dict[int, list[Extra]]
) -> None:
    root = root_key(FINGERPRINT, Scope("tenant", "salt", "adapter"))
    assert root == digest(b"root", FINGERPRINT, b"tenant", b"salt", b"adapter")
    assert list(KeyChain(root, size).extend(tokens, extras)) == chained(root, tokens, size, extras)


@given(token_lists, st.integers(1, 9), extras_by_block, st.lists(st.integers(0, 60), max_size=4))
def test_a_chain_extended_in_steps_equals_one_made_at_once(
    tokens: list[int], size: int, extras: dict[int, list[Extra]], cuts: list[int]
) -> None:
    root = root_key(FINGERPRINT, Scope())
    chain = KeyChain(root, size)
    for cut in sorted(cuts):
        chain.extend(tokens[:cut], extras)
    assert list(chain.extend(tokens, extras)) == list(KeyChain(root, size).extend(tokens, extras))
    assert all(len(key) == 32 for key in chain.keys)


def test_fewer_tokens_than_before_yield_the_keys_of_those_only() -> None:
    chain = KeyChain(root_key(FINGERPRINT, Scope()), 2)
    longer = list(chain.extend([1, 2, 3, 4, 5]))
    assert len(longer) == 2
    assert list(chain.extend([1, 2, 3])) == longer[:1]


def test_scopes_that_concatenate_alike_differ() -> None:
    scopes = [Scope(*texts) for texts in itertools.product(["", "a", "ab", "b"], repeat=3)]
    assert len({root_key(FINGERPRINT, scope) for scope in scopes}) == len(scopes)


@pytest.mark.parametrize("field", ["model", "revision", "kv_dtype", "quantisation", "rope", "page_encoding"])
def test_every_text_of_the_identity_changes_the_fingerprint(field: str) -> None:
    changed = ModelIdentity(**{**_fields(), field: "other"})  # type: ignore[arg-type]
    assert changed.fingerprint() != IDENTITY.fingerprint()


@pytest.mark.parametrize(
    "field", ["num_layers", "num_kv_heads", "head_dim", "kv_factor", "block_tokens", "format_version"]
)
def test_every_number_of_the_identity_changes_the_fingerprint(field: str) -> None:
    changed = ModelIdentity(**{**_fields(), field: 7})  # type: ignore[arg-type]
    assert changed.fingerprint() != IDENTITY.fingerprint()


def test_pages_of_another_order_are_exchanged_under_another_fingerprint() -> None:
    assert pages_fingerprint(FINGERPRINT, "") == FINGERPRINT, "as engines did that knew of no order"
    assert len({pages_fingerprint(FINGERPRINT, order) for order in ("", "vec", "amx")}) == 3


def _fields() -> dict[str, object]:
    return {name: getattr(IDENTITY, name) for name in IDENTITY.__struct_fields__}


FINGERPRINT_TODAY = "f9bad71d86fd632601ecc67e3283a214afc3940b627a9059d5440e6b408baeda"
KEYS_TODAY = (
    "9fe6669f8450f6af68190adfb286d6c9b476c69fcac3a6bb74a894cdc444ab95",
    "dc878476936e178d1685215cacbfd1a39b160065738f82b1d612e9e106610c91",
)
GOLDEN = """
print(IDENTITY.fingerprint().hex())
keys = KeyChain(root_key(IDENTITY.fingerprint(), Scope("t", "s", "a")), 4).extend(
    list(range(8)), {1: [Extra("mm", -2, bytes(32))]}
)
print(*[key.hex() for key in keys])
"""


def test_keys_are_the_same_in_every_process_and_release() -> None:
    """Blocks that were stored years ago are found by these bytes; a change needs a new format version."""
    setup = (
        "from kvferry.connector.keys import *\n"
        "IDENTITY = ModelIdentity(model='org/model', revision='abc', kv_dtype='bfloat16', num_layers=30,"
        " num_kv_heads=3, head_dim=64, block_tokens=64)\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", setup + GOLDEN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert printed == {"\n".join((FINGERPRINT_TODAY, " ".join(KEYS_TODAY), ""))}


def test_a_token_outside_32_bits_is_no_key() -> None:
    for token in (-1, 2**32):
        with pytest.raises(struct.error):
            KeyChain(BlockKey(bytes(32)), 1).extend([token])
