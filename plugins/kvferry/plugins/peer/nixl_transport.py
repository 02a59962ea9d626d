"""The ``nixl`` transport: pages to pages, one-sided, through NVIDIA's NIXL and UCX."""

from __future__ import annotations

from kvferry.connector.transport import PageMemory, TransportType
from kvferry.plugins.peer.agent import is_installed
from kvferry.plugins.peer.nixl_exporter import NixlExporter
from kvferry.plugins.peer.nixl_reader import NixlReader

__all__ = ["MISSING", "NIXL"]

MISSING = "nixl is not installed: pip install 'kvferry[nixl]'"


def _unusable(memory: PageMemory) -> str:
    if not is_installed():
        return MISSING
    if memory.device not in ("cpu", "cuda"):
        return f"NIXL is used for memory of the CPU and of CUDA, not of {memory.device!r}"
    return ""


NIXL = TransportType(
    name="nixl",
    unusable=_unusable,
    export=NixlExporter,
    connect=NixlReader,
    summary="one-sided reads from pages to pages over NIXL: shared memory, RDMA, NVLink",
    priority=10,
)
