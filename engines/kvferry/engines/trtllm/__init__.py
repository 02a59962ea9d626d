"""kvferry for TensorRT-LLM 1.1 and newer, PyTorch backend.

Switched on in the engine's YAML::

    kv_cache_config:
      enable_block_reuse: true
      enable_partial_reuse: false
    kv_connector_config:
      connector_module: kvferry.engines.trtllm
      connector_scheduler_class: KVFerryScheduler
      connector_worker_class: KVFerryWorker

and configured by the TOML file that the variable ``TLLM_KVFERRY_CONFIG`` names, for every rank.

Importing this package does not import TensorRT-LLM; asking it for one of the classes does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.engines.trtllm.connector import KVFerryScheduler, KVFerryWorker

__all__ = ["KVFerryScheduler", "KVFerryWorker"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from kvferry.engines.trtllm import connector

        return getattr(connector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
