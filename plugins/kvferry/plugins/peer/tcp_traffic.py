"""Finds out whether NIXL's bytes come over TCP, which it does not tell, by what the kernel counts.

How long a read takes, or whether it is over when it returns, says nothing: over loopback TCP nine reads of ten are over
within the call that starts them.
"""

from __future__ import annotations

import os
import socket
import struct

__all__ = ["TcpTraffic"]

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""``tcpi_bytes_received`` of ``struct tcp_info``, Linux 4.1 and newer."""


class TcpTraffic:
    """What TCP connections of this process receive that are younger than this object. Used by one thread.

    Connections that other threads make meanwhile are among them: who needs certainty asks more than once.
    """

    def __init__(self) -> None:
        self._older = frozenset(_sockets())

    def received_bytes(self) -> int:
        """Return how much those connections have received in all."""
        return sum(_received(number) for inode, number in _sockets().items() if inode not in self._older)


def _sockets() -> dict[str, int]:
    """Return the descriptors of this process's sockets, by the sockets' names in the kernel."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # closed since it was listed
        if target.startswith("socket:"):
            found[target] = int(name)
    return found


def _received(number: int) -> int:
    try:
        with socket.socket(fileno=os.dup(number)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
    except OSError:
        return 0  # of another family, or closed since it was listed
    return int(_BYTES_RECEIVED.unpack(info)[0]) if len(info) == _BYTES_RECEIVED.size else 0
