"""A TCP proxy on loopback whose line can be cut or stalled."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self

__all__ = ["Proxy"]

_CHUNK = 64 << 10
_TURN_S = 0.02


class Proxy:
    """Forwards connections to a port of this machine. Use it as a context manager.

    One thread carries every connection, so a stall holds all of them.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._flows = threading.Event()
        self._flows.set()
        self._ended = threading.Event()
        self._is_cut = False
        self._lock = threading.Lock()
        self.forwarded_bytes = 0
        self._thread = threading.Thread(target=self._run, name="test-proxy", daemon=True)
        self._thread.start()

    def stall(self) -> None:
        """Forward nothing any more; connections stay open and new ones are taken by the kernel."""
        self._flows.clear()

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        with self._lock:
            self._is_cut = True
            self._close_all()

    def mend(self) -> None:
        """Forward again."""
        with self._lock:
            self._is_cut = False
        self._flows.set()

    def close(self) -> None:
        self._ended.set()
        self._flows.set()
        self._thread.join(10.0)
        self._listener.close()
        with self._lock:
            self._close_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._flows.wait()
            with self._lock:
                watched = [self._listener, *self._pairs]
            try:
                ready, _, _ = select.select(watched, [], [], _TURN_S)
            except (OSError, ValueError):
                continue  # cut while it was watched
            if not self._flows.is_set():
                continue
            for sock in ready:
                if sock is self._listener:
                    self._accept()
                else:
                    self._forward(sock)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        with self._lock:
            if self._is_cut:
                near.close()
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                return
            self._pairs |= {near: far, far: near}

    def _forward(self, sock: socket.socket) -> None:
        with self._lock:
            other = self._pairs.get(sock)
            if other is None:
                return
            try:
                data = sock.recv(_CHUNK)
                if data:
                    other.sendall(data)
                    self.forwarded_bytes += len(data)
                    return
            except OSError:
                pass
            for one in (sock, other):
                self._pairs.pop(one, None)
                one.close()

    def _close_all(self) -> None:
        for sock in self._pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._pairs.clear()
