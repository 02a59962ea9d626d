"""KV events on real ZeroMQ sockets: what subscribers of vLLM read, gaps that tell, and replay."""

from __future__ import annotations

import logging
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import zmq
from server_kit import FINGERPRINT, LAYOUT, ServerInside, content, prefix, soon, wait_until

from kvferry.connector import wire
from kvferry.connector.address import parse_address
from kvferry.connector.config import Config, HostConfig, TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.server.config import ServerConfig, ServerSettings
from kvferry.connector.server.kv_events import MAX_KEYS, cut
from kvferry.connector.server.publishing import MAX_QUEUED, EventPublisher
from kvferry.connector.server.running import CacheServer
from kvferry.connector.service import ServiceEvent

LOGGER = logging.getLogger("kvferry.server")
ANYWHERE = "tcp://127.0.0.1:0"
TOPIC = "kv@default@66666666"
KEYS = tuple(prefix(4))
WAIT_MS = 20_000


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """vLLM 0.32's batch and events, as a subscriber declares them."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


DECODER = msgspec.msgpack.Decoder(EventBatch)


class Router:
    """A subscriber: hears everything, and can ask for what it missed."""

    def __init__(self, publisher: EventPublisher, *, topic: str = "kv@", unread: int = 100_000) -> None:
        self._context = zmq.Context()
        self.sub = self._context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.RCVHWM, unread)
        self.sub.setsockopt(zmq.RCVBUF, 4096)
        self.sub.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.sub.connect(publisher.endpoint)
        self.replay = self._context.socket(zmq.DEALER)
        self.replay.setsockopt(zmq.RCVHWM, 100)
        if publisher.replay_endpoint:
            self.replay.connect(publisher.replay_endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sub.close(linger=0)
        self.replay.close(linger=0)
        self._context.term()

    def hear(self) -> tuple[str, int, EventBatch]:
        assert self.sub.poll(WAIT_MS), "nothing was published"
        topic, number, payload = self.sub.recv_multipart()
        return topic.decode(), int.from_bytes(number, "big"), DECODER.decode(payload)

    def ask(self, first: int) -> list[tuple[str, int, EventBatch]]:
        """Return what is sent again, from number ``first``."""
        self.replay.send_multipart([b"", first.to_bytes(8, "big")])
        return list(self.answers())

    def answers(self) -> Iterator[tuple[str, int, EventBatch]]:
        while True:
            assert self.replay.poll(WAIT_MS), "the replay did not end"
            empty, topic, number, payload = self.replay.recv_multipart()
            assert empty == b""
            if not payload:
                assert (topic, int.from_bytes(number, "big", signed=True)) == (b"", -1)
                return
            yield topic.decode(), int.from_bytes(number, "big"), DECODER.decode(payload)


@pytest.fixture
def publisher() -> Iterator[EventPublisher]:
    publisher = EventPublisher(ServerConfig(events=ANYWHERE, events_replay=ANYWHERE), LOGGER)
    publisher.start()
    yield publisher
    publisher.close(soon())


def stored(*keys: BlockKey, tier: str = "host") -> ServiceEvent:
    return ServiceEvent("stored", tier, keys)


def publish(publisher: EventPublisher, *events: ServiceEvent, tenant: str = "") -> None:
    publisher.publish(tenant, FINGERPRINT, 64, events)


def connected(publisher: EventPublisher, router: Router) -> int:
    """Publish until the subscriber hears it; return the last number it heard."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not router.sub.poll(10):
        assert time.monotonic() < deadline, "the subscriber was never connected"
        publish(publisher, stored(KEYS[0]))
    publish(publisher, stored(KEYS[0], tier="the last"))
    while True:
        _, number, batch = router.hear()
        event = batch.events[0]
        if isinstance(event, BlockStored) and event.ownership == "the last":
            return number


def test_a_subscriber_of_vllm_reads_them(publisher: EventPublisher) -> None:
    with Router(publisher, topic=TOPIC) as router:
        last = connected(publisher, router)
        before = time.time()
        publish(
            publisher,
            stored(*KEYS),
            stored(KEYS[0], tier="disk"),
            ServiceEvent("removed", "host", KEYS[:2]),
            ServiceEvent("removed", "a plugin's", KEYS[:1]),
        )
        topic, number, batch = router.hear()
    assert topic == TOPIC
    assert number == last + 1
    assert before <= batch.ts <= time.time()
    assert batch.data_parallel_rank is None
    assert batch.events == [
        BlockStored(list(KEYS), None, [], 64, None, "CPU", None),
        BlockStored([KEYS[0]], None, [], 64, None, "STORAGE", None, ownership="disk"),
        BlockRemoved(list(KEYS[:2]), "CPU"),
        BlockRemoved([KEYS[0]], "STORAGE", ownership="a plugin's"),
    ]


