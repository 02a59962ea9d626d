"""``kvferry doctor``: the machine, the effective configuration, and what will not be cached."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

import click

from kvferry.connector import __version__
from kvferry.connector.cli.output import clean, mark, table
from kvferry.connector.cli.source import config_options, quiet_registry, settings_from
from kvferry.connector.doctor import examine
from kvferry.connector.finding import Finding
from kvferry.connector.settings import Settings, effective

__all__ = ["doctor"]


@click.command()
@config_options
def doctor(toml_path: str | None, kv_transfer_config: str | None) -> None:
    """Check the machine and the configuration, and tell what will not be cached.

    Prints every setting with where its value came from (the engine's flag, the TOML file, a KVFERRY_*
    variable, or the default), secrets masked. Exits with 1 when something would keep kvferry from working.

    \b
    kvferry doctor --config kvferry.toml
    kvferry doctor --kv-transfer-config '{"kv_connector": "KVFerryConnector", ...}'
    """
    settings = settings_from(toml_path, kv_transfer_config)
    click.echo(f"kvferry {__version__}\n")
    click.echo("\n".join(_configuration(settings)) + "\n")
    findings = list(examine(settings, quiet_registry(settings), os.environ))
    click.echo("\n".join(_grouped(findings)) + "\n")
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    click.echo(f"{errors} errors, {warnings} warnings")
    if errors:
        raise SystemExit(1)


def _configuration(settings: Settings) -> Iterator[str]:
    yield "effective configuration"
    rows = [(line.path, clean(line.value), clean(line.origin)) for line in effective(settings)]
    yield from table(rows, indent="  ")


def _grouped(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield findings below their topics, topics in the order of their first finding."""
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    ordered = sorted(findings, key=lambda finding: topics.index(finding.topic))
    for topic, group in itertools.groupby(ordered, key=lambda finding: finding.topic):
        yield clean(topic)
        for finding in group:
            yield f"  {mark(finding.level)} {clean(finding.text, 500)}"
            if finding.hint:
                yield f"        {clean(finding.hint, 500)}"
