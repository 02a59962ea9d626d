"""The measurements run and yield figures; how large the figures are is no matter for a unit test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.measure import interleaved, percentile
from kvferry.connector.bench.run import all_cases, run_case
from kvferry.connector.cli import main
from kvferry.connector.registry import PluginRegistry

CORE = {"host", "disk", "lookup", "hashing", "admission"}


@pytest.mark.parametrize("case", sorted(CORE))
def test_every_case_of_the_core_yields_figures(case: str, tmp_path: Path) -> None:
    parts: list[float] = []
    (chosen,) = [
        one for one in all_cases(PluginRegistry(use_entry_points=case == "disk")) if one.name == case
    ]
    result = run_case(chosen, True, str(tmp_path), parts.append)
    assert result.skipped == ""
    assert all(figure.value > 0 and figure.unit for figure in result.figures)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    assert list((tmp_path / case).iterdir()) == []


def test_without_the_disk_plugin_the_case_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvferry.connector.bench.disk.PluginRegistry", lambda: PluginRegistry(use_entry_points=False)
    )
    (disk,) = [one for one in all_cases(PluginRegistry(use_entry_points=False)) if one.name == "disk"]
    result = run_case(disk, True, str(tmp_path), lambda part: None)
    assert "there is no tier type 'disk'" in result.skipped
    assert result.figures == ()


def failing(error: Exception) -> BenchCase:
    def run(context: BenchContext) -> Sequence[Figure]:
        raise error

    return BenchCase("failing", "fails", run)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BenchSkipped("no GPU"), "no GPU"),
        (OSError(28, "No space left on device"), "No space left"),
        (ZeroDivisionError("division by zero"), "failed: ZeroDivisionError"),
    ],
)
def test_a_case_that_cannot_run_is_a_line_not_a_crash(error: Exception, text: str, tmp_path: Path) -> None:
    assert text in run_case(failing(error), True, str(tmp_path), lambda part: None).skipped


# --- figures ------------------------------------------------------------------------------------------


def test_a_goal_is_about_the_ratio_where_there_is_a_limit() -> None:
    figure = Figure(name="x", value=9.0, unit="GB/s", raw=10.0, goal=Goal(0.8, at_least=True))
    assert figure.ratio == 0.9
    assert figure.is_met is True


def test_a_goal_is_about_the_value_where_there_is_no_limit() -> None:
    assert Figure(name="x", value=2.0, unit="us", goal=Goal(1.0, at_least=False)).is_met is False
    assert Figure(name="x", value=0.5, unit="us", goal=Goal(1.0, at_least=False)).is_met is True


def test_without_a_goal_there_is_nothing_to_meet() -> None:
    assert Figure(name="x", value=2.0, unit="us").is_met is None


def test_sides_take_turns_and_change_who_goes_first() -> None:
    calls: list[str] = []
    sides = {
        "a": lambda repetition: calls.append(f"a{repetition}"),
        "b": lambda repetition: calls.append(f"b{repetition}"),
    }
    medians = interleaved(sides, 3, lambda part: None)
    assert calls == ["a-1", "b-1", "b0", "a0", "a1", "b1", "b2", "a2"]
    assert set(medians) == {"a", "b"}


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (99, 99), (100, 100)])
def test_percentiles(percent: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == value


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose case stands for the core's, so that the command is quick."""
    figure = Figure(
        name="speed of light", value=1.0, unit="c", raw=2.0, raw_name="limit", goal=Goal(0.8, at_least=True)
    )
    case = BenchCase("light", "how fast light is", lambda context: [figure])
    monkeypatch.setattr(
        "kvferry.connector.bench.run.all_cases", lambda registry: [case, failing(BenchSkipped("no GPU"))]
    )


@pytest.mark.usefixtures("plugin")
def test_bench_prints_value_limit_ratio_and_goal(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "--path", str(tmp_path)])
    assert result.exit_code == 0
    assert "speed of light  1 c  limit 2  0.50  goal >= 0.8 missed" in result.stdout
    assert "skipped: no GPU" in result.stdout
    assert "0 of 1 goals met" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("plugin")
def test_bench_speaks_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "light", "--json", "--path", str(tmp_path)])
    (case,) = json.loads(result.stdout)["cases"]
    (figure,) = case["figures"]
    assert (figure["ratio"], figure["is_met"]) == (0.5, False)


@pytest.mark.usefixtures("plugin")
def test_bench_names_the_nearest_case() -> None:
    result = CliRunner().invoke(main, ["bench", "ligth"])
    assert result.exit_code == 2
    assert "did you mean 'light'" in result.stderr
