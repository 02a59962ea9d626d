"""A cache server that lies: it lets everybody in, and answers with whatever a test makes up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from kvferry.connector import wire
from kvferry.connector.channel import Channel
from kvferry.connector.errors import KVFerryError
from kvferry.connector.handshake import Grant, Peer, server_handshake

__all__ = ["Answer", "Liar", "lying"]

WELCOME = wire.Welcome(server_id=bytes(16), version="0")
PATIENCE_S = 30.0

Answer = Callable[[Channel, wire.Request, float], None]
"""Answers a request on a channel until a deadline."""


class _Everybody:
    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        return Grant("", "")


class Liar:
    """Serves each connection on a thread of its own, until ``close``."""

    def __init__(self, answer: Answer, greeting: wire.Reply = WELCOME) -> None:
        self._answer = answer
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._channels: list[Channel] = []
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept, name="liar", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for channel in self._channels:
            channel.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._channels.append(Channel(sock))
                self._threads.append(
                    threading.Thread(target=self._serve, args=(self._channels[-1],), name="liar", daemon=True)
                )
                self._threads[-1].start()

    def _serve(self, channel: Channel) -> None:
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.suppress(OSError, KVFerryError):
            server_handshake(channel, _Everybody(), Peer("somebody", is_loopback=True), deadline)
            channel.receive_request(deadline)
            channel.send(self._greeting, deadline)
            while True:
                request = channel.receive_request(deadline)
                if isinstance(request, wire.Stats):
                    size = wire.Size(id=request.id, blocks=0, used_bytes=0, capacity_bytes=1, evictions=0)
                    channel.send(size, deadline)
                else:
                    self._answer(channel, request, deadline)
        channel.close()


@contextlib.contextmanager
def lying(answer: Answer, greeting: wire.Reply = WELCOME) -> Iterator[Liar]:
    liar = Liar(answer, greeting)
    try:
        yield liar
    finally:
        liar.close()
