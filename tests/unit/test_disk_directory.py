"""A directory that cannot or must not be used is refused with a clear line, and left as it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_kit import capacity_for, key_of, load_verified, make_context, open_tier, store

from kvferry.connector.errors import ConfigError, TierUnavailable
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import Outcome
from kvferry.plugins.disk import manifest
from kvferry.plugins.disk.opening import open_disk_tier
from kvferry.plugins.disk.options import DiskOptions

KEYS = [key_of(number) for number in range(6)]
CAPACITY = capacity_for(20)
MANIFEST = "kvferry-disk.json"


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A directory with six blocks, closed properly."""
    opened = open_tier(tmp_path / "cache", CAPACITY)
    store(opened, KEYS)
    opened.close()
    return tmp_path / "cache"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_refused(path: Path, match: str, **context: object) -> None:
    """The tier names itself, the path, the cause and what to do; nothing in the directory changes."""
    before = contents(path)
    with pytest.raises(TierUnavailable, match=match) as caught:
        open_tier(path, CAPACITY, make_context(**context))  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"tier 'disk': {path}")
    assert "; " in str(caught.value)
    assert contents(path) == before


def test_another_models_directory(used: Path) -> None:
    assert_refused(used, "another model's blocks.*one per model", fingerprint=bytes(32))


def test_records_of_another_length(used: Path) -> None:
    layout = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2)
    before = contents(used)
    with pytest.raises(TierUnavailable, match="records of 20480 bytes"):
        open_tier(used, CAPACITY * 2, make_context(layout=layout))
    assert contents(used) == before


def test_a_directory_of_a_newer_kvferry(used: Path) -> None:
    (used / MANIFEST).write_text('{"kvferry_disk": 2, "something": ["new"]}')
    assert_refused(used, "newer kvferry .format 2, this one knows 1.*upgrade")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"name": "someone-elses"}', '{"kvferry_disk": 1}', "\x00" * 99, "[" * 70000]
)
def test_a_damaged_manifest(used: Path, text: str) -> None:
    (used / MANIFEST).write_text(text)
    assert_refused(used, "damaged kvferry-disk.json")


def test_a_directory_with_files_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    assert_refused(tmp_path, "thesis.tex.*name an empty directory")


def test_slabs_without_a_manifest_are_not_taken_for_ours(used: Path) -> None:
    (used / MANIFEST).unlink()
    assert_refused(used, "no kvferry-disk.json")


def test_an_empty_mount_point_is_fine(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    open_tier(tmp_path, CAPACITY).close()


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierUnavailable, match=f"{path} cannot be used: .*; name a directory"):
            open_tier(path, CAPACITY)


def test_an_empty_path_and_an_instance_that_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.disk\.path: is empty"):
        open_disk_tier(DiskOptions(path="", capacity=CAPACITY), make_context())
    for instance in ("../elsewhere", "a/b", "..", "."):
        with pytest.raises(ConfigError, match="is no plain name"):
            open_tier(tmp_path, CAPACITY, make_context(instance=instance))
    assert not list(tmp_path.iterdir())


