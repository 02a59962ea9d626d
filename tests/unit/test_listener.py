"""Letting clients in: sockets that nobody else gets at, and strangers that cost little."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry.connector import handshake, wire
from kvferry.connector.address import Address, parse_address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import AccessRefused, ConfigError, KVFerryError, WireError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.server import listener as listener_module
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerConfig, TenantConfig
from kvferry.connector.server.listener import Client, Listener

TOKEN = "correct horse battery staple"
SEARCH = "the token of search"
LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=16, head_dim=8, itemsize=2)
HELLO = wire.Hello(mode="stream", fingerprint=bytes(32), layout=LAYOUT, engine="a test")
LOGGER = logging.getLogger("kvferry.test")
NO_TLS = TlsConfig()


def soon() -> float:
    return time.monotonic() + 5.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


class Served:
    """A listener that hands its clients to a queue."""

    def __init__(self, config: ServerConfig, tenants: tuple[TenantConfig, ...] = ()) -> None:
        self.clients: queue.Queue[Client] = queue.Queue()
        self.refused: list[str] = []
        self.listener = Listener(
            config, Access(config, tenants), self.clients.put, self.refused.append, LOGGER
        )
        self.listener.start()

    @property
    def address(self) -> Address:
        return self.listener.addresses[0]

    def dial(self, token: str = "") -> Channel:
        return dial(self.address, token, NO_TLS, soon())

    def connect(self) -> Channel:
        """A connection that has said nothing yet."""
        if self.address.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.address.path)
        else:
            sock = socket.create_connection((self.address.host, self.address.port))
        return Channel(sock)

    def client(self, token: str = "") -> tuple[Channel, Client]:
        channel = self.dial(token)
        channel.send(HELLO, soon())
        return channel, self.clients.get(timeout=5.0)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(
            listen: str = f"unix://{tmp_path}/run/a.sock", *tenants: TenantConfig, **settings: object
        ) -> Served:
            served = Served(ServerConfig(listen=(listen,), **settings), tenants)  # type: ignore[arg-type]
            stack.callback(served.listener.close, soon())
            return served

        yield start


def is_closed(channel: Channel) -> bool:
    """Wait until the server has closed a connection; not much may have come before."""
    with pytest.raises(ConnectionError):
        channel.receive(10_000, soon())
    channel.close()
    return True


# --- clients ------------------------------------------------------------------------------------------


def test_a_local_client_is_handed_over_with_what_is_known_of_it(serve: Serve) -> None:
    served = serve()
    channel, client = served.client()
    assert client.tenant == ""
    assert client.hello == HELLO
    assert client.peer.uid == os.geteuid()
    assert client.address == served.address
    client.channel.send(wire.Goodbye(), soon())
    assert channel.receive_reply(soon()) == wire.Goodbye()
    channel.close()
    client.channel.close()


def test_a_token_tells_the_tenant(serve: Serve) -> None:
    served = serve("tcp://127.0.0.1:0", TenantConfig(name="search", token=SEARCH), token=TOKEN)
    for token, tenant in ((TOKEN, ""), (SEARCH, "search")):
        channel, client = served.client(token)
        assert client.tenant == tenant
        channel.close()
        client.channel.close()


@pytest.mark.parametrize("token", ["", "not the token at all"])
def test_who_has_no_credential_is_refused_and_counted(serve: Serve, token: str) -> None:
    served = serve("tcp://127.0.0.1:0", token=TOKEN)
    with pytest.raises(AccessRefused, match=str(served.address)):
        served.dial(token)
    wait_until(lambda: served.refused == ["credential"])
    assert served.clients.empty()
    assert served.listener.connections == 0


@pytest.mark.parametrize("request_type", wire.Request.__args__, ids=lambda kind: kind.__name__)
def test_without_the_token_no_message_is_even_read(
    serve: Serve, request_type: type[wire.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(body: bytes) -> wire.Request:
        raise AssertionError("a message was read before the credential was accepted")

    monkeypatch.setattr(wire, "decode_request", fail)
    served = serve("tcp://127.0.0.1:0", token=TOKEN)
    name = str(request_type.__struct_config__.tag).encode()
    message = b"\x81\xa4type" + bytes([0xA0 | len(name)]) + name
    framed = wire.LENGTH.pack(len(message)) + message
    greeting_only, refused = served.connect(), served.connect()
    greeting_only.send_bytes([framed.ljust(handshake.ANSWER_BYTES, b"\0")], soon())
    assert is_closed(greeting_only)
    answer = handshake.client_answer(refused.receive(handshake.GREETING_BYTES, soon()), "wrong", bytes(32))
    refused.send_bytes([answer + framed], soon())
    assert refused.receive(handshake.VERDICT_BYTES, soon())[0] == 1
    assert is_closed(refused)
    wait_until(lambda: sorted(served.refused) == ["credential", "protocol"])


def test_an_answer_that_was_overheard_lets_nobody_in(serve: Serve) -> None:
    served = serve("tcp://127.0.0.1:0", token=TOKEN)
    first, second = served.connect(), served.connect()
    answer = handshake.client_answer(first.receive(handshake.GREETING_BYTES, soon()), TOKEN, bytes(32))
    second.receive(handshake.GREETING_BYTES, soon())
    for channel, code in ((second, 1), (first, 0)):
        channel.send_bytes([answer], soon())
        assert channel.receive(handshake.VERDICT_BYTES, soon())[0] == code
        channel.close()


def test_the_first_message_is_hello_or_the_last(serve: Serve) -> None:
    served = serve()
    channel = served.dial()
    channel.send(wire.Ping(id=1), soon())
    refusal = channel.receive_reply(soon())
    assert isinstance(refusal, wire.Refused)
    assert refusal.code == "protocol"
    assert "Ping" in refusal.why
    assert is_closed(channel)
    wait_until(lambda: served.refused == ["protocol"])
    wait_until(lambda: served.listener.connections == 0)


def test_a_client_of_another_version_is_told(serve: Serve) -> None:
    served = serve()
    channel = served.connect()
    greeting = channel.receive(handshake.GREETING_BYTES, soon())
    answer = bytearray(handshake.client_answer(greeting, "", bytes(32)))
    answer[8] += 1
    channel.send_bytes([answer], soon())
    assert channel.receive(handshake.VERDICT_BYTES, soon())[0] == 2
    assert is_closed(channel)
    wait_until(lambda: served.refused == ["protocol"])


def test_a_client_that_breaks_the_server_breaks_its_own_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Client] = []

    def on_client(client: Client) -> None:
        calls.append(client)
        if len(calls) == 1:
            raise RuntimeError("out of cheese")

    config = ServerConfig(listen=(f"unix://{tmp_path}/a.sock",))
    listener = Listener(config, Access(config), on_client, lambda reason: None, LOGGER)
    listener.start()
    first = dial(listener.addresses[0], "", NO_TLS, soon())
    first.send(HELLO, soon())
    assert is_closed(first)
    wait_until(lambda: listener.connections == 0)
    second = dial(listener.addresses[0], "", NO_TLS, soon())
    second.send(HELLO, soon())
    wait_until(lambda: len(calls) == 2)
    listener.close(soon())
    second.close()
    calls[1].channel.close()
    assert "out of cheese" in caplog.text


# --- strangers ----------------------------------------------------------------------------------------


def test_who_says_nothing_or_says_it_slowly_is_turned_away_in_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not buy more time, before the answer and in the middle of the first message."""
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.4)
    served = serve()
    silent, slow, slow_later = served.connect(), served.connect(), served.dial()
    drips = [(slow, b"KVFERRYC" * 20), (slow_later, wire.encode(HELLO))]
    began = time.monotonic()
    with contextlib.suppress(OSError):
        for position in range(80):
            for channel, said in drips:
                channel.send_bytes([said[position : position + 1]], soon())
            wait_until(lambda position=position: time.monotonic() > began + 0.02 * position)  # type: ignore[misc]
    assert time.monotonic() - began < 3.0
    for channel in (silent, slow, slow_later):
        assert is_closed(channel)
    wait_until(lambda: served.refused == ["timeout"] * 3)
    assert served.listener.connections == 0


