"""What the demo found out: a table for people, and what is wrong with it, if anything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import click

from kvferry.connector.cli.output import table
from kvferry.engines.vllm.demo.ask import Answer

__all__ = ["DISK_GOAL", "DRAM_GOAL", "Row", "Run", "tell"]

DRAM_GOAL = 10.0
DISK_GOAL = 5.0
QUESTION_WIDTH = 34


def tell(number: int, answer: Answer) -> Answer:
    """Print a line about an answer as soon as it is there, and return it."""
    said = textwrap.shorten(answer.text, 64, placeholder=" ...")
    reused = f"{answer.reused_tokens} of {answer.prompt_tokens} tokens reused"
    click.echo(f"   {number}  first token after {answer.first_token_s:.2f} s, {reused}: {said}")
    return answer


@dataclass(frozen=True)
class Row:
    """One question's answers."""

    question: str
    alone: Answer
    """By vLLM without a connector and without any cache."""
    dram: Answer
    """With kvferry, the document being in DRAM."""
    restarted: Answer
    """With kvferry, after the engine was killed and started again."""


@dataclass(frozen=True)
class Run:
    """Everything one run of the demo measured.

    Args:
        first: The first question's answer when kvferry had nothing stored yet.
        rows: One per question.
        judges_times: Whether a missed goal is a failure.
    """

    first: Answer
    rows: tuple[Row, ...]
    judges_times: bool = True

    @property
    def cold_s(self) -> float:
        """The first question's time to first token when all of the prompt was computed.

        The smaller of two: by vLLM alone, and by the engine that also saved the KV. So a slow moment of
        the machine does not flatter kvferry.
        """
        return min(self.rows[0].alone.first_token_s, self.first.first_token_s)

    @property
    def dram_ratio(self) -> float:
        """Times sooner that the first question's first token comes from DRAM."""
        return self.cold_s / self.rows[0].dram.first_token_s

    @property
    def disk_ratio(self) -> float:
        """Times sooner that the first question's first token comes after the restart."""
        return self.cold_s / self.rows[0].restarted.first_token_s

    def lines(self) -> Iterator[str]:
        """Yield the table and the ratios."""
        lines = [("question", "answered by", "first token", "tokens reused", "bytes moved", "same answer")]
        for number, row in enumerate(self.rows, start=1):
            first = [("kvferry, still empty", self.first)] if number == 1 else []
            by_kvferry = [
                *first,
                (f"kvferry, from {_source(row.dram)}", row.dram),
                (f"restarted, from {_source(row.restarted)}", row.restarted),
            ]
            lines.append((_short(f"{number} {row.question}"), "vLLM alone", *_cells(row.alone), ""))
            for who, answer in by_kvferry:
                lines.append(("", who, *_cells(answer), "yes" if answer.tokens == row.alone.tokens else "NO"))
        yield from table(lines, right=range(2, 5))
        yield ""
        yield f"question 1, computed / from DRAM: {self.dram_ratio:5.1f} times sooner (goal {DRAM_GOAL:.0f})"
        yield f"question 1, computed / restarted: {self.disk_ratio:5.1f} times sooner (goal {DISK_GOAL:.0f})"

    def problems(self) -> Iterator[str]:
        """Yield a line for everything that is not as it must be."""
        if self.first.reused_tokens:
            yield f"the first question reused {self.first.reused_tokens} tokens, so it was not cold"
        if self.first.tokens != self.rows[0].alone.tokens:
            yield _difference("question 1, with nothing stored yet", self.first, self.rows[0].alone)
        for number, row in enumerate(self.rows, start=1):
            for when, answer in (("from DRAM", row.dram), ("after the restart", row.restarted)):
                if not answer.reused_tokens or not answer.engine_bytes:
                    yield f"question {number} {when} reused nothing"
                if answer.tokens != row.alone.tokens:
                    yield _difference(f"question {number} {when}", answer, row.alone)
        if not self.rows[0].restarted.disk_bytes:
            yield "question 1 after the restart read nothing from disk"
        if self.judges_times:
            if self.dram_ratio < DRAM_GOAL:
                yield f"computed / from DRAM is {self.dram_ratio:.1f}, below the goal of {DRAM_GOAL:.0f}"
            if self.disk_ratio < DISK_GOAL:
                yield f"computed / restarted is {self.disk_ratio:.1f}, below the goal of {DISK_GOAL:.0f}"


def _cells(answer: Answer) -> tuple[str, str, str]:
    """Return time, tokens and bytes of an answer."""
    moved = answer.disk_bytes or answer.engine_bytes
    return (
        f"{answer.first_token_s:.2f} s",
        f"{answer.reused_tokens}/{answer.prompt_tokens}",
        f"{moved / 1e6:.1f} MB" if moved else "-",
    )


def _source(answer: Answer) -> str:
    return "disk" if answer.disk_bytes else "DRAM"


def _short(text: str) -> str:
    return textwrap.shorten(text, QUESTION_WIDTH, placeholder=" ...")


def _difference(what: str, answer: Answer, expected: Answer) -> str:
    return f"{what}: the answer {answer.text!r} is not the uncached one, {expected.text!r}"
