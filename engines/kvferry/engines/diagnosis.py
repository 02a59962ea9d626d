"""What ``kvferry doctor`` says where any engine is installed, and where none is. Each adapter says more of its own."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.finding import Finding
from kvferry.cuda import diagnosis as cuda_diagnosis
from kvferry.engines.installed import ENGINES, distribution_of

__all__ = ["findings"]


def findings() -> Sequence[Finding]:
    """Return the findings about the GPU, or that there is no engine to use it."""
    if distribution_of(ENGINES) is not None:
        return list(cuda_diagnosis.findings())
    return [
        Finding(
            level="warn",
            topic="engine",
            text="neither vLLM nor TensorRT-LLM is installed in this environment",
            hint="install kvferry where the engine runs; a cache server needs none",
        )
    ]
