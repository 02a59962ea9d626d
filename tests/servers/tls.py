"""Certificates made for a test, and TLS in front of a server that was built without it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

_CHUNK_BYTES = 1 << 16
_JOIN_S = 10.0


class Certificates:
    """An authority, a server's certificate for 127.0.0.1 and a client's; and another authority."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl program to make certificates")
        self.directory = directory
        self._authority("ca")
        self._authority("other-ca")
        self._signed("server", "IP:127.0.0.1")
        self._signed("elsewhere", "DNS:elsewhere.example")
        self._signed("client", "DNS:client")

    def certificate(self, name: str) -> str:
        return str(self.directory / f"{name}.pem")

    def key(self, name: str) -> str:
        return str(self.directory / f"{name}.key")

    def _authority(self, name: str) -> None:
        extensions = (
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign",
        )
        self._openssl("req", "-x509", "-out", self.certificate(name), "-subj", f"/CN={name}", *extensions)

    def _signed(self, name: str, alternative: str) -> None:
        by = ("-CA", self.certificate("ca"), "-CAkey", self.key("ca"))
        extensions = ("-addext", f"subjectAltName={alternative}", "-addext", "basicConstraints=CA:FALSE")
        self._openssl(
            "req", "-x509", "-out", self.certificate(name), "-subj", f"/CN={name}", *by, *extensions
        )

    def _openssl(self, command: str, *arguments: str) -> None:
        name = Path(arguments[arguments.index("-out") + 1]).stem
        new_key = (
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            self.key(name),
        )
        subprocess.run(
            ["openssl", command, *new_key, "-days", "2", *arguments], check=True, capture_output=True
        )


class TlsFront:
    """Accepts TLS on a port of its own and passes the bytes on to a server.

    Args:
        certificates: Where the server's certificate is from.
        name: Which certificate it shows.
        backend: Port of the server, on loopback.
        asks_for_client: Refuse clients without a certificate of the authority.
    """

    def __init__(
        self, certificates: Certificates, name: str, backend: int, *, asks_for_client: bool = False
    ) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.certificate(name), certificates.key(name))
        if asks_for_client:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(certificates.certificate("ca"))
        self._backend = backend
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="tls-front", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_JOIN_S)
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(plain)
            self._start(self._serve, plain)

    def _serve(self, plain: socket.socket) -> None:
        try:
            front = self._context.wrap_socket(plain, server_side=True)
        except OSError:
            plain.close()  # as a server does with a client that speaks no TLS, or shows no certificate
            return
        back = socket.create_connection(("127.0.0.1", self._backend))
        self._sockets += (front, back)
        self._start(_pass_on, back, front)
        _pass_on(front, back)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="tls-front", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
