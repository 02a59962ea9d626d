"""The host driver, host_driver.cpp: built, found by a process in place of CUDA's driver, and what its tests ask of it.

A process has one CUDA driver, whichever its ``cuda.bindings`` find first. So tests on the host driver run in a process
of their own: ``run_tests`` starts pytest there, with the plugin ``host_plugin``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from emulation import compile_library

__all__ = ["DEVICE_VERSION", "LIBRARY", "HostDriver", "Left", "build_driver", "run_tests"]

HERE = Path(__file__).parent
LIBRARY = "libcuda.so.1"
SOURCES = [HERE / "host_driver.cpp", HERE / "host_copies.cpp", HERE / "emulation.cpp"]
DEVICE_VERSION = 13000
"""The CUDA version that it has unless a test says otherwise."""
DEADLINE_S = 150


def build_driver(directory: Path) -> None:
    """Make a ``libcuda.so.1`` in a directory; raises as ``compile_library``."""
    compile_library(directory / LIBRARY, SOURCES)


def run_tests(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the host driver.

    Args:
        directory: Where it was built; compiled kernels are kept there too.
        arguments: Paths, from the root of the repository, and options.
    """
    libraries = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": str(HERE),
        "XDG_CACHE_HOME": str(directory / "cache"),
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-p",
        "host_plugin",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


class Left(NamedTuple):
    """How many of each were made and not given back."""

    allocations: int
    registrations: int
    streams: int
    events: int
    modules: int


class HostDriver:
    """The host driver that this process runs on.

    Raises:
        RuntimeError: It runs on another driver, or none.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._library.host_driver_left  # noqa: B018  # only the host driver has it
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"this process does not run on the host driver: {error}") from error

    def set(self, version: int = DEVICE_VERSION, num_devices: int = 1) -> None:
        """Be as after a start: no refusals, ``cuInit`` not called yet. What was made stays."""
        self._library.host_driver_set(version, num_devices)

    def refuse(self, function: str, code: int) -> None:
        """Have a function answer nothing but this code."""
        self._library.host_driver_refuse(function.encode(), code)

    def take_misuses(self) -> list[str]:
        """Return and forget the calls that nobody should have made: ``cuMemFree: why``."""
        text = ctypes.create_string_buffer(1 << 16)
        self._library.host_driver_take_misuses(text, ctypes.c_uint64(len(text)))
        return text.value.decode().splitlines()

    def left(self) -> Left:
        """Return what was made and not given back."""
        counts = (ctypes.c_uint64 * len(Left._fields))()
        self._library.host_driver_left(counts)
        return Left(*counts)
