"""A cache server's KV events, read with vLLM's own classes as vLLM's own subscribers do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from kvferry.connector.keys import BlockKey
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.kv_events import encode_batch
from kvferry.connector.server.publishing import EventPublisher
from kvferry.connector.service import ServiceEvent
from kvferry.engines.vllm.events import translate

FINGERPRINT = b"f" * 32
KEYS = tuple(BlockKey(bytes([i]) * 32) for i in range(3))
EVENTS = [
    ServiceEvent("stored", "host", KEYS),
    ServiceEvent("stored", "disk", KEYS[:1]),
    ServiceEvent("removed", "host", KEYS[1:]),
    ServiceEvent("removed", "disk", KEYS[:1]),
]
WAIT_S = 20.0


@pytest.fixture
def publisher() -> Iterator[EventPublisher]:
    anywhere = "tcp://127.0.0.1:0"
    publisher = EventPublisher(ServerConfig(events=anywhere, events_replay=anywhere), logging.getLogger())
    publisher.start()
    yield publisher
    publisher.close(time.monotonic() + WAIT_S)


def test_the_engine_and_the_server_say_the_same() -> None:
    """An engine with kvferry inside publishes through vLLM what a cache server publishes itself."""
    engines = KVEventBatch(ts=1.0, events=[translate(event, 64) for event in EVENTS])
    batch = msgspec.msgpack.decode(encode_batch(1.0, 64, EVENTS), type=KVEventBatch)
    assert batch == engines
    assert [type(event) for event in batch.events] == [BlockStored, BlockStored, BlockRemoved, BlockRemoved]
    cleared = msgspec.msgpack.decode(encode_batch(1.0, 0, None), type=KVEventBatch)
    assert cleared.events == [AllBlocksCleared()]


def test_a_subscriber_notices_what_it_missed_and_asks_for_it(publisher: EventPublisher) -> None:
    """What vLLM's documentation has a subscriber do: compare the numbers, ask, go on at the end marker."""
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    for event in EVENTS:  # before anybody listens: missed
        publisher.publish("", FINGERPRINT, 64, [event])
    context = zmq.Context()
    sub, replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    sub.connect(publisher.endpoint)
    sub.setsockopt_string(zmq.SUBSCRIBE, "kv@")
    replay.connect(publisher.replay_endpoint)
    deadline = time.monotonic() + WAIT_S
    while not sub.poll(20):
        assert time.monotonic() < deadline
        publisher.publish("", FINGERPRINT, 64, EVENTS[:1])
    _, number, payload = sub.recv_multipart()
    first = int.from_bytes(number, "big")
    assert first >= len(EVENTS)
    replay.send_multipart((b"", (0).to_bytes(8, "big")))
    seen = {}
    while replay.poll(WAIT_S * 1000):
        _, topic, number, again = replay.recv_multipart()
        if number == ZmqEventPublisher.END_SEQ:
            assert not again
            break
        assert topic == b"kv@default@66666666"
        seen[int.from_bytes(number, "big")] = decoder.decode(again)
    sub.close(linger=0)
    replay.close(linger=0)
    context.term()
    assert sorted(seen)[: first + 1] == list(range(first + 1))
    assert seen[first] == decoder.decode(payload)
    assert [seen[i].events for i in range(len(EVENTS))] == [[translate(event, 64)] for event in EVENTS]
