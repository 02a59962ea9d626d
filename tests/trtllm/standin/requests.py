"""Requests: what a connector sees of one, and what the engine itself knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from standin.model import Scope, prefix_digests

__all__ = ["LlmRequest", "Phase", "Sequence", "State"]


class State(IntEnum):
    """As far as a connector may look at it."""

    CONTEXT_INIT = 2
    GENERATION_IN_PROGRESS = 5
    GENERATION_COMPLETE = 14
    DISAGG_GENERATION_TRANS_IN_PROGRESS = 9
    DISAGG_CONTEXT_TRANS_IN_PROGRESS = 21


class LlmRequest:
    """The bound attributes of the engine's request and nothing else: nobody can hang ``py_`` fields on it."""

    __slots__ = (
        "_tokens",
        "cache_salt",
        "cache_salt_id",
        "context_chunk_size",
        "context_current_position",
        "is_context_only_request",
        "is_dummy_request",
        "is_first_context_chunk",
        "is_generation_only_request",
        "lora_task_id",
        "max_new_tokens",
        "multimodal_hashes",
        "multimodal_lengths",
        "multimodal_positions",
        "num_connector_matched_tokens",
        "prepopulated_prompt_len",
        "prompt_len",
        "py_num_connector_matched_tokens",
        "request_id",
        "state",
    )

    cache_salt: str | None
    """In release lines with a text for it; ``cache_salt_id`` in the others."""
    cache_salt_id: int | None
    num_connector_matched_tokens: int
    """How much of an offer was honoured, in the newer release lines, under one or the other name."""
    py_num_connector_matched_tokens: int

    def __init__(self, request_id: int, prompt: list[int], max_new_tokens: int, scope: Scope) -> None:
        self.request_id = request_id
        self._tokens = list(prompt)
        self.prompt_len = len(prompt)
        self.max_new_tokens = max_new_tokens
        self.state = State.CONTEXT_INIT
        self.context_current_position = 0
        self.context_chunk_size = len(prompt)
        self.is_first_context_chunk = True
        self.prepopulated_prompt_len = 0
        self.lora_task_id = scope.lora
        words = [
            [int.from_bytes(digest[at : at + 4], "big", signed=True) for at in range(0, 32, 4)]
            for _, _, digest in scope.images
        ]
        self.multimodal_hashes: Any = words or None
        self.multimodal_positions: Any = [start for start, _, _ in scope.images] or None
        self.multimodal_lengths: Any = [length for _, length, _ in scope.images] or None
        self.is_context_only_request = False
        self.is_generation_only_request = False
        self.is_dummy_request = False

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self._tokens)

    def get_num_tokens(self, beam: int) -> int:
        assert beam == 0
        return len(self._tokens)

    @property
    def context_remaining_length(self) -> int:
        return self.prompt_len - self.context_current_position

    def priority(self) -> float:
        return 0.5

    def append(self, token: int) -> None:
        """What the host learned that was sampled."""
        self._tokens.append(token)


class Phase(IntEnum):
    """Where a request is."""

    WAITING = 0
    CONTEXT = 1
    LOADING = 2
    GENERATION = 3
    SAVING = 4
    OVER = 5


@dataclass
class Sequence:
    """A request as the engine knows it."""

    request: LlmRequest
    scope: Scope
    tokens: list[int]
    """Those that the device knows; the overlap loop tells the host one step later."""
    wanted: int
    """Tokens to generate."""
    phase: Phase = Phase.WAITING
    pages: list[int] = field(default_factory=list)
    local: int = 0
    """Tokens of reused pages."""
    computed: int = 0
    """Tokens with valid KV, those promised by the connector included."""
    honoured: int = 0
    is_async: bool = False
    was_reported: bool = False
    pages_reported: int = 0
    tokens_reported: int = 0
    generated: list[int] = field(default_factory=list)
    """What the host knows of the answer."""
    sampled: int = 0
    """How many the device sampled."""
    is_cancelled: bool = False
    wants_replay: bool = False
    _digests: list[bytes] = field(default_factory=list)

    @property
    def id(self) -> int:
        return self.request.request_id

    @property
    def is_active(self) -> bool:
        return self.phase in (Phase.CONTEXT, Phase.LOADING, Phase.GENERATION)

    def digests(self) -> list[bytes]:
        """Return the digest of each prefix of what the device knows."""
        if len(self._digests) < len(self.tokens):
            self._digests = prefix_digests(self.scope, self.tokens)
        return self._digests
