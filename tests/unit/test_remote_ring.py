"""Which cache server holds a block: a lost server moves only its own share, and everybody agrees."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import hostile_keys, key_of
from kvferry.plugins.remote.ring import Ring

KEYS = [key_of(number) for number in range(250)] + hostile_keys()
NAMES = [f"tcp://10.0.0.{number}:9470" for number in range(1, 65)]
VECTOR = {"tcp://a:1": [5], "tls://b:2": [1, 2, 6, 7], "unix:///c": [0, 3, 4]}
"""What is kept where on deployed servers; when this changes, every block is in another place."""

names = st.lists(st.sampled_from(NAMES), min_size=2, max_size=12, unique=True)


def homes(ring: Ring, usable: list[str], keys: list[BlockKey] = KEYS) -> list[str]:
    """Return each key's server."""
    found: dict[int, str] = {}
    for name, positions in ring.assign(keys, usable).items():
        assert positions == sorted(positions)
        found |= dict.fromkeys(positions, name)
    return [found[index] for index in range(len(keys))]


@settings(max_examples=10, deadline=None)
@given(names, st.data())
def test_a_lost_server_moves_only_its_own_keys(servers: list[str], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(servers))
    ring = Ring(servers)
    before = homes(ring, servers)
    after = homes(ring, [name for name in servers if name != lost])
    assert lost not in after
    assert all(one == other for one, other in zip(before, after, strict=True) if one != lost)


@settings(max_examples=10, deadline=None)
@given(names, st.data())
def test_a_server_that_is_away_is_as_one_that_is_not_named(servers: list[str], data: st.DataObject) -> None:
    left = data.draw(st.lists(st.sampled_from(servers), min_size=1, unique=True))
    assert homes(Ring(servers), left) == homes(Ring(left), left)


@settings(max_examples=10, deadline=None)
@given(names, st.randoms(use_true_random=False))
def test_the_order_of_the_list_has_no_meaning(servers: list[str], chance: random.Random) -> None:
    shuffled = list(servers)
    chance.shuffle(shuffled)
    assert homes(Ring(servers), servers) == homes(Ring(shuffled), shuffled)


@pytest.mark.parametrize("count", [2, 3, 8, 32])
def test_every_server_gets_about_the_same(count: int) -> None:
    keys = [key_of(number, "balance") for number in range(200 * count)]
    shares = Counter(homes(Ring(NAMES[:count]), NAMES[:count], keys))
    assert len(shares) == count
    assert min(shares.values()) > 140
    assert max(shares.values()) < 260


@pytest.mark.parametrize("lost", range(4))
def test_what_a_lost_server_had_is_spread_over_all_others(lost: int) -> None:
    servers = NAMES[:4]
    ring = Ring(servers)
    before = homes(ring, servers)
    after = homes(ring, [name for name in servers if name != servers[lost]])
    moved = Counter(to for was, to in zip(before, after, strict=True) if was == servers[lost])
    assert len(moved) == 3
    assert min(moved.values()) > sum(moved.values()) / 6


def test_servers_whose_names_are_alike_share_nothing_but_chance() -> None:
    """Weights of one key on two servers must not follow one another."""
    first = [name == NAMES[0] for name in homes(Ring(NAMES[:2]), NAMES[:2])]
    other = [name == NAMES[2] for name in homes(Ring(NAMES[2:4]), NAMES[2:4])]
    agreeing = sum(one is two for one, two in zip(first, other, strict=True))
    assert 0.4 < agreeing / len(KEYS) < 0.6


def test_no_keys_are_nobodys() -> None:
    assert Ring(NAMES).assign([], NAMES) == {}
    assert Ring(NAMES).assign([], NAMES[:1]) == {}


def test_blocks_stay_where_they_are_from_version_to_version() -> None:
    assert Ring(list(VECTOR)).assign(KEYS[:8], VECTOR.keys()) == VECTOR


def test_another_process_finds_the_same_servers() -> None:
    program = f"""
from kvferry.connector.testing.blocks import key_of
from kvferry.plugins.remote.ring import Ring
names = {sorted(VECTOR, reverse=True)!r}
print(sorted(Ring(names).assign([key_of(number) for number in range(8)], names).items()))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == str(sorted(VECTOR.items()))
