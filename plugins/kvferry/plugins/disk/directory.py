"""The directory of one disk tier: whose it is, who uses it, and whether its index can be believed.

    kvferry-disk.json   the manifest
    index.mdb           the index
    slab-00000, ...     the records
    <name>.new          unfinished twins of the above, removed at the next start

Nothing is deleted here but the ``.new`` files and an index that a crash of the machine may have
torn. A directory that is not plainly ours is refused as it is. The process that uses the directory holds a
lock on it (``flock`` on the directory itself); a child that it forks does not.

``Directory`` is used by one thread, at opening and closing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import weakref
from pathlib import Path

import msgspec

from kvferry.connector.errors import ConfigError, TierUnavailable
from kvferry.connector.tier import TierContext
from kvferry.plugins.disk.manifest import (
    DIRECTORY_FORMAT,
    Manifest,
    ManifestDamaged,
    current_boot_id,
    read_manifest,
    write_manifest,
)

__all__ = ["Directory", "hint_for", "tier_path"]

_MANIFEST = "kvferry-disk.json"
# What may lie in a directory that has no manifest yet: our own first step, and a mount point's.
_HARMLESS = frozenset({"kvferry-disk.new", "lost+found"})
_UNFINISHED = re.compile(r"(kvferry-disk|index|probe|slab-\d{5})\.new")
_HINTS = {
    errno.EROFS: "remount the filesystem writable or name another path",
    errno.EACCES: "let this user write there or name another path",
    errno.EPERM: "let this user write there or name another path",
    errno.ENOSPC: "make room on the filesystem",
    errno.EDQUOT: "make room in the quota",
    errno.EEXIST: "name a directory",
    errno.ENOTDIR: "name a directory",
}


def tier_path(path: str, context: TierContext) -> Path:
    """Return the directory for this engine: ``path``, or one below it per instance.

    Raises:
        ConfigError: The path is empty, or the instance is no plain name.
    """
    if not path:
        raise ConfigError(f"tiers.{context.name}.path", "is empty", "name a directory for this tier alone")
    base = Path(path).expanduser().absolute()
    if not context.instance:
        return base
    if context.instance != os.path.basename(context.instance) or context.instance in (".", ".."):
        raise ConfigError(f"tiers.{context.name}.path", f"instance {context.instance!r} is no plain name")
    return base / context.instance


class Directory:
    """A directory that this process alone uses.

    Args:
        context: The tier's context.
        path: From :func:`tier_path`; created when absent.
        record_bytes: Length of one record.
        is_durable: Whether transactions will be flushed to the medium.

    Raises:
        TierUnavailable: It cannot be used; the message says why and what to do. Nothing was changed.
    """

    def __init__(self, context: TierContext, path: Path, record_bytes: int, *, is_durable: bool) -> None:
        self.path = path
        self.index_path = path / "index.mdb"
        self._context = context
        self._manifest = Manifest(
            fingerprint=context.fingerprint.hex(),
            record_bytes=record_bytes,
            blocks=repr(context.layout),
            pid=os.getpid(),
            boot_id=current_boot_id(),
            is_clean=False,
            is_durable=is_durable,
        )
        self._lock = self._acquire()
        try:
            self._take_over()
        except BaseException:
            self._lock.release()
            raise

    def release(self, *, is_clean: bool) -> None:
        """Let go of the directory; ``is_clean`` when everything is on the medium."""
        try:
            if is_clean:
                self._write(is_clean=True)
        finally:
            self._lock.release()

    def _acquire(self) -> _Lock:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _Lock(self.path)
        except BlockingIOError:
            found = self._read()
            by = f"process {found.pid}" if found is not None else "another process"
            raise self._unavailable(f"is in use by {by}", "stop it or name another path") from None
        except OSError as error:
            raise self._unavailable(f"cannot be used: {error.strerror}", hint_for(error)) from error

    def _take_over(self) -> None:
        """Check that the directory is ours, drop an index that may be torn, mark it as in use."""
        found = self._read()
        if found is None:
            self._check_empty()
        else:
            self._check_same(found)
            if not found.survives(self._manifest.boot_id) and self.index_path.exists():
                self._context.logger.warning(
                    "tier %r: the machine stopped without closing %s, so its index may be torn: "
                    "starting empty (set sync = true to keep blocks through that)",
                    self._context.name,
                    self.path,
                )
                self.index_path.unlink()
        for unfinished in filter(lambda file: _UNFINISHED.fullmatch(file.name), self.path.iterdir()):
            unfinished.unlink()
        if self._manifest.is_durable and found is not None and not (found.is_clean or found.is_durable):
            self._flush()
        self._write(is_clean=False)

    def _flush(self) -> None:
        """Put on the medium what a process without ``sync`` left to the kernel, before promising that."""
        try:
            for file in filter(Path.is_file, self.path.iterdir()):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        except OSError as error:
            raise self._unavailable(f"cannot be flushed: {error.strerror}", hint_for(error)) from error

    def _read(self) -> Manifest | None:
        try:
            found = read_manifest(self.path / _MANIFEST)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unavailable(
                f"has an unreadable {_MANIFEST}: {error.strerror}", hint_for(error)
            ) from error
        except ManifestDamaged as error:
            raise self._unavailable(
                f"has a damaged {_MANIFEST}: {error}", "restore it, or empty the directory to start afresh"
            ) from error
        if isinstance(found, int):
            raise self._unavailable(
                f"was written by a newer kvferry (format {found}, this one knows {DIRECTORY_FORMAT})",
                "upgrade kvferry or name another path",
            )
        return found

    def _check_same(self, found: Manifest) -> None:
        want = self._manifest
        if found.fingerprint != want.fingerprint:
            raise self._unavailable(
                f"holds another model's blocks (fingerprint {found.fingerprint[:8]}, "
                f"this model's is {want.fingerprint[:8]})",
                "name another path, one per model",
            )
        if found.record_bytes != want.record_bytes:
            raise self._unavailable(
                f"holds records of {found.record_bytes} bytes, this model's are {want.record_bytes}",
                "empty the directory or name another path",
            )

    def _check_empty(self) -> None:
        foreign = sorted({entry.name for entry in self.path.iterdir()} - _HARMLESS)
        if foreign:
            raise self._unavailable(
                f"holds files that are not kvferry's ({', '.join(foreign[:3])}) and no {_MANIFEST}",
                "name an empty directory",
            )

    def _write(self, *, is_clean: bool) -> None:
        manifest = msgspec.structs.replace(self._manifest, is_clean=is_clean)
        try:
            write_manifest(self.path / _MANIFEST, manifest)
        except OSError as error:
            raise self._unavailable(f"cannot be written: {error.strerror}", hint_for(error)) from error

    def _unavailable(self, why: str, hint: str) -> TierUnavailable:
        return TierUnavailable(self._context.name, f"{self.path} {why}", hint)


def hint_for(error: OSError) -> str:
    """Return what an operator can do about ``error``."""
    return _HINTS.get(error.errno or 0, "check the filesystem")


class _Lock:
    """An exclusive lock on a directory, held by this process only.

    Raises:
        BlockingIOError: Another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise
        _held.add(self)

    def release(self) -> None:
        """Unlock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_held: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked worker that outlives its engine must not keep the next engine out.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
