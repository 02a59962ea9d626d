"""The kernels on the host: the same headers, compiled by g++, called as a kernel is launched.

Needs g++, and nothing of CUDA. The library is built once per process, in a temporary directory.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.cuda.geometry import CopyGeometry, Direction
from kvferry.cuda.program import KERNELS

__all__ = ["Emulation", "Report", "build", "compile_library", "emulation"]

SOURCE = Path(__file__).with_name("emulation.cpp")
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


class Report(ctypes.Structure):
    """What a launch did; the twin of ``Report`` in emulation.hpp."""

    _fields_ = (
        ("bytes_stored", ctypes.c_uint64),
        ("misaligned", ctypes.c_uint64),
        ("outside", ctypes.c_uint64),
    )


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_uint64), ("size", ctypes.c_uint64))


class Field(NamedTuple):
    """One field of the C struct as the compiler placed it, in bytes."""

    name: str
    offset: int
    size: int


class Emulation:
    """A compiled emulation.

    Args:
        library: The shared library that ``build`` made.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self._library.emulate.argtypes = [
            *(ctypes.c_int, ctypes.c_uint32, ctypes.c_char_p, pointer),
            *(pointer, u64, pointer, u64, pointer, ctypes.c_int32, u64, ctypes.POINTER(Report)),
        ]
        self.vectors_per_thread = ctypes.c_uint32.in_dll(self._library, "vectors_per_thread").value

    def fields(self) -> list[Field]:
        """Return the C struct's fields; the last has no name, and the struct's size for an offset."""
        table = (_Field * 64).in_dll(self._library, "geometry_fields")
        fields = []
        for row in table:
            fields.append(Field((row.name or b"").decode(), row.offset, row.size))
            if not row.name:
                break
        return fields

    def launch(
        self,
        kernel: str,
        geometry: bytes,
        layer_offsets: int,
        pages: tuple[int, int],
        shards: tuple[int, int],
        page_ids: int,
        num_pages: int,
        num_threads: int,
    ) -> Report:
        """Run a kernel by name as the driver would, on addresses.

        Args:
            kernel: ``kvferry_gather_v16`` and so on.
            geometry: The packed struct.
            layer_offsets: Address of int64 ``[layers]``.
            pages: Address and bytes of the engine's memory.
            shards: Address and bytes of the shards.
            page_ids: Address of int32 ``[num_pages]``.
            num_pages: Pages, including those left out.
            num_threads: Threads of the whole grid; any number from 1.
        """
        _, direction, width = kernel.split("_")
        source, target = (pages, shards) if direction == "gather" else (shards, pages)
        report = Report()
        unknown = self._library.emulate(
            *(direction == "gather", int(width[1:]), geometry, layer_offsets),
            *(*source, *target, page_ids, num_pages, num_threads, ctypes.byref(report)),
        )
        assert not unknown, f"no kernel {kernel}"
        return report

    def copy(
        self,
        direction: Direction,
        geometry: CopyGeometry,
        pages: npt.NDArray[np.uint8],
        shards: npt.NDArray[np.uint8],
        page_ids: npt.NDArray[np.int32],
        num_threads: int,
    ) -> Report:
        """Gather or scatter ``page_ids`` (any shape, C order) between two arrays."""
        ids = np.ascontiguousarray(page_ids, np.int32)
        offsets = geometry.offsets_array()
        return self.launch(
            geometry.kernel_name(direction),
            geometry.pack(),
            offsets.ctypes.data,
            (pages.ctypes.data, pages.nbytes),
            (shards.ctypes.data, shards.nbytes),
            ids.ctypes.data,
            ids.size,
            num_threads,
        )


def compile_library(library: Path, sources: Sequence[Path], headers: Path = KERNELS, *options: str) -> None:
    """Compile C++ that includes the kernels' headers.

    Raises:
        RuntimeError: There is no g++, or it refused the sources; its messages are in the text.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(f"{library.name} is compiled by g++, which is not on PATH: install g++")
    command = [compiler, *FLAGS, *options, "-I", str(headers), "-o", str(library), *map(str, sources)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if outcome.returncode:
        raise RuntimeError(f"g++ could not compile {library.name}:\n{outcome.stderr}")


def build(directory: Path, headers: Path = KERNELS) -> Emulation:
    """Compile the emulation with the headers of a folder; raises as ``compile_library``."""
    library = directory / "libemulation.so"
    compile_library(library, [SOURCE], headers)
    return Emulation(library)


@functools.cache
def emulation() -> Emulation:
    """Return this process's emulation."""
    with tempfile.TemporaryDirectory(prefix="kvferry-emulation-") as directory:
        return build(Path(directory))
