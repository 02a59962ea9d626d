"""kvferry for vLLM 0.29 and newer.

Switched on by one flag::

    --kv-transfer-config '{"kv_connector": "KVFerryConnector",
                           "kv_connector_module_path": "kvferry.engines.vllm",
                           "kv_role": "kv_both",
                           "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"host": {"capacity": "16GiB"}}}'

Importing this package does not import vLLM; asking it for ``KVFerryConnector`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.engines.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]


def __getattr__(name: str) -> object:
    if name == "KVFerryConnector":
        from kvferry.engines.vllm.connector import KVFerryConnector

        return KVFerryConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
