"""Hook specifications: everything a plugin can add to or learn from kvferry.

A plugin is a module (or object) whose functions carry ``hookimpl``. It is found through the
entry-point group ``kvferry`` or named in the configuration's ``plugins`` list. The tiers and engine
adapters that kvferry ships use these hooks and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from kvferry.connector.admission import AdmissionPolicy
    from kvferry.connector.bench.case import BenchCase
    from kvferry.connector.codec import CodecType
    from kvferry.connector.finding import Finding
    from kvferry.connector.keys import BlockKey
    from kvferry.connector.policy import EvictionPolicy
    from kvferry.connector.tier import TierType
    from kvferry.connector.transport import TransportType

__all__ = ["API_VERSION", "PROJECT", "hookimpl", "hookspec"]

PROJECT = "kvferry"
"""pluggy project name and entry-point group."""

API_VERSION = 1
"""Version of everything a plugin may use: these hooks, ``tier``, ``codec``, ``admission``, ``policy``,
``transport`` and ``testing``. It grows when something is added; what is there is not changed or removed within
a version of kvferry's major number. A plugin that needs a newer one says so in ``kvferry_api_version``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvferry_tier_types() -> Sequence[TierType]:  # type: ignore[empty-body]
    """Return the kinds of tier this plugin offers."""


@hookspec
def kvferry_eviction_policies() -> dict[str, Callable[[], EvictionPolicy]]:  # type: ignore[empty-body]
    """Return eviction policies by the name that configuration uses."""


@hookspec
def kvferry_admission_policies() -> dict[str, Callable[[], AdmissionPolicy]]:  # type: ignore[empty-body]
    """Return admission policies by the name that configuration uses."""


@hookspec
def kvferry_codecs() -> Sequence[CodecType]:  # type: ignore[empty-body]
    """Return the codecs this plugin offers for blocks at rest."""


@hookspec
def kvferry_transports() -> Sequence[TransportType]:  # type: ignore[empty-body]
    """Return ways in which an engine's rank reads pages of another engine's memory."""


@hookspec
def kvferry_commands() -> Sequence[click.Command]:  # type: ignore[empty-body]
    """Return commands to add to the ``kvferry`` command line."""


@hookspec
def kvferry_doctor_findings() -> Sequence[Finding]:  # type: ignore[empty-body]
    """Return what ``kvferry doctor`` should print about this plugin and what it needs."""


@hookspec
def kvferry_bench_cases() -> Sequence[BenchCase]:  # type: ignore[empty-body]
    """Return measurements to add to ``kvferry bench``."""


@hookspec
def kvferry_block_stored(tier: str, keys: Sequence[BlockKey]) -> None:
    """Observe blocks that became loadable from ``tier``. Called on the service's thread."""


@hookspec
def kvferry_block_loaded(tier: str, keys: Sequence[BlockKey]) -> None:
    """Observe blocks that were brought from ``tier`` into the arena and verified."""


@hookspec
def kvferry_block_removed(tier: str, keys: Sequence[BlockKey], reason: str) -> None:
    """Observe blocks that left ``tier``; ``reason`` is ``evicted``, ``deleted`` or ``refused``."""


@hookspec
def kvferry_block_refused(tier: str, keys: Sequence[BlockKey], reason: str) -> None:
    """Observe blocks whose bytes were refused on load."""
