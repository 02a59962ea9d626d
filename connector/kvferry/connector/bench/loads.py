"""Loads for simulations of policies: which blocks the requests of a day ask for.

From a trace of real requests, or made up with a seed. Values only.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from kvferry.connector.bench.case import BenchSkipped
from kvferry.connector.keys import BlockKey

__all__ = ["TRACE_VARIABLE", "Load", "default_load", "of_trace", "zipf_with_scans"]

TRACE_VARIABLE = "KVFERRY_BENCH_TRACE"
"""Environment variable with the path of a trace to use instead of the made-up load."""
DOCUMENT_BLOCKS = 16

Load = Sequence[Sequence[BlockKey]]
"""The block keys of each request's prompt, from the first block on."""


def of_trace(path: Path) -> Load:
    """Return the load of a trace: one JSON object per line with ``hash_ids``, the ids of its blocks.

    That is the form in which Mooncake publishes its traces.

    Raises:
        BenchSkipped: The file is not there, or is no such trace.
    """
    try:
        with path.open() as lines:
            return [[_key(number) for number in json.loads(line)["hash_ids"]] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchSkipped(f"{path} is no trace that can be read: {error}") from error


def zipf_with_scans(requests: int = 20_000, documents: int = 2_000, scan_share: float = 0.3) -> Load:
    """Return questions about documents of Zipf popularity, among requests that never come back."""
    chance = random.Random(1)
    ranks = range(1, documents + 1)
    popular = chance.choices(ranks, [1 / rank for rank in ranks], k=requests)
    fresh = itertools.count(documents + 1)
    numbers = (next(fresh) if chance.random() < scan_share else rank for rank in popular)
    return [[_key(number * DOCUMENT_BLOCKS + i) for i in range(DOCUMENT_BLOCKS)] for number in numbers]


def default_load(quick: bool) -> tuple[str, Load]:
    """Return the trace that the environment names, else the made-up load, and what to call it.

    Raises:
        BenchSkipped: There is no trace at that path.
    """
    path = os.environ.get(TRACE_VARIABLE, "")
    if path:
        name, load = Path(path).name, of_trace(Path(path))
    else:
        name, load = "Zipf and scans", zipf_with_scans(2_000 if quick else 20_000)
    return name, load[:2_000] if quick else load


@functools.lru_cache(maxsize=1 << 20)
def _key(number: int) -> BlockKey:
    """Return a key that looks like real ones: any part of it is as good as random."""
    return BlockKey(blake3(number.to_bytes(16, "big")).digest())
