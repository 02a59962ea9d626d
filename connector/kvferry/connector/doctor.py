"""Findings: what ``kvferry doctor`` tells the operator before traffic arrives.

Each check looks at one thing and yields findings; none starts, stores or changes anything for good.
Plugins add findings of their own, and look at the tiers of their types.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from kvferry.connector import offers
from kvferry.connector.address import is_loopback, parse_address
from kvferry.connector.choosing import with_remote_tier
from kvferry.connector.codec import NONE
from kvferry.connector.config import Config, ExplainConfig, HostConfig, TierConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import ConfigError, KVFerryError, PluginMissing
from kvferry.connector.explain import explain_directory
from kvferry.connector.finding import Finding
from kvferry.connector.layout import BlockLayout
from kvferry.connector.memory import available_bytes, format_bytes, huge_page_bytes
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import Settings, split_tier, typed_options
from kvferry.connector.tier import TierType

__all__ = ["examine"]

ALWAYS = ("blake3", "lmdb", "msgspec", "numpy", "pluggy", "xxhash")
# Engines are reported by their adapters' plugins.
OPTIONAL = (
    "torch",
    "tensorrt_llm",
    "redis",
    "boto3",
    "obstore",
    "lz4",
    "zstandard",
    "ml_dtypes",
    "nixl",
    "cuda-core",
)

_DIAL_S = 2.0
_USUAL_LAYOUT = BlockLayout(
    num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=128, itemsize=2, dtype="bfloat16"
)
"""Blocks as most models have them; the engine's own are not known here."""


