"""Fuzzing of the cache server: hostile clients, beside good ones who must not notice.

    PYTHONPATH=tests/unit python tests/servers/fuzz_server.py --messages 1000000 --seed 1

Three layers. ``decode``: spoilt messages into the decoders of both ends. ``inside``: engines and streaming clients
over socket pairs, into the index thread and the streams. ``served``: a real ``kvferry serve``, handshake included.
Most messages are well-formed and allowed, with hostile values, so that they get far; each connection ends with one
that is not. Every answer is checked, those to the hostile ones too. A seed and the number of a connection tell
everything that was sent on it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

from fuzz_targets import DEADLINE_S, Inside, Line, Served, Target, footprint
from hostile import GOOD_KEYS, Forge, any_reply, any_request
from server_kit import FINGERPRINT, LAYOUT, Engine, content, soon

from kvferry.connector import wire
from kvferry.connector.errors import BlockRefused, WireError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.manager import ManagerOptions

SYNC = (1 << 53) - 2
"""Id of the ping after a batch."""
REMEMBERED_BLOCKS = ManagerOptions().remembered_blocks
GRANT_MESSAGES = (wire.Lookup, wire.Prefetch, wire.Lease, wire.Reserve, wire.Ping)
"""Those that have an answer, in map mode."""


class Finding(AssertionError):
    """Something that the server must not do, and how to have it do it again."""


class Tally:
    """What was sent and answered; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.slowest_s = 0.0
        """Of the good ones' questions."""

    def count(self, kind: str, number: int = 1) -> None:
        with self._lock:
            self.sent[kind] += number

    @property
    def messages(self) -> int:
        return sum(count for kind, count in self.sent.items() if not kind.startswith("("))


# A connection that maps the arena


def map_connection(line: Line, random: Random, tally: Tally) -> None:
    forge = Forge(random)
    for _ in range(random.randint(1, 5)):
        batch = [forge.map_request() for _ in range(random.randint(1, 16))]
        line.channel.send_bytes([b"".join(map(wire.encode, [*batch, wire.Ping(id=SYNC)]))], soon())
        tally.count("allowed, mapping", len(batch) + 1)
        if random.random() < 0.03:
            return  # its answers stay unread
        for message in batch:
            if isinstance(message, GRANT_MESSAGES):
                _check_answer(forge, message, _answer(line), line)
        assert _answer(line) == wire.Pong(id=SYNC)
    _end(line, random, tally, forge.map_request, forge.map_breach, forge)


def _answer(line: Line) -> wire.Reply:
    """Return what comes next, apart from events."""
    while True:
        reply = line.channel.receive_reply(soon())
        if not isinstance(reply, wire.Events):
            return reply


def _check_answer(forge: Forge, message: wire.Request, reply: wire.Reply, line: Line) -> None:
    assert reply.id == message.id, reply
    match message, reply:
        case wire.Lookup(keys=keys), wire.Found():
            assert 0 <= reply.ready <= reply.reachable <= len(keys) // KEY_BYTES
            assert sum(count for _, count in reply.runs) == reply.reachable
        case wire.Prefetch(keys=keys), wire.Coming():
            assert 0 <= reply.blocks <= len(keys) // KEY_BYTES
        case wire.Lease(keys=keys), wire.Leased():
            assert len(reply.slots) == len(reply.generations) <= len(keys) // KEY_BYTES
            assert bool(reply.lease) == bool(reply.slots)
            forge.grants.append(reply.lease)
        case wire.Reserve(keys=packed), wire.Reserved():
            keys = wire.unpack_keys(packed)
            assert len(reply.slots) == len(reply.generations) == len(reply.indices) == len(set(reply.slots))
            assert bool(reply.reservation) == bool(reply.slots)
            if reply.reservation:
                assert reply.reservation not in forge.reservations
                forge.reservations[reply.reservation] = [keys[index] for index in reply.indices]
                forge.grants.append(reply.reservation)
                line.spoil(reply.slots)
        case wire.Ping(), wire.Pong():
            pass
        case _:
            raise AssertionError(f"{reply} is no answer to {message}")


# A streaming connection


def stream_connection(line: Line, random: Random, tally: Tally) -> None:
    forge = Forge(random)
    for _ in range(random.randint(1, 12)):
        message = forge.stream_request()
        line.channel.send(message, soon())
        tally.count("allowed, streaming")
        if random.random() < 0.03:
            return
        match message:
            case wire.Load():
                _take_blocks(line, wire.unpack_keys(message.keys), message.id)
            case wire.Store():
                if not _give_blocks(line, wire.unpack_keys(message.keys), message.id, random):
                    return
            case _:
                reply = line.channel.receive_reply(soon())
                assert reply.id == message.id, reply
                expected = {
                    wire.Contains: wire.Held, wire.Delete: wire.Done, wire.Stats: wire.Size, wire.Ping: wire.Pong,
                }[type(message)]  # fmt: skip
                assert isinstance(reply, expected), reply
                if isinstance(reply, wire.Held):
                    assert len(reply.held) == len(message.keys) // KEY_BYTES
    _end(line, random, tally, forge.stream_request, forge.stream_breach, forge)


