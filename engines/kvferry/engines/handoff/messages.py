"""Messages of the side channel, over which an engine asks another for a request's pages.

Framed like those of the cache server (``framing``): a length, then a map in msgpack whose ``type`` names the message.
The handshake (``connector.handshake``) comes before the first one. Every request has one answer, in order.

Nothing that arrives is believed: lengths, counts and types are checked here, and whatever does not fit is a
``WireError``, after which the connection is closed. Docs: docs/reference/handoff-protocol.md.

Values and pure functions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec

from kvferry.connector.errors import WireError
from kvferry.connector.framing import framed
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff.params import MAX_NAME, MAX_TOKENS

__all__ = [
    "MAX_DIGEST_BYTES",
    "MAX_LEASES",
    "MAX_RANKS",
    "MAX_TEXT",
    "Check",
    "Checked",
    "Claim",
    "Claimed",
    "Digests",
    "DigestsAre",
    "Hello",
    "RefusalReason",
    "Refused",
    "Release",
    "Released",
    "Renew",
    "Renewed",
    "Reply",
    "Request",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
    "pack_pages",
    "unpack_pages",
]

MAX_LEASES = 256
"""Leases in one ``Renew``."""
MAX_RANKS = 256
MAX_TEXT = 1024
MAX_PAGE_BYTES = 1 << 19
MAX_DIGEST_BYTES = 1 << 19
"""Digests in one answer."""
_MAX_COUNT = 1 << 31

RefusalReason = Literal["refused", "incompatible", "gone", "content", "expired", "protocol"]
"""``protocol``: the request was none. The others are reasons of ``HandoffFailed``."""
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_COUNT)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class Hello(_Message, tag="hello"):
    """A reader's first message."""

    fingerprint: Digest
    """What its pages are exchanged under: the model, and all else that must agree for KV to be interchangeable, the
    order inside a page too (``keys.pages_fingerprint``)."""
    reader: Name
    """What it calls itself, for logs."""


class Welcome(_Message, tag="welcome"):
    """Answers ``Hello``."""

    incarnation: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    """Random bytes, new with every start of the engine."""
    engine_id: Name
    """The engine's name."""
    ranks: Annotated[list[RemotePages], msgspec.Meta(max_length=MAX_RANKS)]
    """Pages of each rank that exported them; none while the engine is still starting."""
    lease_s: Seconds
    """Seconds that a lease lives without being renewed."""


class Claim(_Message, tag="claim"):
    """Asks for a request's pages, and renews its lease."""

    request_id: Name
    """The request, as the other engine calls it."""
    reader: Name
    """Who reads: the same for all ranks of an engine, another for each request that reads."""
    num_tokens: Tokens
    """Tokens whose KV is wanted, from the first one on."""
    content: Digest
    """Digest of these tokens and all else that determines their KV (``keys.content_digest``)."""


class Claimed(_Message, tag="claimed"):
    """Answers ``Claim``."""

    seq: Seq
    """Names the lease."""
    num_tokens: Tokens
    """Tokens whose KV the pages hold."""
    pages: Annotated[bytes, msgspec.Meta(max_length=MAX_PAGE_BYTES)]
    """Page ids, 4 bytes each (little-endian), in the tokens' order; the same on every rank."""


class Renew(_Message, tag="renew"):
    """Renews leases."""

    leases: Annotated[list[tuple[Name, Name]], msgspec.Meta(min_length=1, max_length=MAX_LEASES)]
    """Pairs of request and reader, each as in ``Claim``."""


class Renewed(_Message, tag="renewed"):
    """Answers ``Renew``."""

    alive: Annotated[list[bool], msgspec.Meta(max_length=MAX_LEASES)]
    """For each lease, in order, whether it lives."""


class Check(_Message, tag="check"):
    """Asks whether a lease still lives; whoever has read pages may use them only if it does."""

    request_id: Name
    """As in ``Claim``."""
    seq: Seq
    """As in ``Claimed``."""


class Checked(_Message, tag="checked"):
    """Answers ``Check``."""

    ok: bool
    """True: the pages have not been given to anything else since the lease began."""


class Digests(_Message, tag="digests"):
    """Asks for digests of a lease's pages."""

    seq: Seq
    """As in ``Claimed``."""
    rank: Count
    """Whose pages."""
    first: Count
    """The first page asked for, counted in ``Claimed.pages``."""
    count: Annotated[int, msgspec.Meta(ge=1, lt=_MAX_COUNT)]
    """How many pages."""


class DigestsAre(_Message, tag="digests_are"):
    """Answers ``Digests``."""

    ready: bool
    """False: they are not there yet; ask again."""
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_DIGEST_BYTES)]
    """Page by page, XXH3-64 (8 bytes) for each head of the rank. Empty where the rank makes none."""


class Release(_Message, tag="release"):
    """Says that a reader needs the pages no more, or never will."""

    request_id: Name
    """As in ``Claim``."""
    reader: Name
    """As in ``Claim``."""


class Released(_Message, tag="released"):
    """Answers ``Release``, also where nothing was held."""


class Refused(_Message, tag="refused"):
    """Answers any request that is refused. After ``protocol`` and ``incompatible`` the connection is closed."""

    reason: RefusalReason
    """For programs."""
    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    """A sentence for people."""


Request = Hello | Claim | Renew | Check | Digests | Release
"""What a reader sends."""
Reply = Welcome | Claimed | Renewed | Checked | DigestsAre | Released | Refused
"""What it is answered."""

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """Return a message with its length before it.

    Raises:
        WireError: It is longer than anybody would accept.
    """
    return framed(_encoder.encode(message), type(message).__name__)


def decode_request(body: bytes) -> Request:
    """Return what a reader sent.

    Raises:
        WireError: It is no message, or one of its fields is not as it has to be.
    """
    return _decode(_requests, body)


def decode_reply(body: bytes) -> Reply:
    """Return what a reader was answered.

    Raises:
        WireError: It is no message, or one of its fields is not as it has to be.
    """
    return _decode(_replies, body)


def pack_pages(pages: Sequence[int]) -> bytes:
    """Return page ids as in ``Claimed``.

    Raises:
        WireError: They are more than fit, or an id is none.
    """
    if len(pages) * 4 > MAX_PAGE_BYTES:
        raise WireError(f"{len(pages)} pages are over {MAX_PAGE_BYTES // 4}")
    try:
        return struct.pack(f"<{len(pages)}I", *pages)
    except struct.error as error:
        raise WireError(f"a page id is out of bounds: {error}") from error


def unpack_pages(packed: bytes) -> tuple[int, ...]:
    """Return the page ids of a ``Claimed``.

    Raises:
        WireError: The bytes are no whole number of ids.
    """
    if len(packed) % 4:
        raise WireError(f"{len(packed)} bytes of page ids are no multiple of 4")
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def _decode(decoder: msgspec.msgpack.Decoder[_M], body: bytes) -> _M:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message of the handoff's side channel: {error}") from error
