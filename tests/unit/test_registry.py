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

from kvferry.connector import hooks
from kvferry.connector.admission import Always, SecondTouch
from kvferry.connector.bench.case import BenchCase
from kvferry.connector.codec import CodecType
from kvferry.connector.doctor import Finding
from kvferry.connector.errors import ConfigError
from kvferry.connector.hooks import hookimpl
from kvferry.connector.keys import BlockKey
from kvferry.connector.policy import LRU
from kvferry.connector.registry import PluginRegistry, PluginReport
from kvferry.connector.tier import TierType
from kvferry.connector.transport import TransportType

Module = Callable[..., str]


class Options(msgspec.Struct):
    pass


def tier_type(name: str) -> TierType:
    return TierType(name, Options, lambda options, context: None, "for tests")  # type: ignore[arg-type,return-value]


def codec_type(name: str, number: int) -> CodecType:
    return CodecType(name, number, False, lambda layout: None, "for tests")  # type: ignore[arg-type,return-value]


def transport(name: str) -> TransportType:
    return TransportType(name, str, Always, Always, "for tests")  # type: ignore[arg-type]


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
    assert isinstance(registry.admission_policy("always"), Always)
    assert report(registry, "policies").hooks == ("kvferry_admission_policies", "kvferry_eviction_policies")


def test_modules_of_the_configuration_offer_everything(module: Module) -> None:
    command = click.Command("extra")
    case = BenchCase("speed", "for tests", lambda context: [])
    finding = Finding("ok", "tape", "the drive is there")
    name = module(
        "plugin_full",
        kvferry_tier_types=lambda: [tier_type("tape")],
        kvferry_codecs=lambda: [codec_type("squash", 300)],
        kvferry_eviction_policies=lambda: {"mine": LRU},
        kvferry_admission_policies=lambda: {"mine": SecondTouch},
        kvferry_transports=lambda: [transport("pigeons")],
        kvferry_commands=lambda: [command],
        kvferry_bench_cases=lambda: [case],
        kvferry_doctor_findings=lambda: [finding],
    )
    registry = load(name)
    assert registry.tier_type("tape").summary == "for tests"
    assert registry.codec_type("squash").id == 300
    assert "mine" in registry.eviction_policies()
    assert "mine" in registry.admission_policies()
    assert not registry.admission_policy("mine").admits(BlockKey(bytes(32)))
    assert registry.transport("pigeons").summary == "for tests"
    assert list(registry.transports()) == ["pigeons"]
    assert registry.commands() == [command]
    assert registry.bench_cases() == [case]
    assert registry.doctor_findings() == [finding]
    found = report(registry, name)
    assert (found.origin, found.error) == ("configuration", "")
    assert found.offers == {
        "tier type": ("tape",),
        "codec": ("squash",),
        "eviction policy": ("mine",),
        "admission policy": ("mine",),
        "transport": ("pigeons",),
        "command": ("extra",),
        "bench case": ("speed",),
    }


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


def test_unknown_names_get_the_nearest() -> None:
    registry = PluginRegistry()
    with pytest.raises(ConfigError, match=r"tiers\[1\]\.type: there is no tier type 'dsik'.*'disk'"):
        registry.tier_type("dsik", "tiers[1]")
    with pytest.raises(ConfigError, match=r"host\.eviction: there is no eviction policy 'lur'.*'lru'"):
        registry.eviction_policy("lur")
    with pytest.raises(ConfigError, match=r"there is no admission policy 'alwys'.*'always'"):
        registry.admission_policy("alwys")
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.codec: there is no codec 'none'"):
        load().codec_type("none", "tiers[0].codec")
    with pytest.raises(ConfigError, match=r"peer\.transport: there is no transport 'sokcet'.*'socket'"):
        load("kvferry.plugins.peer").transport("sokcet")


def test_codecs_are_found_by_name(module: Module) -> None:
    registry = load(module("plugin_codec", kvferry_codecs=lambda: [codec_type("squash", 300)]))
    assert registry.codec_type("squash").id == 300
    assert list(registry.codec_types()) == ["squash"]


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


HOOKS = [name for name, value in vars(hooks).items() if hasattr(value, f"{hooks.PROJECT}_spec")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested_working_and_broken(hook: str) -> None:
    """By name, so that nobody adds a hook without both."""
    folder = Path(__file__).parent
    working = [path for path in folder.glob("test_*.py") if path.name != "test_broken_plugins.py"]
    assert hook in (folder / "test_broken_plugins.py").read_text()
    assert [
        path.name for path in working if f"{hook}=" in path.read_text() or f"def {hook}" in path.read_text()
    ]
