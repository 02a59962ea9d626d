"""The demo's judgement: every way in which a run can be wrong is told, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvferry.engines.vllm.demo.ask import Answer
from kvferry.engines.vllm.demo.report import Row, Run

COLD = Answer("Paris.", (3, 1, 4), 6.0, 1700, 0)
DRAM = Answer("Paris.", (3, 1, 4), 0.3, 1700, 1664, engine_bytes=76_677_120)
DISK = replace(DRAM, first_token_s=0.4, disk_bytes=76_677_120)
WRONG = "question 1 from DRAM: the answer 'Rome.' is not the uncached one, 'Paris.'"


def run(alone: Answer = COLD, dram: Answer = DRAM, restarted: Answer = DISK, first: Answer = COLD) -> Run:
    return Run(first, (Row("What is the capital of France?", alone, dram, restarted),))


def test_a_good_run_has_no_problems() -> None:
    assert list(run().problems()) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (run(dram=replace(DRAM, tokens=(3, 1, 5), text="Rome.")), WRONG),
        (run(restarted=replace(DISK, tokens=())), "question 1 after the restart: the answer"),
        (run(first=replace(COLD, tokens=(9,))), "question 1, with nothing stored yet: the answer"),
        (run(first=replace(COLD, reused_tokens=128)), "the first question reused 128 tokens"),
        (run(dram=replace(DRAM, reused_tokens=0)), "question 1 from DRAM reused nothing"),
        (run(dram=replace(DRAM, engine_bytes=0)), "question 1 from DRAM reused nothing"),
        (run(restarted=replace(DISK, disk_bytes=0)), "question 1 after the restart read nothing from disk"),
        (run(dram=replace(DRAM, first_token_s=0.61)), "computed / from DRAM is 9.8, below the goal of 10"),
        (
            run(restarted=replace(DISK, first_token_s=1.21)),
            "computed / restarted is 5.0, below the goal of 5",
        ),
    ],
)
def test_what_is_wrong_is_told(bad: Run, problem: str) -> None:
    (told,) = bad.problems()
    assert told.startswith(problem)


def test_missed_goals_are_only_told_where_times_are_judged() -> None:
    slow = run(dram=replace(DRAM, first_token_s=6.0))
    assert list(slow.problems())
    assert list(replace(slow, judges_times=False).problems()) == []


def test_the_smaller_of_both_cold_times_is_compared() -> None:
    assert run(alone=replace(COLD, first_token_s=60.0)).dram_ratio == pytest.approx(20)
    assert run(first=replace(COLD, first_token_s=60.0)).dram_ratio == pytest.approx(20)


def test_the_table_shows_who_answered_when_and_with_what() -> None:
    text = " ".join(" ".join(run().lines()).split())
    assert "1 What is the capital of France? vLLM alone 6.00 s 0/1700 -" in text
    assert "kvferry, still empty 6.00 s 0/1700 - yes" in text
    assert "kvferry, from DRAM 0.30 s 1664/1700 76.7 MB yes" in text
    assert "restarted, from disk 0.40 s 1664/1700 76.7 MB yes" in text
    assert "computed / from DRAM: 20.0 times sooner" in text
    assert "computed / restarted: 15.0 times sooner" in text


def test_the_table_marks_a_different_answer() -> None:
    different = run(restarted=replace(DISK, tokens=(2,)))
    assert next(line for line in different.lines() if "restarted" in line).endswith("NO")


def test_the_table_tells_when_a_restarted_engine_found_it_in_dram() -> None:
    assert any("restarted, from DRAM" in line for line in run(restarted=DRAM).lines())


def test_a_long_question_is_cut() -> None:
    long = Run(COLD, (Row("Why " * 40, COLD, DRAM, DISK),))
    assert all(len(line) <= 110 for line in long.lines())
