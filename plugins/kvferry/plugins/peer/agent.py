"""One NIXL agent with everything that hangs on it, so that it can be ended for certain.

Destroying an agent is the only way to stop a transfer that is under way: releasing its handle returns, and bytes land
afterwards. An agent lives as long as anything refers to it, a handle or a frame of a traceback included. So handles
and descriptor lists never leave this module's ``Agent``, and ``close`` lets go of all of them in order.

This is the only module that imports nixl, lazily: it takes a fifth of a second and 60 MB.

NIXL's calls are not thread-safe by default; users of an ``Agent`` take turns. An agent with a progress thread has one
thread of NIXL's own, which sleeps until there is traffic.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvferry.connector.errors import HandoffFailed
from kvferry.connector.transport import PageIds
from kvferry.plugins.peer.runs import Rows

__all__ = ["Agent", "is_installed", "memory_type"]

log = logging.getLogger(__name__)

PROGRESS_DELAY_US = 10_000
"""How long the progress thread sleeps where no event wakes it. Traffic does wake it."""

ENGINE_CONFIG = {"TCP_TX_SEG_SIZE": "1m", "TCP_RX_SEG_SIZE": "1m", "TCP_CONN_NB": "y"}
"""UCX settings; ``UCX_...`` in the environment wins. Segments: TCP is three times as fast. Connecting does not block:
it would for minutes, with no deadline."""

_creating = threading.Lock()
_is_warned = False


def is_installed() -> bool:
    """Tell whether the ``nixl`` package is there, without importing it."""
    return importlib.util.find_spec("nixl") is not None


def memory_type(device: str) -> str:
    """Return NIXL's word for a device's memory."""
    return "VRAM" if device == "cuda" else "DRAM"


class Agent:
    """A NIXL agent with the UCX backend, under a name that was never used before.

    Args:
        name: What it is for; a random part is added.
        is_local: Listen and connect on this machine only, unless the operator has set ``UCX_NET_DEVICES``.
        has_thread: Answer peers, and make progress, while nobody calls.

    Raises:
        HandoffFailed: ``transport``: NIXL or UCX do not start here.
    """

    def __init__(self, name: str, *, is_local: bool, has_thread: bool) -> None:
        self.name = f"{name}-{secrets.token_hex(8)}"
        self._wrapped: Any = None
        self._registered: list[Any] = []
        self._lists: list[Any] = []
        self._transfer: Any = None
        self._remote = ""
        settings = ENGINE_CONFIG | ({"NET_DEVICES": "lo"} if is_local else {})
        config = ",".join(f"{key}={value}" for key, value in settings.items())
        with self._calling("start"), _creating, _quietly():
            self._wrapped = _create(self.name, has_thread)
            self._wrapped.create_backend("UCX", {"engine_config": config})

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._wrapped is None

    def register(self, address: int, nbytes: int, kind: str, device_id: int) -> None:
        """Let NIXL use some memory, until the agent is closed. It does not look whether the memory exists."""
        with self._calling("register memory"):
            region = [(address, nbytes, device_id, "")]
            self._registered.append(self._wrapped.register_memory(region, kind))

    def metadata(self) -> bytes:
        """Return what a peer needs to reach this agent and what was registered so far."""
        with self._calling("describe itself"):
            return bytes(self._wrapped.get_agent_metadata())

    def connect(self, metadata: bytes, name: str) -> None:
        """Introduce the one peer of this agent. What it says is believed: damage must have been found before."""
        with self._calling("reach the peer"):
            found = self._wrapped.add_remote_agent(metadata)
            found = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
            if found != name:
                raise HandoffFailed("transport", "the peer's NIXL metadata is somebody else's")
            self._remote = found

    def prepare(self, rows: Rows, kind: str, *, is_remote: bool) -> int:
        """Have descriptors checked and kept; return the list's number. Indices count all of a row before the next."""
        with self._calling("take descriptors"):
            owner = self._remote if is_remote else ""
            self._lists.append(self._wrapped.prep_xfer_dlist(owner, rows, kind))
        return len(self._lists) - 1

    def post(self, own: int, own_indices: PageIds, remote: int, remote_indices: PageIds) -> bool:
        """Start to read and tell whether it is over already; else call ``poll``. One transfer at a time."""
        with self._calling("read"):
            self._transfer = self._wrapped.make_prepped_xfer(
                "READ", self._lists[own], own_indices, self._lists[remote], remote_indices
            )
            return self._is_over(self._wrapped.transfer(self._transfer))

    def poll(self) -> bool:
        """Tell whether the transfer that was started is over."""
        with self._calling("read"):
            return self._is_over(self._wrapped.check_xfer_state(self._transfer))

    def close(self) -> None:
        """Destroy the agent: connections end and no byte lands any more. Idempotent; takes some milliseconds."""
        wrapped, self._wrapped = self._wrapped, None
        if wrapped is None:
            return
        handles = [*self._lists] if self._transfer is None else [self._transfer, *self._lists]
        self._lists, self._transfer = [], None
        for handle in handles:
            _attempt(handle.release)
            # Handles keep the agent alive, and whoever looks at a traceback may keep the handles.
            handle._agent = None
            handle._released = True
        while self._registered:
            _attempt(lambda: wrapped.deregister_memory(self._registered.pop()))
        native = wrapped.__dict__.pop("agent", None)
        del native

    def _is_over(self, state: str) -> bool:
        if state == "PROC":
            return False
        if state != "DONE":
            raise HandoffFailed("transport", f"NIXL ended a read with {state}")
        transfer, self._transfer = self._transfer, None
        transfer.release()
        return True

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Turn whatever NIXL raises into HandoffFailed."""
        try:
            yield
        except HandoffFailed:
            raise
        except Exception as error:  # noqa: BLE001  # boundary: NIXL and UCX, whose errors have no common class
            raise _failure(error, what) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep nixl from announcing every agent on the terminal, unless the operator said how much it is to say."""
    import nixl  # noqa: F401  # it sets its logger up when it is imported

    logger = logging.getLogger("nixl")
    level = logger.level
    if "NIXL_LOG_LEVEL" not in os.environ:
        logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _create(name: str, has_thread: bool) -> Any:
    """Make an agent without a backend, whose progress thread sleeps.

    nixl's wrapper gives the thread no pause at all, whereby it takes a whole core for ever, and has no argument
    for it. So the class of its settings is replaced while the agent is made; the caller holds ``_creating``.
    """
    import nixl
    import nixl._api as api

    config = nixl.nixl_agent_config(enable_prog_thread=has_thread, backends=[])
    strict = getattr(nixl, "nixl_thread_sync_t", None)
    if strict is not None:
        config.sync_mode = strict.NIXL_THREAD_SYNC_STRICT
    with _patience(getattr(api, "nixlBind", None)) as was_used:
        agent = nixl.nixl_agent(name, config)
    if has_thread and not was_used():
        _warn_once()
    return agent


