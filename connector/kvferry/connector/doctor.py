"""Findings: what ``kvferry doctor`` tells the operator before traffic arrives.

Each check looks at one thing and yields findings; none starts, stores or changes anything but a probe
file in a tier's directory, which is removed again. Plugins add findings of their own.
"""

from __future__ import annotations

import errno
import importlib.metadata
import mmap
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from kvferry.connector.config import Config, ExplainConfig, HostConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.explain import explain_directory
from kvferry.connector.memory import available_bytes, format_bytes, huge_page_bytes
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import Settings, split_tier, typed_options

__all__ = ["Finding", "examine"]

ALWAYS = ("blake3", "lmdb", "msgspec", "numpy", "pluggy", "xxhash")
# Engines are reported by their adapters' plugins.
OPTIONAL = ("torch", "tensorrt_llm", "redis", "boto3", "nixl", "cuda-core")


class Finding(msgspec.Struct, frozen=True):
    """One thing worth knowing before traffic arrives."""

    level: Literal["ok", "warn", "error"]
    """``error`` makes ``kvferry doctor`` exit with 1."""
    topic: str
    """A word or two to group by: ``memory``, ``tier disk``, ``vllm``."""
    text: str
    """What was found, one line."""
    hint: str = ""
    """What to do about it."""


