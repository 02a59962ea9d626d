"""The side channel and its caller, over real sockets: who is let in, what is answered, and what goes wrong how."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from handoff_kit import (
    FINGERPRINT,
    HEADS,
    NUM_PAGES,
    TOKEN,
    Giver,
    content,
    frozen_server,
    remote_pages,
    scripted_server,
    soon,
    wait_until,
)

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.config import PeerConfig, TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import ConfigError, HandoffFailed, KVFerryError
from kvferry.engines.handoff import messages
from kvferry.engines.handoff import side_channel as side_channel_module
from kvferry.engines.handoff.caller import PeerCaller
from kvferry.engines.handoff.digest import DIGEST_BYTES
from kvferry.engines.handoff.side_channel import SideChannel
from kvferry.engines.handoff.table import Claimed, HandoffTable

WELCOME = messages.Welcome(incarnation=bytes(16), engine_id="p", ranks=[remote_pages()], lease_s=30.0)
CLAIMED = messages.Claimed(seq=5, num_tokens=40, pages=messages.pack_pages((1, 2, 3)))


@pytest.fixture
def give() -> Iterator[Callable[..., Giver]]:
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> Giver:
            giver = Giver(**options)  # type: ignore[arg-type]
            stack.callback(giver.close)
            return giver

        yield start


@contextlib.contextmanager
def fails(reason: str, match: str | None = None) -> Iterator[None]:
    with pytest.raises(HandoffFailed, match=match) as raised:
        yield
    assert raised.value.reason == reason


def call(port: int, deadline: float | None = None, token: str = "") -> PeerCaller:
    return PeerCaller.connect("127.0.0.1", port, token, FINGERPRINT, "d", deadline or soon())


def peer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvferry-peer")]


# --- what is answered ------------------------------------------------------------------------------------


def test_a_handoff_from_welcome_to_release(give: Callable[..., Giver]) -> None:
    giver = give(token=TOKEN)
    seq = giver.hand_over()
    with contextlib.closing(giver.call(TOKEN)) as caller:
        assert caller.welcome.engine_id == "giver"
        assert caller.welcome.ranks == [remote_pages(0), remote_pages(1)]
        assert caller.welcome.lease_s == 30.0
        claimed = caller.claim("r", "d/1", 33, content(33), soon())
        assert claimed == Claimed(seq, 40, (7, 8, 9))
        assert caller.claim("r", "d/1", 16, content(16), soon()).pages == (7,)
        assert caller.digests(seq, 1, 0, 3, soon()) is None
        width = HEADS * DIGEST_BYTES
        giver.table.set_digests(seq, 1, bytes(range(3 * width)))
        assert caller.digests(seq, 1, 1, 2, soon()) == bytes(range(width, 3 * width))
        giver.table.set_digests(seq, 0, b"")
        assert caller.digests(seq, 0, 0, 3, soon()) == b""
        assert caller.renew([("r", "d/1"), ("unknown", "d/1")], soon()) == [True, False]
        caller.check("r", seq, soon())
        caller.release("r", "d/1", soon())
        assert giver.ended() == ["r"]
        with fails("expired"):
            caller.check("r", seq, soon())
        with fails("expired"):
            caller.digests(seq, 1, 0, 3, soon())
        caller.release("r", "d/1", soon())


def test_refusals_leave_the_connection_usable(give: Callable[..., Giver]) -> None:
    giver = give()
    giver.hand_over()
    with contextlib.closing(giver.call()) as caller:
        with fails("gone"):
            caller.claim("unknown", "d/1", 40, content(40), soon())
        with fails("content", "other tokens"):
            caller.claim("r", "d/1", 40, content(39), soon())
        assert caller.claim("r", "d/1", 40, content(40), soon()).num_tokens == 40


def test_a_lease_that_ran_out_is_said_to_have(give: Callable[..., Giver]) -> None:
    giver = give(lease_s=0.01)
    giver.hand_over()
    wait_until(lambda: giver.ended() == ["r"])
    with contextlib.closing(giver.call()) as caller, fails("expired", "peer.lease_s"):
        caller.claim("r", "d/1", 40, content(40), soon())


def test_many_digests_come_in_pieces(give: Callable[..., Giver], monkeypatch: pytest.MonkeyPatch) -> None:
    giver = give()
    seq = giver.hand_over(num_tokens=160)
    digests = bytes(range(10 * HEADS * DIGEST_BYTES))
    giver.table.set_digests(seq, 0, digests)
    monkeypatch.setattr(messages, "MAX_DIGEST_BYTES", 3 * HEADS * DIGEST_BYTES)
    with contextlib.closing(giver.call()) as caller:
        assert caller.digests(seq, 0, 0, 10, soon()) == digests


def test_an_engine_that_is_still_starting_says_so(give: Callable[..., Giver]) -> None:
    giver = give(is_ready=False)
    giver.hand_over()
    with contextlib.closing(giver.call()) as caller:
        assert caller.renew([("r", "d/1")], soon()) == [True]
        with fails("refused", "exported"):
            caller.claim("r", "d/1", 40, content(40), soon())
    address = Address(scheme="tcp", host="127.0.0.1", port=giver.port)
    with contextlib.closing(dial(address, "", TlsConfig(), soon())) as channel:
        claim = messages.Claim(request_id="r", reader="d/1", num_tokens=40, content=content(40))
        for request in (messages.Hello(fingerprint=FINGERPRINT, reader="d"), claim):
            channel.send_bytes([messages.encode(request)], soon())
            reply = messages.decode_reply(channel.receive_body(soon()))
        assert isinstance(reply, messages.Refused)
        assert "not ready" in reply.text
    giver.channel.set_ranks([remote_pages()])
    with contextlib.closing(giver.call()) as caller:
        assert caller.claim("r", "d/1", 40, content(40), soon()).pages == (7, 8, 9)


def test_ranks_that_say_more_than_a_message_holds_are_an_error_at_once(give: Callable[..., Giver]) -> None:
    rank = msgspec.structs.replace(remote_pages(), offers={"socket": bytes(16 << 10)})
    with fails("transport", "80 ranks"):
        give().channel.set_ranks([rank] * 80)


# --- who is let in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "another token, of enough letters"])
def test_without_the_token_nothing_is_parsed(
    give: Callable[..., Giver], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver = give(token=TOKEN)

    def fail(body: bytes) -> messages.Request:
        raise AssertionError("a stranger's message was read")

    monkeypatch.setattr(messages, "decode_request", fail)
    with fails("refused", "token"):
        giver.call(token)


def test_an_engine_of_another_model_is_told_which(give: Callable[..., Giver]) -> None:
    other = bytes.fromhex("abcdef01") + bytes(28)
    with fails("incompatible", r"abcdef01, this engine's 00010203"):
        give().call(fingerprint=other)


@pytest.mark.parametrize("first", [b"\x81", messages.encode(messages.Released())[4:]])
def test_what_is_no_hello_is_refused(give: Callable[..., Giver], first: bytes) -> None:
    address = Address(scheme="tcp", host="127.0.0.1", port=give().port)
    with contextlib.closing(dial(address, "", TlsConfig(), soon())) as channel:
        channel.send_bytes([len(first).to_bytes(4, "little"), first], soon())
        reply = messages.decode_reply(channel.receive_body(soon()))
        assert isinstance(reply, messages.Refused)
        assert reply.reason == "protocol"
        with pytest.raises(ConnectionError):
            channel.receive(1, soon())


def test_nonsense_ends_its_own_connection_only(give: Callable[..., Giver]) -> None:
    giver = give()
    with contextlib.closing(giver.call()) as good, contextlib.closing(giver.call()) as bad:
        with fails("incompatible", "does not understand"):
            bad.claim("r" * 300, "d/1", 40, content(40), soon())
        with fails("disconnected"):
            bad.renew([("r", "d")], soon())
        assert good.renew([("r", "d")], soon()) == [False]
    wait_until(lambda: not peer_threads())


def test_whoever_asks_nothing_for_long_is_disconnected(
    give: Callable[..., Giver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_channel_module, "IDLE_S", 0.05)
    caller = give().call()
    wait_until(lambda: not peer_threads())
    with fails("disconnected"):
        caller.renew([("r", "d")], soon())


def test_connections_are_bounded(give: Callable[..., Giver], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_channel_module, "MOST_CONNECTIONS", 1)
    giver = give()
    with contextlib.closing(giver.call()), fails("refused", "as many connections"):
        giver.call()
    wait_until(lambda: not peer_threads())
    giver.call().close()


def test_closing_disconnects_everybody_and_frees_the_port(give: Callable[..., Giver]) -> None:
    giver = give()
    port = giver.port
    with contextlib.closing(giver.call()) as caller:
        began = time.monotonic()
        giver.close()
        giver.close()
        assert time.monotonic() - began < 2.0
        assert not peer_threads()
        with fails("disconnected"):
            caller.renew([("r", "d")], soon())
    with fails("unreachable"):
        call(port)


# --- what the operator may have written ------------------------------------------------------------------


def make(token: str = "", port_offset: int = 0, **options: object) -> SideChannel:
    config = PeerConfig(**options)  # type: ignore[arg-type]
    return SideChannel(config, token, FINGERPRINT, "p", HandoffTable(1.0), port_offset)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"listen": "unix:///run/a.sock"}, r"peer\.listen: unix.*use tcp://"),
        ({"listen": "tls://127.0.0.1:0"}, r"peer\.listen: tls.*use tcp://"),
        ({"listen": "127.0.0.1:0"}, r"peer\.listen"),
        ({"listen": "tcp://10.0.0.1:0"}, r"peer\.listen: refuses.*KVFERRY_TOKEN"),
        ({"listen": "tcp://0.0.0.0:0", "token": TOKEN}, r"peer\.advertise"),
        ({"listen": "tcp://0.0.0.0:0", "token": TOKEN, "advertise": "::"}, r"peer\.advertise"),
        ({"advertise": "a b"}, r"peer\.advertise"),
        ({"token": "short"}, r"token: .*guessed"),
        ({"listen": "tcp://127.0.0.1:65535", "port_offset": 1}, r"peer\.listen"),
    ],
)
def test_an_address_that_will_not_do_is_a_clear_error(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(**options)  # type: ignore[arg-type]


def test_an_address_of_another_machine_is_an_error_that_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"peer\.listen.*no address of this machine"):
        make(listen="tcp://192.0.2.1:0", token=TOKEN).start()


@pytest.mark.parametrize("port_offset", [0, 3])
def test_a_port_that_is_taken_is_an_error(port_offset: int) -> None:
    """Engines of one host add an offset, to have a port each."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        channel = make(listen=f"tcp://127.0.0.1:{port - port_offset}", port_offset=port_offset)
        with pytest.raises(KVFerryError, match=rf"{port}: something else does.*peer\.listen"):
            channel.start()
        channel.close(1.0)


