"""Joining a server: what it hands over is verified, and a hand-over that fails leaves no descriptor behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvferry.connector import wire
from kvferry.connector.address import parse_address
from kvferry.connector.arena import Arena
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.errors import AccessRefused, ArenaError, ConfigError, WireError
from kvferry.connector.handshake import Grant, Peer, server_handshake
from kvferry.connector.joining import Joined, JoinRefused, is_mistake, join
from kvferry.connector.layout import BlockLayout

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=16, itemsize=2)
HELLO = wire.Hello(mode="map", fingerprint=bytes(32), layout=LAYOUT)
DEADLINE_S = 10.0


class Everybody:
    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        return Grant("", "")


class Offer:
    """What a server hands over; a test spoils it."""

    def __init__(self) -> None:
        self.arena = Arena.create(2, LAYOUT.slot_bytes)
        self.ends = os.pipe2(os.O_CLOEXEC)
        handle = self.arena.handle
        self.reply: wire.Reply = wire.Welcome(
            server_id=bytes(16),
            version="1",
            tiers=["disk"],
            arena=wire.ArenaShape(
                arena_id=handle.arena_id,
                slot_bytes=handle.slot_bytes,
                num_slots=handle.num_slots,
                header_bytes=handle.header_bytes,
                total_bytes=handle.total_bytes,
            ),
        )
        self.fds = [handle.fd, self.ends[1]]

    def change(self, **shape: object) -> None:
        assert isinstance(self.reply, wire.Welcome)
        assert self.reply.arena is not None
        self.reply.arena = msgspec.structs.replace(self.reply.arena, **shape)

    def serve(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            channel = Channel(sock)
            deadline = 1e9
            server_handshake(channel, Everybody(), Peer("test", True), deadline)
            channel.receive_request(deadline)
            sock.settimeout(DEADLINE_S)
            socket.send_fds(sock, [wire.encode(self.reply)], self.fds)

    def close(self) -> None:
        self.arena.close()
        for end in self.ends:
            os.close(end)


@pytest.fixture
def offer() -> Iterator[Offer]:
    offer = Offer()
    yield offer
    offer.close()


def joined(offer: Offer, directory: Path) -> Joined:
    path = f"{directory}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=offer.serve, args=(listener,))
        thread.start()
        try:
            return join(parse_address(f"unix://{path}", "service"), "", TlsConfig(), HELLO, lambda: False)
        finally:
            thread.join(DEADLINE_S)


def test_the_arena_and_its_lifeline_are_taken_over(offer: Offer, tmp_path: Path) -> None:
    offer.arena.slots_array[1] = 5
    taken = joined(offer, tmp_path)
    assert (taken.version, taken.tiers) == ("1", ("disk",))
    assert taken.handle.fd not in offer.fds
    with_arena = Arena.attach(taken.handle)
    assert (with_arena.slots_array[1] == 5).all()
    with_arena.close()
    assert not os.get_inheritable(taken.handle.fd)
    taken.close()


SPOILT: dict[str, tuple[Callable[[Offer], object], type[Exception]]] = {
    "no arena": (lambda offer: setattr(offer, "fds", []), WireError),
    "no lifeline": (lambda offer: offer.fds.pop(), WireError),
    "too many": (lambda offer: offer.fds.append(offer.fds[0]), WireError),
    "far too many": (lambda offer: offer.fds.extend(offer.fds * 10), WireError),
    "the wrong way round": (lambda offer: offer.fds.reverse(), ArenaError),
    "a file for a lifeline": (lambda offer: offer.fds.__setitem__(1, offer.fds[0]), WireError),
    "another arena": (lambda offer: offer.change(arena_id=bytes(16)), ArenaError),
    "a short id": (lambda offer: offer.change(arena_id=b"x"), WireError),
    "other slots": (lambda offer: offer.change(slot_bytes=4096 * 7), WireError),
    "more slots": (lambda offer: offer.change(num_slots=3), ArenaError),
    "no slots": (lambda offer: offer.change(num_slots=0), WireError),
    "a longer arena": (lambda offer: offer.change(total_bytes=1 << 40), ArenaError),
    "no welcome": (lambda offer: setattr(offer, "reply", wire.Pong(id=1)), WireError),
}


@pytest.mark.parametrize(("spoil", "error"), SPOILT.values(), ids=SPOILT)
def test_what_is_not_right_is_refused_and_closed(
    offer: Offer, tmp_path: Path, spoil: Callable[[Offer], object], error: type[Exception]
) -> None:
    spoil(offer)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        joined(offer, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("is_final", [True, False])
def test_a_refusal_tells_whether_trying_again_helps(offer: Offer, tmp_path: Path, is_final: bool) -> None:
    offer.reply = wire.Refused(code="no_room", why="full", is_mistake=is_final)
    with pytest.raises(JoinRefused, match="full") as raised:
        joined(offer, tmp_path)
    assert is_mistake(raised.value) is is_final


def test_which_errors_are_mistakes() -> None:
    mistakes = [AccessRefused("no"), WireError("what"), ConfigError("tls.ca", "no file")]
    assert all(map(is_mistake, mistakes))
    assert not any(map(is_mistake, [ConnectionRefusedError(), TimeoutError(), ArenaError("gone")]))


def test_nobody_is_waited_for_who_is_not_wanted_any_more(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        is_asked = threading.Event()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                server_handshake(Channel(sock), Everybody(), Peer("test", True), 1e9)
                assert is_asked.wait(DEADLINE_S)

        def is_given_up() -> bool:
            is_asked.set()
            return True

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TimeoutError, match="nobody waits"):
            join(parse_address(f"unix://{path}", "service"), "", TlsConfig(), HELLO, is_given_up)
        thread.join(DEADLINE_S)
