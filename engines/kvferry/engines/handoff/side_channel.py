"""The side channel: where other engines ask for the pages that this one holds for them.

It runs in the engine's scheduler process and answers from the ``HandoffTable`` alone, so it never waits for the engine.
Who connects has to prove that it knows the token before anything else of it is read.

Who owns what
  * A ``Listener`` of the cache server's kind lets readers in. Each has a thread, ``kvferry-peer-<where from>``, which
    owns its connection and ends when nothing came for ``IDLE_S``.
  * ``set_ranks``, ``start`` and ``close`` are the owner's, one thread's at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec

from kvferry.connector.address import Address, parse_address
from kvferry.connector.channel import Channel
from kvferry.connector.config import PeerConfig
from kvferry.connector.errors import ConfigError, HandoffFailed, KVFerryError, LeaseError, WireError
from kvferry.connector.framing import LENGTH
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.listener import Client, Listener
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff import messages
from kvferry.engines.handoff.table import HandoffTable

__all__ = ["IDLE_S", "MOST_CONNECTIONS", "SideChannel"]

_logger = logging.getLogger(__name__)

IDLE_S = 120.0
"""A reader that asks nothing for so long is disconnected; it may come back."""
MOST_CONNECTIONS = 256
_SEND_S = 5.0
_EVERYWHERE = ("0.0.0.0", "::")


class SideChannel:
    """Answers other engines.

    Args:
        config: The handoff's options.
        token: The credential of all engines; empty for none.
        fingerprint: 32 bytes; what this engine's blocks are keyed under. A reader's must be the same.
        engine_id: The engine's name.
        table: The leases; the clock of its arguments is ``time.monotonic``.
        port_offset: Added to the configured port, unless that is 0.
        logger: Where it reports.

    Raises:
        ConfigError: ``peer.listen`` or ``peer.advertise`` cannot be served, or would let strangers in.
    """

    def __init__(
        self,
        config: PeerConfig,
        token: str,
        fingerprint: bytes,
        engine_id: str,
        table: HandoffTable,
        port_offset: int = 0,
        logger: logging.Logger = _logger,
    ) -> None:
        address = _listen_address(config, token, port_offset)
        self._advertised = _advertised_host(config, address)
        self._fingerprint = fingerprint
        self._engine_id = engine_id
        self._table = table
        self._logger = logger
        self._incarnation = os.urandom(16)
        self._lock = threading.Lock()
        self._ranks: list[RemotePages] = []
        self._channels: set[Channel] = set()
        self._is_closing = False
        self._has_started = False
        server = ServerConfig(listen=(str(address),), token=token, max_connections=MOST_CONNECTIONS)
        with _named_for_peers():
            access = Access(server)
        access.warnings = _warnings(address, token)
        self._listener = Listener(server, access, self._serve, lambda reason: None, logger, self._read_hello)

    @property
    def address(self) -> tuple[str, int]:
        """Where readers reach it, once started."""
        return self._advertised, self._listener.addresses[0].port

    def set_ranks(self, ranks: Sequence[RemotePages]) -> None:
        """Say how the ranks' pages can be read; what is claimed before is refused.

        Raises:
            HandoffFailed: ``transport``: they say more than a message can hold.
        """
        welcome = msgspec.structs.replace(self._welcome(), ranks=list(ranks))
        try:
            messages.decode_reply(messages.encode(welcome)[LENGTH.size :])
        except WireError as error:
            raise HandoffFailed(
                "transport", f"what the {len(ranks)} ranks offer cannot be told: {error}"
            ) from error
        with self._lock:
            self._ranks = list(ranks)

    def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: The address cannot be had by anybody.
            KVFerryError: It cannot be had now.
        """
        with _named_for_peers():
            self._listener.start()
        self._has_started = True

    def close(self, deadline_s: float) -> None:
        """Disconnect everybody and listen no more; waits at most ``deadline_s`` seconds. Idempotent."""
        with self._lock:
            self._is_closing = True
            channels = list(self._channels)
        for channel in channels:
            channel.interrupt()
        if self._has_started:
            self._has_started = False
            self._listener.close(time.monotonic() + deadline_s)

    def _read_hello(self, channel: Channel, deadline: float) -> messages.Hello:
        """On a stranger's thread: it has a credential, is it of the same model?"""
        try:
            hello = messages.decode_request(channel.receive_body(deadline))
            if not isinstance(hello, messages.Hello):
                raise WireError(f"a reader began with {type(hello).__name__} instead of Hello")
        except WireError as error:
            _refuse(channel, "protocol", str(error), deadline)
            raise
        if hello.fingerprint != self._fingerprint:
            why = (
                f"the reader's model is {hello.fingerprint[:4].hex()}, this engine's {self._fingerprint[:4].hex()}: "
                "model, revision, KV dtype, block_tokens, the order inside a CPU's pages or kvferry's version differ"
            )
            _refuse(channel, "incompatible", why, deadline)
            raise WireError(why)
        return hello

    def _serve(self, client: Client[messages.Hello]) -> None:
        """On the reader's thread, until it goes."""
        threading.current_thread().name = f"kvferry-peer-{client.peer.name}"
        channel = client.channel
        with self._lock:
            is_late = self._is_closing
            if not is_late:
                self._channels.add(channel)
        try:
            if not is_late:
                self._converse(channel)
        except WireError as error:
            self._logger.warning("%s (%s) is disconnected: %s", client.hello.reader, client.peer.name, error)
            with contextlib.suppress(OSError):
                _refuse(channel, "protocol", str(error), time.monotonic() + _SEND_S)
        except OSError as error:
            self._logger.debug("%s (%s) is gone: %s", client.hello.reader, client.peer.name, error)
        finally:
            with self._lock:
                self._channels.discard(channel)
            channel.close()
            client.release()

    def _converse(self, channel: Channel) -> None:
        reply: messages.Reply = self._welcome()
        while True:
            channel.send_bytes([messages.encode(reply)], time.monotonic() + _SEND_S)
            request = messages.decode_request(channel.receive_body(time.monotonic() + IDLE_S))
            reply = self._answer(request)

    def _welcome(self) -> messages.Welcome:
        with self._lock:
            ranks = self._ranks
        return messages.Welcome(
            incarnation=self._incarnation,
            engine_id=self._engine_id,
            ranks=ranks,
            lease_s=self._table.lease_s,
        )

    def _answer(self, request: messages.Request) -> messages.Reply:
        now = time.monotonic()
        match request:
            case messages.Claim():
                return self._claim(request, now)
            case messages.Renew():
                alive = [self._table.renew(request_id, reader, now) for request_id, reader in request.leases]
                return messages.Renewed(alive=alive)
            case messages.Check():
                return messages.Checked(ok=self._table.check(request.request_id, request.seq, now))
            case messages.Digests():
                return self._digests(request)
            case messages.Release():
                self._table.release(request.request_id, request.reader, now)
                return messages.Released()
            case messages.Hello():
                raise WireError("a reader said Hello twice")

    def _claim(self, claim: messages.Claim, now: float) -> messages.Reply:
        with self._lock:
            is_ready = bool(self._ranks)
        if not is_ready:
            return messages.Refused(
                reason="refused", text="not ready: its workers have not exported their pages"
            )
        claimed = self._table.claim(claim.request_id, claim.reader, claim.num_tokens, claim.content, now)
        if isinstance(claimed, str):
            return messages.Refused(reason=claimed, text=_WHY[claimed])
        pages = messages.pack_pages(claimed.pages)
        return messages.Claimed(seq=claimed.seq, num_tokens=claimed.num_tokens, pages=pages)

    def _digests(self, request: messages.Digests) -> messages.Reply:
        try:
            found = self._table.digests(request.seq, request.rank, request.first, request.count)
        except LeaseError as error:
            return messages.Refused(reason="expired", text=str(error))
        if found is not None and len(found) > messages.MAX_DIGEST_BYTES:
            raise WireError(f"{request.count} pages' digests do not fit into a message")
        return messages.DigestsAre(ready=found is not None, data=found or b"")


