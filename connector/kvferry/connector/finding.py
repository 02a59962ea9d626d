"""A finding: one line of what ``kvferry doctor`` tells the operator. A value only."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True):
    """One thing worth knowing before traffic arrives."""

    level: Literal["ok", "warn", "error"]
    """``error`` makes ``kvferry doctor`` exit with 1."""
    topic: str
    """A word or two to group by: ``memory``, ``tier disk``, ``vllm``."""
    text: str
    """What was found, one line."""
    hint: str = ""
    """What to do about it."""
