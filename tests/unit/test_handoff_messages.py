"""Messages of the side channel: what fits is read as it was sent, everything else is refused."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import pytest
from handoff_kit import FINGERPRINT, remote_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector.errors import WireError
from kvferry.connector.framing import LENGTH, MAX_MESSAGE_BYTES, MessageReader
from kvferry.engines.handoff import messages
from kvferry.engines.handoff.params import MAX_NAME, MAX_TOKENS

REQUESTS: list[messages.Request] = [
    messages.Hello(fingerprint=FINGERPRINT, reader="d"),
    messages.Claim(request_id="r", reader="d/1", num_tokens=40, content=bytes(32)),
    messages.Renew(leases=[("r", "d/1"), ("s", "d/2")]),
    messages.Check(request_id="r", seq=1 << 62),
    messages.Digests(seq=5, rank=1, first=0, count=3),
    messages.Release(request_id="r", reader="d/1"),
]
REPLIES: list[messages.Reply] = [
    messages.Welcome(incarnation=bytes(16), engine_id="p", ranks=[remote_pages()], lease_s=30.0),
    messages.Claimed(seq=5, num_tokens=40, pages=messages.pack_pages((1, 2, 3))),
    messages.Renewed(alive=[True, False]),
    messages.Checked(ok=True),
    messages.DigestsAre(ready=True, data=bytes(48)),
    messages.Released(),
    messages.Refused(reason="gone", text="it is"),
]


def packed(message: messages.Request | messages.Reply, **changes: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(message, builtin_types=(bytes,)) | changes)


def body(message: messages.Request | messages.Reply) -> bytes:
    (found,) = MessageReader().feed(messages.encode(message))
    return found


def test_every_message_is_here() -> None:
    assert {type(message) for message in REQUESTS} == set(messages.Request.__args__)
    assert {type(message) for message in REPLIES} == set(messages.Reply.__args__)


def test_every_message_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/handoff-protocol.md").read_text()
    for message in (*REQUESTS, *REPLIES):
        assert f"\n### {type(message).__struct_config__.tag}\n" in page


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_a_request_is_read_as_it_was_sent_and_is_no_reply(message: messages.Request) -> None:
    assert messages.decode_request(body(message)) == message
    with pytest.raises(WireError):
        messages.decode_reply(body(message))


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_a_reply_is_read_as_it_was_sent_and_is_no_request(message: messages.Reply) -> None:
    assert messages.decode_reply(body(message)) == message
    with pytest.raises(WireError):
        messages.decode_request(body(message))


@pytest.mark.parametrize("message", [*REQUESTS, *REPLIES], ids=lambda message: type(message).__name__)
def test_fields_are_all_there_and_no_others(message: messages.Request | messages.Reply) -> None:
    decode = messages.decode_request if message in REQUESTS else messages.decode_reply
    with pytest.raises(WireError):
        decode(packed(message, more=1))
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    for name in fields:
        with pytest.raises(WireError):
            decode(msgspec.msgpack.encode({key: value for key, value in fields.items() if key != name}))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (REQUESTS[0], {"fingerprint": bytes(31)}),
        (REQUESTS[0], {"fingerprint": bytes(33)}),
        (REQUESTS[0], {"reader": ""}),
        (REQUESTS[0], {"reader": "x" * (MAX_NAME + 1)}),
        (REQUESTS[1], {"num_tokens": 0}),
        (REQUESTS[1], {"num_tokens": MAX_TOKENS + 1}),
        (REQUESTS[1], {"num_tokens": "40"}),
        (REQUESTS[1], {"content": b""}),
        (REQUESTS[2], {"leases": []}),
        (REQUESTS[2], {"leases": [("r", "d")] * (messages.MAX_LEASES + 1)}),
        (REQUESTS[2], {"leases": [("r", "d", "more")]}),
        (REQUESTS[2], {"leases": ["r"]}),
        (REQUESTS[3], {"seq": -1}),
        (REQUESTS[3], {"seq": 1 << 63}),
        (REQUESTS[3], {"seq": 1.0}),
        (REQUESTS[4], {"count": 0}),
        (REQUESTS[4], {"first": -1}),
        (REQUESTS[4], {"rank": 1 << 31}),
    ],
)
def test_a_request_out_of_bounds_is_refused(message: messages.Request, changes: dict[str, object]) -> None:
    messages.decode_request(packed(message))
    with pytest.raises(WireError):
        messages.decode_request(packed(message, **changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (REPLIES[0], {"incarnation": bytes(15)}),
        (REPLIES[0], {"lease_s": 0.0}),
        (REPLIES[0], {"lease_s": float("nan")}),
        (REPLIES[0], {"ranks": [{}]}),
        (REPLIES[0], {"ranks": [msgspec.to_builtins(remote_pages(), builtin_types=(bytes,))] * 257}),
        (REPLIES[1], {"pages": bytes(messages.MAX_PAGE_BYTES + 4)}),
        (REPLIES[2], {"alive": [1]}),
        (REPLIES[4], {"data": bytes(messages.MAX_DIGEST_BYTES + 1)}),
        (REPLIES[6], {"reason": "boredom"}),
        (REPLIES[6], {"text": "x" * (messages.MAX_TEXT + 1)}),
    ],
)
def test_a_reply_out_of_bounds_is_refused(message: messages.Reply, changes: dict[str, object]) -> None:
    messages.decode_reply(packed(message))
    with pytest.raises(WireError):
        messages.decode_reply(packed(message, **changes))


def test_a_rank_may_not_say_more_than_its_share() -> None:
    pages = msgspec.structs.replace(remote_pages(), offers={"socket": bytes((16 << 10) + 1)})
    with pytest.raises(WireError):
        messages.decode_reply(packed(msgspec.structs.replace(REPLIES[0], ranks=[pages])))


def test_a_message_that_nobody_would_accept_is_not_sent() -> None:
    rank = msgspec.structs.replace(remote_pages(), offers={"socket": bytes(16 << 10)})
    with pytest.raises(WireError, match=str(MAX_MESSAGE_BYTES)):
        messages.encode(msgspec.structs.replace(REPLIES[0], ranks=[rank] * 80))


@settings(max_examples=20)
@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=50))
def test_page_ids_come_through(pages: list[int]) -> None:
    assert messages.unpack_pages(messages.pack_pages(pages)) == tuple(pages)


def test_page_ids_that_are_none_are_refused() -> None:
    with pytest.raises(WireError):
        messages.pack_pages([-1])
    with pytest.raises(WireError):
        messages.pack_pages([0] * (messages.MAX_PAGE_BYTES // 4 + 1))
    with pytest.raises(WireError):
        messages.unpack_pages(b"abcde")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_bytes_that_are_no_message_are_refused_and_nothing_else_happens(seed: int) -> None:
    """Random bytes hardly ever get past the first field, so mostly a good message is bent."""
    random = Random(seed)
    good = [body(message) for message in (*REQUESTS, *REPLIES)]
    for _ in range(200):
        bent = bytearray(random.choice([*good, random.randbytes(random.randrange(80))]))
        for _ in range(random.randint(1, 3)):
            if bent:
                bent[random.randrange(len(bent))] = random.randrange(256)
        found = bytes(bent[: random.randint(0, len(bent))] if random.random() < 0.3 else bent)
        for decode in (messages.decode_request, messages.decode_reply):
            try:
                message = decode(found)
            except WireError:
                continue
            assert decode(messages.encode(message)[LENGTH.size :]) == message
