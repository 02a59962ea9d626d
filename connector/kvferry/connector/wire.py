"""The wire: every message between a cache server and its clients, and how they are framed.

A message is a length (u32, little-endian) and so many bytes of msgpack: a map whose ``type`` names the
message. Block payloads are no messages: after a ``Block`` and after the answer to a ``Wanted`` they follow
as raw bytes, a frame header and a body each, whose lengths the message before them tells. The handshake
(``handshake``) comes before the first message.

Nothing that arrives is believed: lengths, counts and types are checked here, and whatever does not fit is a
``WireError``, after which the connection is closed. Docs: docs/reference/protocol.md.

How messages are cut out of a stream is ``framing``'s business. Values and pure functions.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvferry.connector.errors import WireError
from kvferry.connector.framing import (
    LENGTH,
    MAX_KEYS,
    MAX_MESSAGE_BYTES,
    MessageReader,
    framed,
    message_length,
    pack_keys,
    unpack_keys,
)
from kvferry.connector.keys import KEY_BYTES
from kvferry.connector.layout import BlockLayout
from kvferry.connector.service import MissReason

__all__ = [
    "LENGTH",
    "MAX_KEYS",
    "MAX_MESSAGE_BYTES",
    "MAX_TEXT",
    "PROTOCOL_VERSION",
    "Abort",
    "ArenaShape",
    "Block",
    "Clear",
    "Coming",
    "Commit",
    "Contains",
    "Delete",
    "Done",
    "Events",
    "Failed",
    "Found",
    "Goodbye",
    "Held",
    "Hello",
    "Lease",
    "Leased",
    "Load",
    "Lookup",
    "MessageReader",
    "Mode",
    "Ping",
    "Pong",
    "Prefetch",
    "RefusalCode",
    "Refused",
    "Release",
    "ReleaseOwner",
    "Reply",
    "Request",
    "Reserve",
    "Reserved",
    "Size",
    "Stats",
    "Store",
    "Stored",
    "Wanted",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
    "message_length",
    "pack_keys",
    "unpack_keys",
]

PROTOCOL_VERSION = 1
MAX_TEXT = 1024

Mode = Literal["map", "stream"]
"""``map``: a local engine that maps the arena. ``stream``: blocks travel over the connection."""
RefusalCode = Literal["protocol", "layout", "no_room", "mode", "draining", "internal"]
"""Why a client is refused, for programs."""
RequestId = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
"""Chosen by the client, repeated in the answer."""
GrantId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
"""A lease or reservation; 0 for none."""
Owner = Annotated[str, msgspec.Meta(max_length=256)]
"""For whom: a name of the client's choice, its own on every connection."""
Keys = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * MAX_KEYS)]
"""Block keys, one after the other."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Slots = Annotated[list[int], msgspec.Meta(max_length=MAX_KEYS)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Name = Annotated[str, msgspec.Meta(max_length=64)]


class _Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


# What opens a connection


class Hello(_Message, tag="hello"):
    """The client's first message: what it wants to be."""

    mode: Mode
    fingerprint: Digest
    """Of the model, lossy codecs included (``coding.block_fingerprint``)."""
    layout: BlockLayout
    """Geometry of the model's blocks."""
    engine: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """A name for reports."""
    wants_events: bool = False
    """``map`` only: send ``Events``."""


class ArenaShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Geometry of the arena whose descriptor comes with ``Welcome``; see ``arena.ArenaHandle``."""

    arena_id: bytes
    """16 random bytes, also in the arena's header."""
    slot_bytes: int
    """A block's payload, rounded up to whole pages of 4096 bytes."""
    num_slots: int
    """How many there are."""
    header_bytes: int
    """Offset of the first slot."""
    total_bytes: int
    """Length of the memory."""


class Welcome(_Message, tag="welcome"):
    """The answer to ``Hello``. For ``map`` two descriptors come with its first byte: the arena's memory, and
    the write end of a pipe, which every process that maps the arena holds open for as long."""

    server_id: Annotated[bytes, msgspec.Meta(max_length=16)]
    """16 random bytes, new with every start of the server."""
    version: Name
    """kvferry's version."""
    arena: ArenaShape | None = None
    """None for ``stream``."""
    tiers: list[Name] = []
    """Names of the tiers below the server's arena."""


