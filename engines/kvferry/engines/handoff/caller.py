"""Calling another engine's side channel, one question at a time.

Whatever goes wrong is a ``HandoffFailed``. After ``timeout``, ``disconnected`` and ``incompatible`` the connection is
of no use any more; after the other reasons it is, except that ``refused`` calls for a new one, because the other engine
may have more to say of itself by then.

Threading: one thread at a time, except ``interrupt``. Every call blocks until its deadline, in seconds of
``time.monotonic``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import AccessRefused, HandoffFailed, WireError
from kvferry.connector.handshake import Busy
from kvferry.connector.layout import PageLayout
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff import messages
from kvferry.engines.handoff.digest import DIGEST_BYTES
from kvferry.engines.handoff.table import Claimed

__all__ = ["PeerCaller"]

_R = TypeVar("_R", bound=messages.Reply)


class PeerCaller:
    """A connection to another engine's side channel; made by :meth:`connect`.

    Args:
        channel: Past the handshake; the caller's from now on.
        fingerprint: 32 bytes; what this engine's blocks are keyed under.
        reader: What this engine calls itself.
        deadline: Until when it may take.

    Raises:
        HandoffFailed: The other side does not welcome us.
    """

    def __init__(self, channel: Channel, fingerprint: bytes, reader: str, deadline: float) -> None:
        self._channel = channel
        hello = messages.Hello(fingerprint=fingerprint, reader=reader)
        self._welcome = self._ask(hello, messages.Welcome, deadline)

    @classmethod
    def connect(
        cls, host: str, port: int, token: str, fingerprint: bytes, reader: str, deadline: float
    ) -> PeerCaller:
        """Connect to another engine.

        Args:
            host: Name or address, without brackets.
            port: Of its side channel.
            token: The credential of both sides; empty for none.
            fingerprint: 32 bytes; what this engine's blocks are keyed under.
            reader: What this engine calls itself.
            deadline: Until when it may take.

        Raises:
            HandoffFailed: ``unreachable``, ``refused``, ``incompatible``, ``timeout`` or ``disconnected``.
        """
        address = Address(scheme="tcp", host=host, port=port)
        try:
            channel = dial(address, token, TlsConfig(), deadline)
        except TimeoutError as error:
            raise HandoffFailed("timeout", str(error)) from error
        except AccessRefused as error:
            raise HandoffFailed("refused", str(error)) from error
        except WireError as error:
            raise HandoffFailed("incompatible", str(error)) from error
        except Busy as error:
            raise HandoffFailed("refused", f"{address}: it has as many connections as it may") from error
        except OSError as error:
            raise HandoffFailed("unreachable", str(error)) from error
        try:
            return cls(channel, fingerprint, reader, deadline)
        except BaseException:
            channel.close()
            raise

    @property
    def welcome(self) -> messages.Welcome:
        """What the other engine said of itself."""
        return self._welcome

    def claim(
        self, request_id: str, reader: str, num_tokens: int, content: bytes, deadline: float
    ) -> Claimed:
        """Ask for a request's pages; see ``HandoffTable.claim``.

        Returns:
            The lease, with exactly the pages of ``num_tokens`` tokens, each inside every rank's layout.

        Raises:
            HandoffFailed: ``refused``, ``gone``, ``content``, ``expired``, ``timeout``, ``disconnected`` or
                ``incompatible``.
        """
        layouts = self._layouts()
        claim = messages.Claim(request_id=request_id, reader=reader, num_tokens=num_tokens, content=content)
        claimed = self._ask(claim, messages.Claimed, deadline)
        with self._answers_checked():
            needed = -(-num_tokens // layouts[0].page_tokens)
            pages = messages.unpack_pages(claimed.pages)[:needed]
            if claimed.num_tokens < num_tokens or len(pages) < needed:
                raise WireError(
                    f"it has {len(pages)} pages for {num_tokens} tokens and calls them {claimed.num_tokens}"
                )
            if max(pages) >= min(layout.num_pages for layout in layouts):
                raise WireError("it named a page outside its own memory")
        return Claimed(claimed.seq, claimed.num_tokens, pages)

    def check(self, request_id: str, seq: int, deadline: float) -> None:
        """Return if the lease still lives, so that what was read before may be used.

        Raises:
            HandoffFailed: ``expired``: it does not; ``timeout``, ``disconnected`` or ``incompatible``.
        """
        if not self._ask(messages.Check(request_id=request_id, seq=seq), messages.Checked, deadline).ok:
            raise HandoffFailed("expired", "the lease was over before all had been read; see peer.lease_s")

    def digests(self, seq: int, rank: int, first: int, count: int, deadline: float) -> bytes | None:
        """Return what a rank digested of a lease's pages: ``DIGEST_BYTES`` for each page and each of its heads.

        Args:
            seq: The lease.
            rank: The rank, as its shard calls it.
            first: The first page, counted in the lease's.
            count: How many pages.
            deadline: Until when it may take.

        Returns:
            None: they are not there yet; empty: the rank makes none.

        Raises:
            HandoffFailed: ``expired``: the lease is over; ``timeout``, ``disconnected`` or ``incompatible``.
        """
        width = DIGEST_BYTES * self._rank(rank).shard.num_heads
        step = max(1, messages.MAX_DIGEST_BYTES // width)
        found = bytearray()
        for start in range(first, first + count, step):
            asked = min(step, first + count - start)
            question = messages.Digests(seq=seq, rank=rank, first=start, count=asked)
            answer = self._ask(question, messages.DigestsAre, deadline)
            if not answer.ready:
                return None
            if not answer.data and start == first:
                return b""
            with self._answers_checked():
                if len(answer.data) != asked * width:
                    raise WireError(
                        f"it sent {len(answer.data)} bytes of digests for {asked} pages of {width}"
                    )
            found += answer.data
        return bytes(found)

    def renew(self, leases: Sequence[tuple[str, str]], deadline: float) -> list[bool]:
        """Renew leases, and return for each whether it lives.

        Args:
            leases: Pairs of request and reader, at most ``messages.MAX_LEASES``.
            deadline: Until when it may take.

        Raises:
            HandoffFailed: ``timeout``, ``disconnected`` or ``incompatible``.
        """
        alive = self._ask(messages.Renew(leases=list(leases)), messages.Renewed, deadline).alive
        with self._answers_checked():
            if len(alive) != len(leases):
                raise WireError(f"it answered for {len(alive)} leases of {len(leases)}")
        return alive

    def release(self, request_id: str, reader: str, deadline: float) -> None:
        """Say that a reader needs the pages no more.

        Raises:
            HandoffFailed: ``timeout``, ``disconnected`` or ``incompatible``.
        """
        self._ask(messages.Release(request_id=request_id, reader=reader), messages.Released, deadline)

    def interrupt(self) -> None:
        """End what another thread waits for; it gets ``disconnected``. Any thread; idempotent."""
        self._channel.interrupt()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()

    def _ask(self, request: messages.Request, kind: type[_R], deadline: float) -> _R:
        with self._answers_checked():
            self._channel.send_bytes([messages.encode(request)], deadline)
            reply = messages.decode_reply(self._channel.receive_body(deadline))
            if isinstance(reply, kind):
                return reply
            if not isinstance(reply, messages.Refused):
                raise WireError(f"it answered {type(request).__name__} with {type(reply).__name__}")
            if reply.reason == "protocol":
                raise WireError(f"it does not understand us: {_line(reply.text)}")
            raise HandoffFailed(reply.reason, _line(reply.text))

    @contextlib.contextmanager
    def _answers_checked(self) -> Iterator[None]:
        """Close the connection after what it cannot go on from, and say so in one kind of error."""
        try:
            yield
        except TimeoutError as error:
            self.close()
            raise HandoffFailed("timeout", "the peer did not answer within the deadline") from error
        except OSError as error:
            self.close()
            raise HandoffFailed("disconnected", f"the peer went away: {error}") from error
        except WireError as error:
            self.close()
            raise HandoffFailed("incompatible", str(error)) from error

    def _layouts(self) -> list[PageLayout]:
        layouts = [pages.layout for pages in self._welcome.ranks]
        if not layouts:
            raise HandoffFailed("refused", "the peer's workers had not exported their pages yet")
        if len({layout.page_tokens for layout in layouts}) > 1 or layouts[0].page_tokens < 1:
            raise HandoffFailed("incompatible", "the peer's ranks have pages of different sizes")
        return layouts

    def _rank(self, rank: int) -> RemotePages:
        for pages in self._welcome.ranks:
            if pages.shard.rank == rank and pages.shard.num_heads > 0:
                return pages
        raise HandoffFailed("incompatible", f"the peer has no rank {rank}")


def _line(text: str) -> str:
    """Return somebody else's sentence so that it is one line of a log."""
    return text if text.isprintable() else repr(text)
