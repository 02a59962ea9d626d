"""Compiled kernels on disk are private, whole or absent, and bounded; without NVIDIA's packages the error says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.connector.errors import DeviceError
from kvferry.cuda.program import CubinCache, cache_directory, compile_kernels


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def cache(directory: Path) -> CubinCache:
    return CubinCache(directory)


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_what_is_stored_is_loaded(cache: CubinCache, directory: Path) -> None:
    assert cache.load("a") is None
    cache.store("a", b"cubin")
    cache.store("a", b"another")
    assert cache.load("a") == b"another"
    assert cache.load("b") is None
    assert directory.stat().st_mode & 0o777 == 0o700
    assert only_file(directory).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:10],
        lambda whole: whole[:32],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\x7fELF" + whole,
        lambda whole: whole[:-1] + b"M",
    ],
)
def test_a_damaged_file_is_absent(cache: CubinCache, directory: Path, damage, caplog) -> None:
    cache.store("a", b"a cubin")
    path = only_file(directory)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load("a") is None
    assert "damaged" in caplog.text


def test_a_file_under_another_name_is_absent(cache: CubinCache, directory: Path) -> None:
    cache.store("sm_80", b"cubin")
    only_file(directory).rename(directory / "sm_90.cubin")
    assert cache.load("sm_90") is None


@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_a_file_that_others_can_write_is_absent(
    cache: CubinCache, directory: Path, mode: int, caplog
) -> None:
    cache.store("a", b"cubin")
    only_file(directory).chmod(mode)
    assert cache.load("a") is None
    assert "somebody else" in caplog.text
    cache.store("a", b"cubin")
    assert cache.load("a") == b"cubin"


def test_a_link_a_pipe_a_folder_and_a_giant_are_absent(
    cache: CubinCache, directory: Path, tmp_path: Path
) -> None:
    cache.store("a", b"cubin")
    path = only_file(directory)
    (elsewhere := tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)
    assert cache.load("a") is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert cache.load("a") is None
    path.unlink()
    path.mkdir()
    assert cache.load("a") is None
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert cache.load("a") is None


def test_a_directory_that_cannot_be_made_costs_only_the_keeping(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CubinCache(tmp_path / "file" / "kernels")
    cache.store("a", b"cubin")
    assert "cannot be kept" in caplog.text
    assert cache.load("a") is None


def test_old_files_go_and_with_them_what_was_never_finished(cache: CubinCache, directory: Path) -> None:
    cache.store("a", b"cubin")
    torn = directory / "new-torn.cubin"
    torn.write_bytes(b"half")
    os.utime(torn, (1, 1))
    for number in range(40):
        cache.store(f"n{number}", b"cubin")
        os.utime(directory / f"n{number}.cubin", (1000 + number, 1000 + number))
    os.utime(directory / "n39.cubin")
    assert len(list(directory.iterdir())) == 32
    assert not torn.exists()
    assert cache.load("n39") == b"cubin"
    assert cache.load("n0") is None


def test_cubins_lie_where_xdg_says(tmp_path: Path) -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/kvferry/kernels")
    assert cache_directory({"HOME": "/h"}) == Path("/h/.cache/kvferry/kernels")


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings"])
def test_missing_packages_are_an_error_that_names_the_extra(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"] + ["cuda", missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=r"kvferry\[cuda\]"):
        compile_kernels("sm_90", cache)
    with pytest.raises(DeviceError, match=r"kvferry\[cuda\]"):
        compile_kernels("sm_90")


def test_importing_the_modules_needs_none_of_nvidias_packages() -> None:
    script = (
        "import sys; sys.modules['cuda'] = None\n"
        "import kvferry.cuda, kvferry.cuda.geometry, kvferry.cuda.program\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
