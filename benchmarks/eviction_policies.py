"""Hit rates of the eviction policies, over a trace of real requests and over synthetic load.

    python benchmarks/eviction_policies.py [TRACE.jsonl]

A trace has one request per line with ``hash_ids``, the ids of its prompt's blocks from the first on (the
form in which Mooncake publishes its traces). Each policy runs inside the real manager, arena only. A hit
is a block of the *prefix* that is ready: a block behind a hole counts as missed, as it does in an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

from kvferry.connector.bench.loads import Load, of_trace, zipf_with_scans
from kvferry.connector.manager import BlockManager
from kvferry.connector.policy import POLICIES, EvictionPolicy

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Capacities, as shares of the distinct blocks of the load."""


def hit_rate(load: Load, slots: int, policy: EvictionPolicy) -> float:
    """Return the share of all requested blocks that were found ready."""
    manager = BlockManager(slots, policy)
    found = total = 0
    for keys in load:
        lease = manager.lease("engine", keys, 0.0)
        found += len(lease.places)
        total += len(keys)
        manager.release(lease.id)
        reservation = manager.reserve("engine", keys, 0.0)
        manager.commit(reservation.id, [place.key for place in reservation.places], 0.0)
        manager.take_events()
    return found / total


def rows(load: Load) -> Iterator[tuple[float, int, dict[str, float]]]:
    """Yield share, slots and hit rate by policy; the last row has room for everything."""
    distinct = len({one for keys in load for one in keys})
    for share in (*SHARES, 1.0):
        slots = max(2, round(distinct * share))
        yield share, slots, {name: hit_rate(load, slots, make()) for name, make in sorted(POLICIES.items())}


@click.command(help=__doc__)
@click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(trace: Path | None) -> None:
    loads: dict[str, Callable[[], Load]] = {"zipf documents with 30 % scans": zipf_with_scans}
    if trace is not None:
        loads = {trace.name: lambda: of_trace(trace), **loads}
    for name, make in loads.items():
        load = make()
        click.echo(f"\n{name}: {len(load):,} requests, {sum(map(len, load)):,} blocks")
        click.echo(f"{'capacity':>20}  " + "  ".join(f"{policy:>8}" for policy in sorted(POLICIES)))
        for share, slots, rates in rows(load):
            cells = "  ".join(f"{rate:>8.1%}" for rate in rates.values())
            click.echo(f"{slots:>12,} ({share:>4.0%})  {cells}")


if __name__ == "__main__":
    main()
