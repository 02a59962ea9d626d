"""The ``socket`` transport: held to the kit, and to what only it can get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transport_kit import Exported, Rank, TransportTests, context

from kvferry.connector.transport import TransportType
from kvferry.plugins.peer.socket_transport import SOCKET


@contextmanager
def exported_here(rank: Rank, token: str = "") -> Iterator[bytes]:
    exporter = SOCKET.export(rank.memory, context(token))
    try:
        yield exporter.offer
    finally:
        exporter.close()
        exporter.close()


class TestSocketTransport(TransportTests):
    @pytest.fixture
    def transport(self) -> TransportType:
        return SOCKET

    @pytest.fixture
    def exported(self) -> Exported:
        return exported_here
