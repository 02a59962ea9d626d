"""How much memory this process may still take: the machine's and its control group's view.

Read from ``/proc`` and ``/sys/fs/cgroup`` at the moment of the call. Only used to refuse an arena with
a clear message before the kernel's out-of-memory killer has to speak.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "format_bytes", "huge_page_bytes"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_RECLAIMABLE = ("inactive_file", "active_file")


def available_bytes(proc: Path = Path("/proc"), cgroup_root: Path = _CGROUP_ROOT) -> int | None:
    """Return the bytes that can be allocated without swapping or exceeding a limit, None if unknown."""
    known = [
        limit
        for limit in (_meminfo(proc, "MemAvailable"), _cgroup_available(proc, cgroup_root))
        if limit is not None
    ]
    return min(known) if known else None


def huge_page_bytes(proc: Path = Path("/proc")) -> int:
    """Return the size of a huge page, 2 MiB where the kernel does not say."""
    return _meminfo(proc, "Hugepagesize") or 2 << 20


def format_bytes(count: int) -> str:
    """Return a size for people: ``3.5 GiB``, ``512 B``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} PiB"


def _meminfo(proc: Path, field: str) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_available(proc: Path, root: Path) -> int | None:
    """Smallest room over this process's control group and its ancestors; versions 1 and 2."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    rooms: list[int] = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rooms += _rooms(root, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            rooms += _rooms(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(rooms) if rooms else None


def _rooms(root: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    leaf = Path(path.lstrip("/"))
    found = (_room(root / group, limit_name, usage_name) for group in (leaf, *leaf.parents))
    return [room for room in found if room is not None]


def _room(group: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - usage + sum(int(stat.get(name, 0)) for name in _RECLAIMABLE))