def test_where_readers_are_sent_is_what_the_operator_says() -> None:
    channel = make(listen="tcp://127.0.0.1:0", advertise="p1.example")
    channel.start()
    try:
        host, port = channel.address
        assert host == "p1.example"
        assert port > 0
    finally:
        channel.close(5.0)


# --- what the caller may meet ----------------------------------------------------------------------------


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with fails("unreachable", str(port)):
        call(port)


def test_a_name_that_is_none() -> None:
    with fails("unreachable", "not known"):
        PeerCaller.connect("name.invalid", 1, "", FINGERPRINT, "d", soon())


def test_a_frozen_peer_costs_the_deadline_and_no_more() -> None:
    began = time.monotonic()
    with frozen_server() as port, fails("timeout"):
        call(port, soon(0.2))
    with scripted_server(WELCOME, None) as port, contextlib.closing(call(port)) as caller:
        with fails("timeout"):
            caller.check("r", 5, soon(0.2))
    assert 0.4 <= time.monotonic() - began < 2.0


def test_something_else_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            with sock.accept()[0] as other:
                other.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 4)

        thread = threading.Thread(target=serve)
        thread.start()
        with fails("incompatible"):
            call(sock.getsockname()[1])
        thread.join(5.0)


def test_another_thread_can_end_the_wait() -> None:
    with scripted_server(WELCOME, None) as port, contextlib.closing(call(port)) as caller:
        timer = threading.Timer(0.05, caller.interrupt)
        timer.start()
        with fails("disconnected"):
            caller.check("r", 5, soon())
        timer.join()


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (messages.Checked(ok=True), "answered Claim with Checked"),
        (msgspec.structs.replace(CLAIMED, num_tokens=39), "calls them 39"),
        (msgspec.structs.replace(CLAIMED, pages=messages.pack_pages((1, 2))), "has 2 pages"),
        (msgspec.structs.replace(CLAIMED, pages=messages.pack_pages((1, 2, NUM_PAGES))), "outside"),
        (msgspec.structs.replace(CLAIMED, pages=bytes(13)), "multiple of 4"),
    ],
)
def test_lies_about_a_claim_are_noticed(reply: messages.Reply, match: str) -> None:
    with scripted_server(WELCOME, reply) as port, contextlib.closing(call(port)) as caller:
        with fails("incompatible", match):
            caller.claim("r", "d/1", 40, content(40), soon())
        with fails("disconnected"):
            caller.check("r", 5, soon())


