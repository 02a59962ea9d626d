"""How fast the engine computes prompts, measured while it serves.

The adapter tells when a step was planned, with how many prompt tokens, and when its result was taken in.
Engines may plan the next step before the last one is through, but they run steps in order. So a step
took the time from its planning, or from the end of the step before it if that was later, until its own
end. Time in which the engine had nothing to do is in no step.

A step with few prompt tokens tells how long decoding takes, and does not count. Of the last steps that
count, the median by tokens is the rate: a step that was held up, by compilation or by somebody else on
the machine, does not move it.

Owned by the engine's scheduler thread. ``now`` is monotonic seconds.
"""

from __future__ import annotations

import itertools
from collections import deque

__all__ = ["PrefillRate"]

MIN_TOKENS = 128
"""Prompt tokens a step must have to count."""
MIN_STEPS = 4
"""Steps that must have counted before the rate is known."""
_KEPT_STEPS = 32
_MAX_STEPS_UNDER_WAY = 8
"""More steps than an engine plans ahead: some ends were not told. All are forgotten then."""
_SETTLED_S = 2.0
"""After so long without a plan or an end nothing is under way; ends that are missing will not come."""


class PrefillRate:
    """Measures seconds per prompt token.

    Args:
        min_tokens: Prompt tokens a step must have to count.
    """

    def __init__(self, min_tokens: int = MIN_TOKENS) -> None:
        self._min_tokens = min_tokens
        self._under_way: deque[tuple[int, float]] = deque()
        self._last_end: float | None = None
        self._heard = 0.0
        self._counted: deque[tuple[float, int]] = deque(maxlen=_KEPT_STEPS)
        self._token_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens computed in a second of prefill; None until enough was seen."""
        return 1 / self._token_s if self._token_s else None

    def seconds(self, tokens: int) -> float | None:
        """Return in how many seconds the engine computes ``tokens``; None until enough was seen."""
        return tokens * self._token_s if self._token_s else None

    def step_planned(self, prompt_tokens: int, now: float) -> None:
        """Note that a step was planned, in the order in which steps run.

        Args:
            prompt_tokens: Tokens of it that are not generated in it, of all requests.
            now: The time.
        """
        if len(self._under_way) >= _MAX_STEPS_UNDER_WAY or now - self._heard > _SETTLED_S:
            self._under_way.clear()
        self._under_way.append((prompt_tokens, now))
        self._heard = now

    def step_ended(self, now: float) -> None:
        """Note that the result of the oldest step under way was taken in."""
        self._heard = now
        if not self._under_way:
            return
        tokens, planned = self._under_way.popleft()
        began = planned if self._last_end is None else max(planned, self._last_end)
        self._last_end = now
        if tokens >= self._min_tokens and now > began:
            self._counted.append(((now - began) / tokens, tokens))
            self._token_s = self._median() if len(self._counted) >= MIN_STEPS else None

    def _median(self) -> float:
        """Return the seconds per token that half of the counted tokens did not exceed."""
        ordered = sorted(self._counted)
        half = sum(tokens for _, tokens in ordered) / 2
        below = itertools.accumulate(tokens for _, tokens in ordered)
        return next(token_s for (token_s, _), tokens in zip(ordered, below, strict=True) if tokens >= half)
