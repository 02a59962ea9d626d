"""The plugin registry: who offers which tier types, policies, commands and observers.

Plugins come from three places: what the core itself brings, the entry points of installed packages
(group ``kvferry``), and the modules named in the configuration. Each plugin is called on its own, so
that a failure has a name: a plugin that cannot be imported, registers something invalid or raises is
switched off and reported, and everything else goes on.

One registry per service, owned by one thread; there is no module-level state.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pluggy

from kvferry.connector import hooks
from kvferry.connector.errors import ConfigError, PluginError
from kvferry.connector.schema import nearest
from kvferry.connector.tier import TierType

if TYPE_CHECKING:
    import click

    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.doctor import Finding
    from kvferry.connector.keys import BlockKey
    from kvferry.connector.policy import EvictionPolicy

__all__ = ["PluginRegistry", "PluginReport"]

_OBSERVERS = (
    "kvferry_block_stored",
    "kvferry_block_loaded",
    "kvferry_block_removed",
    "kvferry_block_refused",
)


class PluginReport(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin that was found, working or not."""

    name: str
    origin: str
    """``built-in``, ``configuration``, or the distribution that installed it."""
    version: str = ""
    hooks: tuple[str, ...] = ()
    """The hooks it implements."""
    error: str = ""
    """Why it is switched off; empty while it works."""