def _take_blocks(line: Line, keys: list[BlockKey], id_: int) -> None:
    missing = set(range(len(keys)))
    while missing:
        block = line.channel.receive_reply(soon())
        assert isinstance(block, wire.Block), block
        assert block.id == id_
        missing.remove(block.index)
        if block.length:
            header, body = bytearray(HEADER_BYTES), bytearray(block.length)
            line.channel.receive_into(header, soon())
            line.channel.receive_into(body, soon())
            _SEAL.verify(keys[block.index], memoryview(header), memoryview(body))


def _give_blocks(line: Line, keys: list[BlockKey], id_: int, random: Random) -> bool:
    """Send what is wanted, some of it damaged or not at all; return whether the connection is still of use."""
    wanted = line.channel.receive_reply(soon())
    assert isinstance(wanted, wire.Wanted), wanted
    assert wanted.id == id_
    damaged = set()
    for index in wanted.indices:
        if random.random() < 0.03:
            line.channel.send_bytes([random.randbytes(random.randrange(HEADER_BYTES + 10))], soon())
            return False
        header, payload = bytearray(HEADER_BYTES), bytearray(content(keys[index]))
        _SEAL.seal(keys[index], memoryview(header), memoryview(payload))
        if random.random() < 0.2:
            part = random.choice((header, payload))
            part[random.randrange(64)] ^= 1 << random.randrange(8)
            damaged.add(index)
        line.channel.send_bytes([header, payload], soon())
    stored = line.channel.receive_reply(soon())
    assert isinstance(stored, wire.Stored), stored
    assert len(stored.outcomes) == len(keys)
    assert all(stored.outcomes[index] == "failed" for index in damaged if keys.count(keys[index]) == 1)
    return True


_SEAL = FrameSeal(FINGERPRINT, LAYOUT.payload_bytes)


# How a connection ends


def _end(
    line: Line,
    random: Random,
    tally: Tally,
    allowed: Callable[[], wire.Request],
    breach: Callable[[], wire.Request],
    forge: Forge,
) -> None:
    """Say something wrong, and nothing more; the server has to close, and may say why."""
    match random.randrange(4):
        case 0:
            kind, data = "breach", wire.encode(breach())
        case 1:
            kind, data = "garbage", forge.garbage()
        case _:
            kind, data = "spoilt", forge.spoilt(allowed())
    tally.count(kind)
    with contextlib.suppress(OSError):  # closed before all of it was sent
        for piece in (data[:7], data[7:]) if random.random() < 0.2 else (data,):
            line.channel.send_bytes([piece], soon())
        line.channel.socket.shutdown(socket.SHUT_WR)
    last = None
    for last in _replies_until_closed(line):
        assert not isinstance(last, wire.Refused) or last.code == "protocol", last
    tally.count("(refused)", isinstance(last, wire.Refused))
    assert kind != "breach" or isinstance(last, wire.Refused) or not line.is_reliable, (last, data[:300])


def _replies_until_closed(line: Line) -> Iterator[wire.Reply]:
    while True:
        try:
            reply = line.channel.receive_reply(soon())
            if isinstance(reply, wire.Block) and reply.length:
                line.channel.receive(HEADER_BYTES + reply.length, soon())
        except TimeoutError:
            raise
        except OSError:
            return
        yield reply


# The good ones


def good_engine(target: Target, tally: Tally, until: threading.Event) -> None:
    """Save blocks in a cache of its own, find every one of them, again and again."""
    line = target.good_line()
    _save_what_is_missing(line)
    while not until.wait(0.02):
        started = time.perf_counter()
        assert line.read(GOOD_KEYS) == len(GOOD_KEYS), "a block of a cache that nobody else uses is gone"
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)
        tally.count("(good reads)")


def good_neighbour(target: Target, tally: Tally, until: threading.Event) -> None:
    """Share a cache with the hostile ones: they can take blocks away, they cannot make them wrong."""
    line = target.neighbour_line()
    while not until.wait(0.02):
        started = time.perf_counter()
        if line.lookup(GOOD_KEYS).ready < len(GOOD_KEYS):
            _save_what_is_missing(line)
        tally.count("(neighbour's blocks)", line.read(GOOD_KEYS))
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)


def _save_what_is_missing(line: Engine) -> None:
    granted = line.reserve(GOOD_KEYS)
    if granted.reservation:
        keys = [GOOD_KEYS[index] for index in granted.indices]
        for key, slot in zip(keys, granted.slots, strict=True):
            line.arena.slot(slot)[: LAYOUT.payload_bytes] = content(key)
        line.tell(wire.Commit(reservation=granted.reservation, keys=wire.pack_keys(keys)))


# The layers


