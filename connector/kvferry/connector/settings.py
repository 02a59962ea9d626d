"""Where the configuration comes from, and which source every value was taken from.

Sources, the first that names a value wins: the engine's extra config, a TOML file, ``KVFERRY_*``
variables, the defaults. Every source is checked in full, also where another one overrides it.

The sources and how they are merged serve any schema; ``server.settings`` reads a server's with them.

Pure functions; only ``toml_source`` reads a file.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from kvferry.connector.address import parse_address
from kvferry.connector.config import Config, TierConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.memory import format_bytes
from kvferry.connector.schema import MASK, decode, is_name, is_secret, is_size, masked, struct_of, unknown_key
from kvferry.connector.service import HOST
from kvferry.connector.tier import TierType

__all__ = [
    "CONFIG_FILE_VARIABLE",
    "Setting",
    "Settings",
    "Source",
    "check_names",
    "check_tiers",
    "effective",
    "environ_source",
    "field_paths",
    "load_settings",
    "merged",
    "split_tier",
    "toml_source",
    "typed_options",
]

S = TypeVar("S", bound=msgspec.Struct)

EXTRA_CONFIG = "kv_connector_extra_config"
CONFIG_FILE_KEY = "config_file"
"""Key of the extra config that names the TOML file."""
CONFIG_FILE_VARIABLE = "KVFERRY_CONFIG"
PREFIX = "KVFERRY_"
DEFAULT = "default"
SERVER_PREFIX = "KVFERRY_SERVER__"
"""Variables of a cache server, which engines leave alone."""
_ABSENT = object()

_KUBERNETES = re.compile(r"KVFERRY_([A-Z0-9]+_)*(SERVICE_(HOST|PORT\w*)|PORT(_\d+_\w+)?)", re.ASCII)
"""Variables Kubernetes sets by itself beside services called ``kvferry`` or ``kvferry-...``; none of our
business."""


class Settings(msgspec.Struct, frozen=True):
    """The effective configuration and the source of every value."""

    config: Config
    origins: Mapping[str, str]
    """Dotted path of each field to its source: ``kv_connector_extra_config``, a file's path, a
    variable's name, or ``default``."""


class Setting(NamedTuple):
    """One line of the effective configuration, fit to be shown."""

    path: str
    value: str
    """JSON, sizes also for people; masked where it is secret."""
    origin: str


class Source(NamedTuple):
    """One place values come from: nested plain data, and what to call the source of a path."""

    values: Mapping[str, object]
    name: str
    variables: Mapping[str, str] = {}
    """For environment variables, the variable of each path."""

    def origin(self, path: str) -> str:
        """Return what to call the source of the value at ``path``."""
        return self.variables.get(path, self.name)


def load_settings(
    extra: Mapping[str, object] | None = None,
    toml_path: str | None = None,
    environ: Mapping[str, str] | None = None,
    extra_name: str = EXTRA_CONFIG,
) -> Settings:
    """Read every source and return the effective configuration.

    Args:
        extra: The engine's ``kv_connector_extra_config``. Its key ``config_file`` names the TOML file.
        toml_path: The TOML file, where the command line names it; else the extra config's key, else
            ``KVFERRY_CONFIG``.
        environ: Environment variables; none when omitted.
        extra_name: What to call the extra config as a source, for engines that give it in another way than vLLM.

    Returns:
        The configuration. Options of tiers are passed on unchecked: only their plugins know them,
        see :func:`typed_options`.

    Raises:
        ConfigError: A source cannot be read, or something in it is unknown, of the wrong type or out
            of range.
    """
    given = dict(extra or {})
    variables = environ or {}
    named = given.pop(CONFIG_FILE_KEY, None)
    if named is not None and not isinstance(named, str):
        raise ConfigError(CONFIG_FILE_KEY, f"found {named!r}, expected the path of a TOML file")
    path = toml_path or named or variables.get(CONFIG_FILE_VARIABLE)
    sources = [Source(given, extra_name)]
    if path:
        sources.append(toml_source(path))
    ours = {name: text for name, text in variables.items() if not name.startswith(SERVER_PREFIX)}
    sources.append(environ_source(Config, ours))
    config, origins = merged(Config, sources, lambda config: check_tiers(config.tiers))
    check_names(config.tiers)
    _check_service(config)
    return Settings(config, origins)


def effective(settings: Settings) -> Iterator[Setting]:
    """Yield the effective configuration field by field, tiers last, secrets masked."""
    for path, origin in settings.origins.items():
        if path != "tiers":
            yield Setting(path, _shown(path, _lookup(msgspec.to_builtins(settings.config), path)), origin)
    for index, tier in enumerate(settings.config.tiers):
        for name, value in tier.items():
            yield Setting(f"tiers[{index}].{name}", _shown(name, value), settings.origins["tiers"])


def split_tier(tier: Mapping[str, object], path: str = "tier") -> tuple[TierConfig, dict[str, object]]:
    """Split an element of ``tiers`` into kvferry's own fields and the options of the tier's plugin.

    Args:
        tier: The element as it was read.
        path: Where it stands (``tiers[0]``).

    Raises:
        ConfigError: One of kvferry's own fields is missing or wrong. The options are not checked.
    """
    own = {field.name for field in msgspec.structs.fields(TierConfig)}
    config = decode(TierConfig, {name: value for name, value in tier.items() if name in own}, path)
    if not config.name:
        config = msgspec.structs.replace(config, name=config.type)
    return config, {name: value for name, value in tier.items() if name not in own}


