"""NVRTC compiles every kernel for every architecture, without a GPU, and what it made is kept and checked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cuda.bindings import nvrtc

from kvferry.connector.errors import DeviceError
from kvferry.cuda import program
from kvferry.cuda.program import KERNELS, CubinCache, compile_kernels

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
NAMES = [f"kvferry_{way}_v{width}" for way in ("gather", "scatter") for width in (16, 8, 4, 2, 1)]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of the kernels that a test may change."""
    return shutil.copytree(KERNELS, tmp_path / "kernels")


@pytest.fixture
def cache(tmp_path: Path) -> CubinCache:
    return CubinCache(tmp_path / "cubins")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    cubin = compile_kernels(architecture)
    assert cubin.startswith(b"\x7fELF")
    assert [name for name in NAMES if b".text." + name.encode() + b"\0" not in cubin] == []
    assert caplog.records == []


def ptx_of_kernels() -> dict[str, str]:
    """Compile to text, which cuda.core does only where there is a driver."""
    _, compiled = nvrtc.nvrtcCreateProgram((KERNELS / "staging.cu").read_bytes(), b"staging.cu", 0, [], [])
    options = [b"-arch=compute_90", b"-std=c++17", b"-I" + str(KERNELS).encode()]
    assert nvrtc.nvrtcCompileProgram(compiled, len(options), options)[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(compiled)
    text = bytes(size)
    nvrtc.nvrtcGetPTX(compiled, text)
    return dict(re.findall(r"\.entry (\w+)\((.*?)\n}", text.decode(), flags=re.DOTALL))


def test_a_thread_moves_four_whole_vectors_at_a_step() -> None:
    """A struct that was copied piece by piece, or a loop that was not unrolled, would be right and slow."""
    forms = {16: r"\.v4\.\w32", 8: r"(?:\.v2\.\w32|\.\w64)", 4: r"\.\w32", 2: r"\.\w16", 1: r"\.\w8"}
    kernels = ptx_of_kernels()
    assert sorted(kernels) == sorted(NAMES)
    for name, body in kernels.items():
        form = forms[int(name.rpartition("_v")[2])]
        moves = re.findall(rf"\b(ld|st)\.global\.cs{form}\s", body)
        assert moves == ["ld"] * 4 + ["st"] * 4, name
        assert not re.search(r"\b(ld|st)\.(local|shared)|\bbar\.|\batom\.", body), name


def test_what_nvrtc_has_against_a_source_is_in_the_error(sources: Path) -> None:
    source = sources / "strided_copy.cuh"
    source.write_text(source.read_text().replace("const i32 page_id =", "const i32 page_it ="))
    with pytest.raises(DeviceError, match=r"compile staging\.cu for sm_90: .*COMPILATION") as raised:
        compile_kernels("sm_90", kernels=sources)
    assert "strided_copy.cuh" in raised.value.log
    assert '"page_id" is undefined' in raised.value.log


def test_an_architecture_that_nvrtc_does_not_know_is_refused() -> None:
    with pytest.raises(DeviceError, match="sm_42") as raised:
        compile_kernels("sm_42")
    assert "architecture" in str(raised.value)


@pytest.mark.parametrize("architecture", ["", "sm_", "90", "sm_90 -I/", "../sm_90"])
def test_what_is_no_architecture_does_not_reach_the_compiler(architecture: str) -> None:
    with pytest.raises(DeviceError, match="no architecture"):
        compile_kernels(architecture)


def test_kernels_are_compiled_once(cache: CubinCache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernels("sm_90", cache)

    def compiled_again(*arguments: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(program, "_compile", compiled_again)
    assert compile_kernels("sm_90", cache) == first
    with pytest.raises(AssertionError, match="compiled again"):
        compile_kernels("sm_80", cache)


def test_a_change_of_a_header_or_of_nvrtc_is_another_program(
    cache: CubinCache, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(program, "_compile", lambda *_: compiled.append(1) or b"cubin")
    compile_kernels("sm_90", cache, sources)
    compile_kernels("sm_90", cache, sources)
    assert len(compiled) == 1
    with (sources / "geometry.cuh").open("a") as header:
        header.write("// changed\n")
    compile_kernels("sm_90", cache, sources)
    assert len(compiled) == 2
    monkeypatch.setattr(program, "_nvrtc_version", lambda _: (99, 0))
    compile_kernels("sm_90", cache, sources)
    assert len(compiled) == 3


def test_a_damaged_file_is_compiled_again(cache: CubinCache, tmp_path: Path) -> None:
    first = compile_kernels("sm_90", cache)
    (path,) = (tmp_path / "cubins").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert compile_kernels("sm_90", cache) == first
    assert path.read_bytes() == whole
