"""The arena: shared, bounded, private to its user, and gone when nobody maps it."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvferry.connector import arena as arena_module
from kvferry.connector import memory
from kvferry.connector.arena import MIN_SLOTS, Arena, ArenaHandle, slots_for
from kvferry.connector.errors import ArenaError, ClosedError, ConfigError, UsageError

PAGE = 4096

CREATOR = """
import sys, msgspec
from kvferry.connector.arena import Arena
arena = Arena.create(int(sys.argv[1]), 1 << 20)
arena.slots_array[:] = 7
print(msgspec.json.encode(arena.handle).decode(), flush=True)
sys.stdin.read()
"""

ATTACHER = """
import sys, msgspec
from kvferry.connector.arena import Arena, ArenaHandle
arena = Arena.attach(msgspec.json.decode(sys.argv[1], type=ArenaHandle))
index = int(sys.argv[2])
arena.slot(index)[:4] = sys.argv[3].encode()
print(arena.generation(index), bytes(arena.slot(0)[:4]).decode(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(4, PAGE)
    yield made
    made.close()


class Child:
    """A Python process that prints one line and then waits to be ended."""

    def __init__(self, script: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(script: str, *args: str) -> Child:
        children.append(Child(script, *args))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.kill()


def shared_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")


def wait_until(holds: Callable[[], bool], deadline_s: float = 20) -> bool:
    end = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_slots_are_aligned_equal_and_apart(arena: Arena) -> None:
    for index in range(4):
        view = np.frombuffer(arena.slot(index), np.uint8)
        assert view.nbytes == PAGE
        assert view.ctypes.data % PAGE == 0
        view[:] = index + 1
    assert [set(row.tolist()) for row in arena.slots_array] == [{1}, {2}, {3}, {4}]


def test_generations_reach_every_mapping(arena: Arena) -> None:
    other = Arena.attach(arena.handle)
    arena.set_generation(3, (1 << 63) + 5)
    assert [other.generation(index) for index in range(4)] == [0, 0, 0, (1 << 63) + 5]
    with pytest.raises(UsageError, match="creator"):
        other.set_generation(0, 1)
    other.close()


def test_the_memory_is_private_and_its_size_sealed(arena: Arena) -> None:
    path = f"/proc/{os.getpid()}/fd/{arena.handle.fd}"
    assert os.stat(path).st_mode & 0o777 == 0o600
    for size in (0, arena.handle.total_bytes + PAGE):
        with pytest.raises(PermissionError):
            os.truncate(arena.handle.fd, size)
    assert not os.get_inheritable(arena.handle.fd)


def test_nothing_has_a_name_in_dev_shm() -> None:
    before = set(os.listdir("/dev/shm"))
    made = Arena.create(4, PAGE)
    assert set(os.listdir("/dev/shm")) <= before
    made.close()


@pytest.mark.parametrize("index", [-1, 4])
def test_slots_outside_the_arena_are_refused(arena: Arena, index: int) -> None:
    with pytest.raises(UsageError, match="outside"):
        arena.slot(index)


def test_a_closed_arena_says_so(arena: Arena) -> None:
    view = arena.slot(0)
    arena.close()
    arena.close()
    with pytest.raises(ClosedError):
        arena.slot(0)
    view[:] = bytes(PAGE)  # a view that outlives the arena still has its memory


def test_several_processes_share_it_and_any_may_die(spawn: Callable[..., Child]) -> None:
    creator = spawn(CREATOR, "3")
    handle = msgspec.json.decode(creator.line, type=ArenaHandle)
    mine = Arena.attach(handle)
    workers = [spawn(ATTACHER, creator.line, str(index), f"wk{index}!") for index in (1, 2)]
    assert [worker.line.split()[0] for worker in workers] == ["0", "0"]
    assert bytes(mine.slot(1)[:5]) == b"wk1!\x07"
    workers[0].kill()
    assert bytes(mine.slot(2)[:5]) == b"wk2!\x07"
    creator.kill()
    assert bytes(mine.slot(2)[:5]) == b"wk2!\x07"
    with pytest.raises(ArenaError, match="must still run"):
        Arena.attach(handle)
    mine.close()


def test_the_kernel_frees_it_after_kill_9_of_everybody(spawn: Callable[..., Child]) -> None:
    size = 256 << 20
    idle = shared_memory_bytes()
    creator = spawn(CREATOR, str(size >> 20))
    worker = spawn(ATTACHER, creator.line, "1", "here")
    assert wait_until(lambda: shared_memory_bytes() - idle > size * 0.9)
    creator.kill()
    assert shared_memory_bytes() - idle > size * 0.9  # the worker's mapping keeps it
    worker.kill()
    assert wait_until(lambda: shared_memory_bytes() - idle < size * 0.5)


def test_another_arena_under_the_same_descriptor_is_refused(arena: Arena) -> None:
    reused = msgspec.structs.replace(arena.handle, arena_id=bytes(16))
    with pytest.raises(ArenaError, match=r"another arena \(pid or descriptor reused\)"):
        Arena.attach(reused)


def test_another_geometry_is_refused(arena: Arena) -> None:
    for change in ({"num_slots": 2}, {"total_bytes": arena.handle.total_bytes + PAGE}):
        with pytest.raises(ArenaError, match="descriptor"):
            Arena.attach(msgspec.structs.replace(arena.handle, **change))


def test_a_file_that_is_no_arena_is_refused(arena: Arena, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(arena.handle.total_bytes))
    with plain.open("rb+") as opened, pytest.raises(ArenaError, match="no arena"):
        Arena.attach(msgspec.structs.replace(arena.handle, fd=opened.fileno()))
    reading, writing = os.pipe()
    with pytest.raises(ArenaError, match="arena"):
        Arena.attach(msgspec.structs.replace(arena.handle, fd=reading))
    os.close(reading)
    os.close(writing)


def test_a_sealed_file_without_a_header_is_refused(arena: Arena) -> None:
    fd = arena_module._memfd(arena.handle.total_bytes, 0)
    with pytest.raises(ArenaError, match="no arena"):
        Arena.attach(msgspec.structs.replace(arena.handle, fd=fd))
    os.close(fd)


def test_refused_attaches_leave_no_descriptor_open(arena: Arena) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ArenaError):
            Arena.attach(msgspec.structs.replace(arena.handle, arena_id=bytes(16)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_capacity_is_never_exceeded() -> None:
    for slot_bytes in (PAGE, 3 * PAGE, 1 << 20):
        for capacity in (slot_bytes * 3, slot_bytes * 1000 + 17, 1 << 30):
            made = slots_for(capacity, slot_bytes)
            handle_bytes = arena_module._header_bytes(made) + made * slot_bytes
            assert handle_bytes <= capacity < handle_bytes + 2 * slot_bytes + 2 * PAGE


def test_a_capacity_below_two_blocks_names_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"holds 1 blocks of 1 MiB.*at least 2101248 bytes"):
        slots_for(2 << 20, 1 << 20)
    assert slots_for(2101248, 1 << 20) == MIN_SLOTS


def test_more_than_the_free_memory_is_an_error_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "available_bytes", lambda: 64 << 20)
    with pytest.raises(ArenaError, match=r"an arena of 100 MiB does not fit into the 64 MiB.*host\.capacity"):
        Arena.create(100, 1 << 20)


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, PAGE), (-1, PAGE), (2, 100), (2, 0)])
def test_slots_that_make_no_sense_are_refused(slots: int, slot_bytes: int) -> None:
    with pytest.raises(ArenaError, match="positive multiples"):
        Arena.create(slots, slot_bytes)


