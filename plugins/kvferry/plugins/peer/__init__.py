"""The peer plugin: transports that read KV pages out of another engine's memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure
from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.transport import TransportType

__all__ = ["kvferry_bench_cases", "kvferry_doctor_findings", "kvferry_transports"]


def _measure(context: BenchContext) -> Sequence[Figure]:
    from kvferry.plugins.peer.bench import measure

    return measure(context)


@hookimpl
def kvferry_transports() -> Sequence[TransportType]:
    """Offer the transports ``nixl`` and ``socket``."""
    from kvferry.plugins.peer.nixl_transport import NIXL
    from kvferry.plugins.peer.socket_transport import SOCKET

    return [NIXL, SOCKET]


@hookimpl
def kvferry_bench_cases() -> Sequence[BenchCase]:
    """Offer the measurement ``handoff``."""
    return [
        BenchCase(
            "handoff", "pages of another process over NIXL, against bare NIXL, memcpy and a socket", _measure
        )
    ]


@hookimpl
def kvferry_doctor_findings() -> Sequence[Finding]:
    """Tell whether NIXL works here."""
    from kvferry.plugins.peer.diagnosis import findings

    return findings()