def test_each_tenants_model_has_a_topic_and_numbers_count_over_all(publisher: EventPublisher) -> None:
    publish(publisher, stored(KEYS[0]))
    publish(publisher, stored(KEYS[1]), tenant="research")
    publisher.publish("", b"\xab" * 32, 16, [stored(KEYS[2])])
    with Router(publisher) as router:
        wait_until("all were sent", lambda: len(router.ask(0)) == 3)
        heard = [(topic, number) for topic, number, _ in router.ask(0)]
    assert heard == [(TOPIC, 0), ("kv@research@66666666", 1), ("kv@default@abababab", 2)]


def test_a_pool_that_begins_or_ends_is_cleared(publisher: EventPublisher) -> None:
    publisher.clear("research", FINGERPRINT)
    with Router(publisher) as router:
        wait_until("it was sent", lambda: len(router.ask(0)) == 1)
        ((topic, _, batch),) = router.ask(0)
    assert topic == "kv@research@66666666"
    assert batch.events == [AllBlocksCleared()]


def test_nothing_is_published_about_nothing(publisher: EventPublisher) -> None:
    publish(publisher)
    publish(publisher, stored(KEYS[0]))
    with Router(publisher) as router:
        wait_until("it was sent", lambda: [number for _, number, _ in router.ask(0)] == [0])


@pytest.mark.parametrize("sizes", [[3 * MAX_KEYS + 1], [MAX_KEYS - 1, 2, MAX_KEYS], [1, 0, 1], [MAX_KEYS]])
def test_a_batch_has_a_bounded_number_of_keys_and_none_is_lost(sizes: Sequence[int]) -> None:
    events = [ServiceEvent("stored", f"tier {i}", tuple(prefix(n, str(i)))) for i, n in enumerate(sizes)]
    batches = list(cut(events))
    held = [sum(len(event.keys) for event in batch) for batch in batches]
    assert all(count == MAX_KEYS for count in held[:-1])
    assert 0 < held[-1] <= MAX_KEYS
    flat = [(event.tier, key) for batch in batches for event in batch for key in event.keys]
    assert flat == [(event.tier, key) for event in events for key in event.keys]


def test_what_a_full_queue_loses_is_missing_among_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    publisher = EventPublisher(ServerConfig(events=ANYWHERE, events_replay=ANYWHERE), LOGGER)
    for _ in range(MAX_QUEUED + 5):
        publish(publisher, stored(KEYS[0]))
    assert publisher.lost == 5
    publisher.start()
    with Router(publisher) as router:
        wait_until("the last was sent", lambda: any(router.ask(MAX_QUEUED + 4)))
        numbers = [number for _, number, _ in router.ask(0)]
    publisher.close(soon())
    assert numbers == list(range(5, MAX_QUEUED + 5)), "the oldest are lost, and no other takes their number"
    assert "5 batches of KV events are lost" in caplog.text


def test_a_subscriber_that_does_not_read_sees_a_gap_and_can_fill_it(publisher: EventPublisher) -> None:
    blocks = tuple(prefix(256))
    with Router(publisher, unread=1) as router:
        last = connected(publisher, router)
        count = 3000
        for _ in range(count):
            publish(publisher, ServiceEvent("stored", "host", blocks))
        with Router(publisher) as another:
            wait_until("the last was sent", lambda: any(another.ask(last + count)))
        heard = [router.hear()[1]]
        deadline = soon()
        while heard[-1] <= last + count:  # until it has caught up
            assert time.monotonic() < deadline
            publish(publisher, stored(KEYS[0]))
            while router.sub.poll(10):
                heard.append(router.hear()[1])
        everything = range(last + 1, heard[-1] + 1)
        missed = sorted(set(everything) - set(heard))
        assert heard == sorted(heard)
        assert missed, "it was to be too slow, and the numbers tell"
        again = [number for _, number, _ in router.ask(missed[0])]
        assert set(missed) <= set(again), "nothing is missing any more"


def test_only_so_many_batches_are_kept() -> None:
    config = ServerConfig(events=ANYWHERE, events_replay=ANYWHERE, events_kept=10)
    publisher = EventPublisher(config, LOGGER)
    publisher.start()
    for _ in range(50):
        publish(publisher, stored(KEYS[0]))
    with Router(publisher) as router:
        wait_until("the last was sent", lambda: any(router.ask(49)))
        assert [number for _, number, _ in router.ask(0)] == list(range(40, 50))
        assert [number for _, number, _ in router.ask(47)] == [47, 48, 49]
        assert router.ask(50) == []
        assert router.ask((1 << 64) - 1) == []
    publisher.close(soon())


