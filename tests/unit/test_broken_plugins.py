"""Every way in which a plugin can be broken: it is reported by name and switched off, and the rest goes on.

A good plugin is loaded beside each broken one, and has to keep working.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import msgspec
import pytest
from manager_kit import DISK, A, B, finish
from test_embedded import FINGERPRINT, LAYOUT, prefix

from kvferry.connector.admission import Always
from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase
from kvferry.connector.cli.group import main
from kvferry.connector.codec import CodecType
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.doctor import Finding
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.errors import ConfigError, PluginError, PluginMissing
from kvferry.connector.hooks import API_VERSION, hookimpl
from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec
from kvferry.connector.policy import LRU
from kvferry.connector.registry import PluginRegistry, PluginReport
from kvferry.connector.testing.memory import MemoryTier
from kvferry.connector.tier import Capabilities, TierContext, TierType
from kvferry.connector.transport import TransportType

BAD = "plugin_bad"
GOOD = "plugin_good"
RAISED: list[type[BaseException]] = [RuntimeError, SystemExit, MemoryError]


class Options(msgspec.Struct):
    size: int = 0


class Shadowing(msgspec.Struct):
    threads: int = 0


def tier_type(name: object = "tape", **fields: object) -> TierType:
    given = {"options": Options, "create": MemoryTier, "summary": "for tests", **fields}
    return TierType(name, **given)  # type: ignore[arg-type]


def codec_type(name: object = "squash", **fields: object) -> CodecType:
    given = {"id": 300, "is_lossy": False, "make": lambda layout: None, "summary": "", **fields}
    return CodecType(name, **given)  # type: ignore[arg-type]


def case(name: object = "speed", **fields: object) -> BenchCase:
    return BenchCase(name, **{"summary": "", "run": list, **fields})  # type: ignore[arg-type]


def transport(name: object = "pigeons", **fields: object) -> TransportType:
    given = {"unusable": str, "export": Always, "connect": Always, "summary": "", **fields}
    return TransportType(name, **given)  # type: ignore[arg-type]


def raising(error: type[BaseException]) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error("bad day")

    return fail


def plugin(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> str:
    """Make an importable module; what is called like a hook is marked as one."""
    made = types.ModuleType(name)
    for member, value in members.items():
        if isinstance(value, types.FunctionType) and member.startswith("kvferry_"):
            value.__name__ = member
            value = hookimpl(value)
        setattr(made, member, value)
    monkeypatch.setitem(sys.modules, name, made)
    return name


def report(registry: PluginRegistry, name: str = BAD) -> PluginReport:
    (found,) = [report for report in registry.reports() if report.name == name]
    return found


def load_beside_a_good_one(monkeypatch: pytest.MonkeyPatch, bad: str) -> PluginRegistry:
    good = plugin(
        monkeypatch,
        GOOD,
        kvferry_tier_types=lambda: [tier_type("good-tier")],
        kvferry_codecs=lambda: [codec_type("good-codec", id=999)],
        kvferry_eviction_policies=lambda: {"good-eviction": LRU},
        kvferry_admission_policies=lambda: {"good-admission": Always},
        kvferry_transports=lambda: [transport("good-transport")],
        kvferry_commands=lambda: [click.Command("good-command")],
        kvferry_bench_cases=lambda: [case("good-case")],
    )
    return PluginRegistry([good, bad], use_entry_points=False)


def assert_switched_off(registry: PluginRegistry, expected: str) -> None:
    """The plugin is named with the cause, offers nothing, and the good one offers all that it did."""
    registry.doctor_findings()
    commands, cases = registry.commands(), registry.bench_cases()
    assert f"plugin {BAD!r} failed in " in report(registry).error
    assert expected in report(registry).error
    assert report(registry).error.endswith("it is switched off")
    assert report(registry).offers == {}
    assert report(registry, GOOD).error == ""
    assert list(registry.tier_types()) == ["good-tier"]
    assert list(registry.codec_types()) == ["good-codec"]
    assert registry.eviction_policies() == ["good-eviction", "lru", "s3fifo"]
    assert registry.admission_policies() == ["adaptive", "always", "good-admission", "second-touch"]
    assert list(registry.transports()) == ["good-transport"]
    assert [command.name for command in commands] == ["good-command"]
    assert [case.name for case in cases] == ["good-case"]


# Loading

SOURCES = {
    "import no_such_library": "ModuleNotFoundError: No module named 'no_such_library'",
    "def broken(:": "SyntaxError: invalid syntax",
    "raise RuntimeError('half installed')": "RuntimeError: half installed",
    "import sys; sys.exit(3)": "SystemExit: 3",
    "raise GeneratorExit": "GeneratorExit",
    "import plugin_bad.part": "ModuleNotFoundError",
    f"kvferry_api_version = {API_VERSION + 1}": f"it needs version {API_VERSION + 1} of the plugin API and "
    f"this kvferry has version {API_VERSION}: update kvferry",
    "kvferry_api_version = '1'": "kvferry_api_version is '1'",
    "kvferry_api_version = 0": "kvferry_api_version is 0",
    "kvferry_api_version = True": "kvferry_api_version is True",
    "@hookimpl\ndef kvferry_teir_types(): return []": "there is no hook 'kvferry_teir_types', did you mean "
    "'kvferry_tier_types'?",
    "@hookimpl\ndef kvferry_block_stored(tier, kees): ...": "kees",
    "@hookimpl\nasync def kvferry_block_stored(tier): ...": "kvferry_block_stored is a coroutine function",
    "@hookimpl\nasync def kvferry_tier_types(): return []": "kvferry_tier_types is a coroutine function",
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_fails_while_it_is_loaded(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{BAD}.py").write_text(
        "from kvferry.connector.hooks import hookimpl\n"
        "@hookimpl\ndef kvferry_codecs(): raise AssertionError('asked though it is switched off')\n"
        f"{source}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, BAD, raising=False)
    assert_switched_off(load_beside_a_good_one(monkeypatch, BAD), SOURCES[source])
    sys.modules.pop(BAD, None)


def test_an_interrupt_from_the_keyboard_is_not_the_plugins_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{BAD}.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        PluginRegistry([BAD], use_entry_points=False)


@pytest.mark.parametrize("version", [None, *range(1, API_VERSION + 1)])
def test_a_plugin_may_ask_for_any_version_up_to_ours(
    version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = plugin(monkeypatch, BAD, kvferry_api_version=version)
    assert report(PluginRegistry([name], use_entry_points=False)).api_version == version


# What is offered

BAD_NAMES: list[object] = ["", "two words", "none", "host", "x" * 65, "tür", "a/b", "line\n", 7, None]
KINDS: dict[str, Callable[[object], object]] = {
    "kvferry_tier_types": lambda name: [tier_type(name)],
    "kvferry_codecs": lambda name: [codec_type(name)],
    "kvferry_eviction_policies": lambda name: {name: LRU},
    "kvferry_admission_policies": lambda name: {name: Always},
    "kvferry_transports": lambda name: [transport(name)],
    "kvferry_bench_cases": lambda name: [case(name)],
}
OFFERS: list[tuple[str, object, str]] = [
    *((hook, answer, "expected ") for hook in KINDS for answer in (7, [None], ["tape"], [LRU])),
    *((hook, answer(name), "name") for hook, answer in KINDS.items() for name in BAD_NAMES),
    *(
        (hook, answer(f"good-{kind}"), f"is already offered by plugin {GOOD!r}")
        for (hook, answer), kind in zip(
            KINDS.items(), ("tier", "codec", "eviction", "admission", "transport", "case"), strict=True
        )
    ),
    ("kvferry_eviction_policies", {"lru": LRU}, "already offered by plugin 'policies'"),
    ("kvferry_admission_policies", {"always": Always}, "already offered by plugin 'policies'"),
    ("kvferry_tier_types", [tier_type(), tier_type()], "'tape' is already offered by plugin"),
    ("kvferry_tier_types", [tier_type(options=dict)], "expected a msgspec.Struct class"),
    ("kvferry_tier_types", [tier_type(options=Options())], "expected a msgspec.Struct class"),
    ("kvferry_tier_types", [tier_type(options=Shadowing)], "option 'threads' is one of kvferry's own"),
    ("kvferry_tier_types", [tier_type(create=None)], "create is None, expected something to call"),
    ("kvferry_tier_types", [tier_type(check="no")], "check is 'no', expected something to call"),
    *(("kvferry_tier_types", [tier_type(threads=bad)], "expected 1 to 256") for bad in (0, 257, "4", True)),
    ("kvferry_tier_types", [tier_type(summary=None)], "summary is None, expected text"),
    *(("kvferry_codecs", [codec_type(id=bad)], "expected 1 to 65535") for bad in (0, -1, 65536, "1", True)),
    ("kvferry_codecs", [codec_type(id=999)], f"id 999, which is that of 'good-codec' of plugin {GOOD!r}"),
    ("kvferry_codecs", [codec_type(is_lossy=None)], "is_lossy is None, expected True or False"),
    ("kvferry_codecs", [codec_type(make=0)], "make is 0, expected something to call"),
    ("kvferry_eviction_policies", {"mine": "LRU"}, "expected something to call"),
    ("kvferry_admission_policies", {"mine": None}, "expected something to call"),
    ("kvferry_transports", [transport("auto")], "the name 'auto' is reserved"),
    *(
        ("kvferry_transports", [transport(**{field: None})], f"{field} is None, expected something to call")
        for field in ("unusable", "export", "connect")
    ),
    ("kvferry_transports", [transport(summary=None)], "summary is None, expected text"),
    ("kvferry_transports", [transport(priority="high")], "priority is 'high', expected a whole number"),
    ("kvferry_commands", [click.Command(None)], "is no name for a command"),
    ("kvferry_commands", [click.Command("doctor")], "the name 'doctor' is reserved"),
    ("kvferry_commands", [click.Command("good-command")], "is already offered by plugin"),
    ("kvferry_commands", ["run"], "expected Command"),
    ("kvferry_bench_cases", [case(run=3)], "run is 3, expected something to call"),
    ("kvferry_doctor_findings", ["all is well"], "expected Finding"),
    ("kvferry_doctor_findings", [Finding("fatal", "x", "y")], "'fatal'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("hook", "answer", "expected"), OFFERS, ids=[f"{index}-{hook}" for index, (hook, *_) in enumerate(OFFERS)]
)
def test_what_offers_something_invalid(
    hook: str, answer: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = plugin(monkeypatch, BAD, **{hook: lambda: answer})
    registry = load_beside_a_good_one(monkeypatch, bad)
    assert_switched_off(registry, expected)
    assert f"failed in {hook}" in report(registry).error


LISTING = [*KINDS, "kvferry_commands", "kvferry_doctor_findings"]


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("hook", LISTING)
def test_what_raises_when_it_is_asked(
    hook: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {other: (lambda answer=KINDS[other]("fine"): answer) for other in KINDS}
    bad = plugin(monkeypatch, BAD, **{**members, hook: raising(error)})
    assert_switched_off(load_beside_a_good_one(monkeypatch, bad), f"{hook}: {error.__name__}: bad day")


def test_what_raises_halfway_through_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def some() -> Iterator[TierType]:
        yield tier_type()
        raise ValueError("the second is missing")

    bad = plugin(monkeypatch, BAD, kvferry_tier_types=some)
    assert_switched_off(load_beside_a_good_one(monkeypatch, bad), "the second is missing")


def test_an_options_class_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = type("Unknown", (msgspec.Struct,), {"__annotations__": {"size": "NoSuchType"}})
    bad = plugin(monkeypatch, BAD, kvferry_tier_types=lambda: [tier_type(options=unknown)])
    assert_switched_off(load_beside_a_good_one(monkeypatch, bad), "NoSuchType")


def test_a_name_that_a_broken_plugin_wanted_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plugin(
        monkeypatch,
        BAD,
        kvferry_tier_types=lambda: [tier_type("good-tier")],
        kvferry_codecs=lambda: [codec_type("none")],
    )
    good = plugin(monkeypatch, GOOD, kvferry_tier_types=lambda: [tier_type("good-tier")])
    registry = PluginRegistry([bad, good], use_entry_points=False)
    assert report(registry, GOOD).offers == {"tier type": ("good-tier",)}
    assert report(registry).error


def test_each_failure_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = plugin(monkeypatch, BAD, kvferry_block_stored=lambda tier: raising(ValueError)())
    registry = load_beside_a_good_one(monkeypatch, bad)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            registry.notify_stored("disk", A[:1])
    assert caplog.text.count(BAD) == 1


# Observers and commands

OBSERVED: dict[str, Callable[[PluginRegistry], None]] = {
    "kvferry_block_stored": lambda registry: registry.notify_stored("disk", A[:1]),
    "kvferry_block_loaded": lambda registry: registry.notify_loaded("disk", A[:1]),
    "kvferry_block_removed": lambda registry: registry.notify_removed("disk", A[:1], "evicted"),
    "kvferry_block_refused": lambda registry: registry.notify_refused("disk", A[:1], "checksum"),
}


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("hook", OBSERVED)
def test_an_observer_that_raises(
    hook: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watch(tier: str) -> None:
        seen.append(tier)

    bad = plugin(
        monkeypatch,
        BAD,
        kvferry_tier_types=lambda: [tier_type()],
        **{hook: raising(error)},
    )
    watcher = plugin(monkeypatch, "plugin_watcher", **{hook: watch})
    registry = PluginRegistry([bad, watcher], use_entry_points=False)
    for _ in range(2):
        OBSERVED[hook](registry)
    assert seen == ["disk", "disk"]
    assert f"{hook}: {error.__name__}" in report(registry).error
    assert registry.tier_types() == {}


def test_a_command_that_raises_is_one_line_with_the_plugins_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    command = click.Command("sink", callback=raising(ZeroDivisionError))
    monkeypatch.setenv("KVFERRY_PLUGINS", plugin(monkeypatch, BAD, kvferry_commands=lambda: [command]))
    result = CliRunner().invoke(main, ["sink"])
    assert result.exit_code == 1
    assert result.stderr == f"Error: plugin {BAD!r} failed in command 'sink': ZeroDivisionError: bad day\n"


# Policies at run time


class BrokenPolicy(LRU, Always):
    """Both kinds of policy; ``method`` is replaced by something else."""

    def __init__(self, method: str, replacement: Callable[..., object]) -> None:
        super().__init__()
        setattr(self, method, replacement)


def manager(registry: PluginRegistry) -> BlockManager:
    spec = LowerTierSpec(name=DISK, admission=registry.admission_policy("mine"))
    return BlockManager(2, registry.eviction_policy("mine"), [spec])


POLICY_FAULTS: list[tuple[str, Callable[..., object], str]] = [
    *(
        (method, raising(error), f"{method}: {error.__name__}: bad day")
        for method in ("insert", "touch", "remove", "victims", "admits", "hit", "stored", "removed")
        for error in RAISED
    ),
    ("victims", lambda count, is_evictable: None, "victims: TypeError"),
    ("victims", lambda count, is_evictable: [[]] * count, "victims: TypeError"),
    ("victims", lambda count, is_evictable: [], "proposed 0 blocks of 1, though 1 more could go"),
    ("victims", lambda count, is_evictable: [BlockKey(bytes(32))] * count, "proposed 0 blocks of"),
    ("admits", lambda key: None, "admits: TypeError: returned NoneType"),
    ("admits", lambda key: "yes", "admits: TypeError: returned str"),
]


@pytest.mark.parametrize(("method", "replacement", "expected"), POLICY_FAULTS)
def test_a_policy_that_fails_later_is_replaced_by_ours(
    method: str, replacement: Callable[..., object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method is called; the manager stores, evicts and loads as it would with LRU and always."""
    make = {"mine": lambda: BrokenPolicy(method, replacement)}
    bad = plugin(
        monkeypatch,
        BAD,
        kvferry_eviction_policies=lambda: make,
        kvferry_admission_policies=lambda: make,
    )
    registry = load_beside_a_good_one(monkeypatch, bad)
    tested = manager(registry)
    for number, key in enumerate([A[0], A[1], B[0], B[1]]):
        reservation = tested.reserve("engine", [key], 0.0)
        assert [place.key for place in reservation.places] == [key]
        stores = tested.commit(reservation.id, [key], 0.0)
        assert [stored for transfer in stores for stored in transfer.keys] == [key]
        finish(tested, stores)
        lease = tested.lease("engine", [key], 0.0)
        tested.release(lease.id)
        assert tested.counters.evictions == max(0, number - 1)
    tested.release_owner("engine")
    finish(tested, tested.prefetch("engine", [A[0]], 0.0).transfers)
    tested.on_tier_removed(DISK, [A[0]])
    assert_switched_off(registry, expected)
    assert f"policy, {method}" in report(registry).error


