"""The staging bench without a GPU: what it says then, and its arithmetic and table on a played GPU and clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import pytest
from click.testing import CliRunner, Result
from played_device import PlayedDevice

from kvferry.connector.bench.case import BenchSkipped, Figure, Goal
from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.connector.layout import BlockLayout
from kvferry.cuda.bench import __main__ as command
from kvferry.cuda.bench import copies, matmul
from kvferry.cuda.bench.__main__ import bench, tables
from kvferry.cuda.bench.copies import Comparison, compare
from kvferry.cuda.choice import PATHS, Paths

SMALL = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=64, head_dim=16, itemsize=2)
SECONDS = {"D2H": 0.5, "H2D": 0.25, "both": 1.0, "raw D2H": 0.25, "raw H2D": 0.25, "raw both": 0.5}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    """A played GPU; the caches are small, and every side is run once and takes what SECONDS says."""
    played = PlayedDevice(haste=0.0)

    def timed(
        sides: Mapping[str, Callable[[int], None]], repetitions: int, progress: Callable[[float], None]
    ) -> dict[str, float]:
        for side in sides.values():
            side(0)
            assert played.is_idle(), "a side ends when its copies are done"
        progress(1.0)
        return {name: SECONDS[name] for name in sides}

    monkeypatch.setattr(copies, "interleaved", timed)
    monkeypatch.setattr(copies, "CACHES", {"8B": SMALL})
    monkeypatch.setattr(matmul, "CACHES", {"8B": SMALL})
    monkeypatch.setattr(command, "open_device", lambda index: played)
    return played


def paths(device: PlayedDevice) -> Paths:
    return Paths(device, CudaConfig(), lambda architecture: b"cubin")


def measured(device: PlayedDevice, blocks: int = 6) -> list[Comparison]:
    return list(compare(device, paths(device), PATHS, "8B", "tokens", blocks, 1, lambda part: None))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments)


def test_without_a_gpu_nothing_is_printed_as_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int) -> None:
        raise DeviceError("open a GPU", "there is no NVIDIA driver", "install one\nor not")

    monkeypatch.setattr(command, "open_device", missing)
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "nothing was measured: CUDA failed to open a GPU: there is no NVIDIA driver"
    )


def test_the_real_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert run().exit_code == 2


def test_help_says_what_it_takes() -> None:
    text = run("--help").stdout
    for word in ("--cache", "--blocks", "--path", "20 GiB", "exit code is 2"):
        assert word in " ".join(text.split())


def test_a_figure_is_a_part_of_one_large_copy_in_the_same_run(device: PlayedDevice) -> None:
    compared = measured(device)
    assert [one.path for one in compared] == list(PATHS)
    assert [one.left_out for one in compared] == ["", "", ""]
    for one in compared:
        figures = {figure.name: figure for figure in one.figures}
        total = 6 * SMALL.payload_bytes
        assert figures["D2H"].value == pytest.approx(total / 0.5 / 1e9)
        assert figures["D2H"].raw == pytest.approx(total / 0.25 / 1e9)
        assert {name: figure.ratio for name, figure in figures.items()} == pytest.approx(
            {"D2H": 0.5, "H2D": 1.0, "both": 0.5}
        )
        assert {name: figure.is_met for name, figure in figures.items()} == {
            "D2H": False,
            "H2D": True,
            "both": False,
        }
    assert device.allocations == []
    assert device.registrations == []


def test_paths_that_copy_run_by_run_are_given_fewer_blocks(
    device: PlayedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MOST_COPIES", 1)
    by_path = {one.path: one.figures[0] for one in measured(device)}
    assert {path: figure.note for path, figure in by_path.items()} == {
        "batch": "2 blocks only",
        "copies": "2 blocks only",
        "kernel": "",
    }
    assert by_path["copies"].value == pytest.approx(2 * SMALL.payload_bytes / 0.5 / 1e9)


def test_what_does_not_fit_is_left_out_with_the_reason(
    device: PlayedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(nbytes: int) -> None:
        raise DeviceError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")

    device.has_batch_copies = False
    assert ["the driver has none" in one.left_out for one in measured(device)] == [True, False, False]
    monkeypatch.setattr(device, "allocate", full)
    compared = measured(device)
    assert {one.left_out for one in compared} == {"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"}
    assert not any(one.figures for one in compared)


def figure(name: str, ratio: float, bound: float, note: str = "") -> Figure:
    return Figure(
        name=name, value=50 * ratio, unit="GB/s", raw=50.0, goal=Goal(bound, at_least=True), note=note
    )


def test_the_table_is_markdown_with_what_was_left_out_below() -> None:
    kernel = Comparison(
        "8B",
        "tokens",
        64,
        "kernel",
        [figure("D2H", 0.95, 0.9), figure("H2D", 0.85, 0.9), figure("both", 0.85, 0.85)],
    )
    few = Comparison(
        "8B",
        "tokens",
        64,
        "copies",
        [figure(name, 0.1, 0.9, "2 blocks only") for name in ("D2H", "H2D", "both")],
    )
    none = Comparison("8B", "tokens", 64, "batch", (), "the driver has\nnone")
    losses = [
        Figure(name="kernel", value=0.031, unit="", goal=Goal(0.05, at_least=False)),
        Figure(name="copies", value=0.081, unit="", goal=Goal(0.05, at_least=False)),
    ]
    assert list(tables([none, few, kernel], losses, ["batch: none"])) == [
        "| cache | first in a page | blocks | way | raw, GB/s | batch | copies | kernel | goal |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 8B | tokens | 64 | D2H | 50 |  | 0.10 | **0.95** | 0.9 |",
        "| 8B | tokens | 64 | H2D | 50 |  | 0.10 | 0.85 | 0.9 |",
        "| 8B | tokens | 64 | both | 50 |  | 0.10 | **0.85** | 0.85 |",
        "",
        "| path | a matrix product takes longer by | goal |",
        "|---|---|---|",
        "| kernel | **3.1 %** | at most 5 % |",
        "| copies | 8.1 % | at most 5 % |",
        "",
        "- batch: the driver has none",
        "- copies, 8B, tokens first, of 64 blocks: 2 blocks only",
        "- batch: none",
    ]


def test_the_command_prints_the_table_and_says_that_torch_is_missing(
    device: PlayedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("kvferry.cuda.choice.kept_kernels", lambda architecture: b"cubin")
    result = run("--quick", "--cache", "8B", "--blocks", "4", "--order", "heads", "--order", "tokens")
    assert result.exit_code == 0, result.output
    assert "GPU 0 (sm_90), 16 thread blocks" in result.stdout
    assert "mean little" in result.stdout
    assert result.stdout.count("| 8B | heads | 4 |") == 3
    assert result.stdout.count("| 8B | tokens | 4 |") == 3
    assert "- the slowdown of a model is left out: torch is not installed" in result.stdout


@pytest.mark.parametrize("path", PATHS)
def test_what_a_model_loses(device: PlayedDevice, path: str) -> None:
    beside_copies: list[bool] = []

    def work(beside: Callable[[], None]) -> float:
        before = len(device.calls)
        beside()
        beside_copies.append(len(device.calls) > before)
        assert device.is_idle()
        return 1.04 if beside_copies[-1] else 1.0

    found = matmul.slowdown(device, paths(device), path, work, 3)  # type: ignore[arg-type]
    assert beside_copies == [False, *[False, True] * 3]
    assert found.value == pytest.approx(0.04)
    assert found.is_met
    assert device.allocations == []
    assert device.registrations == []


def test_a_path_that_is_not_there_loses_nothing(device: PlayedDevice) -> None:
    device.has_batch_copies = False
    with pytest.raises(BenchSkipped, match=r"batch: .*the driver has none"):
        matmul.slowdown(device, paths(device), "batch", lambda beside: 1.0, 1)