def test_requests_that_are_none_are_ignored(publisher: EventPublisher) -> None:
    publish(publisher, stored(KEYS[0]))
    with Router(publisher) as router:
        for frames in ([b""], [b"", b"1"], [b"x", bytes(8)], [b"", bytes(8), b""], [b"", bytes(9)]):
            router.replay.send_multipart(frames)
        wait_until("the next is answered", lambda: len(router.ask(0)) == 1)


def test_a_subscriber_that_leaves_its_replay_unread_stops_nobody(publisher: EventPublisher) -> None:
    blocks = tuple(prefix(256))
    for _ in range(3000):
        publish(publisher, ServiceEvent("stored", "host", blocks))
    with Router(publisher) as lazy, Router(publisher) as router:
        wait_until("the last was sent", lambda: any(router.ask(2999)))
        lazy.replay.send_multipart([b"", bytes(8)])
        assert [number for _, number, _ in router.ask(0)] == list(range(3000))
        assert [number for _, number, _ in lazy.answers()] == list(range(3000)), "nor does it lose anything"


def test_closing_sends_what_is_queued_and_keeps_its_deadline() -> None:
    publisher = EventPublisher(ServerConfig(events=ANYWHERE), LOGGER)
    publisher.start()
    with Router(publisher) as router:
        last = connected(publisher, router)
        for _ in range(20):
            publish(publisher, stored(KEYS[0]))
        publisher.close(soon())
        assert [router.hear()[1] for _ in range(20)] == list(range(last + 1, last + 21))
    assert [thread.name for thread in threading.enumerate() if thread.name == "kvferry-events"] == []
    publisher.close(soon())
    publish(publisher, stored(KEYS[0]))


def test_closing_does_not_wait_for_a_subscriber_that_does_not_read() -> None:
    publisher = EventPublisher(ServerConfig(events=ANYWHERE), LOGGER)
    publisher.start()
    with Router(publisher, unread=1) as router:
        connected(publisher, router)
        blocks = tuple(prefix(256))
        for _ in range(2000):
            publish(publisher, ServiceEvent("stored", "host", blocks))
        started = time.monotonic()
        publisher.close(started + 1.0)
        assert time.monotonic() - started < 1.5
    wait_until("the thread has ended", lambda: "kvferry-events" not in _threads())


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_without_an_address_nothing_runs() -> None:
    publisher = EventPublisher(ServerConfig(), LOGGER)
    publisher.start()
    publish(publisher, stored(KEYS[0]))
    publisher.clear("", FINGERPRINT)
    assert (publisher.endpoint, publisher.replay_endpoint) == ("", "")
    assert "kvferry-events" not in _threads()
    publisher.close(soon())


def test_a_server_that_could_not_start_can_be_closed() -> None:
    publisher = EventPublisher(ServerConfig(events=ANYWHERE), LOGGER)
    publisher.close(soon())


def test_an_address_that_is_taken_is_named(publisher: EventPublisher) -> None:
    for config in (
        ServerConfig(events=publisher.endpoint),
        ServerConfig(events=ANYWHERE, events_replay=publisher.endpoint),
    ):
        other = EventPublisher(config, LOGGER)
        with pytest.raises(KVFerryError, match=rf"server\.events.*{publisher.endpoint}"):
            other.start()


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:5557", "inproc://here", "tcp://127.0.0.1", "udp://1.2.3.4:5"]
)
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.events: "):
        EventPublisher(ServerConfig(events=endpoint), LOGGER)
    with pytest.raises(ConfigError, match=r"server\.events_replay: "):
        EventPublisher(ServerConfig(events=ANYWHERE, events_replay=endpoint), LOGGER)


def test_replay_needs_something_to_replay() -> None:
    with pytest.raises(ConfigError, match="no events are published"):
        EventPublisher(ServerConfig(events_replay=ANYWHERE), LOGGER)


