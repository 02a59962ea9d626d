"""The reading side of the ``socket`` transport: pages come through a bounce buffer into the rank's own.

Whoever calls ``read`` receives and scatters on its own thread, so nothing lands after it has returned or raised.

Threading: ``read`` by one thread at a time; ``close`` by any, also while another one reads: it ends the read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import AccessRefused, HandoffFailed, LayoutError, WireError
from kvferry.connector.transport import Heads, PageIds, PageMemory, RemotePages
from kvferry.plugins.peer import socket_wire as wire
from kvferry.plugins.peer.socket_exporter import IDLE_S
from kvferry.plugins.peer.socket_pieces import PieceBuffer
from kvferry.plugins.peer.socket_wire import Offer, Opening

__all__ = ["SocketReader", "common_heads"]

_CLOSE_S = 5.0


def common_heads(remote: RemotePages, own: PageMemory) -> Heads:
    """Return the heads that both ranks hold.

    Raises:
        HandoffFailed: ``incompatible``: none, or the pages do not go together.
    """
    try:
        remote.check(own)
    except LayoutError as error:
        raise HandoffFailed("incompatible", str(error)) from error
    first = max(own.heads.first, remote.shard.first_head)
    end = min(own.heads.end, remote.shard.first_head + remote.shard.num_heads)
    if first >= end:
        raise HandoffFailed("incompatible", f"{remote.shard} has none of the heads of {own.shard}")
    return Heads(first, end - first)


class SocketReader:
    """Reads pages of one rank through a TCP socket.

    Args:
        remote: What the rank says of its pages.
        offered: What it offers for this transport.
        own: Where pages go.
        token: The credential; empty for none.
        deadline: ``time.monotonic`` until which connecting may take.

    Raises:
        HandoffFailed: ``incompatible``, ``transport``, ``refused``, ``unreachable`` or ``timeout``.
    """

    def __init__(
        self, remote: RemotePages, offered: bytes, own: PageMemory, token: str, deadline: float
    ) -> None:
        heads = common_heads(remote, own)
        self._token = token
        self._num_remote = remote.layout.num_pages
        self._num_own = own.layout.num_pages
        self._reading = threading.Lock()
        self._is_closed = False
        with _as_failures("unreachable"):
            offer, self._address = Offer.decode(offered)
            self._opening = Opening(
                incarnation=offer.incarnation,
                first_head=heads.first,
                num_heads=heads.count,
                page_bytes=own.page_bytes(heads),
            )
            self._buffer = PieceBuffer(own, heads)
            self._channel = _open(self._address, token, self._opening, deadline)
        self._stale_at = time.monotonic() + IDLE_S / 2

    @property
    def description(self) -> str:
        """How bytes travel."""
        return f"socket, copied through host memory, from {self._address}"

    def read(self, remote_pages: PageIds, local_pages: PageIds, deadline: float) -> None:
        """Copy pages. See ``transport.PageReader``.

        Raises:
            HandoffFailed: ``timeout``, ``disconnected`` or ``transport``; the reader is closed.
        """
        with self._reading:
            try:
                if self._is_closed:
                    raise HandoffFailed("disconnected", "this reader is closed")
                self._check(remote_pages, local_pages)
                with _as_failures("disconnected"):
                    self._read(remote_pages, local_pages, deadline)
            except BaseException:
                self._is_closed = True
                self._channel.close()
                raise

    def close(self) -> None:
        """Disconnect; a read that is under way ends with an error. Idempotent."""
        self._is_closed = True
        self._channel.interrupt()
        if self._reading.acquire(timeout=_CLOSE_S):
            self._channel.close()
            self._reading.release()

    def _check(self, remote_pages: PageIds, local_pages: PageIds) -> None:
        if len(remote_pages) != len(local_pages):
            why = f"{len(remote_pages)} pages are to be read into {len(local_pages)}"
            raise HandoffFailed("transport", why)
        for whose, pages, count in (
            ("the peer's", remote_pages, self._num_remote),
            ("the engine's", local_pages, self._num_own),
        ):
            if len(pages) and not (pages.min() >= 0 and pages.max() < count):
                raise HandoffFailed("transport", f"page ids are outside {whose} {count} pages")
        if len(np.unique(local_pages)) != len(local_pages):
            raise HandoffFailed("transport", "two pages are to be read into one")

    def _read(self, remote_pages: PageIds, local_pages: PageIds, deadline: float) -> None:
        for start in range(0, len(remote_pages), wire.MOST_PAGES):
            if time.monotonic() >= self._stale_at:
                self._reopen(deadline)
            request = slice(start, start + wire.MOST_PAGES)
            wire.send_request(self._channel, remote_pages[request], deadline)
            wire.receive_verdict(self._channel, deadline)
            for piece in self._buffer.pieces(local_pages[request].tolist()):
                self._channel.receive_into(piece.data, deadline)
                piece.scatter()
            self._stale_at = time.monotonic() + IDLE_S / 2

    def _reopen(self, deadline: float) -> None:
        """The exporter ends connections that are idle for long."""
        self._channel.close()
        self._channel = _open(self._address, self._token, self._opening, deadline)
        if self._is_closed:
            raise WireError("this reader is closed")


def _open(address: Address, token: str, opening: Opening, deadline: float) -> Channel:
    channel = dial(address, token, TlsConfig(), deadline)
    try:
        wire.send_opening(channel, opening, deadline)
        wire.receive_verdict(channel, deadline)
    except BaseException:
        channel.close()
        raise
    return channel


@contextmanager
def _as_failures(when_gone: str) -> Iterator[None]:
    """Turn what can go wrong into ``HandoffFailed``, a broken connection into ``when_gone``."""
    try:
        yield
    except HandoffFailed:
        raise
    except TimeoutError as error:
        raise HandoffFailed("timeout", f"the peer did not deliver in time: {error}") from error
    except OSError as error:
        raise HandoffFailed(when_gone, f"the connection to the peer's pages: {error}") from error
    except AccessRefused as error:
        raise HandoffFailed("refused", str(error)) from error
    except WireError as error:
        raise HandoffFailed("transport", str(error)) from error
    except Exception as error:  # boundary: staging is the engine's
        raise HandoffFailed("transport", f"pages cannot be copied: {error!r}") from error