def test_strangers_are_many_at_most_and_on_one_address_do_not_keep_out_those_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "MOST_HANDSHAKES", 3)
    served = Served(ServerConfig(listen=(f"unix://{tmp_path}/a.sock", "tcp://127.0.0.1:0")))
    strangers = [served.connect() for _ in range(3)]
    for stranger in strangers:
        stranger.receive(handshake.GREETING_BYTES, soon())
    assert is_closed(served.connect())
    assert served.refused == ["full"]
    dial(served.listener.addresses[1], "", NO_TLS, soon()).close()
    strangers.pop().close()
    wait_until(lambda: "protocol" in served.refused)
    wait_until(lambda: len(served.listener._strangers) < 3)  # its place is free a moment after it was counted
    served.dial().close()
    served.listener.close(soon())
    for stranger in strangers:
        stranger.close()


def test_connections_are_as_many_as_configured_until_one_ends(serve: Serve) -> None:
    served = serve(max_connections=2)
    held = [served.client() for _ in range(2)]
    with pytest.raises(handshake.Busy, match="max_connections"):
        served.dial()
    wait_until(lambda: served.refused == ["full"])
    channel, client = held.pop()
    channel.close()
    client.channel.close()
    client.release()
    client.release()
    assert served.listener.connections == 1
    held.append(served.client())
    with pytest.raises(handshake.Busy):
        served.dial()
    for channel, client in held:
        channel.close()
        client.channel.close()


def test_strangers_do_not_fill_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = serve("tcp://127.0.0.1:0", token=TOKEN)
    for _ in range(20):
        with pytest.raises(AccessRefused):
            served.dial("something else")
    wait_until(lambda: len(served.refused) == 20)
    assert len([record for record in caplog.records if "wrong token" in record.message]) == 1
    assert TOKEN not in caplog.text