def examine(settings: Settings, registry: PluginRegistry, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield everything that can be said about this machine and this configuration.

    Args:
        settings: The effective configuration.
        registry: With the configuration's plugins loaded.
        environ: Environment variables, for the default directories.
    """
    config = with_remote_tier(settings.config)
    yield from _system()
    yield from _versions()
    if config.service:
        yield _server(config)
    else:
        yield from _memory(config.host)
        yield from _eviction(config.host, registry)
        yield from _tiers(config, registry)
    yield from _handoff(config, registry)
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
            tier_type = registry.tier_type(own.type, path)
            options = typed_options(tier_type, raw, path)
        except (ConfigError, PluginMissing) as error:
            yield Finding("error", path, str(error), "see `kvferry plugins` for types and options")
            continue
        topic = f"tier {own.name}"
        threads = own.threads or tier_type.threads
        yield Finding("ok", topic, f"type {own.type}, {threads} threads, deadline {own.deadline_s:g} s")
        yield from _admission(topic, own, registry)
        yield from _codec(topic, own, f"{path}.codec", registry)
        yield from _checked(tier_type, options, own.name)


def _checked(tier_type: TierType, options: msgspec.Struct, name: str) -> Iterator[Finding]:
    """Let the tier's plugin look at what only it knows: a directory, a server, a bucket."""
    if tier_type.check is None:
        return
    try:
        yield from offers.findings(tier_type.check(options, name))
    except ConfigError as error:
        yield Finding("error", f"tier {name}", str(error))
    except Exception as error:  # noqa: BLE001  # boundary: a plugin's check
        why = f"type {tier_type.name} could not be checked: {type(error).__name__}: {error}"
        yield Finding("warn", f"tier {name}", why, "report this to the plugin's author")


def _admission(topic: str, tier: TierConfig, registry: PluginRegistry) -> Iterator[Finding]:
    known = registry.admission_policies()
    if tier.admission not in known:
        what = f"there is no admission policy {tier.admission!r}"
        yield Finding("error", topic, what, f"known: {', '.join(known)}")


def _codec(topic: str, tier: TierConfig, path: str, registry: PluginRegistry) -> Iterator[Finding]:
    if tier.codec == NONE:
        return
    try:
        offered = registry.codec_type(tier.codec, path)
        offered.make(_USUAL_LAYOUT)
    except (ConfigError, PluginMissing) as error:
        yield Finding("error", topic, str(error), "see `kvferry plugins`")
        return
    except Exception as error:  # noqa: BLE001  # boundary: a plugin's codec
        why = f"codec {tier.codec} cannot be made: {type(error).__name__}: {error}"
        yield Finding("warn", topic, why, "blocks are stored as they are")
        return
    if offered.is_lossy:
        what = f"codec {tier.codec} is LOSSY: whoever reads a block back computes with rounded KV"
        yield Finding("warn", topic, what, "use a lossless codec, or none, if answers must not change")
    else:
        yield Finding("ok", topic, f"blocks are encoded with {tier.codec}, which loses nothing")


def _server(config: Config) -> Finding:
    """Knock at the cache server; a whole hello would have it open a cache."""
    topic = "cache server"
    try:
        address = parse_address(config.service, "service")
        dial(address, config.token, config.tls, time.monotonic() + _DIAL_S).close()
    except OSError as error:
        what = f"{config.service} does not answer: {error}"
        return Finding("warn", topic, what, "engines start without it and use it when it is there")
    except KVFerryError as error:
        return Finding("error", topic, str(error), "engines would not start")
    return Finding(
        "ok", topic, f"{config.service} answers and lets this user in; it owns the memory and the tiers"
    )


def _handoff(config: Config, registry: PluginRegistry) -> Iterator[Finding]:
    """Look at what another engine needs to take pages from this one, and this one from another."""
    topic, peer = "handoff", config.peer
    if peer.enabled is False:
        yield Finding("ok", topic, "off: peer.enabled is false, so requests that ask for it are computed")
        return
    if peer.enabled is None:
        what = "only in engines whose kv_role is kv_producer or kv_consumer"
        yield Finding("ok", topic, what, "for one that is kv_both, set peer.enabled to true")
    yield from _side_channel(config)
    known = sorted(registry.transports())
    if peer.transport not in (offers.AUTO, *known):
        hint = f"known: {', '.join([offers.AUTO, *known])}"
        yield Finding("error", topic, f"there is no transport {peer.transport!r}", hint)
    elif not known:
        yield Finding("warn", topic, "no plugin offers a transport", "see `kvferry plugins`")
    else:
        used = peer.transport if peer.transport != offers.AUTO else f"the best of {', '.join(known)}"
        text = f"pages are read through {used}; held {peer.lease_s:g} s for an engine that says nothing"
        yield Finding("ok", topic, text)
    for host in peer.allowed_hosts:
        if "/" in host and not _is_network(host):
            yield Finding("error", topic, f"peer.allowed_hosts: {host!r} is no network", "write 10.0.0.0/8")


def _side_channel(config: Config) -> Iterator[Finding]:
    """Look at where decoding engines find this one."""
    topic, peer = "handoff", config.peer
    try:
        address = parse_address(peer.listen, "peer.listen")
    except ConfigError as error:
        yield Finding("error", topic, str(error))
        return
    if address.scheme != "tcp":
        what = f"peer.listen: {peer.listen} is no tcp:// address"
        yield Finding("error", topic, what, "write tcp://host:port; port 0 takes a free one")
    elif not address.is_loopback and not config.token:
        what = f"peer.listen: {peer.listen} can be reached by strangers, and there is no token"
        yield Finding("error", topic, what, "set KVFERRY_TOKEN to the same value for all engines")
    elif not address.is_loopback:
        what = (
            f"prompts' KV crosses the network of {peer.listen} in clear, and RDMA reads are not authenticated"
        )
        yield Finding("warn", topic, what, "use a network that is yours alone")
    reached = peer.advertise or address.host
    if reached in ("0.0.0.0", "::"):
        what = f"peer.listen: no decoding engine can reach {reached}"
        yield Finding("error", topic, what, "set peer.advertise to this machine's name or address")
    elif peer.advertise and address.is_loopback and not is_loopback(peer.advertise):
        what = f"peer.advertise says {peer.advertise}, but {peer.listen} is for this machine only"
        yield Finding("error", topic, what, "let peer.listen name an address that others can reach")


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


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
    if not config.tiers and not config.service:
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
    for name, value in (("secret", settings.config.secret), ("token", settings.config.token)):
        origin = settings.origins.get(name, "")
        if not value or not origin.startswith(("/", ".")) or not Path(origin).is_file():
            continue
        if Path(origin).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            yield Finding(
                "warn", name, f"{origin} holds the {name} and others can read it", f"chmod 600 {origin}"
            )
