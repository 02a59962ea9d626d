"""What a measurement is: a case, the context it runs in, and the figures it yields.

Plugins contribute cases through the hook ``kvferry_bench_cases``; ``kvferry bench`` runs and prints them.
Values only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

__all__ = ["BenchCase", "BenchContext", "BenchSkipped", "Figure", "Goal"]


class BenchSkipped(Exception):
    """Raised by a case that cannot run here; the message says what is missing."""


class Goal(msgspec.Struct, frozen=True):
    """What a figure should reach: its ratio where it has a raw limit, else its value."""

    bound: float
    at_least: bool
    """True: as large as ``bound`` or larger. False: as small or smaller."""

    def is_met(self, measured: float) -> bool:
        """Tell whether ``measured`` reaches the goal."""
        return measured >= self.bound if self.at_least else measured <= self.bound


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number."""

    name: str
    value: float
    unit: str
    raw: float | None = None
    """The limit of the machine in ``unit``, measured in the same run."""
    raw_name: str = ""
    """What the limit is (``memcpy``)."""
    goal: Goal | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """``value`` as a part of ``raw``; None without a limit."""
        return self.value / self.raw if self.raw else None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.goal.is_met(self.value if self.ratio is None else self.ratio)


class BenchContext(msgspec.Struct, frozen=True):
    """What a case is given."""

    quick: bool
    """Few repetitions and small sizes: shows that the case works, its figures mean little."""
    scratch: str
    """An empty directory on the storage to measure; removed after the run."""
    progress: Callable[[float], None]
    """Call with the part of the case that is done, rising from 0 to 1."""

    def directory(self, name: str) -> Path:
        """Return a fresh directory of this name below ``scratch``."""
        path = Path(self.scratch) / name
        path.mkdir(mode=0o700)
        return path


class BenchCase(msgspec.Struct, frozen=True):
    """A measurement that ``kvferry bench`` can run."""

    name: str
    """One word, the argument of ``kvferry bench``."""
    summary: str
    """One line: what is measured against what."""
    run: Callable[[BenchContext], Sequence[Figure]]
    """Measures; may take seconds; raises BenchSkipped where it cannot run."""