def fuzz_decoders(messages: int, seed: int, tally: Tally) -> None:
    """Into the decoders of both ends: a message or a ``WireError``, nothing else, and at once."""
    random = Random(f"{seed}/decode")
    forge = Forge(random)
    for number in range(messages // 2):
        for decode, message in (
            (wire.decode_request, any_request(random, forge)),
            (wire.decode_reply, any_reply(random, forge)),
        ):
            data = forge.garbage() if random.random() < 0.1 else forge.spoilt(message)
            started = time.perf_counter()
            try:
                for body in wire.MessageReader().feed(data):
                    again = wire.encode(decode(body))
                    assert wire.encode(decode(again[wire.LENGTH.size :])) == again
                    tally.count("(decoded)")
            except WireError:
                tally.count("(not decoded)")
            except Exception as error:
                raise Finding(f"seed {seed}, message {number}: {data[:200]!r}: {error!r}") from error
            assert time.perf_counter() - started < 1.0, (
                f"seed {seed}, message {number} took long: {data[:200]!r}"
            )
        tally.count("decoded or refused", 2)


def fuzz_target(target: Target, messages: int, seed: int, tally: Tally, threads: int) -> None:
    """Hostile connections on ``threads`` threads, until so many messages were sent."""
    before = tally.messages
    numbers = iter(range(1 << 30))
    over = threading.Event()
    problems: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  # boundary: raised again where the threads are joined
                problems.append(error)
                over.set()

        return run

    def hostile() -> None:
        while tally.messages - before < messages and not over.is_set():
            one_connection(target, seed, next(numbers), tally)

    workers = [threading.Thread(target=guarded(hostile), name=f"hostile-{n}") for n in range(threads)]
    good = [
        threading.Thread(target=guarded(lambda: good_engine(target, tally, over)), name="good"),
        threading.Thread(target=guarded(lambda: good_neighbour(target, tally, over)), name="neighbour"),
    ]
    for thread in [*good, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    over.set()
    for thread in good:
        thread.join()
    if problems:
        raise problems[0]


def one_connection(target: Target, seed: int, number: int, tally: Tally) -> None:
    random = Random(f"{seed}/{number}")
    try:
        if random.random() < target.stranger_share:
            target.stranger(random, tally.count)
            return
        does_map = random.random() < 0.7
        with target.hostile_line(does_map, random) as line:
            (map_connection if does_map else stream_connection)(line, random, tally)
            tally.count("(connections)")
    except (AssertionError, WireError, BlockRefused, OSError, KeyError) as error:
        raise Finding(f"seed {seed}, connection {number}: {error!r}") from error


def run_layer(name: str, messages: int, seed: int, threads: int, tally: Tally) -> str:
    """Run one layer; return a line about what it took. Raises AssertionError for whatever is wrong."""
    if name == "decode":
        fuzz_decoders(messages // 10, seed, tally)
        gc.collect()
        before = footprint(os.getpid())[0]
        fuzz_decoders(messages - messages // 10, seed + 1, tally)
        gc.collect()
        grown = footprint(os.getpid())[0] - before
        assert grown < 32 << 20, f"the decoders keep {grown} bytes"
        return f"memory {grown / 2**20:+.1f} MiB"
    with Inside() if name == "inside" else Served() as target:
        _fill(target)
        fuzz_target(target, messages // 4, seed, tally, threads)
        target.wait_until_clean()
        gc.collect()
        rss, files, running = target.footprint()
        fuzz_target(target, messages - messages // 4, seed + 1, tally, threads)
        target.wait_until_clean()
        gc.collect()
        rss_after, files_after, running_after = target.footprint()
        grown = rss_after - rss
        what = (
            f"memory {grown / 2**20:+.1f} MiB, descriptors {files} -> {files_after}, "
            f"threads {running} -> {running_after}"
        )
        assert grown < 48 << 20, what
        assert files_after <= files, what
        assert running_after <= running, what
        assert not target.errors(), target.errors()[:3]
        return what


def _fill(target: Target) -> None:
    """Have the server remember as many lost blocks as it ever does, so that what grows afterwards is a leak."""
    line = target.neighbour_line()
    for number in range(2 * REMEMBERED_BLOCKS // wire.MAX_KEYS):
        keys = [BlockKey((number << 20 | index).to_bytes(KEY_BYTES, "big")) for index in range(wire.MAX_KEYS)]
        line.tell(wire.Failed(keys=wire.pack_keys(keys)))
        line.lookup([])


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the cache server.")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", default="decode,inside,served")
    options = parser.parse_args()
    logging.getLogger("kvferry").setLevel(logging.ERROR)
    layers = options.layers.split(",")
    for layer in layers:
        tally, started = Tally(), time.monotonic()
        took = run_layer(layer, options.messages // len(layers), options.seed, options.threads, tally)
        seconds = time.monotonic() - started
        print(f"{layer}: {tally.messages} messages in {seconds:.0f} s; {took}")
        print("   ", ", ".join(f"{kind} {count}" for kind, count in sorted(tally.sent.items())))
        if layer != "decode":
            print(f"    slowest answer to a good engine: {tally.slowest_s * 1e3:.0f} ms")
            assert tally.slowest_s < DEADLINE_S
        sys.stdout.flush()


if __name__ == "__main__":
    main()
