"""Hit rates and blocks written of the admission policies, over a trace of real requests and synthetic load.

    python benchmarks/admission_policies.py [TRACE.jsonl]

The simulation is that of ``kvferry bench admission``: an arena of a tenth of the tier's capacity stands
before the tier. Each cell is the share of all blocks that was found as part of a prefix, and how many blocks
were written to the tier. Prints the table of docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from kvferry.connector.admission import ADMISSION_POLICIES
from kvferry.connector.bench.admission import CAPACITIES, serve
from kvferry.connector.bench.loads import Load, of_trace, zipf_with_scans
from kvferry.connector.policy import POLICIES


@click.command(help=__doc__)
@click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(trace: Path | None) -> None:
    loads: dict[str, Callable[[], Load]] = {"Zipf with 30 % scans": zipf_with_scans}
    if trace is not None:
        loads = {trace.name: lambda: of_trace(trace), **loads}
    click.echo(f"| load | eviction | blocks held | {' | '.join(ADMISSION_POLICIES)} |")
    click.echo("|---|---|---|" + "---|" * len(ADMISSION_POLICIES))
    for name, make_load in loads.items():
        load = make_load()
        for eviction, make_eviction in sorted(POLICIES.items()):
            for capacity in CAPACITIES:
                served = [
                    serve(load, capacity, make_eviction, make()) for make in ADMISSION_POLICIES.values()
                ]
                cells = " | ".join(f"{one.hit_rate:.1%}, {one.written:,}" for one in served)
                click.echo(f"| {name} | {eviction} | {capacity:,} | {cells} |")


if __name__ == "__main__":
    main()