@contextmanager
def _patience(bindings: Any) -> Iterator[Callable[[], bool]]:
    """Give agents that are made meanwhile a pause, where the bindings look as they are known to."""
    stock: Any = getattr(bindings, "nixlAgentConfig", None)
    if not isinstance(stock, type) or not hasattr(stock, "pthrDelay"):
        yield lambda: False
        return
    used: list[bool] = []
    assign_stock: Any = stock.__setattr__

    def assign(settings: object, name: str, value: object) -> None:
        if name == "pthrDelay":
            used.append(True)
            value = PROGRESS_DELAY_US
        assign_stock(settings, name, value)

    patient = type("nixlAgentConfig", (stock,), {"__setattr__": assign})
    bindings.nixlAgentConfig = patient
    try:
        yield lambda: bool(used)
    finally:
        bindings.nixlAgentConfig = stock


def _warn_once() -> None:
    global _is_warned
    if not _is_warned:
        _is_warned = True
        log.warning("this nixl is not known to kvferry: its progress thread may keep one core busy")


def _failure(error: Exception, what: str) -> HandoffFailed:
    if isinstance(error, ModuleNotFoundError | ImportError):
        return HandoffFailed("transport", f"nixl cannot be imported: {error}")
    kind = type(error).__name__
    if kind == "nixlRemoteDisconnectError" or (kind == "nixlBackendError" and what == "reach the peer"):
        return HandoffFailed("disconnected", f"NIXL lost the other engine ({error})")
    if ".nixl.cfg" in str(error):
        home = os.environ.get("HOME", "")
        hint = f"nixl looks for ~/.nixl.cfg and may not read {home!r}; set HOME to a directory of this user"
        return HandoffFailed("transport", hint)
    return HandoffFailed("transport", f"NIXL could not {what}: {kind}: {error}")


def _attempt(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001  # boundary: nixl, while it is taken apart whatever its state
        log.debug("nixl, while an agent was closed: %r", error)
