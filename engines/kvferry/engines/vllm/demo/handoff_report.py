"""What the demo found out about handoffs: a table for people, and what is wrong with it, if anything."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from kvferry.connector.cli.output import table
from kvferry.engines.vllm.demo.ask import Answer

__all__ = ["Handed", "HandoffRow", "HandoffRun"]

QUESTION_WIDTH = 32
HEADINGS = (
    *("question", "answered by", "first token", "reused", "taken", "transfer", "bytes", "GB/s"),
    "same answer",
)


@dataclass(frozen=True)
class Handed:
    """An answer about a prompt that another engine read, and what the decode engine took from that one for it."""

    answer: Answer
    """Of its prompt, ``reused_tokens`` are those that the prefill engine had cached: so vLLM reports it."""
    tokens: float
    """Whose KV was taken."""
    moved_bytes: float
    transfer_s: float
    """From the decode engine's first message to the last check."""


@dataclass(frozen=True)
class HandoffRow:
    """One question's answers, both through the router."""

    question: str
    alone: Answer
    """By the decode engine, which computed everything."""
    handed: Handed
    """By both engines."""


@dataclass(frozen=True)
class HandoffRun:
    """Everything that one run measured.

    Args:
        rows: One per question.
        transport: How the pages were read, in the decode engine's words; empty where it did not say.
        failures: Why handoffs failed, in the same words.
    """

    rows: tuple[HandoffRow, ...]
    transport: str
    failures: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the table and what follows from it."""
        lines = [HEADINGS]
        for number, row in enumerate(self.rows, start=1):
            question = textwrap.shorten(f"{number} {row.question}", QUESTION_WIDTH, placeholder=" ...")
            alone = ("decode alone", _seconds(row.alone.first_token_s))
            lines.append((question, *alone, *[""] * (len(HEADINGS) - 3)))
            lines.append(("", "prefill and decode", *_cells(row)))
        yield from table(lines, right=range(2, 8))
        yield ""
        yield "reused: tokens that the prefill engine had in its cache; taken: those whose KV the decode engine got"
        yield f"pages were read through {self.transport or 'a transport that the log does not name'}"
        for failure in self.failures:
            yield f"a handoff failed, so the decode engine computed the prompt: {failure}"
        shares = [row.handed.transfer_s / row.handed.answer.first_token_s for row in self.rows]
        yield f"the transfer is {statistics.median(shares):.1%} of the time to the first token (median)"

    def problems(self) -> Iterator[str]:
        """Yield a line for everything that is not as it must be."""
        for number, row in enumerate(self.rows, start=1):
            answer, expected = row.handed.answer, row.alone
            if expected.reused_tokens:
                yield f"question {number} alone reused {expected.reused_tokens} tokens, so it was not computed"
            if not row.handed.moved_bytes or not row.handed.tokens:
                yield f"question {number}: nothing was handed over"
            if answer.tokens != expected.tokens:
                yield (
                    f"question {number}: the answer {answer.text!r} is not that of the decode engine alone, "
                    f"{expected.text!r}"
                )


def _cells(row: HandoffRow) -> tuple[str, ...]:
    handed, answer = row.handed, row.handed.answer
    return (
        _seconds(answer.first_token_s),
        f"{answer.reused_tokens}/{answer.prompt_tokens}",
        f"{handed.tokens:.0f}/{answer.prompt_tokens}",
        _seconds(handed.transfer_s) if handed.transfer_s else "-",
        f"{handed.moved_bytes / 1e6:.1f} MB",
        f"{handed.moved_bytes / handed.transfer_s / 1e9:.2f}" if handed.transfer_s else "-",
        "yes" if answer.tokens == row.alone.tokens else "NO",
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"
