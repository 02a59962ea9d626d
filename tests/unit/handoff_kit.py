"""What tests of handoffs share: an engine's side channel without an engine, and servers that misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from kvferry.connector.channel import Channel
from kvferry.connector.config import PeerConfig
from kvferry.connector.handshake import Grant, Peer, server_handshake
from kvferry.connector.layout import PageLayout, Shard
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff import messages
from kvferry.engines.handoff.caller import PeerCaller
from kvferry.engines.handoff.side_channel import SideChannel
from kvferry.engines.handoff.table import Handed, HandoffTable
from kvferry.engines.jobs import PeerSource

TOKEN = "correct horse battery staple"
FINGERPRINT = bytes(range(32))
PAGE_TOKENS = 16
NUM_PAGES = 64
HEADS = 2


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def content(num_tokens: int, request_id: str = "r") -> bytes:
    """A digest of the first tokens of a request's prompt."""
    return hashlib.sha256(f"{request_id} {num_tokens}".encode()).digest()


def handed(request_id: str = "r", num_tokens: int = 40, first_page: int = 7) -> Handed:
    pages = tuple(range(first_page, first_page - (-num_tokens // PAGE_TOKENS)))
    return Handed(request_id, pages, num_tokens, lambda count: content(count, request_id))


def remote_pages(rank: int = 0, num_pages: int = NUM_PAGES) -> RemotePages:
    layout = PageLayout(
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        num_heads=HEADS,
        head_bytes=16,
        kv_factor=2,
        layer_offsets=(0,),
        page_stride=1024,
        head_stride=512,
        token_stride=32,
        kv_stride=16,
    )
    return RemotePages(
        shard=Shard(rank, rank * HEADS, HEADS, True),
        layout=layout,
        nbytes=1 << 20,
        device="cpu",
        offers={"socket": b"over there"},
    )


class WatchedTable(HandoffTable):
    """A table that remembers when leases were renewed, well or not."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self.renewals: list[tuple[float, str]] = []

    def renew(self, request_id: str, reader: str, now: float) -> bool:
        self.renewals.append((now, request_id))
        return super().renew(request_id, reader, now)


class Giver:
    """An engine that hands pages over, as far as the side channel goes."""

    def __init__(self, token: str = "", lease_s: float = 30.0, is_ready: bool = True, port: int = 0) -> None:
        self.table = WatchedTable(lease_s)
        config = PeerConfig(listen=f"tcp://127.0.0.1:{port}", lease_s=lease_s)
        self.channel = SideChannel(config, token, FINGERPRINT, "giver", self.table)
        if is_ready:
            self.channel.set_ranks([remote_pages(0), remote_pages(1)])
        self.channel.start()

    @property
    def port(self) -> int:
        return self.channel.address[1]

    def source(self, request_id: str = "r") -> PeerSource:
        return PeerSource(*self.channel.address, "giver", request_id, 40)

    def hand_over(self, request_id: str = "r", num_tokens: int = 40) -> int:
        return self.table.hand_over(handed(request_id, num_tokens), time.monotonic())

    def call(self, token: str = "", fingerprint: bytes = FINGERPRINT) -> PeerCaller:
        return PeerCaller.connect("127.0.0.1", self.port, token, fingerprint, "taker", soon())

    def wait_for_renewals(self, count: int, request_id: str = "r") -> list[float]:
        """Wait until a lease has been renewed some times more, and return when that was."""
        start = len(self.table.renewals)

        def times() -> list[float]:
            return [when for when, whose in self.table.renewals[start:] if whose == request_id]

        wait_until(lambda: len(times()) >= count)
        return times()

    def ended(self) -> list[str]:
        return self.table.take_ended(time.monotonic())

    def close(self) -> None:
        self.channel.close(5.0)


@contextlib.contextmanager
def frozen_server() -> Iterator[int]:
    """A server that is reached and never says anything. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


class _Everybody:
    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        return Grant("", "")


@contextlib.contextmanager
def scripted_server(*replies: messages.Reply | None) -> Iterator[int]:
    """A server that gives its answers whatever it is asked, one connection long; None: silence from there on, and
    after the last one it hangs up. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stopped = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                channel = Channel(listening.accept()[0])
                try:
                    server_handshake(channel, _Everybody(), Peer("a test", True), soon())
                    for reply in replies:
                        channel.receive_body(soon())
                        if reply is None:
                            stopped.wait(5.0)
                            return
                        channel.send_bytes([messages.encode(reply)], soon())
                finally:
                    channel.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            stopped.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)
            assert not thread.is_alive()