@pytest.mark.parametrize(
    "data", [bytes(1), bytes(3 * HEADS * DIGEST_BYTES - 1), bytes(4 * HEADS * DIGEST_BYTES)]
)
def test_digests_of_another_length_are_noticed(data: bytes) -> None:
    reply = messages.DigestsAre(ready=True, data=data)
    with scripted_server(WELCOME, reply) as port, contextlib.closing(call(port)) as caller:
        with fails("incompatible", "bytes of digests"):
            caller.digests(5, 0, 0, 3, soon())


def test_other_lies_are_noticed() -> None:
    with scripted_server(CLAIMED) as port, fails("incompatible"):
        call(port)
    with scripted_server(WELCOME, messages.Renewed(alive=[True])) as port:
        with contextlib.closing(call(port)) as caller, fails("incompatible", "1 leases of 2"):
            caller.renew([("a", "d"), ("b", "d")], soon())
    with scripted_server(WELCOME) as port, contextlib.closing(call(port)) as caller:
        with fails("incompatible", "no rank 7"):
            caller.digests(5, 7, 0, 3, soon())
    uneven = [remote_pages(), msgspec.structs.replace(remote_pages(1), layout=_other_pages())]
    with scripted_server(msgspec.structs.replace(WELCOME, ranks=uneven)) as port:
        with contextlib.closing(call(port)) as caller, fails("incompatible", "different sizes"):
            caller.claim("r", "d/1", 40, content(40), soon())


def test_a_sentence_from_outside_stays_one_line_of_the_log() -> None:
    refused = messages.Refused(reason="gone", text="so\nERROR all is lost")
    with scripted_server(WELCOME, refused) as port, contextlib.closing(call(port)) as caller:
        with pytest.raises(HandoffFailed) as raised:
            caller.claim("r", "d/1", 40, content(40), soon())
        assert "all is lost" in str(raised.value)
        assert str(raised.value).isprintable()


def _other_pages() -> object:
    return msgspec.structs.replace(remote_pages().layout, page_tokens=32)


def test_a_stranger_that_is_slow_keeps_nobody_out(give: Callable[..., Giver]) -> None:
    giver = give()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", giver.port)))
        stack.enter_context(contextlib.closing(Channel(socket.create_connection(("127.0.0.1", giver.port)))))
        giver.call().close()
