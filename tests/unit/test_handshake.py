"""Who is there: nobody is let in without the right credential, and nothing else is read before."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector import handshake, wire
from kvferry.connector.channel import Channel
from kvferry.connector.errors import AccessRefused, KVFerryError, WireError
from kvferry.connector.handshake import Grant, Peer, Verdict

TOKEN = "correct horse battery staple"
OTHER = "incorrect horse battery staple"
PEER = Peer("a test", is_loopback=True)
NONCE = bytes(range(32))

# Made with `openssl dgst -sha256 -hmac`, for a client's nonce of zeros.
PROOF_OF_CLIENT = "a9eaa24ec09128d925d16570c6abc602c11ed80a398cfd3fe6f217907f1bd1bb"
PROOF_OF_SERVER = "540741342b90f8b88beb12668d13069cf586385d9f145ad6bc9df9e34532b8cd"


class Gate:
    """Lets in whoever proves a token of the table; without one, whoever offers none."""

    def __init__(self, **tenants: str) -> None:
        self.tokens = {token: tenant for tenant, token in tenants.items()}

    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        if proves is None and not self.tokens:
            return Grant("", "")
        for token, tenant in self.tokens.items():
            if proves is not None and proves(token):
                return Grant(tenant, token)
        raise AccessRefused("no")


def verdict(answer: bytes, gate: Gate, greeting: bytes = handshake.make_greeting(NONCE)) -> Verdict:
    return handshake.server_verdict(greeting, answer, gate, PEER, lambda: True)


# --- the pieces ---------------------------------------------------------------------------------------


def test_sizes_are_fixed_and_part_of_the_protocol() -> None:
    assert (handshake.GREETING_BYTES, handshake.ANSWER_BYTES, handshake.VERDICT_BYTES) == (44, 75, 33)
    assert handshake.make_greeting(NONCE) == b"KVFERRYS" + b"\x01\x00\x01\x00" + NONCE


def test_the_proofs_are_those_of_the_protocol() -> None:
    """Fixed bytes: whoever writes a client in another language has to arrive at them, too."""
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, bytes(32))
    assert answer[:11] == b"KVFERRYC\x01\x00\x01"
    assert answer[43:].hex() == PROOF_OF_CLIENT
    assert verdict(answer, Gate(a=TOKEN)).reply.hex() == "00" + PROOF_OF_SERVER


def test_the_token_never_travels() -> None:
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, NONCE)
    reply = verdict(answer, Gate(a=TOKEN)).reply
    for piece in (greeting, answer, reply):
        assert TOKEN.encode() not in piece


def test_a_token_tells_the_tenant() -> None:
    gate = Gate(search=TOKEN, chat=OTHER)
    for token, tenant in gate.tokens.items():
        answer = handshake.client_answer(handshake.make_greeting(NONCE), token, NONCE)
        assert verdict(answer, gate).tenant == tenant


@pytest.mark.parametrize("token", ["", OTHER, TOKEN.upper(), TOKEN + " "])
def test_no_token_and_a_wrong_one_are_refused_alike(token: str) -> None:
    answer = handshake.client_answer(handshake.make_greeting(NONCE), token, NONCE)
    found = verdict(answer, Gate(a=TOKEN))
    assert isinstance(found.error, AccessRefused)
    assert found.reply == b"\x01" + bytes(32)


def test_an_answer_that_was_overheard_is_of_no_use_in_another_connection() -> None:
    first, second = handshake.make_greeting(NONCE), handshake.make_greeting(bytes(32))
    answer = handshake.client_answer(first, TOKEN, NONCE)
    assert verdict(answer, Gate(a=TOKEN), first).error is None
    assert isinstance(verdict(answer, Gate(a=TOKEN), second).error, AccessRefused)


def test_a_server_cannot_use_the_clients_own_proof_as_its_own() -> None:
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, NONCE)
    with pytest.raises(AccessRefused, match="does not know the token"):
        handshake.check_verdict(greeting, answer, b"\x00" + answer[-32:], TOKEN)


@pytest.mark.parametrize("position", range(75))
def test_a_changed_bit_of_an_answer_is_refused(position: int) -> None:
    answer = bytearray(handshake.client_answer(handshake.make_greeting(NONCE), TOKEN, NONCE))
    answer[position] ^= 1
    assert verdict(bytes(answer), Gate(a=TOKEN)).error is not None


@pytest.mark.parametrize("position", range(8, 44))
def test_a_changed_bit_of_the_greeting_is_refused(position: int) -> None:
    """A change of the versions on the way, too: nobody can make the two ends agree on an older one."""
    greeting = handshake.make_greeting(NONCE)
    changed = bytearray(greeting)
    changed[position] ^= 2
    try:
        answer = handshake.client_answer(bytes(changed), TOKEN, NONCE)
    except WireError:
        assert position < 12
        return
    assert isinstance(verdict(answer, Gate(a=TOKEN), greeting).error, AccessRefused)


@pytest.mark.parametrize("position", range(33))
def test_a_changed_bit_of_the_verdict_is_seen(position: int) -> None:
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, NONCE)
    reply = bytearray(verdict(answer, Gate(a=TOKEN)).reply)
    handshake.check_verdict(greeting, answer, bytes(reply), TOKEN)
    reply[position] ^= 1
    with pytest.raises(AccessRefused):
        handshake.check_verdict(greeting, answer, bytes(reply), TOKEN)


def test_a_token_is_never_taken_for_granted_by_a_server_that_asks_for_none() -> None:
    """A server that lets in everybody cannot prove that it knows the token, and is refused."""
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, NONCE)
    with pytest.raises(AccessRefused, match="right server"):
        handshake.check_verdict(greeting, answer, bytes(33), TOKEN)


@pytest.mark.parametrize(
    ("code", "token", "error", "words"),
    [
        (1, TOKEN, AccessRefused, "is it the right one"),
        (1, "", AccessRefused, "set KVFERRY_TOKEN"),
        (2, TOKEN, WireError, "update the older"),
        (3, TOKEN, handshake.Busy, "max_connections"),
        (4, TOKEN, WireError, "means nothing"),
    ],
)
def test_the_client_says_what_a_refusal_means(
    code: int, token: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        handshake.check_verdict(handshake.make_greeting(NONCE), bytes(75), bytes([code, *bytes(32)]), token)


def test_versions_that_do_not_go_together_are_said_by_the_end_that_finds_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greeting = handshake.make_greeting(NONCE)
    answer = handshake.client_answer(greeting, TOKEN, NONCE)
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 7)
    with pytest.raises(WireError, match="versions 1 to 1, this client 7"):
        handshake.client_answer(greeting, TOKEN, NONCE)
    found = verdict(answer, Gate(a=TOKEN))
    assert isinstance(found.error, WireError)
    assert found.reply == b"\x02" + bytes(32)


def test_a_stranger_is_told_nothing() -> None:
    found = verdict(b"GET / HTTP/1.1\r\n" + bytes(59), Gate(a=TOKEN))
    assert isinstance(found.error, WireError)
    assert found.reply == b""


def test_room_is_taken_up_only_for_who_is_let_in() -> None:
    taken: list[bool] = []

    def has_room() -> bool:
        taken.append(True)
        return False

    greeting = handshake.make_greeting(NONCE)
    for token, expected in ((OTHER, AccessRefused), (TOKEN, handshake.Busy)):
        answer = handshake.client_answer(greeting, token, NONCE)
        found = handshake.server_verdict(greeting, answer, Gate(a=TOKEN), PEER, has_room)
        assert isinstance(found.error, expected)
    assert taken == [True]
    assert found.reply == b"\x03" + bytes(32)


@settings(deadline=None)
@given(
    st.binary(min_size=44, max_size=44),
    st.binary(min_size=75, max_size=75),
    st.binary(min_size=33, max_size=33),
)
def test_garbage_is_an_error_at_both_ends(greeting: bytes, answer: bytes, reply: bytes) -> None:
    with pytest.raises(WireError):
        handshake.client_answer(greeting, TOKEN, NONCE)
    assert verdict(answer, Gate(a=TOKEN)).error is not None
    with pytest.raises((KVFerryError, handshake.Busy)):
        handshake.check_verdict(greeting, answer, reply, TOKEN)


@settings(deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 65535), st.integers(0, 255))
def test_a_well_formed_answer_without_the_token_is_refused(rest: bytes, version: int, kind: int) -> None:
    answer = b"KVFERRYC" + version.to_bytes(2, "little") + bytes([kind]) + rest
    assert verdict(answer, Gate(a=TOKEN)).error is not None


# --- the two drivers ----------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    client, server = (Channel(sock) for sock in socket.socketpair())
    yield client, server
    client.close()
    server.close()


def in_s(seconds: float) -> float:
    return time.monotonic() + seconds


def serve(channel: Channel, gate: Gate, seconds: float = 5.0) -> tuple[threading.Thread, list[Any]]:
    """Run the server's end on a thread; its tenant or error is put into the list."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(handshake.server_handshake(channel, gate, PEER, in_s(seconds)))
        except (KVFerryError, OSError) as error:
            found.append(error)

    thread = threading.Thread(target=run, name="handshake")
    thread.start()
    return thread, found


