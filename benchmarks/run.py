"""Measure this machine and print the table of docs/performance.md; ``--write`` puts it there.

    python benchmarks/run.py [--write] [--path DIRECTORY] [CASE]...

Needs an otherwise idle machine: the figures are ratios, but a busy machine still moves them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
MAIN = "from kvferry.connector.cli import main; main()"


def measure(cases: list[str], path: str | None) -> dict[str, Any]:
    """Run ``kvferry bench --json`` in a process of its own."""
    arguments = ["bench", "--json", *cases, *(["--path", path] if path else [])]
    output = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], check=True, stdout=subprocess.PIPE
    ).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table as Markdown."""
    today = datetime.date.today().isoformat()
    load = os.getloadavg()[1]
    yield f"kvferry {result['version']}, {today}, {result['machine']}; load over five minutes {load:.1f}."
    yield ""
    yield "| figure | value | limit | ratio | goal |"
    yield "|---|---|---|---|---|"
    for case in result["cases"]:
        if case["skipped"]:
            yield f"| {case['name']} | skipped: {case['skipped']} | | | |"
        for figure in case["figures"]:
            yield row(figure)


def row(figure: dict[str, Any]) -> str:
    """Return one figure as a row."""
    note = f" ({figure['note']})" if figure["note"] else ""
    limit = f"{figure['raw_name']} {figure['raw']:.3g} {figure['unit']}" if figure["raw"] else ""
    ratio = f"{figure['ratio']:.2f}" if figure["ratio"] is not None else ""
    goal = ""
    if figure["goal"]:
        sign = "at least" if figure["goal"]["at_least"] else "at most"
        goal = f"{sign} {figure['goal']['bound']:g}: {'met' if figure['is_met'] else 'missed'}"
    return f"| {figure['name']}{note} | {figure['value']:.3g} {figure['unit']} | {limit} | {ratio} | {goal} |"


def write(table: str) -> None:
    """Replace the table between the markers of the page."""
    page = PAGE.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no {BEGIN} ... {END}")
    PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", page))


def main() -> None:
    """Measure and print, or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--path", help="directory on the disk to measure")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    table = "\n".join(lines(measure(arguments.cases, arguments.path)))
    print(table)
    if arguments.write:
        write(table)


if __name__ == "__main__":
    main()
