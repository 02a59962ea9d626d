"""A link never blocks: what does not fit waits, what is not complete waits, and a server that is stuck is left."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from kvferry.connector import link as link_module
from kvferry.connector import wire
from kvferry.connector.channel import Disconnected
from kvferry.connector.errors import WireError
from kvferry.connector.link import MAX_UNSENT_BYTES, SocketLink

DEADLINE_S = 10.0
LARGE = wire.Failed(keys=bytes(32 * 4096))


@pytest.fixture
def ends() -> Iterator[tuple[SocketLink, socket.socket]]:
    own, other = socket.socketpair()
    other.settimeout(DEADLINE_S)
    link = SocketLink(own)
    yield link, other
    link.close()
    other.close()


def test_messages_arrive_whole_however_they_are_cut(ends: tuple[SocketLink, socket.socket]) -> None:
    link, other = ends
    data = wire.encode(wire.Pong(id=1)) + wire.encode(wire.Pong(id=2))
    replies: list[wire.Reply] = []
    for index in range(len(data)):
        other.sendall(data[index : index + 1])
        link.wait(DEADLINE_S)
        replies += link.receive()
    assert replies == [wire.Pong(id=1), wire.Pong(id=2)]
    assert link.receive() == []


def test_what_the_kernel_does_not_take_is_sent_later(ends: tuple[SocketLink, socket.socket]) -> None:
    link, other = ends
    for _ in range(6):
        link.send(LARGE)
    reader, messages = wire.MessageReader(), 0
    while messages < 6:
        messages += len(list(reader.feed(other.recv(1 << 16))))
        link.receive()
    link.send(wire.Ping(id=1))
    assert list(reader.feed(other.recv(1 << 16))) == [wire.encode(wire.Ping(id=1))[wire.LENGTH.size :]]


def test_a_server_that_takes_nothing_is_left(ends: tuple[SocketLink, socket.socket]) -> None:
    link, _ = ends
    sent = 0

    def send_on() -> None:
        nonlocal sent
        while sent < 100:
            link.send(LARGE)
            sent += 1

    with pytest.raises(OSError, match="does not take"):
        send_on()
    assert sent >= MAX_UNSENT_BYTES // len(wire.encode(LARGE)), "a short stall is no reason"


def test_what_came_before_the_end_is_taken_in(ends: tuple[SocketLink, socket.socket]) -> None:
    link, other = ends
    other.sendall(wire.encode(wire.Goodbye()))
    other.close()
    assert link.receive() == [wire.Goodbye()]
    with pytest.raises(Disconnected):
        link.receive()


def test_nonsense_is_an_error(ends: tuple[SocketLink, socket.socket]) -> None:
    link, other = ends
    other.sendall(bytes(8))
    with pytest.raises(WireError):
        link.receive()


@pytest.mark.parametrize("most_descriptors", [1024, 0], ids=["select", "poll"])
def test_a_wait_ends_with_its_time_or_with_news(
    ends: tuple[SocketLink, socket.socket], monkeypatch: pytest.MonkeyPatch, most_descriptors: int
) -> None:
    monkeypatch.setattr(link_module, "_FD_SETSIZE", most_descriptors)
    link, other = ends
    link.wait(0.001)
    other.sendall(wire.encode(wire.Pong(id=1)))
    started = time.monotonic()
    link.wait(DEADLINE_S)
    assert time.monotonic() - started < DEADLINE_S / 2
    assert link.receive() == [wire.Pong(id=1)]
