"""What plugins offer under a name: the kinds of such things, and the rules that each offer is held to.

A kind says which hook lists its things and how an answer is read. The rules are the same for all: a name
of letters, digits, ``_``, ``-`` and ``.``, no reserved one, none that is taken. The registry asks the
plugins and applies them.

Pure functions and values.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import msgspec

from kvferry.connector.codec import NONE, CodecType
from kvferry.connector.config import MOST_THREADS, TierConfig
from kvferry.connector.finding import Finding
from kvferry.connector.schema import is_name
from kvferry.connector.service import HOST
from kvferry.connector.tier import TierType
from kvferry.connector.transport import TransportType

if TYPE_CHECKING:
    import click

    from kvferry.connector.admission import AdmissionPolicy
    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.policy import EvictionPolicy

__all__ = [
    "ADMISSION_POLICIES",
    "AUTO",
    "BENCH_CASES",
    "CODECS",
    "COMMANDS",
    "EVICTION_POLICIES",
    "TIER_TYPES",
    "TRANSPORTS",
    "Kind",
    "Offer",
    "add",
    "findings",
]

T = TypeVar("T")

AUTO = "auto"
"""As ``peer.transport``: the best that both sides have."""
RESERVED = frozenset({NONE, HOST})
"""Names with a meaning of their own in a configuration."""
OWN_COMMANDS = frozenset({"bench", "doctor", "explain", "plugins", "serve", "top"})
MAX_CODEC_ID = 0xFFFF


class Kind(NamedTuple, Generic[T]):
    """Things of one kind, each known by its name."""

    what: str
    """What one is called in messages."""
    hook: str
    """Who is asked for them."""
    read: Callable[[object], Iterator[tuple[str, T]]]
    """Yields names and things of one plugin's answer; raises TypeError or ValueError for what is none."""
    number: Callable[[T], int | None] = lambda thing: None
    """Another property that no two of them may share."""
    reserved: frozenset[str] = RESERVED


class Offer(NamedTuple, Generic[T]):
    """A thing and the plugin that offers it."""

    plugin: str
    thing: T


def add(kind: Kind[T], offers: dict[str, Offer[T]], plugin: str, answer: object) -> None:
    """Add what ``plugin`` answered to ``offers``.

    Raises:
        TypeError: The answer, or a part of it, is not what the hook asks for.
        ValueError: A name is not allowed or already taken.
    """
    for name, thing in kind.read(answer):
        if not is_name(name):
            rule = "use letters, digits, '_', '-' and '.', at most 64"
            raise ValueError(f"{reprlib.repr(name)} is no name for a {kind.what}: {rule}")
        if name in kind.reserved:
            raise ValueError(f"the name {name!r} is reserved, a {kind.what} cannot have it")
        if name in offers:
            raise ValueError(f"{kind.what} {name!r} is already offered by plugin {offers[name].plugin!r}")
        number = kind.number(thing)
        for other, offer in offers.items():
            if number is not None and kind.number(offer.thing) == number:
                owner = f"{other!r} of plugin {offer.plugin!r}"
                raise ValueError(f"{kind.what} {name!r} has the id {number}, which is that of {owner}")
        offers[name] = Offer(plugin, thing)


def findings(answer: object) -> list[Finding]:
    """Return what a plugin found, held to its types.

    Raises:
        TypeError: It is no list of findings.
        ValueError: A field of one has a value that it cannot have.
    """
    return [msgspec.convert(msgspec.to_builtins(found), Finding) for found in _instances(answer, Finding)]


def _tier_types(answer: object) -> Iterator[tuple[str, TierType]]:
    own = {field.name for field in msgspec.structs.fields(TierConfig)}
    for offered in _instances(answer, TierType):
        what = f"tier type {reprlib.repr(offered.name)}"
        options: object = offered.options
        if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
            raise TypeError(f"{what}: options is {reprlib.repr(options)}, expected a msgspec.Struct class")
        taken = sorted(own & {field.name for field in msgspec.structs.fields(options)})
        if taken:
            raise ValueError(f"{what}: option {taken[0]!r} is one of kvferry's own, choose another name")
        _require_callable(what, "create", offered.create)
        if offered.check is not None:
            _require_callable(what, "check", offered.check)
        threads: object = offered.threads
        if isinstance(threads, bool) or not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
            raise ValueError(f"{what}: threads is {reprlib.repr(threads)}, expected 1 to {MOST_THREADS}")
        _require_text(what, "summary", offered.summary)
        yield offered.name, offered


