"""``kvferry explain``: the story of a request, and why prefixes ended where they did."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from kvferry.connector.cli.output import clean, table
from kvferry.connector.errors import ConfigError
from kvferry.connector.explain import RequestRecord, explain_directory, read_records
from kvferry.connector.memory import format_bytes
from kvferry.connector.settings import load_settings

__all__ = ["HANDOFF_REASONS", "REASONS", "explain", "story", "summary"]

REASONS = {
    "never_stored": "never stored",
    "evicted": "evicted",
    "refused": "refused: its bytes were not what was stored",
    "load_failed": "could not be loaded a moment ago",
    "deadline": "the tier did not answer in time",
    "tier_down": "its tier is down",
    "no_room": "no room in the arena to bring it to",
    "disabled": "switched off",
    "slower_than_recompute": "computing it was faster than loading it",
    "not_asked": "a shared tier did not say whether it has it",
}
"""Why a prefix ended, by ``service.MissReason``."""

HANDOFF_REASONS = {
    "params": "what the router passed on makes no sense",
    "unreachable": "the other engine could not be reached",
    "refused": "the two engines do not accept each other's token",
    "incompatible": "the engines' models or pages do not fit together",
    "gone": "the other engine does not hold the request any more",
    "content": "the other engine holds another prompt",
    "expired": "the other engine's promise to hold the pages had ended",
    "timeout": "it took longer than peer.deadline_s",
    "disconnected": "the other engine went away",
    "transport": "there is no way to read its pages",
    "checksum": "what was read was not what the other engine holds",
    "aborted": "the request was given up meanwhile",
}
"""Why another engine's pages could not be had, by ``HandoffFailed.REASONS``."""