def examine(settings: Settings, registry: PluginRegistry, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield everything that can be said about this machine and this configuration.

    Args:
        settings: The effective configuration.
        registry: With the configuration's plugins loaded.
        environ: Environment variables, for the default directories.
    """
    config = settings.config
    yield from _system()
    yield from _versions()
    yield from _memory(config.host)
    yield from _eviction(config.host, registry)
    yield from _tiers(config, registry)
    yield from _records(config.explain, environ)
    yield from _uncached(config)
    yield from _secret_files(settings)
    yield from registry.doctor_findings()
    yield from _plugins(registry)


def _system() -> Iterator[Finding]:
    yield Finding(
        "ok",
        "system",
        f"Linux {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
    )
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        yield Finding(
            "error", "system", "this system has no memfd_create", "kvferry needs Linux 3.17 or newer"
        )
        return
    try:
        os.close(os.memfd_create("kvferry-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        yield Finding(
            "error",
            "system",
            f"memfd_create fails: {error.strerror}",
            "allow it in the container's seccomp profile",
        )


def _versions() -> Iterator[Finding]:
    for names, absent in ((("kvferry", *ALWAYS), "error"), (OPTIONAL, "ok")):
        found = {name: _version(name) for name in names}
        installed = [f"{name} {version}" for name, version in found.items() if version]
        missing = [name for name, version in found.items() if not version]
        if installed:
            yield Finding("ok", "versions", ", ".join(installed))
        if missing and absent == "error":
            yield Finding("error", "versions", f"not installed: {', '.join(missing)}", "reinstall kvferry")
        elif missing:
            yield Finding("ok", "versions", f"not installed, needed only by some: {', '.join(missing)}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory(host: HostConfig) -> Iterator[Finding]:
    room = available_bytes()
    wanted = format_bytes(host.capacity)
    if room is None:
        yield Finding("warn", "memory", f"the arena takes {wanted}; what is available cannot be read")
    elif host.capacity > room:
        yield Finding(
            "error",
            "memory",
            f"the arena takes {wanted}, only {format_bytes(room)} are available",
            "lower host.capacity, or give the container more memory",
        )
    elif host.capacity > room * 0.8:
        yield Finding(
            "warn",
            "memory",
            f"the arena takes {wanted} of {format_bytes(room)} that are available",
            "the engine needs memory too: lower host.capacity",
        )
    else:
        yield Finding("ok", "memory", f"the arena takes {wanted} of {format_bytes(room)} that are available")
    if host.huge_pages:
        yield from _huge_pages(host)


def _huge_pages(host: HostConfig) -> Iterator[Finding]:
    page = huge_page_bytes()
    needed = -(-host.capacity // page)
    try:
        free = int(Path("/proc/sys/vm/nr_hugepages").read_text()) and _free_huge_pages()
    except (OSError, ValueError):
        free = 0
    if free < needed:
        yield Finding(
            "warn",
            "memory",
            f"host.huge_pages needs {needed} pages of {format_bytes(page)}, {free} are free; normal pages serve",
            f"sysctl vm.nr_hugepages={needed}",
        )


def _free_huge_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


def _eviction(host: HostConfig, registry: PluginRegistry) -> Iterator[Finding]:
    if host.eviction not in registry.eviction_policies():
        known = ", ".join(registry.eviction_policies())
        yield Finding("error", "host", f"there is no eviction policy {host.eviction!r}", f"known: {known}")


def _tiers(config: Config, registry: PluginRegistry) -> Iterator[Finding]:
    for index, tier in enumerate(config.tiers):
        path = f"tiers[{index}]"
        try:
            own, raw = split_tier(tier, path)
            options = typed_options(registry.tier_type(own.type, path), raw, path)
        except ConfigError as error:
            yield Finding("error", path, str(error), "see `kvferry plugins` for types and options")
            continue
        topic = f"tier {own.name}"
        yield Finding("ok", topic, f"type {own.type}, {own.threads} threads, deadline {own.deadline_s:g} s")
        directory = getattr(options, "path", None)
        if isinstance(directory, str) and directory:
            yield from _directory(topic, Path(directory).expanduser(), getattr(options, "capacity", None))


def _directory(topic: str, path: Path, capacity: object) -> Iterator[Finding]:
    """Look at the directory of a tier, or at the nearest one above that exists."""
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
    if isinstance(capacity, int) and capacity > free + used:
        yield Finding(
            "warn",
            topic,
            f"capacity {format_bytes(capacity)}, but {existing} has {format_bytes(free)} free",
            "the tier stays smaller; lower its capacity or make room",
        )
    try:
        has_direct_io = _probe_direct_io(existing)
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


def _probe_direct_io(directory: Path) -> bool:
    """Tell whether a sector can be written past the page cache. Raises OSError where nothing can."""
    probe = directory / f".kvferry-doctor-{os.getpid()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(probe, flags, 0o600))
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        try:
            return os.pwrite(descriptor, mmap.mmap(-1, 4096), 0) == 4096
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        probe.unlink()


def _plugins(registry: PluginRegistry) -> Iterator[Finding]:
    """Look at the plugins last: asking them for findings may have shown that they are broken."""
    reports = registry.reports()
    working = [f"{report.name} {report.version}".strip() for report in reports if not report.error]
    yield Finding("ok", "plugins", ", ".join(working) or "none")
    for report in reports:
        if report.error:
            is_wanted = report.origin == "configuration"
            yield Finding("error" if is_wanted else "warn", "plugins", report.error, "update or uninstall it")


def _records(explain: ExplainConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    if not explain.enabled:
        yield Finding("ok", "explain", "request records are off: `kvferry explain` will know nothing")
        return
    directory = explain_directory(explain, environ)
    existing = next((parent for parent in (directory, *directory.parents) if parent.exists()), Path("/"))
    if os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "ok", "explain", f"request records go to {directory}, at most {format_bytes(explain.max_bytes)}"
        )
    else:
        yield Finding(
            "warn", "explain", f"request records cannot be written to {directory}", "set explain.directory"
        )


def _uncached(config: Config) -> Iterator[Finding]:
    """Say what this configuration leaves uncached, so that nothing is silently not there."""
    topic = "not cached"
    if not config.enabled:
        yield Finding("warn", topic, "everything: enabled is false", "set enabled to true")
    if config.save == "none":
        yield Finding("warn", topic, "nothing new: save is 'none', so only what is stored already is found")
    elif config.save == "prompt":
        yield Finding("ok", topic, "generated tokens: save is 'prompt'")
    if not config.tiers:
        yield Finding(
            "ok",
            topic,
            "anything after a restart: there is no tier below the arena",
            "add a tier of type disk to keep blocks",
        )
    if not config.self_test:
        yield Finding(
            "warn", "self-test", "off: a page layout that is misread would go unnoticed", "turn it on"
        )


def _secret_files(settings: Settings) -> Iterator[Finding]:
    """Warn of a secret in a file that others can read."""
    origin = settings.origins.get("secret", "")
    if not settings.config.secret or not origin.startswith(("/", ".")) or not Path(origin).is_file():
        return
    if Path(origin).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding(
            "warn", "secret", f"{origin} holds the secret and others can read it", f"chmod 600 {origin}"
        )
