"""Clients of a cache server that are killed, and a server that is. A short run of ``soak_server``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = ("--clients", "16", "--minutes", "0.65", "--lives", "2", "--seed", "6", "--json")
DEADLINE_S = 200.0


def test_clients_and_server_may_die_at_any_moment() -> None:
    """In a process of its own, because it forks."""
    paths = (str(HERE.parent / "unit"), os.environ.get("PYTHONPATH", ""))
    ended = subprocess.run(
        [sys.executable, HERE / "soak_server.py", *OPTIONS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if ended.returncode:
        pytest.fail(ended.stderr)
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["wrong"] == 0
    assert seen["kills"] > 20
    assert seen["saved"] > 500, "too few saves to interrupt any"
    assert seen["read"] > 1000, "without hits nothing is shown"
    assert seen["from_disk"] > 50
    assert seen["host_evictions"] > 200