_WHY = {
    "gone": "it holds no pages of that request: it never did, or they were released",
    "content": "what it holds is not what is asked for: other tokens, cache_salt or adapter, or more of them",
    "expired": "the lease was over before the pages were claimed; see peer.lease_s",
    "refused": "too many readers want that request's pages",
}


def _listen_address(config: PeerConfig, token: str, port_offset: int) -> Address:
    address = parse_address(config.listen, "peer.listen")
    if address.scheme != "tcp":
        raise ConfigError("peer.listen", f"{address.scheme}:// is not supported yet", "use tcp://host:port")
    if not address.is_loopback and not token:
        raise ConfigError(
            "peer.listen",
            f"refuses to start: whoever reaches {address} could read what users wrote",
            "set KVFERRY_TOKEN on every engine, or listen on tcp://127.0.0.1:0",
        )
    if address.port and address.port + port_offset > 65535:
        raise ConfigError(
            "peer.listen", f"port {address.port} + {port_offset} is over 65535", "choose a lower"
        )
    return msgspec.structs.replace(address, port=address.port + port_offset if address.port else 0)


def _advertised_host(config: PeerConfig, address: Address) -> str:
    if not config.advertise:
        if address.host in _EVERYWHERE:
            raise ConfigError(
                "peer.advertise",
                f"{address} is every address of this machine",
                "say at which one it is reached",
            )
        return address.host
    host = config.advertise.removeprefix("[").removesuffix("]")
    parsed = parse_address(f"tcp://[{host}]:1" if ":" in host else f"tcp://{host}:1", "peer.advertise")
    if parsed.host in _EVERYWHERE:
        raise ConfigError("peer.advertise", f"nobody can connect to {parsed.host}", "name one address")
    return parsed.host


def _warnings(address: Address, token: str) -> tuple[str, ...]:
    """What is allowed, but should be known."""
    if not address.is_loopback:
        return (
            f"{address} is not encrypted: KV pages, from which prompts can be recovered, travel in clear and can be "
            "altered on the way; use a network that is yours alone",
        )
    if not token:
        return (
            f"every user of this machine may read this engine's KV at {address}; a token would keep them out",
        )
    return ()


@contextlib.contextmanager
def _named_for_peers() -> Iterator[None]:
    """The cache server's parts speak of its options; these are ours."""
    try:
        yield
    except ConfigError as error:
        path = "token" if error.path == "server.token" else "peer.listen"
        raise ConfigError(path, error.why, error.hint.replace("server.listen", "peer.listen")) from error
    except KVFerryError as error:
        raise KVFerryError(str(error).replace("server.listen", "peer.listen")) from error


def _refuse(channel: Channel, reason: messages.RefusalReason, text: str, deadline: float) -> None:
    refused = messages.Refused(reason=reason, text=text[: messages.MAX_TEXT])
    channel.send_bytes([messages.encode(refused)], deadline)
