"""What travels between a reader and an exporter of the ``socket`` transport.

The *offer* goes over the side channel: where to connect, and which life of the exporter is meant. On the connection,
after kvferry's handshake (numbers are little-endian):

    reader     length (u32), ``Opening`` as msgpack: the heads that it wants of every page
    exporter   verdict (u8)
    then, as often as the reader likes:
    reader     count (u32), that many page ids (i32 each)
    exporter   verdict (u8), and after an OK the pages in this order, each ``[head][layer][token][k_or_v][head_dim]``

After any verdict but OK the exporter closes the connection. It also does when it cannot go on in the middle of a page:
there is no way to say more then, and a reader that has less than it asked for uses none of it.

Functions without state; those that take a channel block until their deadline.
"""

from __future__ import annotations

import struct
import time
from enum import IntEnum
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.connector.address import Address, parse_address
from kvferry.connector.channel import Channel
from kvferry.connector.errors import ConfigError, WireError
from kvferry.connector.wire import LENGTH, message_length

__all__ = [
    "INCARNATION_BYTES",
    "MOST_PAGES",
    "VERSION",
    "Offer",
    "Opening",
    "Verdict",
    "receive_opening",
    "receive_request",
    "receive_verdict",
    "send_opening",
    "send_request",
    "send_verdict",
]

VERSION = 1
INCARNATION_BYTES = 16
MOST_PAGES = 8192
"""Pages of one request."""
_COUNT = struct.Struct("<I")
_VERDICT = struct.Struct("<B")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Incarnation = Annotated[bytes, msgspec.Meta(min_length=INCARNATION_BYTES, max_length=INCARNATION_BYTES)]


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where pages can be read."""

    version: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    incarnation: Incarnation
    """Random bytes, new whenever pages are exported: a port may belong to somebody else by now."""

    def encode(self) -> bytes:
        """Return the offer as it travels."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, offered: bytes) -> tuple[Offer, Address]:
        """Return what somebody offers, and the address in it.

        Raises:
            WireError: It is no offer, or none of this version.
        """
        try:
            offer = msgspec.msgpack.decode(offered, type=cls)
            if offer.version != VERSION:
                raise WireError(
                    f"the peer's socket transport has version {offer.version}, this one {VERSION}"
                )
            host = f"[{offer.host}]" if ":" in offer.host else offer.host
            return offer, parse_address(f"tcp://{host}:{offer.port}", "the peer's offer")
        except (*_UNREADABLE, ConfigError) as error:
            raise WireError(f"the peer's offer is none: {error}") from error


class Opening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a reader says first."""

    incarnation: Incarnation
    """The one that was offered."""
    first_head: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
    num_heads: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    page_bytes: Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
    """What the reader takes a page of these heads for."""


class Verdict(IntEnum):
    """What an exporter makes of what it was asked."""

    OK = 0
    STALE = 1
    HEADS = 2
    PAGES = 3
    BROKEN = 4


_WHY = {
    Verdict.OK: "",
    Verdict.STALE: "the peer has started anew since it offered its pages",
    Verdict.HEADS: "the peer does not hold these heads, or its pages have another size",
    Verdict.PAGES: "the peer does not have these pages",
    Verdict.BROKEN: "the peer cannot read its own pages; its log says why",
}


def send_opening(channel: Channel, opening: Opening, deadline: float) -> None:
    """Say which heads are wanted."""
    body = msgspec.msgpack.encode(opening)
    channel.send_bytes([LENGTH.pack(len(body)), body], deadline)


def receive_opening(channel: Channel, deadline: float) -> Opening:
    """Return what a reader says first.

    Raises:
        WireError: It is none.
    """
    length = message_length(channel.receive(LENGTH.size, deadline))
    try:
        return msgspec.msgpack.decode(channel.receive(length, deadline), type=Opening)
    except _UNREADABLE as error:
        raise WireError(f"a reader began with something else than an opening: {error}") from error


def send_request(channel: Channel, page_ids: npt.NDArray[np.int32], deadline: float) -> None:
    """Ask for at most ``MOST_PAGES`` pages."""
    channel.send_bytes([_COUNT.pack(len(page_ids)), page_ids.astype("<i4").tobytes()], deadline)


def receive_request(channel: Channel, idle_s: float, request_s: float) -> list[int]:
    """Return the page ids that a reader asks for next.

    Args:
        channel: From the reader.
        idle_s: Seconds that it may say nothing.
        request_s: Seconds that the request may take once it has begun.

    Raises:
        WireError: It asks for no pages, or for too many.
    """
    (count,) = _COUNT.unpack(channel.receive(_COUNT.size, time.monotonic() + idle_s))
    if not 0 < count <= MOST_PAGES:
        raise WireError(f"a reader asks for {count} pages at once, between 1 and {MOST_PAGES} may be")
    raw = channel.receive(4 * count, time.monotonic() + request_s)
    page_ids: list[int] = np.frombuffer(raw, "<i4").tolist()
    return page_ids


def send_verdict(channel: Channel, verdict: Verdict, deadline: float) -> None:
    """Say what becomes of what was asked."""
    channel.send_bytes([_VERDICT.pack(verdict)], deadline)


def receive_verdict(channel: Channel, deadline: float) -> None:
    """Return if the exporter does what it was asked.

    Raises:
        WireError: It does not; the message says why.
    """
    (code,) = _VERDICT.unpack(channel.receive(_VERDICT.size, deadline))
    if code not in _WHY:
        raise WireError(f"the peer's verdict is {code}, which means nothing")
    if code != Verdict.OK:
        raise WireError(_WHY[Verdict(code)])
