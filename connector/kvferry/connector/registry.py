"""The plugin registry: who offers which tier types, codecs, policies, commands and observers.

Plugins come from three places: what the core itself brings, the entry points of installed packages
(group ``kvferry``), and the modules named in the configuration. Each plugin is called on its own, so
that a failure has a name: a plugin that cannot be imported, registers something invalid or raises is
switched off and reported, and everything else goes on. What it offered is gone with it; a tier that is
open already stays open.

One registry per service, owned by one thread; there is no module-level state. A policy may be used, and
so fail, on another thread: switching off is locked, and what it changes is replaced, never edited.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pluggy

from kvferry.connector import guards, hooks, offers
from kvferry.connector.codec import CodecType
from kvferry.connector.errors import ConfigError, PluginError, PluginMissing
from kvferry.connector.offers import Kind, Offer
from kvferry.connector.schema import nearest
from kvferry.connector.tier import TierType
from kvferry.connector.transport import TransportType

if TYPE_CHECKING:
    import click

    from kvferry.connector.admission import AdmissionPolicy
    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.finding import Finding
    from kvferry.connector.keys import BlockKey
    from kvferry.connector.policy import EvictionPolicy

__all__ = ["OBSERVERS", "PluginRegistry", "PluginReport"]

T = TypeVar("T")

OBSERVERS = (
    "kvferry_block_stored",
    "kvferry_block_loaded",
    "kvferry_block_removed",
    "kvferry_block_refused",
)
"""The hooks that are told what happened."""
_AT_START = (
    offers.TIER_TYPES,
    offers.CODECS,
    offers.EVICTION_POLICIES,
    offers.ADMISSION_POLICIES,
    offers.TRANSPORTS,
)
_BUILT_IN = "policies"
_VERSION_ATTRIBUTE = "kvferry_api_version"


class PluginReport(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin that was found, working or not."""

    name: str
    origin: str
    """``built-in``, ``configuration``, or the distribution that installed it."""
    version: str = ""
    api_version: int | None = None
    """The version of the plugin API it asks for; None when it does not say."""
    hooks: tuple[str, ...] = ()
    """The hooks it implements."""
    offers: dict[str, tuple[str, ...]] = {}
    """The names of what it offers, by kind (``tier type``); empty once it is switched off."""
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
        self._lock = threading.RLock()
        self._plugins = pluggy.PluginManager(hooks.PROJECT)
        self._plugins.add_hookspecs(hooks)
        self._reports: dict[str, PluginReport] = {}
        self._offers: dict[str, dict[str, Offer[Any]]] = {}
        self._observers: dict[str, list[tuple[str, Callable[..., Any]]]] = {}
        self._load(_BUILT_IN, "built-in", "", _BuiltinPolicies)
        if use_entry_points:
            for point in sorted(importlib.metadata.entry_points(group=hooks.PROJECT), key=lambda p: p.name):
                origin = point.dist.name if point.dist else "unknown distribution"
                self._load(point.name, origin, point.dist.version if point.dist else "", point.load)
        for module in modules:
            self._load(module, "configuration", "", partial(importlib.import_module, module))
        self._collect(*_AT_START)
        self._observers = {hook: list(self._callers(hook)) for hook in OBSERVERS}

    def reports(self) -> list[PluginReport]:
        """Return every plugin that was found, in the order of loading."""
        return list(self._reports.values())

    def tier_types(self) -> dict[str, TierType]:
        """Return the kinds of tier by name."""
        return {name: offer.thing for name, offer in self._offered(offers.TIER_TYPES).items()}

    def tier_type(self, name: str, path: str = "tiers") -> TierType:
        """Return one kind of tier.

        Args:
            name: Value of ``type``.
            path: Where the tier stands in the configuration, for the message.

        Raises:
            ConfigError: No plugin offers it.
            PluginMissing: No working plugin offers it, and a broken one may have.
        """
        return self._find(offers.TIER_TYPES, name, f"{path}.type").thing

    def codec_types(self) -> dict[str, CodecType]:
        """Return the codecs by name; ``none`` is not one of them."""
        return {name: offer.thing for name, offer in self._offered(offers.CODECS).items()}

    def codec_type(self, name: str, path: str = "tiers.codec") -> CodecType:
        """Return one codec.

        Raises:
            ConfigError: No plugin offers it.
            PluginMissing: No working plugin offers it, and a broken one may have.
        """
        return self._find(offers.CODECS, name, path).thing

    def transports(self) -> dict[str, TransportType]:
        """Return the transports by name."""
        return {name: offer.thing for name, offer in self._offered(offers.TRANSPORTS).items()}

    def transport(self, name: str, path: str = "peer.transport") -> TransportType:
        """Return one transport.

        Raises:
            ConfigError: No plugin offers it.
            PluginMissing: No working plugin offers it, and a broken one may have.
        """
        return self._find(offers.TRANSPORTS, name, path).thing

    def eviction_policies(self) -> list[str]:
        """Return the names that ``eviction`` accepts."""
        return sorted(self._offered(offers.EVICTION_POLICIES))

    def eviction_policy(self, name: str, path: str = "host.eviction") -> EvictionPolicy:
        """Return a new eviction policy.

        A plugin's policy that cannot be made, or raises later, is replaced by LRU and its plugin is
        switched off; so is one that a broken plugin may have offered.

        Raises:
            ConfigError: No plugin offers it.
        """
        return self._policy(offers.EVICTION_POLICIES, name, path, guards.guarded_eviction, "lru")

    def admission_policies(self) -> list[str]:
        """Return the names that ``admission`` accepts."""
        return sorted(self._offered(offers.ADMISSION_POLICIES))

    def admission_policy(self, name: str, path: str = "tiers.admission") -> AdmissionPolicy:
        """Return a new admission policy.

        A plugin's policy that cannot be made, or raises later, is replaced by ``always`` and its plugin
        is switched off; so is one that a broken plugin may have offered.

        Raises:
            ConfigError: No plugin offers it.
        """
        return self._policy(offers.ADMISSION_POLICIES, name, path, guards.guarded_admission, "always")

    def commands(self) -> list[click.Command]:
        """Return the commands that plugins add to the command line."""
        return [offer.thing for offer in self.command_offers().values()]

    def command_offers(self) -> dict[str, Offer[click.Command]]:
        """Return the same by name, each with the plugin that offers it."""
        self._collect(offers.COMMANDS)
        return self._offered(offers.COMMANDS)

    def bench_cases(self) -> list[BenchCase]:
        """Return the measurements that plugins add to ``kvferry bench``."""
        self._collect(offers.BENCH_CASES)
        return [offer.thing for offer in self._offered(offers.BENCH_CASES).values()]

    def doctor_findings(self) -> list[Finding]:
        """Return what plugins have to say to ``kvferry doctor``."""
        found: list[Finding] = []
        for plugin, call in list(self._callers("kvferry_doctor_findings")):
            with self._boundary(plugin, "kvferry_doctor_findings"):
                found += [finding for answer in call() for finding in offers.findings(answer)]
        return found

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
        with self._boundary(name, "loading"):
            plugin = load()
            if self._plugins.is_registered(plugin):  # installed and named in the configuration too
                del self._reports[name]
                return
            self._reports[name] = msgspec.structs.replace(
                self._reports[name], api_version=_api_version(plugin)
            )
            hash(plugin)  # pluggy keeps plugins in a set
            self._plugins.register(plugin, name)
            self._reports[name] = msgspec.structs.replace(
                self._reports[name], hooks=_implemented(plugin, self._plugins)
            )

    def _boundary(self, plugin: str, hook: str) -> AbstractContextManager[None]:
        return guards.boundary(partial(self._switch_off, plugin, hook))

    def _switch_off(self, name: str, hook: str, error: BaseException) -> None:
        with self._lock:
            report = self._reports[name]
            if report.error:
                return
            if self._plugins.has_plugin(name):
                self._plugins.unregister(name=name)
            self._observers = {
                observed: [observer for observer in observers if observer[0] != name]
                for observed, observers in self._observers.items()
            }
            self._offers = {
                listing: {known: offer for known, offer in offered.items() if offer.plugin != name}
                for listing, offered in self._offers.items()
            }
            failure = PluginError(name, hook, _one_line(error))
            self._reports[name] = msgspec.structs.replace(report, offers={}, error=str(failure))
        self._logger.warning("%s", failure)

    def _callers(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yield, for each plugin that implements ``hook``, its name and a call of it alone."""
        everyone = self._plugins.get_plugins()
        for implementation in getattr(self._plugins.hook, hook).get_hookimpls():
            others = everyone - {implementation.plugin}
            yield implementation.plugin_name, self._plugins.subset_hook_caller(hook, others)

    def _collect(self, *kinds: Kind[Any]) -> None:
        """Ask every plugin, in the order of loading, for its things of some kinds."""
        for kind in kinds:
            self._offers[kind.hook] = {}
        calls = {kind.hook: dict(self._callers(kind.hook)) for kind in kinds}
        for plugin in list(self._reports):
            for kind in kinds:
                call = calls[kind.hook].get(plugin)
                if call is None or self._reports[plugin].error:
                    continue
                with self._boundary(plugin, kind.hook):
                    for answer in call():
                        offers.add(kind, self._offers[kind.hook], plugin, answer)
                self._note_offers(plugin, kind)

    def _note_offers(self, plugin: str, kind: Kind[Any]) -> None:
        names = tuple(name for name, offer in self._offers[kind.hook].items() if offer.plugin == plugin)
        if names:
            report = self._reports[plugin]
            offered = {**report.offers, kind.what: names}
            self._reports[plugin] = msgspec.structs.replace(report, offers=offered)

    def _offered(self, kind: Kind[T]) -> dict[str, Offer[T]]:
        return self._offers[kind.hook]

    def _find(self, kind: Kind[T], name: str, path: str) -> Offer[T]:
        known = self._offered(kind)
        if name in known:
            return known[name]
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted(known)) or 'none'}"
        broken = [report for report in self._reports.values() if report.error]
        # What failed to load is not known to have no such hook.
        suspects = [report.name for report in broken if not report.hooks or kind.hook in report.hooks]
        if suspects:
            raise PluginMissing(path, f"no working plugin offers {kind.what} {name!r}", hint, suspects)
        raise ConfigError(path, f"there is no {kind.what} {name!r}", hint)

    def _policy(
        self,
        kind: Kind[Callable[[], T]],
        name: str,
        path: str,
        guarded: Callable[[Callable[[], T], guards.Blame], T],
        instead: str,
    ) -> T:
        try:
            plugin, make = self._find(kind, name, path)
        except PluginMissing as missing:
            self._logger.warning("%s; %r is used instead", missing, instead)
            plugin, make = self._offered(kind)[instead]
        return make() if plugin == _BUILT_IN else guarded(make, partial(self._switch_off, plugin))

    def _notify(self, hook: str, **facts: object) -> None:
        for plugin, call in self._observers[hook]:
            with self._boundary(plugin, hook):
                call(**facts)


class _BuiltinPolicies:
    """The core's own policies, offered through the same hooks as everybody's."""

    @staticmethod
    @hooks.hookimpl
    def kvferry_eviction_policies() -> dict[str, Callable[[], EvictionPolicy]]:
        from kvferry.connector.policy import POLICIES

        return dict(POLICIES)

    @staticmethod
    @hooks.hookimpl
    def kvferry_admission_policies() -> dict[str, Callable[[], AdmissionPolicy]]:
        from kvferry.connector.admission import ADMISSION_POLICIES

        return dict(ADMISSION_POLICIES)


def _api_version(plugin: object) -> int | None:
    """Return the version of the plugin API that a plugin asks for, if it says so.

    Raises:
        ValueError: It is no version, or newer than this kvferry's.
    """
    wanted: object = getattr(plugin, _VERSION_ATTRIBUTE, None)
    if wanted is None:
        return None
    if type(wanted) is not int or wanted < 1:
        raise ValueError(f"{_VERSION_ATTRIBUTE} is {wanted!r}, expected a whole number such as 1")
    if wanted > hooks.API_VERSION:
        raise ValueError(
            f"it needs version {wanted} of the plugin API and this kvferry has version {hooks.API_VERSION}: "
            "update kvferry, or use an older version of the plugin"
        )
    return wanted


def _implemented(plugin: object, plugins: pluggy.PluginManager) -> tuple[str, ...]:
    """Return the hooks that a registered plugin implements.

    Raises:
        TypeError: One of its functions is no plain function.
        ValueError: One of its marked functions matches no hook: a typing error, or a newer version's.
    """
    callers = plugins.get_hookcallers(plugin) or ()
    for caller in callers:
        if caller.spec is None:
            guess = nearest(caller.name, (known for known in vars(hooks) if known.startswith("kvferry_")))
            raise ValueError(
                f"there is no hook {caller.name!r}" + (f", did you mean {guess!r}?" if guess else "")
            )
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin and inspect.iscoroutinefunction(implementation.function):
                raise TypeError(f"{caller.name} is a coroutine function, hooks are plain functions")
    return tuple(sorted(caller.name for caller in callers))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
