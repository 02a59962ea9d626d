"""Random requests, cancels, replays, evictions, faults, on engines of every kind: right answers, and nothing is lost.

``TRTLLM_STEPS`` in the environment sets how many random steps there are, of which most are several iterations of the
engine's loop. Every rule of the contract is watched all the time, by the stand-in; what is asserted here holds at the
end: every answer is that of an engine without a cache, and every page is free again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from copies import Kind
from ferry import CONFIG, Ferry
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from standin.executor import Engine
from standin.failures import ContractBroken
from standin.interface import Dialect
from standin.model import Scope
from standin.options import EngineOptions
from standin.requests import Phase

STEPS = int(os.environ.get("TRTLLM_STEPS", "10000"))
STEPS_EACH = 100
"""Of one engine."""

LINES: list[tuple[Dialect, bool]] = [
    ("1.1", False),
    ("1.2", False),
    ("1.3", False),
    ("v2", False),
    ("v2", True),
]
FAMILIES = [[family * 100 + index for index in range(40)] for family in range(4)]
"""Prompts of a family begin alike."""
SCOPES = [Scope(), Scope(), Scope(salt="tenant"), Scope(lora=1), Scope(images=((3, 5, bytes(range(32))),))]
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["load", "save"])
TURNS = [
    *["submit"] * 8,
    *["step"] * 3,
    *["run_and_evict"] * 2,
    *("evict", "cancel", "replay", "slow_down", "speed_up", "spoil"),
    "fail_a_pass",
]


class EngineMachine(RuleBasedStateMachine):
    """One engine with kvferry, whose arena is small and which a disk stands behind."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp(prefix="kvferry-trtllm-"))
        self._monkeypatch = pytest.MonkeyPatch()
        self._ferry = Ferry(self._folder, self._monkeypatch)
        self._copies = self._ferry.copies
        self._fails_next = False
        self._history: list[str] = []
        self._has_failed = False

    @initialize(
        line=st.sampled_from(LINES),
        ranks=st.sampled_from([1, 2, 4]),
        overlap=st.booleans(),
        is_batched=st.booleans(),
        chunk_tokens=st.sampled_from([0, 4, 6]),
        num_pages=st.sampled_from([24, 40, 96]),
        sync_bytes=st.sampled_from([1, 2000, 1000000]),
        has_disk=st.booleans(),
        block_tokens=st.sampled_from([4, 8]),
        tells=st.booleans(),
        honour=st.sampled_from([0, 4, 8, 1000]),
        partial_reuse=st.sampled_from([False, False, True]),
    )
    def start(
        self,
        line: tuple[Dialect, bool],
        ranks: int,
        overlap: bool,
        is_batched: bool,
        chunk_tokens: int,
        num_pages: int,
        sync_bytes: int,
        has_disk: bool,
        block_tokens: int,
        tells: bool,
        honour: int,
        partial_reuse: bool,
    ) -> None:
        dialect, is_v2 = line
        played = EngineOptions(
            ranks=ranks,
            is_v2=is_v2,
            overlap=overlap,
            is_batched=is_batched,
            chunk_tokens=chunk_tokens,
            num_pages=num_pages,
            honour=lambda request_id, offered: min(offered, honour) if request_id % 2 else offered,
            tells_finish_of_failed=tells,
            partial_reuse=partial_reuse,
        )
        config = CONFIG.replace("4MiB", "160KiB").replace(
            "block_tokens = {page_tokens}", f"block_tokens = {block_tokens}"
        )
        config = config.replace("[trtllm.", f"[trtllm]\nsync_bytes = {sync_bytes}\n[trtllm.")
        if has_disk:
            disk = f'[[tiers]]\ntype = "disk"\npath = "{self._folder / "disk"}"\ncapacity = "4MiB"\nask = "always"\n'
            config = config.replace("[trtllm]", f"{disk}[trtllm]")
        self.engine = self._ferry.start(played, dialect=dialect, config=config)

    @rule(data=st.data(), turn=st.sampled_from(TURNS))
    def turn(self, data: st.DataObject, turn: str) -> None:
        """One rule for all turns: of several, hypothesis leaves some out of most runs."""
        self._history.append(turn)
        try:
            getattr(self, f"_{turn}")(data)
        except (ContractBroken, AssertionError) as error:
            # Threads don't fail twice in the same way: what hypothesis tells after another run may be of no use.
            self._has_failed = True
            print(f"{error}\n{self.engine.options}\n{self._history}\n{self.engine.transcript.tail()}")
            raise

    def _submit(self, data: st.DataObject) -> None:
        family = data.draw(st.sampled_from(FAMILIES))
        tail = data.draw(st.integers(0, 3))
        prompt = family[: data.draw(st.integers(1, 30))] + [900 + tail] * tail
        self.engine.submit(prompt, data.draw(st.integers(1, 9)), data.draw(st.sampled_from(SCOPES)))
        self._step(data)

    def _step(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(0, 5))):
            self.engine.step()

    def _run_and_evict(self, data: st.DataObject) -> None:
        """What is asked for again comes from the cache then."""
        self.engine.run()
        self._evict(data)

    def _evict(self, data: st.DataObject) -> None:
        self.engine.allocator.evict(data.draw(st.integers(1, 96)))

    def _cancel(self, data: st.DataObject) -> None:
        for request_id in self._chosen(data):
            self.engine.cancel(request_id)
        self._step(data)

    def _replay(self, data: st.DataObject) -> None:
        for request_id in self._chosen(data):
            if self.engine.options.is_v2:
                self.engine.replay(request_id)
        self._step(data)

    def _chosen(self, data: st.DataObject) -> list[int]:
        """Return a request that is not over, or none. What is drawn may not hang on how fast copies are."""
        drawn = data.draw(st.integers(0, 99))
        requests = self._open()
        return [requests[drawn % len(requests)]] if requests else []

    def _slow_down(self, data: st.DataObject) -> None:
        seconds = data.draw(st.integers(1, 15)) / 1000
        self._copies.hold(data.draw(KINDS), data.draw(st.integers(0, 3)), seconds=seconds)

    def _speed_up(self, data: st.DataObject) -> None:
        self._copies.release(data.draw(KINDS))

    def _spoil(self, data: st.DataObject) -> None:
        self._copies.spoil(data.draw(KINDS), data.draw(st.integers(1, 3)))

    def _fail_a_pass(self, data: st.DataObject) -> None:
        hook = data.draw(st.sampled_from(["wait_for_layer_load", "save_kv_layer", "wait_for_save"]))
        if self._fails_next:
            return
        worker = self.engine.workers[-1]
        self._fails_next = True

        def raising(*_: object) -> None:
            delattr(worker, hook)
            self._fails_next = False
            raise RuntimeError("of the forward pass")

        setattr(worker, hook, raising)

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine") and self.engine.died is None and not self._has_failed:
                self._end()
        finally:
            self._ferry.close()
            self._monkeypatch.undo()
            shutil.rmtree(self._folder)

    def _end(self) -> None:
        engine = self.engine
        self._copies.release("load")
        self._copies.release("save")
        engine.run()
        for request_id, outcome in engine.outcomes.items():
            expected = engine.expected(request_id)
            assert outcome.tokens == expected[: len(outcome.tokens)]
            assert outcome.status != "finished" or len(outcome.tokens) == len(expected)
        engine.allocator.evict(engine.options.num_pages)
        assert engine.allocator.available == engine.options.num_pages

    def _open(self) -> list[int]:
        return [
            one.id for one in self.engine.sequences.values() if one.phase not in (Phase.SAVING, Phase.OVER)
        ]


EngineMachine.TestCase.settings = settings(
    max_examples=max(1, STEPS // STEPS_EACH),
    stateful_step_count=STEPS_EACH,
    deadline=None,
    # Copies are made on threads: a shorter run seldom fails in the same way.
    phases=[Phases.generate],
    suppress_health_check=list(HealthCheck),
)
TestRandom = EngineMachine.TestCase
