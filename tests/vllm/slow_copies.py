"""The shipped connector with copies that a test can slow down or break, in every worker.

Selected by ``kv_connector_module_path``, so it is loaded in each of vLLM's processes. What it does is read
from the file that the environment variable ``COPIES`` names, at each batch: ``gather 0.2`` or
``scatter 0.2`` makes each such copy of a block take that many seconds longer, ``gather fail`` raises.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.engines.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]

_gather = HostStaging.gather
_scatter = HostStaging.scatter
_never = threading.Event()


def _disturb(verb: str, blocks: int) -> None:
    try:
        wanted, how = Path(os.environ["COPIES"]).read_text().split()
    except (FileNotFoundError, ValueError):
        return
    if wanted == verb:
        if how == "fail":
            raise RuntimeError(f"{verb} was told to fail")
        _never.wait(float(how) * blocks)


def _disturbed_gather(self: HostStaging, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
    _disturb("gather", len(slots))
    _gather(self, page_ids, slots, arena)


def _disturbed_scatter(self: HostStaging, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
    _disturb("scatter", len(slots))
    _scatter(self, page_ids, slots, arena)


HostStaging.gather = _disturbed_gather  # type: ignore[method-assign]
HostStaging.scatter = _disturbed_scatter  # type: ignore[method-assign]