def test_a_policy_that_proposes_too_much_does_not_empty_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(LRU):
        def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
            return super().victims(len(self), is_evictable)

    bad = plugin(monkeypatch, BAD, kvferry_eviction_policies=lambda: {"mine": Greedy})
    policy = load_beside_a_good_one(monkeypatch, bad).eviction_policy("mine")
    for key in A[:4]:
        policy.insert(key)
    assert policy.victims(1, lambda key: key != A[0]) == [A[1]]


@pytest.mark.parametrize("make", [raising(OSError), lambda: None, object])
def test_a_policy_that_cannot_be_made_is_replaced_by_ours(
    make: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook, use in (
        ("kvferry_eviction_policies", lambda registry: registry.eviction_policy("mine").victims(1, bool)),
        ("kvferry_admission_policies", lambda registry: registry.admission_policy("mine").admits(A[0])),
    ):
        registry = load_beside_a_good_one(
            monkeypatch, plugin(monkeypatch, BAD, **{hook: lambda: {"mine": make}})
        )
        assert use(registry) in ([], True)
        assert_switched_off(registry, "policy, making")


def test_a_policy_that_a_broken_plugin_may_have_offered_is_replaced_by_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = PluginRegistry(["no.such.module"], use_entry_points=False)
    assert isinstance(registry.eviction_policy("mine"), LRU)
    assert isinstance(registry.admission_policy("mine"), Always)
    assert "no working plugin offers eviction policy 'mine'" in caplog.text
    with pytest.raises(ConfigError):
        PluginRegistry(use_entry_points=False).admission_policy("mine")


# Tiers


def service(registry: PluginRegistry, tier: Mapping[str, object]) -> EmbeddedService:
    config = Config(
        host=HostConfig(capacity=5 * LAYOUT.slot_bytes, eviction="lru"), tiers=({**tier},), plugins=(BAD,)
    )
    return EmbeddedService(config, LAYOUT, FINGERPRINT, registry)


def test_a_tier_of_a_broken_plugin_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = PluginRegistry(["no.such.module"], use_entry_points=False)
    tested = service(registry, {"type": "tape"})
    (problem,) = tested.problems()
    assert "tier 'tape' is left out" in problem
    assert "no working plugin offers tier type 'tape'" in problem
    assert "switched off: no.such.module" in problem
    tested.close(5.0)
    with pytest.raises(PluginMissing, match=r"tiers\[0\]\.type"):
        service(registry, {"type": "tape", "required": True})


def test_a_tier_that_no_plugin_could_have_offered_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is broken, but has no tier types, is not suspected."""
    bad = plugin(monkeypatch, BAD, kvferry_codecs=lambda: [None])
    registry = load_beside_a_good_one(monkeypatch, bad)
    assert report(registry).error
    with pytest.raises(ConfigError, match="did you mean 'good-tier'"):
        service(registry, {"type": "godo-tier"})


def broken_tier(method: str, replacement: Callable[..., object]) -> type[MemoryTier]:
    class BrokenTier(MemoryTier):
        def __init__(self, options: Options, context: TierContext) -> None:
            if method == "create":
                replacement()
            super().__init__(1 << 20, context)

        @property
        def capabilities(self) -> Capabilities:
            if method == "capabilities":
                return replacement()  # type: ignore[return-value]
            return Capabilities(is_persistent=True, is_shared=False, is_bounded=True)

    if method not in ("create", "capabilities"):
        setattr(BrokenTier, method, lambda self, *arguments: replacement())
    return BrokenTier


TIER_FAULTS = [
    *(
        (method, raising(error))
        for method in ("create", "capabilities", "load", "store", "delete", "scan", "stats", "close")
        for error in RAISED
    ),
    *(
        (method, lambda: None)
        for method in ("capabilities", "load", "store", "scan", "stats")
    ),
    ("stats", lambda: 7),
    ("scan", lambda: iter([None, b"short", 7])),
    ("scan", lambda: 7),
]  # fmt: skip


@pytest.mark.parametrize(("method", "replacement"), TIER_FAULTS)
def test_the_service_outlives_whatever_a_tier_does(
    method: str, replacement: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = [tier_type(create=broken_tier(method, replacement))]
    bad = plugin(monkeypatch, BAD, kvferry_tier_types=lambda: offered)
    tested = service(PluginRegistry([bad], use_entry_points=False), {"type": "tape", "admission": "always"})
    assert bool(tested.problems()) == (method in ("create", "capabilities"))
    arena = Arena.attach(tested.arena)
    first, second = prefix(3, "first"), prefix(4, "second")
    for keys in (first, second):  # the second evicts the first
        reservation = tested.reserve("engine", keys)
        tested.commit(reservation, keys)
        settle(tested)
    tested.prefetch("engine", first)
    settle(tested)
    assert tested.lookup(second[:1]).ready == 1 or tested.lookup(first).ready
    tested.counters()
    tested.clear()
    settle(tested)
    arena.close()
    tested.close(5.0)


def settle(tested: EmbeddedService) -> None:
    for _ in range(500):
        tested._poll(wait_s=0.02)
        if not tested.has_pending():
            return
    pytest.fail("transfers never end")


def test_a_tier_that_reports_nonsense_as_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TierContext] = []

    def create(options: Options, context: TierContext) -> MemoryTier:
        made.append(context)
        return MemoryTier(1 << 20, context)

    bad = plugin(monkeypatch, BAD, kvferry_tier_types=lambda: [tier_type(create=create)])
    tested = service(PluginRegistry([bad], use_entry_points=False), {"type": "tape"})
    made[0].on_removed([None, [], b"short", bytes(32)])  # type: ignore[list-item]
    tested.poll()
    tested.close(5.0)


def test_the_error_names_plugin_hook_and_cause() -> None:
    error = PluginError("tape", "kvferry_tier_types", "bad day")
    assert str(error) == "plugin 'tape' failed in kvferry_tier_types: bad day; it is switched off"
