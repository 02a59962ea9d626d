"""Processors: kvferry's threads do not stay on the one that vLLM's CPU worker binds its own thread to.

vLLM binds the main thread of a CPU worker to one processor, where it computes, and where it polls for its next step
without a pause as long as steps come. Threads that are started from it inherit the binding: they would wait for the
main thread, and where two engines share a machine, whose first processor is the same by default, for both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["unbound"]


@contextmanager
def unbound() -> Iterator[None]:
    """Let threads that are started meanwhile, and those they start, run wherever the engine's own process may.

    For the calling thread alone; its binding is restored.
    """
    own = os.sched_getaffinity(0)
    try:
        wider = own | os.sched_getaffinity(os.getppid())
        os.sched_setaffinity(0, wider)
    except OSError:
        # The parent is gone, or the system does not allow it: threads stay where they are put.
        wider = own
    try:
        yield
    finally:
        if wider != own:
            os.sched_setaffinity(0, own)
