"""``kvferry demo --disaggregated`` as a user runs it: real engines, the example router, a table, an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DEADLINE_S = 1500.0


def test_the_demo_hands_over_and_answers_as_one_engine_does(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-c",
        "from kvferry.connector.cli import main; main()",
        "demo",
        "--disaggregated",
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    print(done.stdout)  # its figures, for whoever runs this with -s
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "prefill and decode" in line]
    assert len(rows) == 3
    for row in rows:
        assert row.endswith("  yes")
        (moved_mb,) = re.findall(r"([\d.]+) MB", row)
        assert float(moved_mb) > 70, "a document of 1,650 tokens, in float32"
    assert re.search(r"^pages were read through (nixl|socket)", done.stdout, re.MULTILINE)
    assert "Every answer is the one the decode engine gives alone." in done.stdout
