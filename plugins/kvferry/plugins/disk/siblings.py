"""Directories of other models beside this one: kept up to a number, the longest unused go.

A cache server has a directory for each model of each tenant. Models come and go, and what nobody serves any more
would lie there for ever; so where the tier is told how many may be kept, opening one removes the oldest others of
the same tenant. Only what is plainly a disk tier's directory, of the same group, and in use by nobody is touched.

Functions for the thread that opens the tier.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvferry.connector.tier import TierContext

__all__ = ["remove_oldest"]

_MANIFEST = "kvferry-disk.json"
_OURS = re.compile(r"kvferry-disk\.json|index\.mdb|slab-\d{5}|(kvferry-disk|index|probe|slab-\d{5})\.new")
_INSTANCE = re.compile(r"(?P<group>.+)-[0-9a-f]{16}")


def remove_oldest(path: Path, context: TierContext) -> list[Path]:
    """Remove directories beside ``path`` until ``context.kept_instances`` are left, ``path`` among them.

    Args:
        path: The directory of the tier that is being opened.
        context: Of that tier; nothing is removed where ``kept_instances`` is 0.

    Returns:
        What was removed.
    """
    named = _INSTANCE.fullmatch(context.instance)
    if not context.kept_instances or named is None:
        return []
    others = sorted(_others(path, named["group"]))
    too_many = len(others) + 1 - context.kept_instances
    removed: list[Path] = []
    for _, other in others:
        if len(removed) >= too_many:
            break
        try:
            is_removed = _remove(other)
        except OSError as error:
            context.logger.warning("tier %r: cannot remove %s: %s", context.name, other, error.strerror)
            continue
        if is_removed:
            context.logger.info("tier %r: removed %s, a model that is no longer served", context.name, other)
            removed.append(other)
    return removed


def _others(path: Path, group: str) -> Iterator[tuple[float, Path]]:
    """Yield when each other directory of the group was last opened or closed, and the directory."""
    try:
        beside = list(os.scandir(path.parent))
    except OSError:
        return
    for entry in beside:
        named = _INSTANCE.fullmatch(entry.name)
        if named is None or named["group"] != group or entry.name == path.name:
            continue
        if not entry.is_dir(follow_symlinks=False):
            continue
        try:
            yield os.stat(os.path.join(entry.path, _MANIFEST)).st_mtime, Path(entry.path)
        except OSError:
            continue


def _remove(path: Path) -> bool:
    """Remove a directory, unless somebody uses it or something in it is not ours."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = os.listdir(descriptor)
        if not all(_OURS.fullmatch(name) for name in names):
            return False
        # The manifest goes last: until then what is left is still plainly a disk tier's.
        for name in sorted(names, key=lambda name: name == _MANIFEST):
            os.unlink(name, dir_fd=descriptor)
        path.rmdir()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
