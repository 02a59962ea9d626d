"""What ``kvferry doctor`` says about TensorRT-LLM: which one is installed, and what will not be cached with it.

Reads package metadata and one source file; TensorRT-LLM is not imported. Where it is not installed there is nothing
to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.finding import Finding
from kvferry.engines.trtllm.compat import found

__all__ = ["findings"]

_TOPIC = "tensorrt-llm"
_NOT_CACHED = (
    (
        "requests with a LoRA adapter that trtllm.adapters does not name",
        "passed through, request by request",
    ),
    (
        "beam search, pipeline, context or attention data parallelism, speculative decoding, sliding windows, hybrid "
        "models, a KV cache of NVFP4, host or disk tiers of the engine's own",
        "the engine runs without external cache and says why in one line at start",
    ),
    (
        "the last, partly filled block of a prompt",
        "only full blocks have keys; lower block_tokens to lose less",
    ),
)


def findings() -> Sequence[Finding]:
    """Return the findings about TensorRT-LLM."""
    installed = found()
    if installed is None:
        return []
    if not installed.dialect:
        return [
            Finding(
                level="error",
                topic=_TOPIC,
                text=f"TensorRT-LLM {installed.version} has no KV cache connector interface",
                hint="use TensorRT-LLM 1.1 or newer",
            )
        ]
    return [
        Finding(
            level="warn",
            topic=_TOPIC,
            text=f"TensorRT-LLM {installed.version}, connector interface {installed.dialect}; kvferry was tested "
            "with a stand-in for the engine only",
            hint="compare outputs with and without kvferry before you rely on it",
        ),
        *(Finding(level="ok", topic="not cached", text=f"{what}: {how}") for what, how in _NOT_CACHED),
    ]
