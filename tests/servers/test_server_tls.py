"""The cache server's tls:// listeners, with real certificates: who trusts whom, and who is which tenant."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tls import Certificates

from kvferry.connector import handshake, wire
from kvferry.connector.address import parse_address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import AccessRefused, ConfigError, WireError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.server import listener as listener_module
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerConfig, ServerTlsConfig, TenantConfig
from kvferry.connector.server.listener import Client, Listener

TOKEN = "correct horse battery staple"
LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=16, head_dim=8, itemsize=2)
HELLO = wire.Hello(mode="stream", fingerprint=bytes(32), layout=LAYOUT)
PAYLOAD_BYTES = 3 << 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Served:
    """A listener that hands its clients to a queue."""

    def __init__(self, config: ServerConfig, tenants: tuple[TenantConfig, ...]) -> None:
        self.clients: queue.Queue[Client] = queue.Queue()
        self.refused: list[str] = []
        logger = logging.getLogger("kvferry.test")
        self.listener = Listener(
            config, Access(config, tenants), self.clients.put, self.refused.append, logger
        )
        self.listener.start()

    @property
    def port(self) -> int:
        return self.listener.addresses[0].port

    def dial(self, tls: TlsConfig, token: str = "", scheme: str = "tls") -> Channel:
        address = parse_address(f"{scheme}://127.0.0.1:{self.port}", "service")
        return dial(address, token, tls, soon())

    def tenant(self, tls: TlsConfig, token: str = "") -> str:
        """The tenant that a client of these credentials is."""
        channel = self.dial(tls, token)
        channel.send(HELLO, soon())
        client = self.clients.get(timeout=5.0)
        channel.close()
        client.channel.close()
        client.release()
        return client.tenant


Serve = Callable[..., Served]


@pytest.fixture
def serve(certificates: Certificates) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(
            *tenants: TenantConfig, shows: str = "server", asks: str = "", token: str = TOKEN
        ) -> Served:
            tls = ServerTlsConfig(
                certificate=certificates.certificate(shows),
                private_key=certificates.key(shows),
                client_ca=certificates.certificate(asks) if asks else "",
            )
            served = Served(ServerConfig(listen=("tls://127.0.0.1:0",), tls=tls, token=token), tenants)
            stack.callback(served.listener.close, soon())
            return served

        yield start


def soon() -> float:
    return time.monotonic() + 5.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def trusting(certificates: Certificates, ca: str = "ca", shows: str = "", server_name: str = "") -> TlsConfig:
    return TlsConfig(
        ca=certificates.certificate(ca),
        certificate=certificates.certificate(shows) if shows else "",
        private_key=certificates.key(shows) if shows else "",
        server_name=server_name,
    )


# --- the server's certificate, and a token ------------------------------------------------------------


def test_blocks_travel_both_ways(serve: Serve, certificates: Certificates) -> None:
    served = serve()
    channel = served.dial(trusting(certificates), TOKEN)
    channel.send(HELLO, soon())
    client = served.clients.get(timeout=5.0)
    assert isinstance(channel.socket, ssl.SSLSocket)
    assert channel.socket.version() == "TLSv1.3"
    payload = bytes(range(256)) * (PAYLOAD_BYTES // 256)
    for sender, receiver in ((channel, client.channel), (client.channel, channel)):
        thread = threading.Thread(target=sender.send_bytes, args=([payload[:10], payload[10:]], soon()))
        thread.start()
        assert receiver.receive(len(payload), soon()) == payload
        thread.join(5.0)
    channel.close()
    client.channel.close()


@pytest.mark.parametrize("waits", ["receive", "send"])
def test_interrupting_ends_who_reads_and_who_writes_and_nothing_is_sent_in_clear(
    serve: Serve, certificates: Certificates, waits: str
) -> None:
    """A channel's other methods are one thread's; with ``interrupt`` others end what that thread waits for."""
    served = serve()
    channel = served.dial(trusting(certificates), TOKEN)
    channel.send(HELLO, soon())
    client = served.clients.get(timeout=5.0)
    payload = bytes(range(256)) * (8 * PAYLOAD_BYTES // 256)
    errors: list[OSError] = []

    def work() -> None:
        try:
            if waits == "receive":
                client.channel.receive(1, soon())
            else:
                client.channel.send_bytes([payload], soon())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    received = channel.receive(1000, soon()) if waits == "send" else b""
    client.channel.interrupt()
    thread.join(5.0)
    (error,) = errors
    assert not isinstance(error, TimeoutError)
    assert isinstance(client.channel.socket, ssl.SSLSocket)
    assert client.channel.socket.cipher() is not None, "it still encrypts what would be written"
    with contextlib.suppress(ssl.SSLEOFError):  # but no record that is none
        while data := channel.socket.recv(1 << 16):
            received += data
    assert payload.startswith(received)
    channel.close()
    client.channel.close()


@pytest.mark.parametrize("token", ["", "not the token at all"])
def test_tls_does_not_replace_the_token(serve: Serve, certificates: Certificates, token: str) -> None:
    served = serve()
    with pytest.raises(AccessRefused):
        served.dial(trusting(certificates), token)
    wait_until(lambda: served.refused == ["credential"])


def test_a_server_of_another_authority_is_refused_before_it_is_told_anything(
    serve: Serve, certificates: Certificates
) -> None:
    served = serve()
    with pytest.raises(AccessRefused, match=r"tls://127.0.0.1:\d+: the server's certificate is refused"):
        served.dial(trusting(certificates, ca="other-ca"), TOKEN)
    wait_until(lambda: len(served.refused) == 1)


def test_the_systems_authorities_do_not_vouch_for_it_either(serve: Serve) -> None:
    with pytest.raises(AccessRefused, match=r"see tls\.ca"):
        serve().dial(TlsConfig(), TOKEN)


def test_a_certificate_of_another_host_is_refused_unless_it_is_expected(
    serve: Serve, certificates: Certificates
) -> None:
    served = serve(shows="elsewhere")
    with pytest.raises(AccessRefused, match=r"tls\.server_name"):
        served.dial(trusting(certificates), TOKEN)
    assert served.tenant(trusting(certificates, server_name="elsewhere.example"), TOKEN) == ""


# --- clients' certificates ----------------------------------------------------------------------------


def test_a_clients_common_name_tells_the_tenant(serve: Serve, certificates: Certificates) -> None:
    served = serve(TenantConfig(name="search", certificate="client"), asks="ca", token="")
    assert served.tenant(trusting(certificates, shows="client")) == "search"
    with pytest.raises(AccessRefused):
        served.dial(trusting(certificates, shows="elsewhere"))
    wait_until(lambda: served.refused == ["credential"])


def test_whoever_the_authority_signed_is_let_in_where_no_tenant_is_named(
    serve: Serve, certificates: Certificates
) -> None:
    assert serve(asks="ca", token="").tenant(trusting(certificates, shows="client")) == ""


@pytest.mark.parametrize("token", ["", TOKEN])
def test_without_a_certificate_that_is_asked_for_nobody_is_let_in(
    serve: Serve, certificates: Certificates, token: str
) -> None:
    served = serve(asks="ca")
    with pytest.raises(AccessRefused, match=r"see tls\.certificate"):
        served.dial(trusting(certificates), token)
    wait_until(lambda: served.refused == ["credential"])


def test_a_certificate_of_another_authority_is_refused(serve: Serve, certificates: Certificates) -> None:
    served = serve(asks="other-ca", token="")
    with pytest.raises(AccessRefused, match=r"see tls\.certificate"):
        served.dial(trusting(certificates, shows="client"))
    wait_until(lambda: served.refused == ["credential"])


# --- what is no TLS -----------------------------------------------------------------------------------


def test_a_client_without_tls_is_turned_away(serve: Serve, certificates: Certificates) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1000):
                pass
    wait_until(lambda: served.refused == ["protocol"])


def test_an_older_tls_is_turned_away(serve: Serve, certificates: Certificates) -> None:
    served = serve()
    context = ssl.create_default_context(cafile=certificates.certificate("ca"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(sock, server_hostname="127.0.0.1")
    wait_until(lambda: served.refused == ["protocol"])


def test_who_never_finishes_its_tls_is_turned_away_in_time(
    serve: Serve, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.3)
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(5.0)
        sock.sendall(b"\x16\x03\x01")  # the beginning of a client's first record
        assert sock.recv(1000) == b""
    wait_until(lambda: served.refused == ["timeout"])


def test_closing_ends_who_is_in_the_middle_of_its_tls(serve: Serve) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(5.0)
        sock.sendall(b"\x16\x03\x01")
        wait_until(lambda: "kvferry-handshake" in [thread.name for thread in threading.enumerate()])
        began = time.monotonic()
        served.listener.close(soon())
        assert time.monotonic() - began < listener_module.HANDSHAKE_S / 2
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1000) == b""


def test_a_server_without_tls_is_a_mistake() -> None:
    config = ServerConfig(listen=("tcp://127.0.0.1:0",))
    served = Served(config, ())
    with pytest.raises(WireError, match="is it a tcp:// address"):
        served.dial(TlsConfig())
    served.listener.close(soon())


def test_a_client_that_forgets_tls_is_given_up_in_time(serve: Serve) -> None:
    served = serve()
    address = parse_address(f"tcp://127.0.0.1:{served.port}", "service")
    with pytest.raises(TimeoutError, match="is it of this scheme"):
        dial(address, TOKEN, TlsConfig(), time.monotonic() + 0.3)


# --- files that cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "path"),
    [
        (("missing", "", ""), "server.tls.certificate"),
        (("server", "", ""), "server.tls.certificate"),
        (("server", "client", ""), "server.tls.certificate"),
        (("server", "encrypted", ""), "server.tls.certificate"),
        (("server", "server", "missing"), "server.tls.client_ca"),
        (("server", "server", "nonsense"), "server.tls.client_ca"),
    ],
)
def test_a_server_does_not_start_with_files_it_cannot_use(
    certificates: Certificates, server: tuple[str, str, str], path: str
) -> None:
    Path(certificates.certificate("nonsense")).write_text("no PEM")
    encrypt(certificates)
    certificate, key, ca = server
    tls = ServerTlsConfig(
        certificate=certificates.certificate(certificate),
        private_key=certificates.key(key) if key else "",
        client_ca=certificates.certificate(ca) if ca else "",
    )
    with pytest.raises(ConfigError) as raised:
        Served(ServerConfig(listen=("tls://127.0.0.1:0",), tls=tls, token=TOKEN), ())
    assert raised.value.path == path


@pytest.mark.parametrize(
    ("tls", "path"),
    [
        (("missing", "", ""), "tls.ca"),
        (("nonsense", "", ""), "tls.ca"),
        (("ca", "missing", "client"), "tls.certificate"),
        (("ca", "client", "server"), "tls.certificate"),
        (("ca", "client", "encrypted"), "tls.certificate"),
        (("ca", "", "client"), "tls.private_key"),
    ],
)
def test_a_client_says_which_file_it_cannot_use(
    certificates: Certificates, tls: tuple[str, str, str], path: str
) -> None:
    Path(certificates.certificate("nonsense")).write_text("no PEM")
    encrypt(certificates)
    ca, certificate, key = tls
    options = TlsConfig(
        ca=certificates.certificate(ca),
        certificate=certificates.certificate(certificate) if certificate else "",
        private_key=certificates.key(key) if key else "",
    )
    with pytest.raises(ConfigError) as raised:
        dial(parse_address("tls://127.0.0.1:1", "service"), TOKEN, options, soon())
    assert raised.value.path == path


def encrypt(certificates: Certificates) -> None:
    """Make a key that can't be read without somebody at a terminal, who is not there."""
    target = certificates.key("encrypted")
    if not Path(target).exists():
        source = certificates.key("server")
        subprocess.run(
            ["openssl", "pkey", "-in", source, "-aes256", "-passout", "pass:sesame", "-out", target],
            check=True,
            capture_output=True,
        )


def test_the_handshake_comes_after_tls_and_not_before(serve: Serve, certificates: Certificates) -> None:
    """Nothing of it can be seen on the way: not the greeting, and no proof that tokens could be tried against."""
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(handshake.GREETING_BYTES)