@pytest.mark.parametrize(
    ("token", "gate", "tenant"), [(TOKEN, Gate(search=TOKEN), "search"), ("", Gate(), "")]
)
def test_both_ends_agree(ends: tuple[Channel, Channel], token: str, gate: Gate, tenant: str) -> None:
    client, server = ends
    thread, found = serve(server, gate)
    handshake.client_handshake(client, token, in_s(5.0))
    thread.join(5.0)
    assert found == [tenant]


@pytest.mark.parametrize("token", ["", OTHER])
def test_both_ends_learn_of_a_refusal(ends: tuple[Channel, Channel], token: str) -> None:
    client, server = ends
    thread, found = serve(server, Gate(a=TOKEN))
    with pytest.raises(AccessRefused):
        handshake.client_handshake(client, token, in_s(5.0))
    thread.join(5.0)
    assert isinstance(found[0], AccessRefused)


def test_an_end_that_says_nothing_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    client, server = ends
    with pytest.raises(TimeoutError):
        handshake.client_handshake(client, TOKEN, in_s(0.05))
    thread, found = serve(server, Gate(a=TOKEN), seconds=0.05)
    thread.join(5.0)
    assert isinstance(found[0], TimeoutError)


def test_an_end_that_goes_is_noticed(ends: tuple[Channel, Channel]) -> None:
    client, server = ends
    thread, found = serve(server, Gate(a=TOKEN))
    client.close()
    thread.join(5.0)
    assert isinstance(found[0], ConnectionError)


REQUESTS = [request.__struct_config__.tag for request in wire.Request.__args__]


@pytest.mark.parametrize("name", REQUESTS)
def test_no_message_is_read_without_a_credential(
    name: str, ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of message, sent where the credential belongs: refused, and no decoder has seen a byte of it."""
    monkeypatch.setattr(wire, "_requests", None)
    monkeypatch.setattr(wire, "decode_request", None)
    client, server = ends
    thread, found = serve(server, Gate(a=TOKEN))
    message = b"\x85\xa4type" + bytes([0xA0 | len(name)]) + name.encode()
    client.send_bytes([wire.LENGTH.pack(len(message)) + message.ljust(200, b"\0")], in_s(5.0))
    thread.join(5.0)
    assert isinstance(found[0], WireError)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_is_sent_the_server_comes_to_an_end(said: bytes) -> None:
    client, server = (Channel(sock) for sock in socket.socketpair())
    thread, found = serve(server, Gate(a=TOKEN))
    client.send_bytes([said], in_s(5.0))
    client.socket.shutdown(socket.SHUT_WR)
    thread.join(5.0)
    assert isinstance(found[0], WireError | AccessRefused | OSError)
    client.close()
    server.close()