def test_without_huge_pages_it_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if int(Path("/proc/sys/vm/nr_hugepages").read_text()):
        pytest.skip("this machine has huge pages reserved")
    with caplog.at_level(logging.WARNING):
        made = Arena.create(2, PAGE, huge_pages=True)
    assert "vm.nr_hugepages" in caplog.text
    made.slot(1)[:] = bytes(PAGE)
    made.close()


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    group = root / "pod" / "engine"
    group.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 90000 kB\nHugepagesize: 1024 kB\n")
    (proc / "self/cgroup").write_text("0::/pod/engine\n")
    for place, limit in ((group, "max"), (root / "pod", "50000000")):
        (place / "memory.max").write_text(limit)
        (place / "memory.current").write_text("30000000")
        (place / "memory.stat").write_text("anon 1\ninactive_file 4000000\nactive_file 1000000\n")
    assert memory.available_bytes(proc, root) == 25_000_000
    assert memory.huge_page_bytes(proc) == 1 << 20
    (root / "pod/memory.max").write_text("max")
    assert memory.available_bytes(proc, root) == 90000 * 1024


class TestLifeline:
    """Whoever maps a cache server's arena holds its lifeline."""

    def test_it_is_held_until_the_arena_is_closed(self, arena: Arena) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        attached = Arena.attach(msgspec.structs.replace(arena.handle, lifeline_fd=write_end))
        os.close(write_end)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
        attached.close()
        assert os.read(read_end, 1) == b"", "nobody holds it any more"
        os.close(read_end)

    def test_a_server_that_is_gone_is_not_waited_for(self, arena: Arena) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.close(read_end)
        Arena.attach(msgspec.structs.replace(arena.handle, lifeline_fd=write_end)).close()
        os.close(write_end)

    def test_what_is_no_pipe_is_refused(self, arena: Arena, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file:
            with pytest.raises(ArenaError, match="no lifeline"):
                Arena.attach(msgspec.structs.replace(arena.handle, lifeline_fd=file.fileno()))

    def test_it_is_let_go_when_the_arena_is_the_wrong_one(self, arena: Arena) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        wrong = msgspec.structs.replace(arena.handle, lifeline_fd=write_end, arena_id=bytes(16))
        with pytest.raises(ArenaError, match="another arena"):
            Arena.attach(wrong)
        os.close(write_end)
        assert os.read(read_end, 1) == b""
        os.close(read_end)


def test_a_descriptor_is_verified_before_it_is_exported(arena: Arena) -> None:
    Arena.verify(arena.handle.fd, arena.handle)
    with pytest.raises(ArenaError, match="another arena"):
        Arena.verify(arena.handle.fd, msgspec.structs.replace(arena.handle, arena_id=bytes(16)))