@click.command()
@click.argument("request_id", required=False, default="")
@click.option(
    "--last", default=10, show_default=True, type=click.IntRange(1, 100_000), help="How many requests."
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON lines.")
@click.option("--directory", type=click.Path(file_okay=False), help="Where the records lie.")
@click.option(
    "--config", "toml_path", type=click.Path(dir_okay=False), help="TOML file to take the directory from."
)
def explain(request_id: str, last: int, as_json: bool, directory: str | None, toml_path: str | None) -> None:
    """Tell what was cached for requests, and why the rest was not.

    REQUEST_ID is the id the engine returned, or its beginning; without it the newest requests are shown,
    followed by a summary. Records hold counts and reasons, never tokens or text.
    """
    where = Path(directory) if directory else _configured(toml_path)
    try:
        records, unreadable = read_records(where, request_id, last)
    except OSError as error:
        raise ConfigError("explain.directory", f"cannot read {where}: {error.strerror}") from error
    if as_json:
        for record in records:
            click.echo(msgspec.json.encode(record).decode())
    else:
        for record in records:
            click.echo("\n".join(story(record)) + "\n")
        if len(records) > 1:
            click.echo("\n".join(summary(records)))
    if unreadable:
        click.echo(f"{unreadable} unreadable lines were skipped", err=True)
    if not records:
        what = f"no request whose id starts with {request_id!r}" if request_id else "no requests"
        hint = "serve some with explain.enabled, or name the engine's directory with --directory"
        raise click.ClickException(f"{what} recorded in {where}; {hint}")


def _configured(toml_path: str | None) -> Path:
    return explain_directory(load_settings(None, toml_path, os.environ).config.explain, os.environ)


def story(record: RequestRecord) -> Iterator[str]:
    """Yield what happened to one request, as lines."""
    when = _time(record.arrived)
    yield f"{clean(record.request_id)}  {when}  {clean(record.model)}  engine {clean(record.engine) or '-'}"
    if record.passed:
        yield f"  left alone: {clean(record.passed)}"
        return
    yield f"  {_tokens(record)}"
    if record.missing_block is not None:
        yield f"  first missing block {record.missing_block}{_range(record)}: {_reason(record)}"
    elif record.matched_tokens:
        yield "  every full block of the prompt was found"
    if record.peer_failed:
        yield f"  no handoff: {_handoff_reason(record)}; the prompt was computed here"
    elif record.failed:
        yield "  a load failed; the engine recomputed what it did not get"
    if record.offered_tokens > record.loaded_tokens and not record.failed:
        yield f"  {record.offered_tokens - record.loaded_tokens:,} offered tokens were not taken"
    if record.bytes_loaded:
        times = f"waited {record.wait_ms:.1f} ms, copied {record.load_ms:.1f} ms"
        yield f"  loaded {format_bytes(record.bytes_loaded)}: {times}"
    if record.peer_ms and not record.peer_failed:
        yield f"  the other engine's pages took {record.peer_ms:.1f} ms"
    yield from _decision(record)
    yield f"  saved {record.saved_blocks} blocks, {format_bytes(record.bytes_saved)}"


def summary(records: Sequence[RequestRecord]) -> Iterator[str]:
    """Yield a table of outcomes and of reasons for the first missing block."""
    outcomes = collections.Counter(record.outcome for record in records)
    reasons = collections.Counter(
        clean(record.passed) if record.passed else _reason(record)
        for record in records
        if record.passed or record.missing_block is not None
    )
    prompt = sum(record.prompt_tokens for record in records)
    loaded = sum(record.loaded_tokens for record in records)
    local = sum(record.local_tokens for record in records)
    yield f"{len(records)} requests: " + ", ".join(
        f"{count} {name}" for name, count in outcomes.most_common()
    )
    yield f"{prompt:,} prompt tokens: {local:,} on the engine, {loaded:,} loaded{_percent(local + loaded, prompt)}"
    regret = sum(record.regret_ms for record in records)
    if regret:
        yield f"{regret:,.1f} ms lost to waits that took longer than computing"
    if reasons:
        yield "why prefixes ended:"
        yield from _counted(reasons)
    handoffs = collections.Counter(_handoff_reason(record) for record in records if record.peer_failed)
    if handoffs:
        yield "why handoffs failed:"
        yield from _counted(handoffs)


def _counted(reasons: collections.Counter[str]) -> Iterator[str]:
    rows = [(f"{count}", reason) for reason, count in reasons.most_common()]
    yield from table(rows, indent="  ", right=(0,))


def _tokens(record: RequestRecord) -> str:
    parts = [f"{record.loaded_tokens:,} of {record.prompt_tokens:,} tokens loaded"]
    tiers = [f"{count:,} from {clean(tier)}" for tier, count in record.matched_tokens.items() if count]
    if tiers:
        parts.append(f"found {' and '.join(tiers)}")
    if record.local_tokens:
        parts.append(f"{record.local_tokens:,} were on the engine already")
    return "; ".join(parts)


def _decision(record: RequestRecord) -> Iterator[str]:
    """Yield how loading compared with computing, expected and in the end."""
    if record.expected_ms is not None and record.recompute_ms is not None:
        expected = f"loading {record.expected_ms:.1f} ms, computing {record.recompute_ms:.1f} ms"
        yield f"  expected of what the tiers hold: {expected}"
    for tier, blocks in record.declined_blocks.items():
        yield f"  left {blocks} blocks in {clean(tier)}: computing them was faster"
    if record.regret_ms:
        yield f"  lost {record.regret_ms:.1f} ms by waiting for {clean(record.regret_tier)}"


def _range(record: RequestRecord) -> str:
    if not record.block_tokens or record.missing_block is None:
        return ""
    return f" (from token {record.missing_block * record.block_tokens:,})"


def _reason(record: RequestRecord) -> str:
    return REASONS.get(record.missing_reason, clean(record.missing_reason) or "unknown")


def _handoff_reason(record: RequestRecord) -> str:
    return HANDOFF_REASONS.get(record.peer_failed, clean(record.peer_failed))


def _percent(part: int, whole: int) -> str:
    return f" ({part / whole:.0%} not computed)" if whole else ""


def _time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