def _codecs(answer: object) -> Iterator[tuple[str, CodecType]]:
    for offered in _instances(answer, CodecType):
        what = f"codec {reprlib.repr(offered.name)}"
        number: object = offered.id
        if type(number) is not int or not 1 <= number <= MAX_CODEC_ID:
            raise ValueError(f"{what}: id is {reprlib.repr(number)}, expected 1 to {MAX_CODEC_ID}")
        if not isinstance(offered.is_lossy, bool):
            raise TypeError(f"{what}: is_lossy is {reprlib.repr(offered.is_lossy)}, expected True or False")
        _require_callable(what, "make", offered.make)
        _require_text(what, "summary", offered.summary)
        yield offered.name, offered


def _transports(answer: object) -> Iterator[tuple[str, TransportType]]:
    for offered in _instances(answer, TransportType):
        what = f"transport {reprlib.repr(offered.name)}"
        for field in ("unusable", "export", "connect"):
            _require_callable(what, field, getattr(offered, field))
        priority: object = offered.priority
        if type(priority) is not int:
            raise TypeError(f"{what}: priority is {reprlib.repr(priority)}, expected a whole number")
        _require_text(what, "summary", offered.summary)
        yield offered.name, offered


def _factories(answer: object) -> Iterator[tuple[str, Callable[[], T]]]:
    if not isinstance(answer, Mapping):
        raise TypeError(f"returned {reprlib.repr(answer)}, expected a dict of names and factories")
    for name, make in answer.items():
        _require_callable(reprlib.repr(name), "the factory", make)
        yield name, make


def _commands(answer: object) -> Iterator[tuple[str, click.Command]]:
    import click

    for offered in _instances(answer, click.Command):
        yield offered.name or "", offered


def _bench_cases(answer: object) -> Iterator[tuple[str, BenchCase]]:
    from kvferry.connector.bench.case import BenchCase

    for offered in _instances(answer, BenchCase):
        what = f"case {reprlib.repr(offered.name)}"
        _require_callable(what, "run", offered.run)
        _require_text(what, "summary", offered.summary)
        yield offered.name, offered


def _instances(answer: object, wanted: type[T]) -> Iterator[T]:
    if not isinstance(answer, Iterable):
        raise TypeError(f"returned {reprlib.repr(answer)}, expected a list of {wanted.__name__}")
    for item in answer:
        if not isinstance(item, wanted):
            raise TypeError(f"returned {reprlib.repr(item)}, expected {wanted.__name__}")
        yield item


def _require_callable(what: str, field: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{what}: {field} is {reprlib.repr(value)}, expected something to call")


def _require_text(what: str, field: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what}: {field} is {reprlib.repr(value)}, expected text")


TIER_TYPES: Kind[TierType] = Kind("tier type", "kvferry_tier_types", _tier_types)
CODECS: Kind[CodecType] = Kind("codec", "kvferry_codecs", _codecs, lambda codec: codec.id)
EVICTION_POLICIES: Kind[Callable[[], EvictionPolicy]] = Kind(
    "eviction policy", "kvferry_eviction_policies", _factories
)
ADMISSION_POLICIES: Kind[Callable[[], AdmissionPolicy]] = Kind(
    "admission policy", "kvferry_admission_policies", _factories
)
TRANSPORTS: Kind[TransportType] = Kind(
    "transport", "kvferry_transports", _transports, reserved=RESERVED | {AUTO}
)
COMMANDS: Kind[click.Command] = Kind("command", "kvferry_commands", _commands, reserved=OWN_COMMANDS)
BENCH_CASES: Kind[BenchCase] = Kind("bench case", "kvferry_bench_cases", _bench_cases)
