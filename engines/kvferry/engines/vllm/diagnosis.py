"""What ``kvferry doctor`` says about vLLM: which one is installed, and what will not be cached with it.

Reads package metadata only; vLLM is not imported. Where it is not installed there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.finding import Finding
from kvferry.engines.installed import VLLM, distribution_of

__all__ = ["findings"]

_OLDEST = (0, 29)
_TESTED = "0.32"
_NOT_CACHED = (
    ("prompt embeddings, pooling requests and streaming sessions", "passed through, request by request"),
    (
        "hybrid attention (several KV cache groups), Mamba, pipeline or context parallelism, draft models, "
        "run-time KV scales, packed KV quantisation",
        "the engine runs without external cache and says why in one line at start",
    ),
    (
        "the last, partly filled block of a prompt",
        "only full blocks have keys; lower block_tokens to lose less",
    ),
)
_ROLES = (
    "kv_producer prefills for others and hands its pages over, kv_consumer takes them and saves nothing, kv_both "
    "does both"
)


def findings() -> Sequence[Finding]:
    """Return the findings about vLLM."""
    found = distribution_of(VLLM)
    if found is None:
        return []
    name, version = found
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if release < _OLDEST:
        return [
            Finding(
                level="error",
                topic="vllm",
                text=f"{name} {version} is too old: its KV cache is laid out differently",
                hint="use vLLM 0.29 or newer",
            )
        ]
    tested = "" if version.startswith(_TESTED) else f" (kvferry is tested with {_TESTED})"
    return [
        Finding(level="ok", topic="vllm", text=f"{name} {version}{tested}"),
        Finding(
            level="ok",
            topic="handoff",
            text=f"by kv_role: {_ROLES}",
            hint="a router has to send kv_transfer_params; without them engines share by content only",
        ),
        *(Finding(level="ok", topic="not cached", text=f"{what}: {how}") for what, how in _NOT_CACHED),
    ]
