"""A channel: messages and raw bytes over one blocking socket, every call with a deadline.

Both ends of a streaming connection use it, and the handshake of every connection. Bytes of blocks go from and
into the memory they belong to, without a copy of ours in between.

Threading: one thread at a time, except ``interrupt``, which any thread may call to end what another waits for.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Sequence

from kvferry.connector import wire
from kvferry.connector.errors import WireError

__all__ = ["Channel", "Disconnected", "unexpected"]

_UNIX_BUFFER_BYTES = 4 << 20
"""TCP's buffers are left to the kernel, which fits them to the line as long as nobody has set them."""
_MOST_BUFFERS = 64
"""Buffers per ``sendmsg``; the kernel takes 1024."""


class Disconnected(ConnectionError):
    """The other end closed the connection."""


class Channel:
    """Messages over a connected stream socket.

    Every method that takes a ``deadline`` (seconds of ``time.monotonic``) blocks no longer than until then.

    Args:
        sock: Connected; owned by the channel from now on.

    Raises:
        TimeoutError: By every call, when the deadline passed. The connection is of no use any more.
        OSError: By every call, when the connection failed; ``Disconnected`` when the other end closed it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        if sock.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNIX_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @property
    def socket(self) -> socket.socket:
        """The socket itself, for what only it can do."""
        return self._sock

    def send(
        self,
        message: wire.Request | wire.Reply,
        deadline: float,
        payload: Sequence[memoryview | bytes | bytearray] = (),
    ) -> None:
        """Send a message and the raw bytes that follow it.

        Raises:
            WireError: The message is too long to be accepted by anybody; nothing was sent.
        """
        self.send_bytes([wire.encode(message), *payload], deadline)

    def send_bytes(self, buffers: Sequence[memoryview | bytes | bytearray], deadline: float) -> None:
        """Send buffers, one after the other."""
        left = [memoryview(buffer).cast("B") for buffer in buffers]
        while left:
            self._wait_at_most(deadline)
            # TLS has no sendmsg.
            sent = self._sock.send(left[0]) if self._is_tls else self._sock.sendmsg(left[:_MOST_BUFFERS])
            while left and sent >= len(left[0]):
                sent -= len(left[0])
                del left[0]
            if sent:
                left[0] = left[0][sent:]

    def receive_into(self, buffer: memoryview | bytearray, deadline: float) -> None:
        """Fill a buffer with the bytes that come next."""
        view = memoryview(buffer).cast("B")
        while view:
            self._wait_at_most(deadline)
            count = self._sock.recv_into(view)
            if not count:
                raise Disconnected("the other end closed the connection")
            view = view[count:]

    def receive(self, count: int, deadline: float) -> bytes:
        """Return the next ``count`` bytes; for few, as of a message or a handshake."""
        buffer = bytearray(count)
        self.receive_into(buffer, deadline)
        return bytes(buffer)

    def receive_request(self, deadline: float) -> wire.Request:
        """Return the client's next message.

        Raises:
            WireError: What came is none.
        """
        return wire.decode_request(self.receive_body(deadline))

    def receive_reply(self, deadline: float) -> wire.Reply:
        """Return the server's next message.

        Raises:
            WireError: What came is none.
        """
        return wire.decode_reply(self.receive_body(deadline))

    def receive_body(self, deadline: float) -> bytes:
        """Return the body of the next message, of whatever protocol.

        Raises:
            WireError: The length before it is out of bounds.
        """
        length = wire.message_length(self.receive(wire.LENGTH.size, deadline))
        return self.receive(length, deadline)

    def close(self) -> None:
        """Close the connection at once. Idempotent."""
        self.interrupt()
        self._sock.close()

    def interrupt(self) -> None:
        """End the connection at once; whoever waits for it gets an error, and closes it. Any thread; idempotent.

        The descriptor stays: its number could belong to another connection before the other thread notices. And TLS
        is not told: ``SSLSocket.shutdown`` would have the other thread write in clear what is left to write.
        """
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _wait_at_most(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer within the deadline")
        self._sock.settimeout(left)


def unexpected(reply: wire.Reply) -> WireError:
    """Return the error for a message that does not belong here."""
    return WireError(f"the server answered with {type(reply).__name__}, which is no answer to what was asked")
