"""Messages that nobody should send: right ones with hostile values, almost right ones, and garbage.

Everything is drawn from a ``random.Random``, so that a seed tells the whole story. Framed bytes come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import TypeVar

import msgspec
from server_kit import FINGERPRINT, LAYOUT, prefix

from kvferry.connector import wire
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.service import MissReason

__all__ = ["GOOD_KEYS", "Forge", "any_reply", "any_request"]

GOOD_KEYS = prefix(8, "good")
"""Others ask for these, take them away and claim them; only the good engine fills them."""
BAD_KEYS = [key for salt in ("bad", "worse") for key in prefix(24, salt)]
MANY = 500
"""One in so many lists of keys is as long as it may be."""

IDS = (1, 2, 3, 7, (1 << 31) - 1, 1 << 32, (1 << 53) - 1)
GRANTS = (0, 1, 2, 3, 17, 1 << 32, (1 << 53) - 1)
NAMES = ("", "reader", "engine-0/reader", "../..", "\0", "é" * 256, "x" * 256, "0")
WRONG: tuple[object, ...] = (
    None, True, -1, 0, 1 << 53, 1 << 63, (1 << 64) - 1, -(1 << 63), float("nan"), float("inf"), -0.5, 3600.5,
    "", "x" * 257, "x" * 5000, "\U0001f600", b"", b"short", bytes(KEY_BYTES), bytes(KEY_BYTES * 8193),
    [], [[]], {}, {"type": "lookup"}, [0] * 9000, [-1], [1 << 60], ["host", 1], msgspec.msgpack.Ext(-1, bytes(12)),
    msgspec.msgpack.Ext(5, b"abc"),
)  # fmt: skip
"""In place of any field, whatever its type."""
SPLICED = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xdc\xff\xff", b"\x91" * 3000, b"\x81\xa1a" * 3000, b"\xc1", b"\xff", b"\xcf" + b"\xff" * 8, b"\xa4type",
    b"\xd9\x01\xff", b"\xcb\x7f\xf8" + bytes(6), b"\xc9\xff\xff\xff\xff\xff",
)  # fmt: skip
"""Announced counts that nothing follows, nesting, and what is no msgpack at all."""

T = TypeVar("T")


class Forge:
    """Makes messages for one connection.

    Args:
        random: Where every choice comes from.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self.reservations: dict[int, list[BlockKey]] = {}
        """Those of this connection that it has not settled."""
        self.grants: deque[int] = deque(GRANTS, maxlen=32)
        """Ids of leases and reservations, its own and of others, that were heard of."""
        self._has_cleared = False

    # What has a place on a connection that maps the arena

    def map_request(self) -> wire.Request:
        """Return a message that the server has to take, however senseless."""
        random = self._random
        id_ = random.choice(IDS)
        match random.choices(range(11), (6, 4, 8, 12, 10, 3, 4, 3, 2, 1, 1))[0]:
            case 0:
                return wire.Lookup(id=id_, keys=self.keys())
            case 1:
                block_s = random.choice((None, None, 0.0, 1e-300, 0.5, 3600.0))
                return wire.Prefetch(id=id_, owner=self.name(), keys=self.keys(), block_s=block_s)
            case 2:
                return wire.Lease(id=id_, owner=self.name(), keys=self.keys())
            case 3:
                return wire.Reserve(id=id_, owner=self.name(), keys=self.keys(own=True))
            case 4 if self.reservations:
                reservation, keys = self.pop_reservation()
                some = random.sample(keys, random.randint(0, len(keys)))
                return wire.Commit(reservation=reservation, keys=wire.pack_keys(some + some[:1]))
            case 5 if self.reservations:
                return wire.Abort(reservation=self.pop_reservation()[0])
            case 6:
                return wire.Release(lease=random.choice(self.grants))
            case 7:
                return wire.ReleaseOwner(owner=self.name())
            case 8:
                return wire.Failed(keys=self.keys())
            case 9:
                self._has_cleared = True
                return wire.Clear()
            case _:
                return wire.Ping(id=id_)

    def map_breach(self) -> wire.Request:
        """Return a message that has to end the connection, well-formed as it is."""
        random = self._random
        id_ = random.choice(IDS)
        strangers = [grant for grant in self.grants if grant not in self.reservations]
        breaches: list[wire.Request] = [
            wire.Commit(reservation=random.choice(strangers), keys=self.keys()),
            wire.Abort(reservation=random.choice(strangers)),
            wire.Hello(mode="map", fingerprint=FINGERPRINT, layout=LAYOUT),
            wire.Load(id=id_, keys=self.keys(), wait_s=3600.0),
            wire.Store(id=id_, keys=self.keys()),
            wire.Contains(id=id_, keys=self.keys(), wait_s=0.0),
            wire.Delete(id=id_, keys=self.keys()),
            wire.Stats(id=id_),
            wire.Lookup(id=id_, keys=self.ragged()),
            wire.Reserve(id=id_, owner="", keys=self.ragged()),
            wire.Failed(keys=self.ragged()),
        ]
        if self.reservations and not self._has_cleared:  # of void ones nobody looks at the keys
            own = random.choice(list(self.reservations))
            breaches.append(wire.Commit(reservation=own, keys=random.choice(GOOD_KEYS)))
        return random.choice(breaches)

    # What has a place on a streaming connection

    def stream_request(self) -> wire.Request:
        """Return a message that the server has to answer."""
        random = self._random
        id_, wait_s = random.choice(IDS), random.choice((0.0, -0.0, 1e-9, 0.01, 3600.0))
        match random.choices(range(6), (6, 6, 4, 2, 2, 2))[0]:
            case 0:
                return wire.Load(id=id_, keys=self.keys(), wait_s=wait_s)
            case 1:
                return wire.Store(id=id_, keys=self.keys(own=True))
            case 2:
                return wire.Contains(id=id_, keys=self.keys(), wait_s=wait_s)
            case 3:
                return wire.Delete(id=id_, keys=self.keys())
            case 4:
                return wire.Stats(id=id_)
            case _:
                return wire.Ping(id=id_)

    def stream_breach(self) -> wire.Request:
        """Return a well-formed message that has to end a streaming connection."""
        random = self._random
        id_ = random.choice(IDS)
        return random.choice(
            [
                wire.Hello(mode="stream", fingerprint=FINGERPRINT, layout=LAYOUT),
                wire.Lookup(id=id_, keys=self.keys()),
                wire.Reserve(id=id_, owner="", keys=self.keys()),
                wire.Lease(id=id_, owner=self.name(), keys=self.keys()),
                wire.Commit(reservation=random.choice(self.grants), keys=self.keys()),
                wire.Clear(),
                wire.ReleaseOwner(owner=self.name()),
                wire.Load(id=id_, keys=self.ragged(), wait_s=1.0),
                wire.Store(id=id_, keys=self.ragged()),
                wire.Delete(id=id_, keys=self.ragged()),
            ]
        )

    # What is no message, or nearly one

    def spoilt(self, message: wire.Request | wire.Reply) -> bytes:
        """Return a message with something wrong in it; now and then nothing is."""
        framed = wire.encode(message)
        return self._random.choice((self.with_wrong_field, self.flipped, self.cut, self.spliced, self.lying))(
            framed
        )

    def garbage(self) -> bytes:
        """Return bytes of no meaning."""
        random = self._random
        body = random.randbytes(random.choice((0, 1, 3, 4, 5, 17, 100, 1000, 5000)))
        return body if random.random() < 0.5 else _framed(body)

    def with_wrong_field(self, framed: bytes) -> bytes:
        """A field is of another type, out of bounds, missing or unheard of."""
        random = self._random
        fields = msgspec.msgpack.decode(framed[wire.LENGTH.size :])
        name = random.choice(list(fields))
        match random.randrange(8):
            case 0:
                del fields[name]
            case 1:
                fields[random.choice(NAMES)] = random.choice(WRONG)
            case 2:
                fields["type"] = random.choice(("", "welcome", "lookup", "load", "nothing", "leased"))
            case _:
                fields[name] = random.choice(WRONG)
        return _framed(msgspec.msgpack.encode(fields))

    def flipped(self, framed: bytes) -> bytes:
        """Some bits are not what they were, the length is."""
        random, body = self._random, bytearray(framed[wire.LENGTH.size :])
        for _ in range(random.choice((1, 1, 2, 8))):
            body[random.randrange(min(len(body), 200))] ^= 1 << random.randrange(8)
        return _framed(bytes(body))

    def cut(self, framed: bytes) -> bytes:
        """The end is missing, with or without a length that says so."""
        body = framed[wire.LENGTH.size :]
        kept = body[: self._random.randrange(len(body))]
        return _framed(kept) if self._random.random() < 0.5 else framed[: wire.LENGTH.size] + kept

    def spliced(self, framed: bytes) -> bytes:
        """Something is put in, or in the place of what was there."""
        random, body = self._random, framed[wire.LENGTH.size :]
        at, taken = random.randrange(len(body) + 1), random.choice((0, 0, 1, 5, 40))
        return _framed(body[:at] + random.choice(SPLICED) + body[at + taken :])

    def lying(self, framed: bytes) -> bytes:
        """The length is another."""
        real = len(framed) - wire.LENGTH.size
        length = self._random.choice((0, 1, real - 1, real + 1, wire.MAX_MESSAGE_BYTES, (1 << 32) - 1))
        return wire.LENGTH.pack(max(0, length)) + framed[wire.LENGTH.size :]

    # Parts

    def keys(self, own: bool = False) -> bytes:
        """Return keys of the good engine's, or of ``own`` alone, one after the other."""
        random = self._random
        pool = BAD_KEYS if own or random.random() < 0.7 else GOOD_KEYS
        if random.randrange(MANY) == 0:
            first = random.randrange(1 << 20)
            many = (number.to_bytes(KEY_BYTES, "little") for number in range(first, first + wire.MAX_KEYS))
            return b"".join(many) if random.random() < 0.5 else pool[0] * wire.MAX_KEYS
        match random.randrange(4):
            case 0:
                return b""
            case 1:
                return wire.pack_keys(random.choices(pool, k=random.randint(1, 6)))
            case _:
                first = random.choice((0, 0, 0, 1, 5))
                return wire.pack_keys(pool[first : first + random.randint(1, 10)])

    def ragged(self) -> bytes:
        """Return what is no whole number of keys."""
        return self.keys()[: KEY_BYTES * 100] + bytes(self._random.randint(1, KEY_BYTES - 1))

    def name(self) -> str:
        """Return an owner."""
        return self._random.choice(NAMES)

    def pop_reservation(self) -> tuple[int, list[BlockKey]]:
        """Return a reservation of this connection; it is settled now."""
        reservation = self._random.choice(list(self.reservations))
        return reservation, self.reservations.pop(reservation)