def test_closing_ends_strangers_at_once_and_leaves_clients_alone(serve: Serve) -> None:
    served = serve()
    stranger, (channel, client) = served.connect(), served.client()
    stranger.receive(handshake.GREETING_BYTES, soon())
    began = time.monotonic()
    served.listener.close(soon())
    assert time.monotonic() - began < listener_module.HANDSHAKE_S / 2
    assert is_closed(stranger)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kvferry-")] == []
    client.channel.send(wire.Goodbye(), soon())
    assert channel.receive_reply(soon()) == wire.Goodbye()
    channel.close()
    client.channel.close()
    with pytest.raises(OSError, match="unix://"):
        served.dial()


# --- sockets ------------------------------------------------------------------------------------------


def test_a_unix_socket_is_the_users_own_from_its_first_moment(serve: Serve, tmp_path: Path) -> None:
    """Also with a umask that would open it; the umask itself, which all threads share, is not touched."""
    before = os.umask(0)
    try:
        served = serve()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    path = Path(served.address.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_directory_that_is_there_keeps_its_mode(serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir(mode=0o755)
    serve(f"unix://{directory}/a.sock")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_closing_removes_the_socket(serve: Serve) -> None:
    served = serve()
    assert Path(served.address.path).exists()
    served.listener.close(soon())
    assert not Path(served.address.path).exists()


def test_a_socket_that_a_dead_server_left_behind_is_replaced(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    served = serve(f"unix://{path}")
    served.dial().close()


def test_a_socket_that_somebody_listens_on_is_left_alone(serve: Serve) -> None:
    served = serve()
    with pytest.raises(KVFerryError, match="another server listens"):
        serve()
    served.dial().close()


def test_a_file_is_left_alone(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="is no socket"):
        serve(f"unix://{path}")
    assert path.read_text() == "data"


def test_closing_leaves_a_successors_socket_alone(serve: Serve) -> None:
    served = serve()
    path = Path(served.address.path)
    path.unlink()
    successor = serve()
    served.listener.close(soon())
    assert path.exists()
    successor.dial().close()


def test_a_port_that_is_taken_is_an_error_and_nothing_is_left_bound(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServerConfig(listen=(f"unix://{tmp_path}/a.sock", f"tcp://127.0.0.1:{port}"))
        listener = Listener(config, Access(config), lambda client: None, lambda reason: None, LOGGER)
        with pytest.raises(KVFerryError, match=f"127.0.0.1:{port}: something else does"):
            listener.start()
    assert not (tmp_path / "a.sock").exists()


def test_an_address_of_another_machine_is_an_error(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        serve("tcp://192.0.2.1:7070", token=TOKEN)


def test_a_name_that_is_none_is_an_error(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="not known"):
        serve("tcp://name.invalid:7070", token=TOKEN)


# --- the client's side --------------------------------------------------------------------------------


def test_a_server_that_is_away_can_be_tried_again(tmp_path: Path) -> None:
    for text in (f"unix://{tmp_path}/a.sock", "tcp://127.0.0.1:1"):
        with pytest.raises(OSError, match=text):
            dial(parse_address(text, "service"), "", NO_TLS, soon())


def test_something_else_that_listens_there_is_a_mistake(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = parse_address(f"tcp://127.0.0.1:{other.getsockname()[1]}", "service")

        def answer() -> None:
            with other.accept()[0] as sock:
                sock.sendall(b"220 mail.example ESMTP and something more to read\r\n")

        thread = threading.Thread(target=answer, name="mail")
        thread.start()
        with pytest.raises(WireError, match="no kvferry cache server"):
            dial(address, "", NO_TLS, soon())
        thread.join(5.0)


def test_something_that_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = parse_address(f"tcp://127.0.0.1:{mute.getsockname()[1]}", "service")
        with pytest.raises(TimeoutError, match="did not introduce itself"):
            dial(address, "", NO_TLS, time.monotonic() + 0.05)
        with pytest.raises(TimeoutError):
            dial(address, "", NO_TLS, time.monotonic() - 1.0)


def test_tls_options_for_another_kind_of_address_are_a_mistake(tmp_path: Path) -> None:
    address = parse_address(f"unix://{tmp_path}/a.sock", "service")
    with pytest.raises(ConfigError, match="do nothing"):
        dial(address, "", TlsConfig(ca="ca.pem"), soon())


def test_a_server_of_another_user_is_not_trusted_without_a_token(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("unix:///" + str(serve().address.path)[1:] + "2", token=TOKEN)
    mine = os.geteuid()
    monkeypatch.setattr("kvferry.connector.dialing.os.geteuid", lambda: mine + 1)
    with pytest.raises(AccessRefused, match="the server runs as user id"):
        served.dial()
    served.dial(TOKEN).close()