def test_a_slab_that_is_a_link_is_not_followed(used: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(bytes(1 << 20))
    (used / "slab-00000").unlink()
    (used / "slab-00000").symlink_to(tmp_path / "target")
    with pytest.raises(TierUnavailable, match=f"{used} cannot be used"):
        open_tier(used, CAPACITY)


def test_a_read_only_filesystem(used: Path) -> None:
    mounted = subprocess.run(["mount", "--bind", used, used], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", used], check=True)
        assert_refused(used, "Read-only file system; remount")
    finally:
        subprocess.run(["umount", "-l", used], check=True)


def test_a_directory_that_cannot_be_written(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def denied(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_open(path, flags, mode)

    with monkeypatch.context() as fault:
        fault.setattr(os, "open", denied)
        assert_refused(used, "Permission denied; let this user write there")
    opened = open_tier(used, CAPACITY)
    assert load_verified(opened, KEYS) == [Outcome.OK] * 6
    opened.close()


def test_a_directory_in_use_names_the_process(used: Path) -> None:
    opened = open_tier(used, CAPACITY)
    assert_refused(used, f"in use by process {os.getpid()}; stop it")
    opened.close()
    open_tier(used, CAPACITY).close()


ENGINE = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from disk_kit import open_tier, store, key_of
opened = open_tier(Path(sys.argv[1]), int(sys.argv[3]))
store(opened, [key_of(77)])
worker = os.fork()
if worker == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@pytest.fixture
def engine(used: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the directory and has forked a worker, which outlives it."""
    command = [sys.executable, "-c", ENGINE, str(used), str(Path(__file__).parent), str(CAPACITY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_worker_that_outlives_a_killed_engine_does_not_keep_the_next_one_out(
    used: Path, engine: subprocess.Popen[str]
) -> None:
    assert_refused(used, f"in use by process {engine.pid}")
    engine.send_signal(signal.SIGKILL)
    engine.wait(20)
    opened = open_tier(used, CAPACITY)
    assert load_verified(opened, [*KEYS, key_of(77)]) == [Outcome.OK] * 7
    opened.close()


def test_after_a_crash_of_the_machine_the_index_is_not_believed(
    used: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_manifest(used, is_clean=False, boot_id="another boot")
    opened = open_tier(used, CAPACITY)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "starting empty (set sync = true" in caplog.text
    assert opened.stats().blocks == 0
    assert opened.census().free > 0
    assert store(opened, KEYS) == [Outcome.OK] * 6
    opened.close()


@pytest.mark.parametrize(
    "left",
    [
        {"is_clean": True, "boot_id": "another boot"},
        {"is_clean": False, "boot_id": "another boot", "is_durable": True},
        {"is_clean": False},
    ],
    ids=["closed before the restart", "sync", "killed, same boot"],
)
def test_what_was_on_the_medium_or_in_the_kernel_is_believed(
    used: Path, left: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    edit_manifest(used, **left)
    with caplog.at_level(logging.WARNING):
        opened = open_tier(used, CAPACITY)
    assert not caplog.records
    assert load_verified(opened, KEYS) == [Outcome.OK] * 6
    opened.close()


def test_the_manifest_says_how_the_directory_was_left(used: Path) -> None:
    def found() -> manifest.Manifest:
        value = manifest.read_manifest(used / MANIFEST)
        assert isinstance(value, manifest.Manifest)
        return value

    assert found().is_clean
    opened = open_tier(used, CAPACITY, sync=True)
    assert (found().is_clean, found().is_durable, found().boot_id) == (
        False,
        True,
        manifest.current_boot_id(),
    )
    opened.close()
    assert found().is_clean


def test_sync_is_promised_only_once_the_last_process_without_it_is_flushed(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(used, is_clean=False)
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def observe(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", observe)
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("promise"), replace(old, new)))
    opened = open_tier(used, CAPACITY, sync=True)
    flushed = set(steps[: steps.index("promise")])
    assert flushed >= {"index.mdb", *(slab.name for slab in used.glob("slab-*"))}
    opened.close()


def test_unfinished_files_are_removed(used: Path) -> None:
    for name in ("slab-00007.new", "index.new", "kvferry-disk.new", "probe.new"):
        (used / name).write_bytes(b"x" * 5000)
    opened = open_tier(used, CAPACITY)
    assert load_verified(opened, KEYS) == [Outcome.OK] * 6
    opened.close()
    assert not list(used.glob("*.new"))


def test_files_of_somebody_else_beside_ours_are_left_alone(used: Path) -> None:
    (used / "notes.new").write_text("mine")
    (used / "lost+found").mkdir()
    edit_manifest(used, is_clean=False)
    open_tier(used, CAPACITY, sync=True).close()
    assert (used / "notes.new").read_text() == "mine"


def test_a_directory_that_could_not_be_opened_can_be_opened_later(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as fault:
        fault.setattr("kvferry.plugins.disk.opening.Index", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_tier(used, CAPACITY)
    opened = open_tier(used, CAPACITY)
    assert load_verified(opened, KEYS) == [Outcome.OK] * 6
    opened.close()
