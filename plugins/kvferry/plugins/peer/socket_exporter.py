"""The exporting side of the ``socket`` transport: hands out pages to whoever is let in.

Pages are gathered a piece at a time into a buffer of the connection and sent from there, so that memory is bounded
whatever is asked for. That the engine leaves them alone meanwhile is what the side channel's leases are for.

Who owns what
  * ``Listener`` has its threads for strangers. The one on which a reader introduced itself becomes that reader's,
    ``kvferry-socket-<rank>``, and owns its connection and buffer until the reader goes.
  * ``close`` may be called by any thread: it interrupts the readers' connections and waits for their threads, so that
    none reads the engine's memory any more.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.errors import ConfigError, HandoffFailed, KVFerryError, WireError
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.listener import Client, Listener
from kvferry.connector.transport import Heads, PageMemory, TransportContext
from kvferry.plugins.peer import socket_wire as wire
from kvferry.plugins.peer.socket_pieces import PieceBuffer
from kvferry.plugins.peer.socket_wire import Offer, Opening, Verdict

__all__ = ["IDLE_S", "SocketExporter", "answer", "verdict_on"]

logger = logging.getLogger(__name__)

IDLE_S = 600.0
"""A reader that asks for nothing for so long is gone."""
_REQUEST_S = 5.0
_PIECE_S = 15.0
"""What a reader may take for a piece before it counts as gone."""
_MOST_READERS = 256
"""Of each rank: every rank of every engine that decodes may be one."""
_CLOSE_S = 5.0


class SocketExporter:
    """Makes a rank's pages readable through a TCP socket. Any thread may close it.

    Args:
        memory: The pages.
        context: Where to listen, and the credential.

    Raises:
        HandoffFailed: ``transport``: it cannot listen there.
    """

    def __init__(self, memory: PageMemory, context: TransportContext) -> None:
        self._memory = memory
        self._incarnation = os.urandom(wire.INCARNATION_BYTES)
        self._lock = threading.Lock()
        self._is_closing = False
        self._channels: set[Channel] = set()
        try:
            self._listener = self._listen(context)
        except KVFerryError as error:
            why = f"cannot listen on {context.host} for readers of pages: {error}"
            raise HandoffFailed("transport", why) from error
        self._offer = Offer(
            version=wire.VERSION,
            host=context.advertised,
            port=self._listener.addresses[0].port,
            incarnation=self._incarnation,
        ).encode()

    @property
    def offer(self) -> bytes:
        """Where to connect."""
        return self._offer

    def close(self) -> None:
        """Let nobody read any more. Idempotent; waits at most ``_CLOSE_S``."""
        with self._lock:
            self._is_closing = True
            channels = list(self._channels)
        for channel in channels:
            channel.interrupt()
        self._listener.close(time.monotonic() + _CLOSE_S)
        with self._lock:
            if self._channels:
                logger.error("%d readers of pages did not end in time", len(self._channels))

    def _listen(self, context: TransportContext) -> Listener[Opening]:
        address = Address(scheme="tcp", host=context.host)
        if not address.is_loopback and not context.token:
            raise ConfigError(
                "peer.listen",
                f"whoever reaches {context.host} could read what users wrote",
                "set KVFERRY_TOKEN on every engine, or listen on tcp://127.0.0.1:0",
            )
        config = ServerConfig(listen=(str(address),), token=context.token, max_connections=_MOST_READERS)
        access = Access(config)
        access.warnings = ()  # the side channel, which listens on the same host, has said it all
        listener = Listener(config, access, self._serve, _ignore, logger, wire.receive_opening)
        listener.start()
        return listener

    def _serve(self, client: Client[Opening]) -> None:
        """On the reader's thread, until it goes."""
        threading.current_thread().name = f"kvferry-socket-{self._memory.shard.rank}"
        channel = client.channel
        try:
            with self._lock:
                if self._is_closing:
                    return
                self._channels.add(channel)
            answer(channel, client.hello, self._memory, self._incarnation)
        except WireError as error:
            logger.warning("reader %s of pages is disconnected: %s", client.peer.name, error)
        except OSError as error:
            logger.debug("reader %s of pages is gone: %s", client.peer.name, error)
        finally:
            channel.close()
            with self._lock:
                self._channels.discard(channel)
            client.release()


def answer(channel: Channel, opening: Opening, memory: PageMemory, incarnation: bytes) -> None:
    """Answer a reader's requests until it goes. Blocks.

    Raises:
        WireError: The reader does not keep to the protocol, or the pages cannot be gathered.
        TimeoutError: It says nothing, or does not take what it asked for.
        OSError: It is gone.
    """
    verdict = verdict_on(opening, memory, incarnation)
    wire.send_verdict(channel, verdict, time.monotonic() + _REQUEST_S)
    if verdict is not Verdict.OK:
        raise WireError(f"its opening is refused ({verdict.name})")
    buffer = PieceBuffer(memory, Heads(opening.first_head, opening.num_heads))
    while True:
        page_ids = wire.receive_request(channel, IDLE_S, _REQUEST_S)
        if min(page_ids) < 0 or max(page_ids) >= memory.layout.num_pages:
            wire.send_verdict(channel, Verdict.PAGES, time.monotonic() + _REQUEST_S)
            raise WireError(f"it asks for pages outside the {memory.layout.num_pages} that there are")
        _send_pages(channel, buffer, page_ids)


def verdict_on(opening: Opening, memory: PageMemory, incarnation: bytes) -> Verdict:
    """Return what becomes of a reader that opens like this."""
    if opening.incarnation != incarnation:
        return Verdict.STALE
    wanted, own = Heads(opening.first_head, opening.num_heads), memory.heads
    if not own.first <= wanted.first < wanted.end <= own.end:
        return Verdict.HEADS
    return Verdict.OK if memory.page_bytes(wanted) == opening.page_bytes else Verdict.HEADS


def _send_pages(channel: Channel, buffer: PieceBuffer, page_ids: list[int]) -> None:
    has_begun = False
    for piece in buffer.pieces(page_ids):
        try:
            piece.gather()
        except Exception as error:  # boundary: the pages are the engine's
            if not has_begun:
                wire.send_verdict(channel, Verdict.BROKEN, time.monotonic() + _REQUEST_S)
            raise WireError(f"the engine's pages cannot be gathered: {error!r}") from error
        deadline = time.monotonic() + _PIECE_S
        if not has_begun:
            wire.send_verdict(channel, Verdict.OK, deadline)
            has_begun = True
        channel.send_bytes([piece.data], deadline)


def _ignore(_: str) -> None:
    """Refusals are logged by the listener; there is no counter for them."""
