"""Joining a cache server on this machine: hello, welcome, and the descriptors that come with it.

What the server hands over is verified before anybody maps it: a sealed memory file of this user with the header of
the announced arena, and a pipe. Everything blocks, with deadlines; ``reconnecting`` calls it on a thread of its own.
"""

from __future__ import annotations

import array
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterable

from kvferry.connector import wire
from kvferry.connector.address import Address
from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.channel import Channel, Disconnected, unexpected
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import AccessRefused, ConfigError, KVFerryError, WireError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.link import Link, SocketLink

__all__ = ["JoinRefused", "Joined", "is_mistake", "join"]

_DIAL_S = 2.0
_WELCOME_S = 300.0
"""A server that opens the model's cache clears its memory first."""
_SLICE_S = 0.1
_MOST_FDS = 8
_ARENA_ID_BYTES = 16


class JoinRefused(KVFerryError):
    """The server does not want this engine.

    Args:
        refusal: What it said.
    """

    def __init__(self, refusal: wire.Refused) -> None:
        self.is_mistake = refusal.is_mistake
        super().__init__(f"the cache server refuses this engine ({refusal.code}): {refusal.why}")


class Joined:
    """A connection to a server, and the arena that came with it. Whoever holds it closes it."""

    def __init__(self, link: Link, handle: ArenaHandle, version: str, tiers: Iterable[str]) -> None:
        self.link = link
        self.handle = handle
        """Descriptors of this process."""
        self.version = version
        self.tiers = tuple(tiers)

    def close(self) -> None:
        """Close the connection and the descriptors: the arena's before the lifeline, see ``Arena.attach``."""
        self.link.close()
        os.close(self.handle.fd)
        os.close(self.handle.lifeline_fd)


def join(
    address: Address, token: str, tls: TlsConfig, hello: wire.Hello, is_given_up: Callable[[], bool]
) -> Joined:
    """Connect, introduce the engine and take over the arena.

    Args:
        address: Of a server on this machine.
        token: The credential; empty for none.
        tls: For ``dial``.
        hello: Who the engine is.
        is_given_up: Asked several times a second while the server prepares; True ends the wait.

    Raises:
        KVFerryError: The server, or this engine's configuration, is not as it should be; see ``is_mistake``.
        OSError: The server is away; ``TimeoutError`` when it does not answer.
    """
    channel = dial(address, token, tls, time.monotonic() + _DIAL_S)
    try:
        channel.send(hello, time.monotonic() + _DIAL_S)
        _wait_for_welcome(channel.socket, is_given_up)
        welcome, fds = _receive_welcome(channel)
        try:
            handle = _verified(welcome, fds, hello.layout)
        except BaseException:
            _close(fds)
            raise
    except BaseException:
        channel.close()
        raise
    return Joined(SocketLink(channel.socket), handle, welcome.version, welcome.tiers)


def is_mistake(error: Exception) -> bool:
    """Tell whether trying again is in vain before somebody corrects something."""
    if isinstance(error, JoinRefused):
        return error.is_mistake
    return isinstance(error, AccessRefused | ConfigError | WireError)


def _wait_for_welcome(sock: socket.socket, is_given_up: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WELCOME_S
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    while not poller.poll(_SLICE_S * 1e3):
        if is_given_up():
            raise TimeoutError("nobody waits for the cache server any more")
        if time.monotonic() >= deadline:
            raise TimeoutError(f"the cache server did not open the model's cache within {_WELCOME_S:g} s")


def _receive_welcome(channel: Channel) -> tuple[wire.Welcome, list[int]]:
    """Return the welcome and the descriptors that came with its first byte."""
    sock, deadline = channel.socket, time.monotonic() + _DIAL_S
    sock.settimeout(_DIAL_S)
    fds = array.array("i")
    space = socket.CMSG_SPACE(_MOST_FDS * fds.itemsize)
    start, control, flags, _ = sock.recvmsg(wire.LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    try:
        if not start:
            raise Disconnected("the cache server closed the connection")
        if flags & socket.MSG_CTRUNC:
            raise WireError("the cache server sent more descriptors than there may be")
        start += channel.receive(wire.LENGTH.size - len(start), deadline)
        reply = wire.decode_reply(channel.receive(wire.message_length(start), deadline))
        if isinstance(reply, wire.Refused):
            raise JoinRefused(reply)
        if not isinstance(reply, wire.Welcome):
            raise unexpected(reply)
    except BaseException:
        _close(fds)
        raise
    return reply, list(fds)


def _verified(welcome: wire.Welcome, fds: list[int], layout: BlockLayout) -> ArenaHandle:
    shape = welcome.arena
    if shape is None or len(fds) != 2:
        raise WireError(f"the cache server sent {len(fds)} descriptors and not an arena and its lifeline")
    if shape.slot_bytes != layout.slot_bytes or len(shape.arena_id) != _ARENA_ID_BYTES or shape.num_slots < 1:
        raise WireError(f"the cache server's arena is not one for these blocks: {shape}")
    handle = ArenaHandle(
        pid=os.getpid(),
        fd=fds[0],
        lifeline_fd=fds[1],
        arena_id=shape.arena_id,
        slot_bytes=shape.slot_bytes,
        num_slots=shape.num_slots,
        header_bytes=shape.header_bytes,
        total_bytes=shape.total_bytes,
    )
    Arena.verify(handle.fd, handle)
    if not stat.S_ISFIFO(os.fstat(handle.lifeline_fd).st_mode):
        raise WireError("the cache server's lifeline is no pipe")
    return handle


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