@pytest.mark.parametrize(
    ("endpoint", "is_open"),
    [
        ("tcp://*:5557", True),
        ("tcp://0.0.0.0:5557", True),
        ("tcp://[::]:5557", True),
        ("tcp://cache.internal:5557", True),
        ("tcp://127.0.0.1:5557", False),
        ("tcp://[::1]:5557", False),
        ("tcp://localhost:5557", False),
        ("ipc:///run/kvferry/events", False),
    ],
)
def test_who_publishes_beyond_this_machine_is_warned(
    endpoint: str, is_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    EventPublisher(ServerConfig(events=endpoint), LOGGER)
    assert ("without a credential" in caplog.text) == is_open


def test_zeromq_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    EventPublisher(ServerConfig(), LOGGER)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[server\]'"):
        EventPublisher(ServerConfig(events=ANYWHERE), LOGGER)


def test_routers_hear_of_a_servers_whole_life(tmp_path: Path) -> None:
    """From a real server: a pool begins, a block is stored, the pool ends with the server."""
    settings = ServerSettings(
        server=ServerConfig(
            listen=(f"unix://{tmp_path}/kvferry.sock",), http="", events=ANYWHERE, events_replay=ANYWHERE
        ),
        cache=Config(host=HostConfig(capacity=8 * LAYOUT.slot_bytes)),
    )
    server = CacheServer(settings, LOGGER)
    server.start()
    address = parse_address(settings.server.listen[0], "listen")
    channel = dial(address, "", TlsConfig(), soon())
    channel.send(wire.Hello(mode="stream", fingerprint=FINGERPRINT, layout=LAYOUT), soon())
    assert isinstance(channel.receive_reply(soon()), wire.Welcome)
    key = prefix(1)[0]
    channel.send(wire.Store(id=1, keys=key), soon())
    assert isinstance(channel.receive_reply(soon()), wire.Wanted)
    header, payload = bytearray(HEADER_BYTES), content(key)
    FrameSeal(FINGERPRINT, len(payload)).seal(key, memoryview(header), memoryview(payload))
    channel.send_bytes([header, payload], soon())
    assert channel.receive_reply(soon()) == wire.Stored(id=1, outcomes=["ok"])
    with Router(server.events, topic="") as router:
        wait_until("it was told", lambda: len(router.ask(0)) == 2)
        said = [batch.events for _, _, batch in router.ask(0)]
        assert said == [
            [AllBlocksCleared()],
            [BlockStored([key], None, [], LAYOUT.block_tokens, None, "CPU", None)],
        ]
        number = connected(server.events, router)
        channel.close()
        server.close(5.0)
        topic, last, batch = router.hear()
    assert (topic, last, batch.events) == (TOPIC, number + 1, [AllBlocksCleared()])


def test_the_example_of_the_docs_knows_what_is_cached(publisher: EventPublisher, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "follow-kv-events.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    example = example.replace("tcp://127.0.0.1:5557", publisher.endpoint)
    example = example.replace("tcp://127.0.0.1:5558", publisher.replay_endpoint)
    script = tmp_path / "router.py"
    script.write_text(example)
    publish(publisher, *(stored(*prefix(3, "missed")) for _ in range(3)))
    publish(publisher, ServiceEvent("removed", "host", tuple(prefix(1, "missed"))))
    publish(publisher, stored(*prefix(3, "missed"), tier="disk"))
    router = subprocess.Popen([sys.executable, "-u", str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert router.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(
            target=lambda: [lines.put(line) for line in router.stdout or ()], name="reader", daemon=True
        ).start()
        deadline = soon()
        while lines.empty():  # until it is connected
            assert time.monotonic() < deadline
            publish(publisher, stored(KEYS[0]))
            time.sleep(0.05)
        assert lines.get() == "4 blocks are cached\n", "three that were missed, and the one that was heard"
        publish(publisher, *(stored(key, tier="disk") for key in KEYS[1:]))
        publisher.clear("another", FINGERPRINT)
        last = "7 blocks are cached\n"
        wait_until("it knows of the others", lambda: lines.get(timeout=20) == last)
        publisher.clear("", FINGERPRINT)
        wait_until("it forgets", lambda: lines.get(timeout=20) == "0 blocks are cached\n")
    finally:
        router.kill()
        router.wait()
        if router.stdout is not None:
            router.stdout.close()


def stored_keys(inside: ServerInside) -> set[bytes]:
    return {key for event in inside.events if event.kind == "stored" for key in event.keys}


def test_what_is_published_is_true_of_a_pool(publisher: EventPublisher) -> None:
    """A router that believes every event knows exactly what can be loaded."""
    with ServerInside(slots=4) as inside, Router(publisher) as router:
        pool, engine = inside.pool(), inside.engine()
        for round_ in range(5):
            engine.save(prefix(3, str(round_)))
        last = set(prefix(3, "4"))
        wait_until("all is told", lambda: last <= stored_keys(inside) and pool.service.has_pending() is False)
        publisher.publish("", FINGERPRINT, 16, inside.events)
        believed: set[bytes | int] = set()
        wait_until("it was sent", lambda: any(router.ask(0)))
        for _, _, batch in router.ask(0):
            for event in batch.events:
                assert not isinstance(event, AllBlocksCleared)
                if isinstance(event, BlockStored):
                    believed |= set(event.block_hashes)
                else:
                    believed -= set(event.block_hashes)
        every = [key for round_ in range(5) for key in prefix(3, str(round_))]
        there = {key for key in every if len(engine.lease([key]).slots)}
    assert 0 < len(there) < len(every)
    assert believed == there
