"""``kvferry plugins``: what is installed, what it adds, and what is broken."""

from __future__ import annotations

import json

import click
import msgspec

from kvferry.connector.cli.output import clean, mark, table
from kvferry.connector.cli.source import config_options, quiet_registry, settings_from
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.tier import option_fields

__all__ = ["plugins"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@config_options
def plugins(as_json: bool, toml_path: str | None, kv_transfer_config: str | None) -> None:
    """List plugins, what they add, and why one is switched off.

    Plugins are found among installed packages (entry-point group "kvferry") and in the configuration's
    list "plugins". Exits with 1 when one of them is broken.
    """
    registry = quiet_registry(settings_from(toml_path, kv_transfer_config))
    # Asking for everything once shows failures that loading alone does not.
    commands, cases = registry.commands(), registry.bench_cases()
    registry.doctor_findings()
    reports = registry.reports()
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(report) for report in reports], indent=2))
    else:
        rows = [("", "plugin", "version", "from", "adds")]
        for report in reports:
            adds = ", ".join(hook.removeprefix("kvferry_").replace("_", " ") for hook in report.hooks)
            rows.append(("", report.name, report.version or "-", report.origin, adds or "-"))
        for line in table(rows):
            click.echo(line.lstrip())
        for report in reports:
            if report.error:
                click.echo(f"{mark('error')} {clean(report.error)}")
        _print_offers(registry, [c.name or "" for c in commands], [case.name for case in cases])
    if any(report.error for report in reports):
        raise SystemExit(1)


def _print_offers(registry: PluginRegistry, commands: list[str], cases: list[str]) -> None:
    click.echo()
    rows = [
        (f"tier {name}", tier_type.summary, "options: " + ", ".join(option_fields(tier_type)))
        for name, tier_type in sorted(registry.tier_types().items())
    ]
    rows += [(f"eviction {name}", "", "") for name in registry.eviction_policies()]
    rows += [(f"command {name}", "", "") for name in sorted(commands)]
    rows += [(f"bench case {name}", "", "") for name in sorted(cases)]
    for line in table(rows):
        click.echo(clean(line))
