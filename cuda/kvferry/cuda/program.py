"""The kernels as machine code: compiled by NVRTC at first use, kept on disk, never trusted unchecked.

No compiler is needed when kvferry is installed and none but NVRTC when it runs; compiling takes neither a GPU nor a
driver. A cubin depends on nothing but the sources, the options, the architecture and NVRTC's version: these are its
name on disk. The file begins with a digest of name and content, so that a torn, damaged or renamed one is a
reason to compile again, as is one that somebody else could have written.

NVIDIA's packages are imported when something is compiled. Functions block while they compile and may be called from
any thread and process at the same time; the last writer of a file wins, with the same content.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from blake3 import blake3

from kvferry.connector.errors import DeviceError
from kvferry.connector.rotation import make_private

__all__ = ["KERNELS", "CubinCache", "cache_directory", "compile_kernels", "kept_kernels"]

logger = logging.getLogger(__name__)

KERNELS = Path(__file__).with_name("kernels")
"""The folder of the sources."""

_PROGRAM = "staging.cu"
_OPTIONS = {"std": "c++17", "lineinfo": True}
_ARCHITECTURE = re.compile(r"sm_\d{2,3}[af]?")
_SUFFIX = ".cubin"
_DIGEST_BYTES = 32
_MAX_CUBIN_BYTES = 16 << 20
_KEPT_CUBINS = 32
"""Versions and architectures whose files stay; older ones are deleted when one is added."""


class CubinCache:
    """Cubins in a private directory, by name. Nothing that goes wrong with it is worse than compiling again.

    Args:
        directory: Made with mode 0700 if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, name: str) -> bytes | None:
        """Return the content stored under a name, or None if it is not there, or not to be trusted."""
        path = self._directory / (name + _SUFFIX)
        try:
            content = _read_own(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("the compiled kernels in %s are not used: %s", path, error)
            return None
        cubin = content[_DIGEST_BYTES:]
        if not cubin or content[:_DIGEST_BYTES] != _digest([name.encode(), cubin]):
            logger.warning("the compiled kernels in %s are damaged and are compiled again", path)
            return None
        return cubin

    def store(self, name: str, cubin: bytes) -> None:
        """Keep a content under a name: after a crash the old file or the new one is there, whole."""
        try:
            make_private(self._directory)
            descriptor, fresh = tempfile.mkstemp(suffix=_SUFFIX, prefix="new-", dir=self._directory)
            try:
                with open(descriptor, "wb") as file:
                    file.write(_digest([name.encode(), cubin]) + cubin)
                os.replace(fresh, self._directory / (name + _SUFFIX))
            except BaseException:
                os.unlink(fresh)
                raise
            self._prune()
        except OSError as error:
            logger.warning("compiled kernels cannot be kept in %s: %s", self._directory, error)

    def _prune(self) -> None:
        """Delete the oldest files, among them what a killed process left half written."""
        paths = list(self._directory.glob(f"*{_SUFFIX}"))
        ages = {}
        for path in paths:
            with contextlib.suppress(OSError):
                ages[path] = path.stat().st_mtime_ns
        for path in sorted(ages, key=lambda path: ages[path])[:-_KEPT_CUBINS]:
            path.unlink(missing_ok=True)


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Return where cubins lie, following the XDG base directories."""
    cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "kvferry" / "kernels"


def kept_kernels(architecture: str) -> bytes:
    """Return the kernels from this user's cache, compiled if they are not there; raises as ``compile_kernels``."""
    return compile_kernels(architecture, CubinCache(cache_directory(os.environ)))


def compile_kernels(architecture: str, cache: CubinCache | None = None, kernels: Path = KERNELS) -> bytes:
    """Return the machine code of all kernels, from the cache where it has it.

    Args:
        architecture: ``sm_90`` and so on.
        cache: Where the result is looked up and kept; without one it is always compiled.
        kernels: The folder of the sources.

    Raises:
        DeviceError: NVIDIA's packages are missing, or NVRTC refused; its log is in the error.
    """
    if not _ARCHITECTURE.fullmatch(architecture):
        raise DeviceError(f"compile for {architecture!r}", "that is no architecture", "name one as in sm_90")
    operation = f"compile {_PROGRAM} for {architecture}"
    version = _nvrtc_version(operation)
    if cache is None:
        return _compile(architecture, operation, kernels)
    sources = {path.name: path.read_bytes() for path in sorted(kernels.glob("*.cu*"))}
    name = _name(sources, architecture, version)
    cubin = cache.load(name)
    if cubin is None:
        cubin = _compile(architecture, operation, kernels)
        cache.store(name, cubin)
    return cubin


def _compile(architecture: str, operation: str, kernels: Path) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions

        options = ProgramOptions(name=_PROGRAM, arch=architecture, include_path=[str(kernels)], **_OPTIONS)
        log = io.StringIO()
        program = Program((kernels / _PROGRAM).read_text(), "c++", options)
        cubin = bytes(program.compile("cubin", logs=log).code)
    except ImportError as error:
        raise _missing(operation, error) from error
    except Exception as error:  # boundary: NVIDIA's compiler and its loader
        code, _, messages = str(error).partition(", compilation log:")
        raise DeviceError(operation, code or repr(error), log=messages.strip()) from error
    if log.getvalue().strip():
        logger.warning("NVRTC, %s: %s", operation, log.getvalue().strip())
    return cubin


def _nvrtc_version(operation: str) -> tuple[int, int]:
    try:
        from cuda.bindings import nvrtc

        result, major, minor = nvrtc.nvrtcVersion()
    except ImportError as error:
        raise _missing(operation, error) from error
    except Exception as error:  # boundary: the loader of NVIDIA's libraries
        raise _missing(operation, error) from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(operation, str(result.name))
    return int(major), int(minor)


def _missing(operation: str, error: Exception) -> DeviceError:
    return DeviceError(
        operation,
        f"NVIDIA's compiler is not there ({error})",
        "install it with pip install 'kvferry[cuda]', or 'kvferry[cuda12]' for a driver of CUDA 12",
    )


def _name(sources: Mapping[str, bytes], architecture: str, nvrtc: tuple[int, int]) -> str:
    """Name a cubin by all that it depends on."""
    fields = [architecture, repr(nvrtc), repr(sorted(_OPTIONS.items()))]
    parts = [field.encode() for field in fields]
    for name, source in sources.items():
        parts += [name.encode(), source]
    return f"{architecture}-{_digest(parts).hex()}"


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = blake3()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _read_own(path: Path) -> bytes:
    """Read a bounded regular file that nobody but this user can have written.

    Raises:
        OSError: There is none, or it is something else.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_CUBIN_BYTES:
            raise OSError("it is no file of a cubin's size")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError("somebody else could have written it")
        return file.read(_MAX_CUBIN_BYTES)
