"""The side that is read: one NIXL agent for as long as the engine lives.

Readers take bytes without this side's doing. All it does is NIXL's own: a thread of the agent's, asleep but for
traffic, answers readers that connect, and copies for those that come over TCP.
"""

from __future__ import annotations

import secrets
import threading

import numpy as np

from kvferry.connector.address import is_loopback
from kvferry.connector.transport import PageMemory, TransportContext
from kvferry.plugins.peer.agent import Agent, memory_type
from kvferry.plugins.peer.nixl_offer import PROBE_BYTES, PROBE_REPEATS, Offer, pack

__all__ = ["NixlExporter"]


class NixlExporter:
    """Makes pages readable over NIXL; a ``PageExporter``. Any thread may close it.

    Args:
        memory: The pages. They belong to the engine, which keeps them until this is closed.
        context: Of this engine.

    Raises:
        HandoffFailed: ``transport``: NIXL does not start, or does not take the memory.
    """

    def __init__(self, memory: PageMemory, context: TransportContext) -> None:
        self._lock = threading.Lock()
        probe = secrets.token_bytes(PROBE_BYTES)
        self._probe = np.frombuffer(probe * PROBE_REPEATS, np.uint8).copy()
        is_local = is_loopback(context.host)
        self._agent = Agent(context.name, is_local=is_local, has_thread=True)
        try:
            kind = memory_type(memory.device)
            self._agent.register(memory.address, memory.nbytes, kind, memory.device_id)
            self._agent.register(self._probe.ctypes.data, self._probe.nbytes, memory_type("cpu"), 0)
            self._offer = pack(
                Offer(
                    agent=self._agent.name,
                    metadata=self._agent.metadata(),
                    is_local=is_local,
                    address=memory.address,
                    nbytes=memory.nbytes,
                    device_id=memory.device_id,
                    probe_address=self._probe.ctypes.data,
                    probe=probe,
                )
            )
        except BaseException:
            self._agent.close()
            raise

    @property
    def offer(self) -> bytes:
        """What a reader needs."""
        return self._offer

    def close(self) -> None:
        """End all connections. Reads that are under way fail at the reader. Idempotent."""
        with self._lock:
            self._agent.close()
