"""The ``socket`` transport: pages are copied through host memory and a plain TCP socket.

The stop-gap where NIXL is missing or has no fast path. It needs nothing but a port, and serves pages of any device that
staging can reach. What travels is described in ``socket_wire``.
"""

from __future__ import annotations

from kvferry.connector.transport import PageMemory, RemotePages, TransportContext, TransportType
from kvferry.plugins.peer.socket_exporter import SocketExporter
from kvferry.plugins.peer.socket_reader import SocketReader

__all__ = ["SOCKET"]


def _unusable(memory: PageMemory) -> str:
    return ""


def _connect(
    remote: RemotePages, offer: bytes, own: PageMemory, context: TransportContext, deadline: float
) -> SocketReader:
    return SocketReader(remote, offer, own, context.token, deadline)


SOCKET = TransportType(
    name="socket",
    unusable=_unusable,
    export=SocketExporter,
    connect=_connect,
    summary="pages are copied through host memory and a TCP socket",
)