class Refused(_Message, tag="refused"):
    """The server refuses what the last message asked for, and closes the connection."""

    code: RefusalCode
    why: Text
    """A sentence for people."""
    is_mistake: bool
    """True when trying again cannot help before somebody changes a configuration."""

    @classmethod
    def because(cls, code: RefusalCode, why: str, is_mistake: bool = False) -> Refused:
        """Return a refusal whose sentence is cut to what a message may hold."""
        return cls(code=code, why=why[:MAX_TEXT], is_mistake=is_mistake)


class Goodbye(_Message, tag="goodbye"):
    """The server is about to stop. What is under way is still taken in; then the connection closes."""


# Map mode. Requests with an id are answered in order; those without have no answer.


class Lookup(_Message, tag="lookup"):
    """See ``CacheService.lookup``."""

    id: RequestId
    keys: Keys


class Found(_Message, tag="found"):
    """Answers ``Lookup``."""

    id: RequestId
    ready: int
    """Leading blocks that lie in the arena."""
    reachable: int
    """Leading blocks that lie in the arena or in a tier that could bring them."""
    runs: list[tuple[Name, int]]
    """Tiers of the reachable blocks, run-length encoded."""
    missing: MissReason
    """Why the next one is missing."""


class Prefetch(_Message, tag="prefetch"):
    """See ``CacheService.prefetch``."""

    id: RequestId
    owner: Owner
    keys: Keys
    block_s: Seconds | None = None
    """Seconds in which the engine computes a block; what would come later is not brought. Null: everything is."""


class Coming(_Message, tag="coming"):
    """Answers ``Prefetch``."""

    id: RequestId
    blocks: int
    """Leading blocks that are there, on their way or asked for."""
    cut: MissReason
    """Why no further reachable one is; without meaning when all are."""
    expected_s: float | None = None
    """Seconds until the whole reachable prefix would be there; null when not known."""


class Lease(_Message, tag="lease"):
    """See ``CacheService.lease``."""

    id: RequestId
    owner: Owner
    keys: Keys


class Leased(_Message, tag="leased"):
    """Answers ``Lease``: the first blocks of its keys, in order."""

    id: RequestId
    lease: GrantId
    slots: Slots
    """A slot for each block."""
    generations: Slots
    """Each slot's generation, for as long as the block lies in it."""


class Release(_Message, tag="release"):
    """See ``CacheService.release``."""

    lease: GrantId


class Reserve(_Message, tag="reserve"):
    """See ``CacheService.reserve``."""

    id: RequestId
    owner: Owner
    keys: Keys


class Reserved(_Message, tag="reserved"):
    """Answers ``Reserve``."""

    id: RequestId
    reservation: GrantId
    indices: Slots
    """Which of the request's keys got a slot."""
    slots: Slots
    """A slot for each of ``indices``."""
    generations: Slots
    """Each slot's generation, for as long as it belongs to the block."""


class Commit(_Message, tag="commit"):
    """See ``CacheService.commit``."""

    reservation: GrantId
    keys: Keys


class Abort(_Message, tag="abort"):
    """See ``CacheService.abort``."""

    reservation: GrantId


class Failed(_Message, tag="failed"):
    """See ``CacheService.report_load_failed``."""

    keys: Keys


class ReleaseOwner(_Message, tag="release_owner"):
    """See ``CacheService.release_owner``."""

    owner: Owner


class Clear(_Message, tag="clear"):
    """Drop everything of this connection: leases, holds and the right to commit what it reserved."""


class Events(_Message, tag="events"):
    """Sent unasked to clients that want it; see ``service.ServiceEvent``."""

    kind: Literal["stored", "removed"]
    """Whether they can be loaded from now on, or no longer."""
    tier: Name
    """From where; ``host`` is the arena."""
    keys: Keys


class Ping(_Message, tag="ping"):
    """Asks for a ``Pong``."""

    id: RequestId


