"""The plugin registry: everything offered is found, and a broken plugin is named and left out."""

import importlib.metadata
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import pytest

from kvferry.connector.errors import ConfigError, PluginError
from kvferry.connector.hooks import hookimpl
from kvferry.connector.policy import LRU
from kvferry.connector.registry import PluginRegistry, PluginReport
from kvferry.connector.tier import TierType

Module = Callable[..., str]


class Options(msgspec.Struct):
    pass


def tier_type(name: str) -> TierType:
    return TierType(name, Options, lambda options, context: None, "for tests")  # type: ignore[arg-type,return-value]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Make an importable module of the given functions, each marked as a hook implementation."""

    def make(name: str, **functions: Callable[..., object]) -> str:
        made = types.ModuleType(name)
        for hook, function in functions.items():
            function.__name__ = hook
            setattr(made, hook, hookimpl(function))
        monkeypatch.setitem(sys.modules, name, made)
        return name

    return make


def load(*modules: str) -> PluginRegistry:
    return PluginRegistry(modules, use_entry_points=False)


def report(registry: PluginRegistry, name: str) -> PluginReport:
    (found,) = [report for report in registry.reports() if report.name == name]
    return found


def test_the_shipped_disk_tier_comes_through_its_entry_point() -> None:
    registry = PluginRegistry()
    assert registry.tier_type("disk").name == "disk"
    disk = report(registry, "disk")
    assert (disk.origin, disk.error) == ("kvferry", "")
    assert disk.version == importlib.metadata.version("kvferry")
    assert "kvferry_tier_types" in disk.hooks


def test_builtin_policies_are_a_plugin_like_any_other() -> None:
    registry = load()
    assert isinstance(registry.eviction_policy("lru"), LRU)
    assert registry.eviction_policy("lru") is not registry.eviction_policy("lru")
    assert report(registry, "policies").hooks == ("kvferry_eviction_policies",)


def test_modules_of_the_configuration_offer_everything(module: Module) -> None:
    command = click.Command("extra")
    name = module(
        "plugin_full",
        kvferry_tier_types=lambda: [tier_type("tape")],
        kvferry_eviction_policies=lambda: {"mine": LRU},
        kvferry_commands=lambda: [command],
    )
    registry = load(name)
    assert registry.tier_type("tape").summary == "for tests"
    assert "mine" in registry.eviction_policies()
    assert registry.commands() == [command]
    assert report(registry, name).origin == "configuration"


def test_a_module_that_is_installed_and_configured_is_one_plugin() -> None:
    registry = PluginRegistry(["kvferry.plugins.disk"])
    assert [found.name for found in registry.reports() if "disk" in found.name] == ["disk"]
    assert registry.tier_type("disk")


def test_a_module_that_cannot_be_imported_is_reported_and_the_rest_goes_on(
    module: Module, caplog: pytest.LogCaptureFixture
) -> None:
    good = module("plugin_good", kvferry_tier_types=lambda: [tier_type("tape")])
    with caplog.at_level(logging.WARNING):
        registry = load("no.such.module", good)
    assert registry.tier_type("tape")
    assert "No module named 'no'" in report(registry, "no.such.module").error
    assert caplog.text.count("no.such.module") == 1


