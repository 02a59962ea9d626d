"""``kvferry plugins``: what is installed, what it adds, and what is broken."""

from __future__ import annotations

import json

import click
import msgspec

from kvferry.connector.cli.output import clean, mark, table
from kvferry.connector.cli.source import config_options, quiet_registry, settings_from
from kvferry.connector.registry import OBSERVERS, PluginRegistry, PluginReport
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
    registry.commands()
    registry.bench_cases()
    registry.doctor_findings()
    reports = registry.reports()
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(report) for report in reports], indent=2))
    else:
        rows: list[tuple[str, ...]] = [("", "plugin", "version", "api", "from", "adds")]
        rows += [("", *_row(report)) for report in reports]
        for line in table(rows):
            click.echo(line.lstrip())
        for report in reports:
            if report.error:
                click.echo(f"{mark('error')} {clean(report.error)}")
        _print_details(registry)
    if any(report.error for report in reports):
        raise SystemExit(1)


def _row(report: PluginReport) -> tuple[str, ...]:
    """Say what a plugin adds: things by name, and the hooks that have none."""
    named = [f"{kind} {name}" for kind, names in report.offers.items() for name in names]
    others = [hook for hook in report.hooks if hook in OBSERVERS or hook == "kvferry_doctor_findings"]
    adds = [*named, *(hook.removeprefix("kvferry_").replace("_", " ") for hook in others)]
    api = str(report.api_version) if report.api_version is not None else "-"
    return report.name, report.version or "-", api, report.origin, clean(", ".join(adds)) or "-"


def _print_details(registry: PluginRegistry) -> None:
    click.echo()
    rows = [
        (f"tier {name}", tier_type.summary, "options: " + ", ".join(option_fields(tier_type)))
        for name, tier_type in sorted(registry.tier_types().items())
    ]
    rows += [
        (f"codec {name}", codec.summary, f"id {codec.id}" + (", lossy" if codec.is_lossy else ""))
        for name, codec in sorted(registry.codec_types().items())
    ]
    rows += [
        (f"transport {name}", transport.summary, f"priority {transport.priority}")
        for name, transport in sorted(registry.transports().items())
    ]
    rows += [(f"eviction {name}", "", "") for name in registry.eviction_policies()]
    rows += [(f"admission {name}", "", "") for name in registry.admission_policies()]
    for line in table(rows):
        click.echo(clean(line))