def typed_options(tier_type: TierType, options: Mapping[str, object], path: str) -> msgspec.Struct:
    """Turn a tier's options into the struct that its plugin declared.

    Args:
        tier_type: The kind of tier.
        options: What :func:`split_tier` left over.
        path: Where the tier stands (``tiers[0]``).

    Raises:
        ConfigError: Unknown key (the nearest valid one is named), missing key, wrong type or range.
    """
    own = [field.name for field in msgspec.structs.fields(TierConfig)]
    return decode(tier_type.options, options, path, others=own)


def merged(
    schema: type[S], sources: Sequence[Source], check: Callable[[S], None]
) -> tuple[S, dict[str, str]]:
    """Return the values of the first source that has them, and which that was for each.

    Args:
        schema: What may be configured.
        sources: The first wins.
        check: Checks further what one source alone says.

    Raises:
        ConfigError: Something in a source is wrong, also where another one overrides it.
    """
    for source in sources:
        try:
            check(decode(schema, source.values))
        except ConfigError as error:
            origin = source.origin(error.path.partition("[")[0])
            raise ConfigError(error.path, f"{error.why} [from {origin}]", error.hint) from None
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for field_path in field_paths(schema):
        origins[field_path] = _take(field_path, sources, values)
    return decode(schema, values), origins


def toml_source(path: str) -> Source:
    """Read a TOML file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        with open(path, "rb") as file:
            return Source(tomllib.load(file), path)
    except OSError as error:
        raise ConfigError(CONFIG_FILE_KEY, f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(CONFIG_FILE_KEY, f"{path} is not valid TOML: {error}") from error


def environ_source(
    schema: type[msgspec.Struct],
    environ: Mapping[str, str],
    aliases: Mapping[str, str] = {},
    ignored: Iterable[str] = (),
) -> Source:
    """Nest ``KVFERRY_HOST__CAPACITY`` below ``host``, reading each text as its field's type wants it.

    Args:
        schema: What may be configured; every field of it needs a default.
        environ: Variables; those that do not begin with ``KVFERRY_`` are nobody's business.
        aliases: Further variables and the paths that they are short for.
        ignored: Variables that are somebody else's.

    Raises:
        ConfigError: There is no such variable; the nearest one is named.
    """
    known = {PREFIX + path.upper().replace(".", "__"): path for path in field_paths(schema)}
    defaults = msgspec.to_builtins(schema())
    passed_over = {CONFIG_FILE_VARIABLE, *ignored} - set(aliases)
    values: dict[str, object] = {}
    variables: dict[str, str] = {}
    for name in sorted(environ, key=lambda name: (name in aliases, name)):
        if not name.startswith(PREFIX) or name in passed_over or _KUBERNETES.fullmatch(name):
            continue
        path = aliases.get(name) or known.get(name)
        if path is None:
            raise unknown_key("", name, [*known, *aliases, CONFIG_FILE_VARIABLE])
        if path not in variables:
            _put(values, path, _from_text(environ[name], _lookup(defaults, path)))
            variables[path] = name
    return Source(values, "environment", variables)


def check_tiers(tiers: Sequence[Mapping[str, object]], path: str = "tiers") -> None:
    """Check kvferry's own fields of tiers.

    Raises:
        ConfigError: One is missing or wrong. The options of the tiers are not checked.
    """
    for index, tier in enumerate(tiers):
        split_tier(tier, f"{path}[{index}]")


def check_names(tiers: Sequence[Mapping[str, object]], path: str = "tiers") -> None:
    """Check that each tier of a list has a name of its own.

    Raises:
        ConfigError: One is taken, or is none.
    """
    seen: set[str] = set()
    for index, tier in enumerate(tiers):
        name = split_tier(tier, f"{path}[{index}]")[0].name
        name_path = f"{path}[{index}].name"
        if not is_name(name):
            raise ConfigError(
                name_path, f"found {name!r}", "use letters, digits, '_', '-' and '.', at most 64"
            )
        if name == HOST or name in seen:
            raise ConfigError(name_path, f"{name!r} is taken", "give each tier a name of its own")
        seen.add(name)


def _check_service(config: Config) -> None:
    if not config.service:
        return
    parse_address(config.service, "service")
    if config.tiers:
        raise ConfigError(
            "tiers", "the tiers belong to the cache server that service names", "configure them there"
        )


def _from_text(text: str, default: object) -> object:
    """Read a variable: text stays text, everything else is JSON; lists of names may use commas."""
    if isinstance(default, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        is_list = isinstance(default, tuple | list) and not text.lstrip().startswith(("[", "{"))
        return [part.strip() for part in text.split(",") if part.strip()] if is_list else text


def _take(path: str, sources: Sequence[Source], values: dict[str, object]) -> str:
    """Copy the value of ``path`` from the first source that has it; return that source's name."""
    for source in sources:
        value = _lookup(source.values, path, _ABSENT)
        if value is not _ABSENT:
            _put(values, path, value)
            return source.origin(path)
    return DEFAULT


def field_paths(struct_type: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every value in a schema."""
    for field in msgspec.structs.fields(struct_type):
        nested = struct_of(field.type)
        if nested is not None:
            yield from field_paths(nested, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _lookup(values: object, path: str, default: object = None) -> object:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _put(values: dict[str, object], path: str, value: object) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        assert isinstance(inner, dict)  # fields of one schema: a parent is never a leaf
        values = inner
    values[name] = value


def _shown(path: str, value: object) -> str:
    name = path.rpartition(".")[2]
    if is_secret(name):
        return MASK if value else '""'
    if is_size(name) and isinstance(value, int):
        return f"{value} ({format_bytes(value)})"
    return json.dumps(masked(value))
