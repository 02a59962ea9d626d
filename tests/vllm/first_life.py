"""What the first engine with kvferry left behind for the tests on later ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine import Answer, Engine
from prompts import Prompt

UNCACHED_TOKENS = 64


@dataclass
class FirstLife:
    """An engine with kvferry that has seen every prompt, and what it answered."""

    engine: Engine
    """Closed as soon as another one was started."""
    hits: dict[Prompt, Answer]
    """Answers to every prompt, all its full blocks coming from vLLM's own prefix cache."""
    disk: Path
    tampering: Path
    """Steers the ``tampering`` plugin."""
