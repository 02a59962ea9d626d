"""The shipped connector with copies that a test can slow down or break, in every worker.

Selected by ``kv_connector_module_path``, so it is loaded in each of vLLM's processes. What it does is read
from the file that the environment variable ``COPIES`` names, at each batch: ``gather 0.2`` or
``scatter 0.2`` makes each such copy of a block take that many seconds longer, ``gather fail`` raises,
``gather hold`` lets none through while the file says so.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.engines.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]

_gather = HostStaging.gather
_scatter = HostStaging.scatter
_never = threading.Event()
_LONGEST_HOLD_S = 60.0


def _wanted() -> list[str]:
    try:
        return Path(os.environ["COPIES"]).read_text().split()
    except FileNotFoundError:
        return []


def _disturb(verb: str, blocks: int) -> None:
    end = time.monotonic() + _LONGEST_HOLD_S
    while _wanted() == [verb, "hold"] and time.monotonic() < end:
        _never.wait(0.01)
    match _wanted():
        case [kind, "fail"] if kind == verb:
            raise RuntimeError(f"{verb} was told to fail")
        case [kind, seconds] if kind == verb and seconds != "hold":
            _never.wait(float(seconds) * blocks)


def _disturbed_gather(self: HostStaging, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
    _disturb("gather", len(slots))
    _gather(self, page_ids, slots, arena)


def _disturbed_scatter(self: HostStaging, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
    _disturb("scatter", len(slots))
    _scatter(self, page_ids, slots, arena)


HostStaging.gather = _disturbed_gather  # type: ignore[method-assign]
HostStaging.scatter = _disturbed_scatter  # type: ignore[method-assign]