class PluginRegistry:
    """Finds plugins and asks them.

    Args:
        modules: Module paths to load as plugins besides the installed ones.
        use_entry_points: False leaves installed packages out.
        logger: Where a plugin that is switched off is reported, once.
    """

    def __init__(
        self,
        modules: Sequence[str] = (),
        use_entry_points: bool = True,
        logger: logging.Logger | None = None,
    ) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._plugins = pluggy.PluginManager(hooks.PROJECT)
        self._plugins.add_hookspecs(hooks)
        self._reports: dict[str, PluginReport] = {}
        self._observers: dict[str, list[tuple[str, Callable[..., Any]]]] = {}
        self._load("policies", "built-in", "", _builtin_policies)
        if use_entry_points:
            for point in sorted(importlib.metadata.entry_points(group=hooks.PROJECT), key=lambda p: p.name):
                origin = point.dist.name if point.dist else "unknown distribution"
                self._load(point.name, origin, point.dist.version if point.dist else "", point.load)
        for module in modules:
            self._load(module, "configuration", "", partial(importlib.import_module, module))
        self._tier_types = self._collect_tier_types()
        self._policies = self._collect_policies()
        self._observers = {hook: list(self._callers(hook)) for hook in _OBSERVERS}

    def reports(self) -> list[PluginReport]:
        """Return every plugin that was found, in the order of loading."""
        return list(self._reports.values())

    def tier_types(self) -> dict[str, TierType]:
        """Return the kinds of tier by name."""
        return dict(self._tier_types)

    def tier_type(self, name: str, path: str = "tiers") -> TierType:
        """Return one kind of tier.

        Args:
            name: Value of ``type``.
            path: Where it stands in the configuration, for the message.

        Raises:
            ConfigError: No working plugin offers it.
        """
        if name not in self._tier_types:
            raise self._unknown("tier type", name, f"{path}.type", self._tier_types)
        return self._tier_types[name]

    def eviction_policies(self) -> list[str]:
        """Return the names that ``eviction`` accepts."""
        return sorted(self._policies)

    def eviction_policy(self, name: str, path: str = "host.eviction") -> EvictionPolicy:
        """Return a new eviction policy.

        Raises:
            ConfigError: No working plugin offers it.
            PluginError: The plugin failed to make it.
        """
        if name not in self._policies:
            raise self._unknown("eviction policy", name, path, self._policies)
        plugin, make = self._policies[name]
        try:
            return make()
        except Exception as error:  # boundary: a plugin's factory
            self._switch_off(plugin, "kvferry_eviction_policies", error)
            raise PluginError(plugin, f"making eviction policy {name!r}", _one_line(error)) from error

    def commands(self) -> list[click.Command]:
        """Return the commands that plugins add to the command line."""
        import click

        return [found for _, found in self._each("kvferry_commands", click.Command)]

    def doctor_findings(self) -> list[Finding]:
        """Return what plugins have to say to ``kvferry doctor``."""
        from kvferry.connector.doctor import Finding

        return [found for _, found in self._each("kvferry_doctor_findings", Finding)]

    def bench_cases(self) -> list[BenchCase]:
        """Return the measurements that plugins add to ``kvferry bench``."""
        from kvferry.connector.bench.case import BenchCase

        return [found for _, found in self._each("kvferry_bench_cases", BenchCase)]

    def notify_stored(self, tier: str, keys: Sequence[BlockKey]) -> None:
        """Tell observers of blocks that became loadable."""
        self._notify("kvferry_block_stored", tier=tier, keys=keys)

    def notify_loaded(self, tier: str, keys: Sequence[BlockKey]) -> None:
        """Tell observers of blocks that were brought into the arena."""
        self._notify("kvferry_block_loaded", tier=tier, keys=keys)

    def notify_removed(self, tier: str, keys: Sequence[BlockKey], reason: str) -> None:
        """Tell observers of blocks that left a tier."""
        self._notify("kvferry_block_removed", tier=tier, keys=keys, reason=reason)

    def notify_refused(self, tier: str, keys: Sequence[BlockKey], reason: str) -> None:
        """Tell observers of blocks whose bytes were refused."""
        self._notify("kvferry_block_refused", tier=tier, keys=keys, reason=reason)

    def _load(self, name: str, origin: str, version: str, load: Callable[[], object]) -> None:
        if name in self._reports:
            name = f"{name} ({origin})"
        self._reports[name] = PluginReport(name=name, origin=origin, version=version)
        try:
            plugin = load()
            if self._plugins.is_registered(plugin):  # installed and named in the configuration too
                del self._reports[name]
                return
            self._plugins.register(plugin, name)
            unknown = _unknown_hooks(plugin, self._plugins)
            if unknown:
                raise PluginError(name, "registration", f"there is no hook {unknown[0]!r}")
        except Exception as error:  # noqa: BLE001  # boundary: a plugin's import and registration
            self._switch_off(name, "loading", error)
            return
        implemented = tuple(
            sorted(caller.name for caller in self._plugins.get_hookcallers(plugin) or () if caller.spec)
        )
        self._reports[name] = msgspec.structs.replace(self._reports[name], hooks=implemented)

    def _switch_off(self, name: str, hook: str, error: Exception) -> None:
        if self._plugins.has_plugin(name):
            self._plugins.unregister(name=name)
        for observers in self._observers.values():
            observers[:] = [kept for kept in observers if kept[0] != name]
        failure = error if isinstance(error, PluginError) else PluginError(name, hook, _one_line(error))
        self._reports[name] = msgspec.structs.replace(self._reports[name], error=str(failure))
        self._logger.warning("%s", failure)

    def _callers(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yield, for each plugin that implements ``hook``, its name and a call of it alone."""
        everyone = self._plugins.get_plugins()
        for implementation in getattr(self._plugins.hook, hook).get_hookimpls():
            others = everyone - {implementation.plugin}
            yield implementation.plugin_name, self._plugins.subset_hook_caller(hook, others)

    def _each(self, hook: str, wanted: type[Any]) -> Iterator[tuple[str, Any]]:
        """Yield (plugin, item) for every item that plugins return from a listing hook."""
        for plugin, call in list(self._callers(hook)):
            try:
                offered = [item for answer in call() for item in answer]
                for item in offered:
                    if not isinstance(item, wanted):
                        raise TypeError(f"returned {item!r}, expected {wanted.__name__}")
            except Exception as error:  # noqa: BLE001  # boundary: a plugin's hook
                self._switch_off(plugin, hook, error)
                continue
            for item in offered:
                yield plugin, item

    def _collect_tier_types(self) -> dict[str, TierType]:
        found: dict[str, tuple[str, TierType]] = {}
        for plugin, offered in self._each("kvferry_tier_types", TierType):
            if offered.name in found:
                self._refuse_duplicate(plugin, "tier type", offered.name, found[offered.name][0])
            else:
                found[offered.name] = (plugin, offered)
        return {
            name: offered for name, (plugin, offered) in found.items() if self._plugins.has_plugin(plugin)
        }

    def _collect_policies(self) -> dict[str, tuple[str, Callable[[], EvictionPolicy]]]:
        found: dict[str, tuple[str, Callable[[], EvictionPolicy]]] = {}
        for plugin, call in list(self._callers("kvferry_eviction_policies")):
            try:
                offered = {name: make for answer in call() for name, make in answer.items()}
            except Exception as error:  # noqa: BLE001  # boundary: a plugin's hook
                self._switch_off(plugin, "kvferry_eviction_policies", error)
                continue
            for name, make in offered.items():
                if name in found:
                    self._refuse_duplicate(plugin, "eviction policy", name, found[name][0])
                else:
                    found[name] = (plugin, make)
        return {name: value for name, value in found.items() if self._plugins.has_plugin(value[0])}

    def _refuse_duplicate(self, plugin: str, what: str, name: str, owner: str) -> None:
        why = f"{what} {name!r} is already offered by plugin {owner!r}"
        self._switch_off(plugin, "registration", PluginError(plugin, "registration", why))

    def _notify(self, hook: str, **facts: object) -> None:
        for plugin, call in tuple(self._observers[hook]):
            try:
                call(**facts)
            except Exception as error:  # noqa: BLE001  # boundary: a plugin's observer
                self._switch_off(plugin, hook, error)

    def _unknown(self, what: str, name: str, path: str, known: dict[str, Any]) -> ConfigError:
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted(known)) or 'none'}"
        broken = [report.name for report in self._reports.values() if report.error]
        if broken:
            hint += f"; switched off: {', '.join(broken)}, see `kvferry plugins`"
        return ConfigError(path, f"there is no {what} {name!r}", hint)


class _BuiltinPolicies:
    """The core's own eviction policies, offered through the same hook as everybody's."""

    @staticmethod
    @hooks.hookimpl
    def kvferry_eviction_policies() -> dict[str, Callable[[], EvictionPolicy]]:
        from kvferry.connector.policy import POLICIES

        return dict(POLICIES)


def _builtin_policies() -> object:
    return _BuiltinPolicies()


def _unknown_hooks(plugin: object, plugins: pluggy.PluginManager) -> list[str]:
    """Names of the plugin's marked functions that match no hook: typing errors, or a newer version's."""
    callers = plugins.get_hookcallers(plugin) or ()
    return sorted(caller.name for caller in callers if caller.spec is None)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
