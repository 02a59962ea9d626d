"""Where a command's configuration comes from: a TOML file or what is passed to the engine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import click

from kvferry.connector.errors import ConfigError
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import Settings, load_settings

__all__ = ["config_options", "quiet_registry", "settings_from"]

P = ParamSpec("P")
R = TypeVar("R")

CONNECTOR = "KVFerryConnector"
TRANSFER_PATH = "--kv-transfer-config"


def config_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add ``--config`` and ``--kv-transfer-config`` to a command."""
    command = click.option(
        TRANSFER_PATH,
        metavar="JSON",
        help="The value of the engine's flag of this name, exactly as it would be passed.",
    )(command)
    return click.option(
        "--config",
        "toml_path",
        type=click.Path(dir_okay=False),
        help="TOML file; default: $KVFERRY_CONFIG.",
    )(command)


def settings_from(toml_path: str | None, kv_transfer_config: str | None) -> Settings:
    """Return the configuration that an engine started like this would get.

    Raises:
        ConfigError: Something in it is wrong; the message says where.
    """
    extra = _extra_config(kv_transfer_config) if kv_transfer_config is not None else {}
    return load_settings(extra, toml_path, os.environ)


def quiet_registry(settings: Settings) -> PluginRegistry:
    """Return the plugins of a configuration, for commands that report broken ones themselves."""
    logger = logging.Logger("kvferry.cli")
    logger.addHandler(logging.NullHandler())
    return PluginRegistry(settings.config.plugins, logger=logger)


def _extra_config(text: str) -> Mapping[str, object]:
    """Find kvferry's part in a kv-transfer-config, also below a MultiConnector."""
    try:
        transfer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(TRANSFER_PATH, f"not valid JSON: {error}") from error
    found = _find(transfer)
    if found is None:
        raise ConfigError(
            TRANSFER_PATH,
            f"no connector {CONNECTOR!r} in it, so the engine would not use kvferry",
            f'write {{"kv_connector": "{CONNECTOR}", "kv_connector_module_path": "kvferry.engines.vllm", '
            '"kv_role": "kv_both", "kv_connector_extra_config": {...}}',
        )
    extra = found.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{TRANSFER_PATH}.kv_connector_extra_config", f"found {extra!r}, expected a table")
    return extra


def _find(transfer: object) -> Mapping[str, object] | None:
    if not isinstance(transfer, Mapping):
        return None
    if transfer.get("kv_connector") == CONNECTOR:
        return transfer
    extra = transfer.get("kv_connector_extra_config")
    children = extra.get("connectors") if isinstance(extra, Mapping) else None
    for child in children if isinstance(children, list) else ():
        if (found := _find(child)) is not None:
            return found
    return None
