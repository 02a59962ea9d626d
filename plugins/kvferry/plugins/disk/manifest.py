"""The manifest: what a disk tier's directory holds, so that nothing else is ever taken for it.

A small JSON file, replaced atomically. Pure values, plus the two functions that read and write it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

__all__ = [
    "DIRECTORY_FORMAT",
    "Manifest",
    "ManifestDamaged",
    "current_boot_id",
    "flush_names",
    "read_manifest",
    "write_manifest",
]

DIRECTORY_FORMAT = 1
"""Version of the files in the directory: their names, the records, the index entries."""

_MAX_BYTES = 64 << 10
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ManifestDamaged(Exception):
    """The manifest is not one of ours, or is damaged."""


class _Version(msgspec.Struct):
    kvferry_disk: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the directory and how it was left."""

    kvferry_disk: int = DIRECTORY_FORMAT
    fingerprint: str
    """The model's fingerprint, hex."""
    record_bytes: int
    """Length of one record in the slabs."""
    blocks: str
    """The blocks' geometry, for people."""
    pid: int
    """The process that last opened the directory."""
    boot_id: str
    """The machine's boot during which it did."""
    is_clean: bool
    """It was closed, and everything was on the medium by then."""
    is_durable: bool
    """Each transaction was on the medium when it counted as done."""

    def survives(self, boot_id: str) -> bool:
        """Tell whether the index can be believed during the boot ``boot_id``."""
        return self.is_clean or self.is_durable or self.boot_id == boot_id


def current_boot_id() -> str:
    """Return an id that changes when the machine restarts, or one that never recurs where there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"unknown {os.urandom(8).hex()}"


def read_manifest(path: Path) -> Manifest | int:
    """Return the manifest at ``path``, or its format version where that is newer than ours.

    Raises:
        ManifestDamaged: It is not a manifest of a disk tier.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES)
    try:
        version = msgspec.json.decode(text, type=_Version).kvferry_disk
        if version > DIRECTORY_FORMAT:
            return version
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestDamaged(str(error)) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest at ``path``: after a crash the old one or the new one is there, whole."""
    fresh = path.with_suffix(".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    flush_names(path.parent)


def flush_names(path: Path) -> None:
    """Put the names of a directory's files on the medium."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