def test_a_module_that_fails_while_it_is_imported_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_raising.py").write_text("raise RuntimeError('half installed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "RuntimeError: half installed" in report(load("plugin_raising"), "plugin_raising").error


def test_a_hook_that_does_not_exist_switches_the_plugin_off(module: Module) -> None:
    offers = {
        "kvferry_teir_types": lambda: [tier_type("x")],
        "kvferry_tier_types": lambda: [tier_type("tape")],
    }
    name = module("plugin_typo", **offers)
    registry = load(name)
    assert "there is no hook 'kvferry_teir_types'" in report(registry, name).error
    assert registry.tier_types() == {}


def test_a_hook_with_wrong_arguments_switches_the_plugin_off(module: Module) -> None:
    name = module("plugin_arguments", kvferry_block_stored=lambda tier, kees: None)
    assert "kees" in report(load(name), name).error


@pytest.mark.parametrize("answer", [["disk"], 7, None, [None]])
def test_tier_types_that_are_none_switch_the_plugin_off_or_count_as_nothing(
    module: Module, answer: object
) -> None:
    name = module("plugin_answer", kvferry_tier_types=lambda: answer)
    registry = load(name)
    assert registry.tier_types() == {}
    assert bool(report(registry, name).error) == (answer is not None)


def test_a_listing_hook_that_raises_switches_the_plugin_off(module: Module) -> None:
    def fail() -> object:
        raise ValueError("bad day")

    bad = module("plugin_bad", kvferry_commands=fail, kvferry_tier_types=lambda: [tier_type("tape")])
    good = module("plugin_good", kvferry_commands=lambda: [click.Command("extra")])
    registry = load(bad, good)
    assert [command.name for command in registry.commands()] == ["extra"]
    assert "kvferry_commands: ValueError: bad day" in report(registry, bad).error


def test_the_first_to_offer_a_name_keeps_it(module: Module) -> None:
    first = module("plugin_first", kvferry_tier_types=lambda: [tier_type("tape")])
    second = module("plugin_second", kvferry_tier_types=lambda: [tier_type("tape")])
    third = module("plugin_third", kvferry_eviction_policies=lambda: {"lru": list})
    registry = load(first, second, third)
    errors = {name: report(registry, name).error for name in (first, second, third)}
    offered_by = {name for name, error in errors.items() if not error}
    assert "lru" in errors[third]
    assert len(offered_by) == 1
    assert isinstance(registry.eviction_policy("lru"), LRU)
    assert list(registry.tier_types()) == ["tape"]


def test_unknown_names_get_the_nearest_and_what_is_switched_off() -> None:
    registry = PluginRegistry(["no.such.module"])
    with pytest.raises(ConfigError, match=r"tiers\[1\]\.type: there is no tier type 'dsik'.*'disk'"):
        registry.tier_type("dsik", "tiers[1]")
    with pytest.raises(ConfigError, match=r"no eviction policy 'lur'.*'lru'.*switched off: no\.such\.module"):
        registry.eviction_policy("lur")


def test_a_policy_that_cannot_be_made_is_its_plugins_fault(module: Module) -> None:
    def broken() -> object:
        raise OSError("no entropy")

    name = module("plugin_policy", kvferry_eviction_policies=lambda: {"mine": broken})
    registry = load(name)
    with pytest.raises(PluginError, match="plugin_policy"):
        registry.eviction_policy("mine")
    assert "no entropy" in report(registry, name).error


def test_observers_are_told_and_a_broken_one_is_switched_off(module: Module) -> None:
    seen: list[tuple[object, ...]] = []

    def fail(tier: str, keys: object) -> None:
        raise KeyError("observer")

    good = module(
        "plugin_good",
        kvferry_block_stored=lambda tier, keys: seen.append(("stored", tier, keys)),
        kvferry_block_loaded=lambda tier, keys: seen.append(("loaded", tier, keys)),
        kvferry_block_removed=lambda tier, keys, reason: seen.append(("removed", tier, keys, reason)),
        kvferry_block_refused=lambda tier, keys, reason: seen.append(("refused", tier, keys, reason)),
    )
    bad = module("plugin_bad", kvferry_block_stored=fail, kvferry_block_loaded=fail)
    registry = load(good, bad)
    registry.notify_stored("disk", [b"k"])
    registry.notify_loaded("disk", [b"k"])
    registry.notify_removed("disk", [b"k"], "evicted")
    registry.notify_refused("disk", [b"k"], "checksum")
    assert seen == [
        ("stored", "disk", [b"k"]),
        ("loaded", "disk", [b"k"]),
        ("removed", "disk", [b"k"], "evicted"),
        ("refused", "disk", [b"k"], "checksum"),
    ]
    assert "kvferry_block_stored" in report(registry, bad).error
    assert report(registry, good).error == ""


def test_two_registries_share_nothing(module: Module) -> None:
    name = module("plugin_once", kvferry_tier_types=lambda: [tier_type("tape")])
    assert load(name).tier_types()
    assert load().tier_types() == {}
