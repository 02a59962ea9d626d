"""Digests of pages: of the canonical bytes, whatever the strides, head by head."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from transport_kit import even_ranks, two_ranks

from kvferry.connector.transport import Heads
from kvferry.engines.handoff.digest import DIGEST_BYTES, PageDigester, part


@given(seed=st.integers(0, 10_000))
def test_a_digest_is_that_of_the_canonical_bytes_of_a_head(seed: int) -> None:
    memory = two_ranks(seed)[0].memory
    pages = list(range(memory.layout.num_pages))[::-1]
    found = PageDigester(memory).digest(pages)
    assert len(found) == len(pages) * memory.heads.count * DIGEST_BYTES
    for index, page in enumerate(pages):
        for head in range(memory.heads.count):
            one = Heads(memory.heads.first + head, 1)
            canonical = np.zeros((1, memory.page_bytes(one)), np.uint8)
            memory.stage(one).gather(np.array([[page]], np.int32), np.array([0]), canonical)
            at = (index * memory.heads.count + head) * DIGEST_BYTES
            assert found[at : at + DIGEST_BYTES] == xxhash.xxh3_64_digest(canonical.tobytes())


def test_digests_follow_the_memory_and_are_no_copy_of_it() -> None:
    rank = even_ranks()[0]
    digester = PageDigester(rank.memory)
    before = digester.digest([0, 1])
    rank.pages[rank.layout.layer_offsets[1] + rank.layout.page_stride] ^= 1
    after = digester.digest([0, 1])
    width = rank.memory.heads.count * DIGEST_BYTES
    assert before[:width] == after[:width]
    assert before[width:] != after[width:]


@pytest.mark.parametrize(("first", "count"), [(4, 1), (4, 3), (5, 2), (6, 1)])
def test_a_part_is_the_digests_of_some_heads_of_every_page(first: int, count: int) -> None:
    pages, owned = 3, Heads(4, 3)
    digests = bytes(range(pages * owned.count * DIGEST_BYTES))
    expected = b"".join(
        digests[(page * 3 + head - 4) * DIGEST_BYTES :][:DIGEST_BYTES]
        for page in range(pages)
        for head in range(first, first + count)
    )
    assert part(digests, owned, Heads(first, count)) == expected
