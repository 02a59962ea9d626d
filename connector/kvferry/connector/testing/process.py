"""A tier opened from its configuration, here or in a process of its own that may be killed.

The other process runs ``serve``. It reads one JSON document from its standard input,
opens the tier, stores the blocks it was told to one after the other, and writes a line after each that is
``OK``. Then it waits for its standard input to end and closes the tier.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import split_tier, typed_options
from kvferry.connector.testing.blocks import Blocks, key_of
from kvferry.connector.tier import Outcome, Tier, TierContext

__all__ = ["Task", "open_configured", "serve", "start"]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the other process shall do."""

    entry: dict[str, object]
    """The tier's entry in the configuration."""
    plugins: list[str]
    layout: BlockLayout
    fingerprint: bytes
    salt: str
    """With the numbers 0 to ``count - 1`` it makes the keys, see ``key_of``."""
    count: int


def open_configured(entry: dict[str, object], plugins: Sequence[str], context: TierContext) -> Tier:
    """Open the tier of a configuration entry as kvferry would.

    Raises:
        ConfigError: The type is unknown or an option is wrong.
        TierError: The tier cannot be opened.
    """
    registry = PluginRegistry(plugins)
    config, rest = split_tier(entry, "tiers[0]")
    tier_type = registry.tier_type(config.type, "tiers[0]")
    return tier_type.create(typed_options(tier_type, rest, "tiers[0]"), context)


def start(task: Task) -> subprocess.Popen[bytes]:
    """Start another process on ``task``. The caller ends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # plugins may lie beside the tests
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(task) + b"\n")
    process.stdin.flush()
    return process


def serve() -> None:
    """Be the other process."""
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    context = TierContext(
        name="kit",
        layout=task.layout,
        fingerprint=task.fingerprint,
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=PluginRegistry(task.plugins).eviction_policy,
        logger=logging.getLogger("kvferry.kit"),
    )
    tier = open_configured(task.entry, task.plugins, context)
    blocks = Blocks(task.layout, task.fingerprint)
    for number in range(task.count):
        if tier.store(blocks.sealed([key_of(number, task.salt)]).sources()) == [Outcome.OK]:
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
    sys.stdout.write("done\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    tier.close()
