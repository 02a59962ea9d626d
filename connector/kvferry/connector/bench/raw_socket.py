"""Blocks over a plain socket, and nothing else: what a streaming client is held against.

``serve`` is a process that sends blocks out of its memory, or takes them into it; one request is a verb and a range
of blocks. The other side is ``RawSocket``, with a connection for each thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchSkipped
from kvferry.connector.bench.tier_side import Slots
from kvferry.connector.layout import BlockLayout

__all__ = ["RawSocket", "raw_server", "serve"]

_REQUEST = struct.Struct("<cII")
_PULL, _PUSH, _DONE = b"<", b">", b"."
_MAIN = "import sys; from kvferry.connector.bench.raw_socket import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


@contextlib.contextmanager
def raw_server(count: int, block_bytes: int) -> Iterator[int]:
    """Run a process that serves ``count`` blocks on loopback, and yield its port."""
    command = [sys.executable, "-c", _MAIN, str(count), str(block_bytes)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise BenchSkipped("the raw side's server did not start")
            yield int(line)
        finally:
            process.kill()


def serve(count: int, block_bytes: int) -> None:
    """Serve forever; the port is the first line of the output."""
    memory = memoryview(mmap.mmap(-1, count * block_bytes))
    pattern = os.urandom(block_bytes)
    blocks = [memory[at : at + block_bytes] for at in range(0, len(memory), block_bytes)]
    for block in blocks:
        block[:] = pattern
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            sock, _ = listening.accept()
            threading.Thread(
                target=_answer, args=(sock, blocks), name="kvferry-bench-raw", daemon=True
            ).start()


def _answer(sock: socket.socket, blocks: list[memoryview]) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock:
        while request := sock.recv(_REQUEST.size, socket.MSG_WAITALL):
            verb, first, end = _REQUEST.unpack(request)
            for block in blocks[first:end]:
                if verb == _PULL:
                    sock.sendall(block)
                else:
                    _fill(sock, block)
            if verb == _PUSH:
                sock.sendall(_DONE)


def _fill(sock: socket.socket, block: memoryview) -> None:
    while block:
        count = sock.recv_into(block)
        if not count:
            raise ConnectionError("the other end closed the connection")
        block = block[count:]


class RawSocket(Slots):
    """Pulls blocks into slots and pushes them out of slots, without a header, a key or a look at them.

    Args:
        port: Of a ``raw_server`` with as many blocks as the arena has slots.
        layout: Of the blocks.
        arena: One slot for each block of a round.
        threads: Who calls.
    """

    def __init__(self, port: int, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        super().__init__(layout, arena, threads)
        self._length = layout.payload_bytes
        self._port = port
        self._local = threading.local()
        self._sockets: list[socket.socket] = []

    def load(self, _: int) -> None:
        """Pull every block."""
        self.everywhere(self._pull)

    def store(self, _: int) -> None:
        """Push every block."""
        self.everywhere(self._push)

    def close(self) -> None:
        """Disconnect."""
        for sock in self._sockets:
            sock.close()

    def _pull(self, indices: range) -> None:
        sock = self._socket()
        sock.sendall(_REQUEST.pack(_PULL, indices.start, indices.stop))
        for index in indices:
            _fill(sock, self.slots[index][: self._length])

    def _push(self, indices: range) -> None:
        sock = self._socket()
        sock.sendall(_REQUEST.pack(_PUSH, indices.start, indices.stop))
        for index in indices:
            sock.sendall(self.slots[index][: self._length])
        if sock.recv(1) != _DONE:
            raise BenchSkipped("the raw side's server has ended")

    def _socket(self) -> socket.socket:
        sock: socket.socket | None = getattr(self._local, "sock", None)
        if sock is None:
            sock = self._local.sock = socket.create_connection(("127.0.0.1", self._port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(sock)
        return sock
