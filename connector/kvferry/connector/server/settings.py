"""Where a server's configuration comes from: the command line, a TOML file, ``KVFERRY_*`` variables, the defaults.

The file and the variables are those of the engines, as far as they say what a cache is; keys that say how an engine
behaves are an error in a server's file, and variables that do are left to engines that share the environment.

Pure functions; only the TOML file is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvferry.connector.config import Config, HostConfig, Seconds
from kvferry.connector.errors import ConfigError
from kvferry.connector.schema import decode
from kvferry.connector.server.config import ServerConfig, ServerSettings, TenantConfig
from kvferry.connector.settings import (
    CONFIG_FILE_VARIABLE,
    Source,
    check_names,
    check_tiers,
    environ_source,
    field_paths,
    merged,
    toml_source,
)

__all__ = ["engine_variables", "load_server_settings"]

_DEFAULTS = Config()
_ALIASES = {"KVFERRY_TOKEN": "server.token"}
_INSTEAD = {
    "token": "write it into [server], or set KVFERRY_TOKEN",
    "tls": "a server's certificates are in [server.tls]",
    "service": "a server is one; use a tier of type remote to have it ask another",
    "tenant": "a tenant comes from the credential: see [[tenants]]",
    "enabled": "stop the server instead",
}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """What may stand in a server's file."""

    server: ServerConfig = ServerConfig()
    tenants: tuple[dict[str, object], ...] = ()
    host: HostConfig = _DEFAULTS.host
    tiers: tuple[dict[str, object], ...] = _DEFAULTS.tiers
    plugins: tuple[str, ...] = _DEFAULTS.plugins
    secret: str = _DEFAULTS.secret
    lease_s: Seconds = _DEFAULTS.lease_s
    retry_failed_s: Seconds = _DEFAULTS.retry_failed_s


def load_server_settings(
    toml_path: str | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> ServerSettings:
    """Read every source and return the server's configuration.

    Args:
        toml_path: The TOML file; else ``KVFERRY_CONFIG``, else none.
        environ: Environment variables.
        overrides: The ``[server]`` keys that the command line gives.

    Returns:
        The configuration. Credentials and addresses are checked by ``access``, options of tiers by their plugins.

    Raises:
        ConfigError: A source cannot be read, or something in it is unknown, of the wrong type or out of range.
    """
    sources = [Source({"server": dict(overrides)}, "command line")] if overrides else []
    path = toml_path or environ.get(CONFIG_FILE_VARIABLE)
    if path:
        file = toml_source(path)
        _refuse_engine_keys(file)
        sources.append(file)
    sources.append(environ_source(_File, environ, _ALIASES, engine_variables(environ)))
    file_values, origins = merged(_File, sources, _check)
    check_names(file_values.tiers)
    tenants = _tenants(file_values)
    for index, tenant in enumerate(tenants):
        check_names(tenant.tiers or (), f"tenants[{index}].tiers")
    cache = Config(
        host=file_values.host,
        tiers=file_values.tiers,
        plugins=file_values.plugins,
        secret=file_values.secret,
        lease_s=file_values.lease_s,
        retry_failed_s=file_values.retry_failed_s,
    )
    return ServerSettings(server=file_values.server, tenants=tenants, cache=cache, origins=origins)


def engine_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that mean something to an engine and nothing to a server."""
    ours = {*field_paths(_File)}
    theirs = {
        "KVFERRY_" + path.upper().replace(".", "__") for path in field_paths(Config) if path not in ours
    }
    return sorted(theirs.intersection(environ) - set(_ALIASES))


def _refuse_engine_keys(file: Source) -> None:
    known = {field.name for field in msgspec.structs.fields(_File)}
    for field in msgspec.structs.fields(Config):
        if field.name in file.values and field.name not in known:
            hint = _INSTEAD.get(field.name, "it belongs in the engine's configuration")
            raise ConfigError(field.name, f"means nothing to a cache server [from {file.name}]", hint)


def _check(file: _File) -> None:
    """Check the parts of a source that the schema leaves open."""
    check_tiers(file.tiers)
    for index, tenant in enumerate(_tenants(file)):
        check_tiers(tenant.tiers or (), f"tenants[{index}].tiers")


def _tenants(file: _File) -> tuple[TenantConfig, ...]:
    return tuple(decode(TenantConfig, raw, f"tenants[{index}]") for index, raw in enumerate(file.tenants))