class Pong(_Message, tag="pong"):
    """Answers ``Ping``."""

    id: RequestId


# Stream mode: one request at a time.


class Contains(_Message, tag="contains"):
    """Which blocks could be loaded?"""

    id: RequestId
    keys: Keys
    wait_s: Seconds
    """How long the client waits for the answer; the server's own shared tiers are asked within it."""


class Held(_Message, tag="held"):
    """Answers ``Contains``: a byte for each key, 1 where it could be loaded."""

    id: RequestId
    held: Annotated[bytes, msgspec.Meta(max_length=MAX_KEYS)]
    """Bytes of 0 and 1."""


class Load(_Message, tag="load"):
    """Send these blocks. Answered by one ``Block`` for each, in whatever order they are there."""

    id: RequestId
    keys: Keys
    wait_s: Seconds
    """How long the client waits; what the server's tiers have not brought by then is missing."""


class Block(_Message, tag="block"):
    """One block of a ``Load``. If ``length`` is not 0, a frame header (``frame.HEADER_BYTES``) and a body of
    ``length`` bytes follow."""

    id: RequestId
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_KEYS)]
    """Which of the request's keys."""
    length: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    """Bytes of the body; 0: the block is not there."""


class Store(_Message, tag="store"):
    """Take these blocks. Answered by ``Wanted``."""

    id: RequestId
    keys: Keys


class Wanted(_Message, tag="wanted"):
    """Which blocks of a ``Store`` the server has room for and does not hold: the client sends a frame header and
    a whole payload for each of them, in this order and with nothing between, then waits for ``Stored``."""

    id: RequestId
    indices: Slots
    """Which of the request's keys."""


class Stored(_Message, tag="stored"):
    """What became of a ``Store``: for each key one of ``ok``, ``no_room`` and ``failed``."""

    id: RequestId
    outcomes: Annotated[list[Literal["ok", "no_room", "failed"]], msgspec.Meta(max_length=MAX_KEYS)]
    """``ok``: it is held now, whoever sent it, or somebody else is taking long to store it."""


class Delete(_Message, tag="delete"):
    """Forget these blocks: the arena's copies at once; copies in the server's own tiers are not offered for
    ``retry_failed_s``. Answered by ``Done``."""

    id: RequestId
    keys: Keys


class Done(_Message, tag="done"):
    """Answers ``Delete``."""

    id: RequestId


class Stats(_Message, tag="stats"):
    """How full is it? Answered by ``Size``."""

    id: RequestId


class Size(_Message, tag="size"):
    """Answers ``Stats``: the server's arena for this model."""

    id: RequestId
    blocks: int
    """Blocks that lie in it."""
    used_bytes: int
    """Bytes of the slots that are not free."""
    capacity_bytes: int
    """Bytes of all slots."""
    evictions: int
    """Blocks that made room for others so far."""


Request = (
    Hello
    | Lookup
    | Prefetch
    | Lease
    | Release
    | Reserve
    | Commit
    | Abort
    | Failed
    | ReleaseOwner
    | Clear
    | Ping
    | Contains
    | Load
    | Store
    | Delete
    | Stats
)
"""What a client sends."""

Reply = (
    Welcome
    | Refused
    | Goodbye
    | Found
    | Coming
    | Leased
    | Reserved
    | Events
    | Pong
    | Held
    | Block
    | Wanted
    | Stored
    | Done
    | Size
)
"""What a server sends."""

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """Return a message with its length before it.

    Raises:
        WireError: It is longer than anybody would accept.
    """
    return framed(_encoder.encode(message), type(message).__name__)


def decode_request(body: bytes | bytearray | memoryview) -> Request:
    """Return what a client sent.

    Raises:
        WireError: It is no message, or one of its fields is not as it has to be.
    """
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message of protocol version {PROTOCOL_VERSION}: {error}") from error


def decode_reply(body: bytes | bytearray | memoryview) -> Reply:
    """Return what a server sent.

    Raises:
        WireError: It is no message, or one of its fields is not as it has to be.
    """
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message of protocol version {PROTOCOL_VERSION}: {error}") from error
