"""What engine is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

from standin.model import HashModel, Model

__all__ = ["EngineOptions", "llm_args"]


@dataclass(frozen=True)
class EngineOptions:
    """Everything in which engines differ that a connector meets."""

    model: Model = field(default_factory=HashModel)
    ranks: int = 1
    page_tokens: int = 4
    num_pages: int = 64
    is_v2: bool = False
    """Whether the second cache manager has the pages; only in the dialect ``v2``."""
    overlap: bool = False
    is_batched: bool = False
    """Whether all queries of an iteration come before all allocations."""
    chunk_tokens: int = 0
    """Most tokens of a prompt in one pass; 0: all."""
    max_batch: int = 8
    reuse: bool = True
    partial_reuse: bool = False
    """Whether a device match may end inside a page. Played as a position, without the bytes: a connector declines."""
    honour: Callable[[int, int], int] | None = None
    """How many of the offered tokens a request takes, by its id and the offer. The second cache manager only."""
    tells_finish_of_failed: bool = True
    """Whether ``request_finished`` is called for requests that an error ended; newer releases don't."""
    checks_bytes: bool = True
    """Whether bytes are held against the model's before they are read; else they only change the output."""
    query_limit_s: float = 2.0
    poll_limit_s: float = 2.0
    """Longest call of ``get_finished``."""

    def heads(self, rank: int) -> range:
        """Return a rank's KV heads: its share, or a copy of one where there are fewer heads than ranks."""
        count = max(1, self.model.kv_heads // self.ranks)
        first = rank * self.model.kv_heads // self.ranks
        return range(first, first + count)


def llm_args(options: EngineOptions, folder: str = "", **changes: object) -> SimpleNamespace:
    """Return the engine's arguments, as far as a connector may look at them."""
    cache = SimpleNamespace(
        tokens_per_block=options.page_tokens,
        dtype="auto",
        enable_block_reuse=options.reuse,
        enable_partial_reuse=options.partial_reuse,
        host_cache_size=None,
        use_kv_cache_manager_v2=options.is_v2,
    )
    arguments = dict(
        model=folder,
        tensor_parallel_size=options.ranks,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        enable_attention_dp=False,
        max_beam_width=1,
        speculative_config=None,
        dtype="auto",
        quant_config=None,
        kv_cache_config=cache,
        kv_connector_config=SimpleNamespace(server_url=None),
    )
    return SimpleNamespace(**{**arguments, **changes})
