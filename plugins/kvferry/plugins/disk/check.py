"""What ``kvferry doctor`` says about a disk tier: is its directory fit, and is there room.

Changes nothing but a probe file in the directory, which is removed again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvferry.connector.finding import Finding
from kvferry.connector.memory import format_bytes
from kvferry.plugins.disk.options import DiskOptions
from kvferry.plugins.disk.slabs import supports_direct_io

__all__ = ["check"]


def check(options: DiskOptions, name: str) -> Iterator[Finding]:
    """Look at the tier's directory, or at the nearest one above that exists."""
    topic, path = f"tier {name}", Path(options.path).expanduser()
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
    if not existing.is_dir():
        yield Finding("error", topic, f"{existing} is not a directory", "choose another path")
        return
    used = (
        sum(entry.stat().st_blocks * 512 for entry in path.glob("**/*") if entry.is_file())
        if path.is_dir()
        else 0
    )
    free = shutil.disk_usage(existing).free
    if options.capacity > free + used:
        yield Finding(
            "warn",
            topic,
            f"capacity {format_bytes(options.capacity)}, but {existing} has {format_bytes(free)} free",
            "the tier stays smaller; lower its capacity or make room",
        )
    try:
        has_direct_io = supports_direct_io(existing, f".kvferry-doctor-{os.getpid()}")
    except OSError as error:
        yield Finding(
            "error", topic, f"{existing} cannot be written: {error.strerror}", "check owner and mount"
        )
        return
    if has_direct_io:
        yield Finding("ok", topic, f"{path}: {format_bytes(free)} free, direct I/O works")
    else:
        yield Finding(
            "warn",
            topic,
            f"{path}: its filesystem has no direct I/O; the page cache is used, which costs memory and speed",
            "use ext4 or XFS on a local disk",
        )
