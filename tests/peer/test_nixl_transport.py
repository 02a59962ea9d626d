"""The ``nixl`` transport between two real processes: what arrives, what does not, and what happens when one goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import nixl_kit
import numpy as np
import pytest
from nixl_kit import POISON, Pages, Spec, Target, connect, contents, context, held

from kvferry.connector.errors import HandoffFailed
from kvferry.connector.transport import MAX_OFFER_BYTES, PageReader
from kvferry.plugins.peer import nixl_reader
from kvferry.plugins.peer.agent import Agent
from kvferry.plugins.peer.nixl_transport import NIXL
from kvferry.plugins.peer.runs import common_heads

pytest.importorskip("nixl")

PAIRS = {
    "hnd": (Spec("hnd"), Spec("hnd")),
    "hnd to nhd": (Spec("nhd"), Spec("hnd", gap=64)),
    "layers to pages outermost": (Spec("pages_outermost", pages=40), Spec("hnd")),
    "k and v apart": (Spec("kv_separate"), Spec("kv_separate")),
    "k and v apart to nhd": (Spec("nhd", pages=24, gap=32), Spec("kv_separate", pages=32)),
    "ragged": (Spec("ragged", pages=30), Spec("nhd")),
    "latent": (Spec("nhd", is_latent=True), Spec("pages_outermost", is_latent=True)),
    "2 ranks from 1": (Spec("hnd", tp_size=2, rank=1), Spec("hnd")),
    "1 rank from 4": (Spec("hnd"), Spec("hnd", tp_size=4, rank=2)),
    "4 ranks from 2": (Spec("nhd", tp_size=4, rank=3), Spec("hnd", tp_size=2, rank=1)),
}
ONE = Spec("hnd", pages=256)


@pytest.fixture(scope="module")
def many() -> Iterator[Target]:
    """A process that exports every remote side of ``PAIRS``."""
    with Target([remote for _, remote in PAIRS.values()]) as target:
        yield target


@pytest.fixture(scope="module")
def peer() -> Iterator[Target]:
    """A process that nobody harms."""
    with Target([ONE]) as target:
        yield target


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A process that can be reached over TCP only."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    with Target([ONE]) as target:
        yield target


@pytest.fixture
def own() -> Pages:
    """Pages to read into. A reader does not keep them, and nothing else may lie there while it reads."""
    return Pages(ONE)


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def check(reader: PageReader, own: Pages, target: Target, deadline: float | None = None) -> None:
    """Read everything and compare every byte."""
    own.bytes[:] = POISON
    every = np.arange(own.spec.pages, dtype=np.int32)
    reader.read(every, every[::-1], deadline or soon())
    expected = Pages(own.spec)
    expected.put(own.memory.heads, [int(page) for page in every[::-1]], contents(target.specs[0]))
    assert np.array_equal(own.bytes, expected.bytes)


def check_anew(target: Target) -> None:
    """Connect, read everything and compare every byte."""
    own = Pages(target.specs[0])
    reader = connect(target, own)
    check(reader, own, target)
    reader.close()


def fails(reader: PageReader, reason: str, within_s: float, deadline: float | None = None) -> HandoffFailed:
    """Read until it fails, and check how and how soon."""
    every = np.arange(ONE.pages, dtype=np.int32)

    def read() -> None:
        while True:
            reader.read(every, every, deadline or soon())

    started = time.monotonic()
    with pytest.raises(HandoffFailed) as caught:
        read()
    assert time.monotonic() - started < within_s
    assert caught.value.reason == reason
    return caught.value


# What arrives


@pytest.mark.parametrize("name", PAIRS)
def test_the_pages_asked_for_arrive_and_no_other_byte_changes(many: Target, name: str) -> None:
    index, (own_spec, remote_spec) = list(PAIRS).index(name), PAIRS[name]
    own = Pages(own_spec)
    reader = connect(many, own, index)
    remote_pages, local_pages = [7, 3, 4, 5, 20, 3], [1, 9, 8, 2, 3, 4]
    reader.read(ids(*remote_pages), ids(*local_pages), soon())
    reader.read(ids(), ids(), soon())
    reader.close()

    heads = common_heads(own_spec.shard, remote_spec.shard)
    expected = Pages(own_spec)
    expected.put(heads, local_pages, contents(remote_spec)[remote_pages][:, :, heads.first : heads.end])
    assert (expected.bytes != POISON).any()
    assert np.array_equal(own.bytes, expected.bytes)


def test_large_reads_are_split(peer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_reader, "MOST_RUNS", 7)
    check_anew(peer)
    monkeypatch.setattr(nixl_reader, "MOST_BYTES", 1)
    check_anew(peer)


def test_processes_of_one_machine_are_read_directly(peer: Target, own: Pages) -> None:
    reader = connect(peer, own)
    assert reader.description == "nixl, one-sided"
    reader.close()


def test_two_readers_of_one_process_do_not_disturb_each_other(peer: Target) -> None:
    own, other = Pages(ONE), Pages(ONE)
    first, second = connect(peer, own), connect(peer, other)
    check(first, own, peer)
    first.close()
    check(second, other, peer)
    second.close()


@pytest.mark.parametrize("pages", [([256], [0]), ([-1], [0]), ([0], [256]), ([0, 1], [5, 5]), ([0, 1], [0])])
def test_pages_outside_are_refused_before_anything_is_read(
    peer: Target, pages: tuple[list[int], list[int]], own: Pages
) -> None:
    reader = connect(peer, own)
    with pytest.raises(HandoffFailed, match="page"):
        reader.read(ids(*pages[0]), ids(*pages[1]), soon())
    assert (own.bytes == POISON).all()
    reader.close()


# Closing


def test_closing_ends_connection_and_threads_and_a_closed_reader_says_so(peer: Target, own: Pages) -> None:
    descriptors = held()[0]
    reader = connect(peer, own)
    assert held()[0] > descriptors
    reader.close()
    reader.close()
    assert held()[0] == descriptors
    with pytest.raises(HandoffFailed, match="closed"):
        reader.read(ids(0), ids(0), soon())


def test_a_read_is_ended_by_closing(peer: Target, monkeypatch: pytest.MonkeyPatch, own: Pages) -> None:
    monkeypatch.setattr(nixl_reader, "MOST_RUNS", 1)
    reader = connect(peer, own)
    closing = threading.Timer(0.1, reader.close)
    closing.start()
    fails(reader, "disconnected", 5.0)
    closing.join()


def test_an_exporter_that_is_closed_lets_go_of_everything(own: Pages) -> None:
    with Target([ONE]) as target:
        before = int(target.ask("held").split()[0])
        reader = connect(target, own)
        after = int(target.ask("close").split()[0])
        assert after < before
        reader.close()


# Other ways than shared memory


def test_host_memory_over_tcp_is_left_to_another_transport(over_tcp: Target, own: Pages) -> None:
    descriptors = held()[0]
    with pytest.raises(HandoffFailed, match=r'peer\.transport = "nixl"') as caught:
        connect(over_tcp, own)
    assert caught.value.reason == "transport"
    assert held()[0] == descriptors
    assert over_tcp.is_alive


def test_host_memory_is_read_over_tcp_where_the_operator_insists(
    over_tcp: Target, caplog: pytest.LogCaptureFixture, own: Pages
) -> None:
    reader = connect(over_tcp, own, is_only=True)
    assert reader.description == "nixl over TCP"
    assert "may crash in UCX" in caplog.text
    check(reader, own, over_tcp)
    reader.close()


# The other side goes


def test_a_target_that_is_gone_cannot_be_connected_to(own: Pages) -> None:
    with Target([ONE]) as target:
        target.signal(signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(HandoffFailed) as caught:
            connect(target, own, timeout_s=5.0)
        assert caught.value.reason == "disconnected"
        assert time.monotonic() - started < 5.0


def test_a_target_that_was_killed_is_noticed_by_the_next_read(own: Pages) -> None:
    with Target([ONE]) as target:
        reader = connect(target, own)
        target.signal(signal.SIGKILL)
        fails(reader, "disconnected", 3.0)
        with pytest.raises(HandoffFailed, match="failed before"):
            reader.read(ids(0), ids(0), soon())


def test_a_target_that_is_killed_while_it_is_read_is_noticed(
    monkeypatch: pytest.MonkeyPatch, own: Pages
) -> None:
    monkeypatch.setattr(nixl_reader, "MOST_RUNS", 16)
    with Target([ONE]) as target:
        reader = connect(target, own)
        killing = threading.Timer(0.2, target.signal, [signal.SIGKILL])
        killing.start()
        fails(reader, "disconnected", 5.0)
        killing.join()


def test_a_target_that_is_stopped_is_read_right_or_given_up_in_time(own: Pages) -> None:
    """Which of the two depends on whether UCX still wants a word with the target; no wrong byte in either case."""
    with Target([ONE]) as target:
        reader = connect(target, own)
        target.signal(signal.SIGSTOP)
        started = time.monotonic()
        failures = []
        try:
            check(reader, own, target, soon(2.0))
        except HandoffFailed as failure:
            failures.append(failure.reason)
        assert failures in ([], ["timeout"])
        assert time.monotonic() - started < 6.0
        reader.close()
        target.signal(signal.SIGCONT)
        check_anew(target)


def test_a_target_that_is_stopped_cannot_be_connected_to_and_the_deadline_holds(own: Pages) -> None:
    with Target([ONE]) as target:
        target.signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(HandoffFailed) as caught:
            connect(target, own, timeout_s=1.0)
        assert caught.value.reason == "timeout"
        assert time.monotonic() - started < 4.0
        target.signal(signal.SIGCONT)
        check_anew(target)


@pytest.mark.parametrize("has_thread", [False, True])
def test_no_byte_lands_after_a_read_over_tcp_has_timed_out(
    over_tcp: Target, own: Pages, has_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Readers of device memory have a thread of NIXL's that goes on by itself. There is no such memory here.
    monkeypatch.setattr(
        nixl_reader, "Agent", lambda name, **how: Agent(name, **how | {"has_thread": has_thread})
    )
    reader = connect(over_tcp, own, is_only=True)
    over_tcp.signal(signal.SIGSTOP)
    fails(reader, "timeout", 3.0, soon(1.0))
    own.bytes[:] = POISON
    over_tcp.signal(signal.SIGCONT)
    end = soon(1.0)
    while time.monotonic() < end:
        assert (own.bytes == POISON).all()


def test_a_restarted_target_is_a_new_peer(own: Pages) -> None:
    with Target([ONE]) as target:
        reader = connect(target, own)
        target.signal(signal.SIGKILL)
        fails(reader, "disconnected", 3.0)
        stale = target.offers[0]
    with Target([Spec("hnd", pages=256, seed=2)]) as target:
        check_anew(target)
        fresh, target.offers = target.offers, [stale]
        with pytest.raises(HandoffFailed):
            connect(target, own, timeout_s=5.0)
        target.offers = fresh
        check_anew(target)


def test_a_reader_that_is_killed_while_it_reads_leaves_the_target_as_it_was(peer: Target) -> None:
    for _ in range(3):
        command = [
            sys.executable,
            nixl_kit.__file__,
            msgspec.json.encode([ONE]).decode(),
            peer.offers[0].hex(),
        ]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            assert any(line.startswith("= reading") for line in victim.stdout)
            victim.kill()
        assert peer.is_alive
    check_anew(peer)


# Offers from outside


def damaged(offer: bytes) -> dict[str, bytes]:
    """Return offers that are none, by what is wrong with them."""
    version, digest, body = msgspec.msgpack.decode(offer).values()
    envelope = {"version": version, "digest": digest, "body": body}
    middle = len(offer) // 2
    return {
        "empty": b"",
        "cut short": offer[:-20],
        "cut in the middle": offer[:middle],
        "a bit flipped": offer[:middle] + bytes([offer[middle] ^ 4]) + offer[middle + 1 :],
        "something behind it": offer + b"\0",
        "random": np.random.default_rng(3).bytes(400),
        "too long": offer + bytes(MAX_OFFER_BYTES),
        "wrong digest": msgspec.msgpack.encode(envelope | {"digest": bytes(16)}),
        "short digest": msgspec.msgpack.encode(envelope | {"digest": digest[:3]}),
        "another version": msgspec.msgpack.encode(envelope | {"version": 2}),
        "an unknown field": msgspec.msgpack.encode(envelope | {"more": 1}),
        "a list": msgspec.msgpack.encode([1, 2, 3]),
    }


def test_an_offer_that_was_damaged_is_refused_and_the_good_one_still_works(peer: Target, own: Pages) -> None:
    good = peer.offers[0]
    for what, offer in damaged(good).items():
        with pytest.raises(HandoffFailed) as caught:
            NIXL.connect(own.remote, offer, own.memory, context(), soon())
        assert caught.value.reason == "transport", what
    check_anew(peer)


def test_an_offer_about_other_pages_is_refused(peer: Target, own: Pages) -> None:
    other = Pages(Spec("hnd", pages=300))
    with pytest.raises(HandoffFailed, match="not about the pages"):
        NIXL.connect(other.remote, peer.offers[0], own.memory, context(), soon())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"agent": "somebody-else"}, "transport"),
        ({"metadata": b"garbage"}, "transport"),
        ({"address": 4096}, "transport"),
        ({"probe": bytes(64)}, "transport"),
        ({"probe_address": 4096}, "transport"),
    ],
)
def test_an_offer_that_lies_is_refused_and_does_no_harm(
    peer: Target, change: dict[str, object], reason: str, own: Pages
) -> None:
    from kvferry.plugins.peer.nixl_offer import pack, unpack

    lie = pack(msgspec.structs.replace(unpack(peer.offers[0]), **change))
    with pytest.raises(HandoffFailed) as caught:
        NIXL.connect(own.remote, lie, own.memory, context(), soon())
    assert caught.value.reason == reason
    assert (own.bytes == POISON).all()
    check_anew(peer)


def test_pages_that_do_not_fit_are_incompatible(peer: Target) -> None:
    for spec in (Spec("hnd", is_latent=True), Spec("hnd", tp_size=2, rank=1)):
        own = Pages(spec)
        shard = Spec("hnd", tp_size=2, rank=0).shard if spec.tp_size == 2 else ONE.shard
        layout = Spec("hnd", tp_size=2, rank=0, pages=256).layout if spec.tp_size == 2 else ONE.layout
        remote = msgspec.structs.replace(Pages(ONE).remote, shard=shard, layout=layout)
        with pytest.raises(HandoffFailed) as caught:
            NIXL.connect(remote, peer.offers[0], own.memory, context(), soon())
        assert caught.value.reason == "incompatible"


# What it costs


def test_an_exporter_sleeps_while_nobody_reads(peer: Target, own: Pages) -> None:
    reader = connect(peer, own)
    assert float(peer.ask("idle 1.5")) < 0.1
    reader.close()
    assert float(peer.ask("idle 1.5")) < 0.1


def test_nothing_grows_over_connections() -> None:
    spec = Spec("hnd", pages=8)
    with Target([spec]) as target:
        own, every = Pages(spec), np.arange(8, dtype=np.int32)

        def cycles(count: int) -> tuple[tuple[int, int], list[int]]:
            for _ in range(count):
                reader = connect(target, own)
                reader.read(every, every, soon())
                reader.close()
            return held(), [int(number) for number in target.ask("held").split()]

        cycles(20)
        before = cycles(5)
        after = cycles(200)
    for was, now in zip(before, after, strict=True):
        assert now[0] - was[0] <= 2, "descriptors"
        assert now[1] - was[1] < 8 << 10, "KiB"