def any_reply(random: Random, forge: Forge) -> wire.Reply:
    """Return what a server might say."""
    id_, numbers = random.choice(IDS), [random.randrange(1 << 20) for _ in range(random.randrange(6))]
    shape = wire.ArenaShape(
        arena_id=bytes(16), slot_bytes=4096, num_slots=9, header_bytes=4096, total_bytes=45056
    )
    replies: Sequence[wire.Reply] = (
        wire.Welcome(server_id=bytes(16), version="1.0", arena=random.choice((None, shape)), tiers=["disk"]),
        wire.Refused(code="protocol", why="no", is_mistake=False),
        wire.Goodbye(),
        wire.Found(id=id_, ready=1, reachable=2, runs=[("host", 1), ("disk", 1)], missing=_NEVER),
        wire.Coming(id=id_, blocks=3, cut=_NEVER, expected_s=random.choice((None, 0.5))),
        wire.Leased(id=id_, lease=7, slots=numbers, generations=numbers),
        wire.Reserved(id=id_, reservation=7, indices=numbers, slots=numbers, generations=numbers),
        wire.Events(kind="stored", tier="host", keys=forge.keys()),
        wire.Pong(id=id_),
        wire.Held(id=id_, held=bytes(8)),
        wire.Block(id=id_, index=3, length=4096),
        wire.Wanted(id=id_, indices=numbers),
        wire.Stored(id=id_, outcomes=["ok", "failed", "no_room"]),
        wire.Done(id=id_),
        wire.Size(id=id_, blocks=1, used_bytes=2, capacity_bytes=3, evictions=4),
    )
    return random.choice(replies)


def any_request(random: Random, forge: Forge) -> wire.Request:
    """Return what a client might say, at the wrong moment or not."""
    return random.choice((forge.map_request, forge.map_breach, forge.stream_request, forge.stream_breach))()


_NEVER = MissReason.NEVER_STORED


def _framed(body: bytes) -> bytes:
    return wire.LENGTH.pack(len(body)) + body
