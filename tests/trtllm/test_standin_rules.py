"""For each rule of the contract, a connector that breaks just this one is caught, by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from small_connector import StartSmall, Store
from standin.failures import ContractBroken, EngineDied
from standin.manager import Waiting
from standin.model import Scope
from standin.options import EngineOptions

PROMPT = list(range(100, 112))
"""Three whole pages."""
Both = tuple[type[Any], type[Any]]
Change = Callable[[type[Any], type[Any]], Both]


def leader_with(name: str, method: Callable[..., Any]) -> Change:
    """Return what replaces one of the leader's methods; it gets ``super()`` first."""

    def change(leader: type[Any], rank: type[Any]) -> Both:
        return _changed(leader, name, method), rank

    return change


def ranks_with(name: str, method: Callable[..., Any]) -> Change:
    """Return what replaces one of the ranks' methods; it gets ``super()`` first."""

    def change(leader: type[Any], rank: type[Any]) -> Both:
        return leader, _changed(rank, name, method)

    return change


def _changed(base: type[Any], name: str, method: Callable[..., Any]) -> type[Any]:
    changed = type(f"Broken{base.__name__}", (base,), {})
    setattr(changed, name, lambda self, *arguments: method(super(changed, self), self, *arguments))
    return changed


def filled(start: StartSmall, options: EngineOptions, prompt: list[int], **behaviour: Any) -> Store:
    """Return a store that has a prompt's pages."""
    store = Store(options.ranks, options.page_tokens, **behaviour)
    start(options, store=store).answer(prompt)
    return store


def slowly(base: Any, self: Any, *arguments: Any, name: str) -> Any:
    time.sleep(0.2)
    return getattr(base, name)(*arguments)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((3, False), "no number of whole pages"),
        ((-4, False), "no number of whole pages"),
        ((0, True), "nothing was offered, asynchronously"),
        ((12, False), "nothing is left to compute"),
        ((16, True), "nothing is left to compute"),
        (4, "not with tokens"),
        ((4.0, False), "not with tokens"),
        (None, "not with tokens"),
    ],
)
def test_a_wrong_offer(start_small: StartSmall, answer: Any, said: str) -> None:
    engine = start_small(change=leader_with("get_num_new_matched_tokens", lambda *_: answer))
    with pytest.raises(ContractBroken, match=said):
        engine.answer(PROMPT)


def test_an_offer_behind_a_partial_device_match(start_small: StartSmall) -> None:
    options = EngineOptions(partial_reuse=True)
    change = leader_with("get_num_new_matched_tokens", lambda base, self, request, computed: (4, False))
    engine = start_small(options, change=change)
    with pytest.raises(ContractBroken, match="which is inside a page"):
        engine.answer(PROMPT)


@pytest.mark.parametrize("name", ["get_num_new_matched_tokens", "get_finished"])
def test_a_call_that_stands_the_engine_still(start_small: StartSmall, name: str) -> None:
    options = EngineOptions(query_limit_s=0.1, poll_limit_s=0.1)
    make = leader_with if name == "get_num_new_matched_tokens" else ranks_with
    engine = start_small(options, change=make(name, lambda *both: slowly(*both, name=name)))
    with pytest.raises(ContractBroken, match=f"{name} took"):
        engine.answer(PROMPT)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [(None, "is None"), (b"", "cannot tell it from nothing"), ({}, "cannot tell"), (lambda: 1, "be pickled")],
)
def test_metadata_that_does_not_arrive(start_small: StartSmall, metadata: Any, said: str) -> None:
    engine = start_small(change=leader_with("build_connector_meta", lambda *_: metadata))
    with pytest.raises(ContractBroken, match=said):
        engine.answer(PROMPT)


def test_every_rank_has_metadata_of_its_own(start_small: StartSmall) -> None:
    seen = []

    def bind(base: Any, self: Any, metadata: Any) -> None:
        seen.append(metadata)
        base.bind_connector_meta(metadata)

    start_small(EngineOptions(ranks=4), change=ranks_with("bind_connector_meta", bind)).answer(PROMPT, 1)
    assert len({id(metadata) for metadata in seen}) == len(seen) == 4


@pytest.mark.parametrize("is_v2", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize(
    ("page", "said"),
    [
        (lambda _: 0, r"page 0 of request 2 \(context, 4 tokens reused"),
        (lambda copies: copies[-1][0] + 1, r"page 2 of request 2 \("),
        (lambda _: 60, "page 60, which is free"),
    ],
    ids=["below computed", "beyond the offer", "nobody's"],
)
def test_a_write_where_no_load_is(
    start_small: StartSmall, is_v2: bool, page: Callable[[Any], int], said: str
) -> None:
    options = EngineOptions(is_v2=is_v2)
    store = filled(start_small, options, PROMPT)
    is_broken: list[bool] = []

    def load(base: Any, self: Any, copies: Any) -> None:
        base.load(copies)
        if is_broken:
            self.page(page(copies))[0].reshape(-1)[5] ^= 0xFF

    engine = start_small(options, store=store, change=ranks_with("load", load))
    engine.answer(PROMPT[:5])
    is_broken.append(True)
    with pytest.raises(ContractBroken, match=f"no load of its was under way: {said}"):
        engine.answer(PROMPT)


def test_a_write_between_the_pages(start_small: StartSmall) -> None:
    def stray(base: Any, self: Any, layer: int, stream: Any) -> None:
        self.layout.groups[0].regions[0].memory[3, -1] = 1

    with pytest.raises(ContractBroken, match="the room between pages"):
        start_small(EngineOptions(is_v2=True), change=ranks_with("save_kv_layer", stray))


def flipped(base: Any, self: Any, copies: Any) -> None:
    base.load(copies)
    if copies and self.rank == self.store.ranks - 1:
        self.page(copies[-1][0])[-1].reshape(-1)[-1] ^= 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_one_wrong_bit(start_small: StartSmall, ranks: int, is_async: bool) -> None:
    options = EngineOptions(ranks=ranks)
    store = filled(start_small, options, PROMPT, is_async=is_async)
    engine = start_small(options, store=store, change=ranks_with("load", flipped))
    with pytest.raises(
        ContractBroken, match=f"rank {ranks - 1}, layer 1: request 1 reads wrong bytes of 1 of 8"
    ):
        engine.answer(PROMPT)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_load_that_did_not_happen(start_small: StartSmall, is_async: bool) -> None:
    store = filled(start_small, EngineOptions(), PROMPT, is_async=is_async)
    engine = start_small(store=store, change=ranks_with("load", lambda *_: None))
    with pytest.raises(ContractBroken, match="reads wrong bytes of 8 of 8 loaded"):
        engine.answer(PROMPT)


def test_more_is_loaded_than_was_honoured(start_small: StartSmall) -> None:
    def allocated(base: Any, self: Any, request: Any, pages: list[int]) -> None:
        request.py_num_connector_matched_tokens = 8
        base.update_state_after_alloc(request, pages)

    options = EngineOptions(is_v2=True, honour=lambda *_: 4)
    store = filled(start_small, options, PROMPT)
    engine = start_small(options, store=store, change=leader_with("update_state_after_alloc", allocated))
    with pytest.raises(ContractBroken, match="no load of its was under way"):
        engine.answer(PROMPT)


def test_a_load_goes_on_after_it_was_reported(start_small: StartSmall) -> None:
    def finished(base: Any, self: Any, saving: list[int], loading: list[int]) -> Any:
        late = getattr(self, "late", [])
        for page in late:
            self.page(page)[0].reshape(-1)[0] ^= 1
        self.late = [copies[0][0] for left, _, copies in self.loading if left == 0]
        return base.get_finished(saving, loading)

    store = filled(start_small, EngineOptions(), PROMPT, is_async=True)
    engine = start_small(store=store, change=ranks_with("get_finished", finished))
    with pytest.raises(ContractBroken, match=r"no load of its was under way: page 0 of request 1 \("):
        engine.answer(PROMPT)


def test_pages_are_given_back_under_an_async_load(start_small: StartSmall) -> None:
    store = filled(start_small, EngineOptions(), PROMPT, is_async=True)
    engine = start_small(store=store, change=leader_with("request_finished", lambda *_: False))
    cancelled = engine.submit(PROMPT)
    engine.step()
    engine.cancel(cancelled)
    with pytest.raises(ContractBroken, match="no load of its was under way"):
        engine.run_until(lambda: engine.transcript.iteration > 6)


def test_a_cancelled_load_is_dropped_and_reported(start_small: StartSmall) -> None:
    """Its pages stay findable for others, by the first cache manager's rules."""

    was_cancelled: list[bool] = []

    def dropping(base: Any, self: Any, copies: Any) -> None:
        if not was_cancelled:
            base.load(copies)

    store = filled(start_small, EngineOptions(), PROMPT, is_async=True)
    engine = start_small(store=store, change=ranks_with("load", dropping))
    cancelled = engine.submit(PROMPT)
    engine.step()
    was_cancelled.append(True)
    engine.cancel(cancelled)
    with pytest.raises(ContractBroken, match="request 1 reads wrong bytes"):
        engine.run()


def test_pages_are_given_back_under_a_save(start_small: StartSmall) -> None:
    """The small connector saves before the next pass at the latest; so this is held back, too."""
    late = start_small(
        EngineOptions(reuse=False),
        store=Store(1, 4, save_polls=(3,)),
        change=lambda leader, rank: (
            _changed(leader, "request_finished", lambda *_: False),
            _changed(rank, "start_load_kv", _without_saving),
        ),
    )
    late.answer(PROMPT, 1)
    late.answer([1, 2, 3], 4)  # meanwhile the first one's pages are nobody's or somebody else's
    with pytest.raises(ContractBroken, match="reads wrong bytes"):
        late.answer(PROMPT, 1)


def _without_saving(base: Any, self: Any, stream: Any) -> None:
    saving, self.saving = self.saving, []
    base.start_load_kv(stream)
    self.saving = saving + self.saving


def test_a_page_is_saved_before_it_is_full(start_small: StartSmall) -> None:
    def eagerly(base: Any, self: Any, output: Any) -> Any:
        for data in (*output.new_requests, *output.cached_requests):
            if data.num_scheduled_tokens > 1:
                data.num_scheduled_tokens += 4
        return base.build_connector_meta(output)

    store = Store(1, 4, save_polls=(0,))
    options = EngineOptions(chunk_tokens=4, reuse=False)
    engine = start_small(options, store=store, change=leader_with("build_connector_meta", eagerly))
    engine.answer(PROMPT, 1)
    with pytest.raises(ContractBroken, match="reads wrong bytes"):
        engine.answer(PROMPT, 1)


def test_the_old_pages_after_a_replay(start_small: StartSmall) -> None:
    def keeping(base: Any, self: Any, output: Any) -> Any:
        for data in output.new_requests:
            pages = self.__dict__.setdefault("first", {}).setdefault(data.request_id, data.new_block_ids)
            data.new_block_ids = pages + data.new_block_ids[len(pages) :]
        return base.build_connector_meta(output)

    options = EngineOptions(is_v2=True, reuse=False)
    store = Store(1, 4, save_polls=(0,))
    engine = start_small(options, store=store, change=leader_with("build_connector_meta", keeping))
    replayed = engine.submit(PROMPT, 8)
    engine.step()
    store.pages.clear()
    other = engine.submit(PROMPT[::-1], 8)
    engine.step()
    engine.replay(replayed)
    engine.replay(other)
    engine.run()
    with pytest.raises(ContractBroken, match="reads wrong bytes"):
        engine.answer([*PROMPT, 1], 1)


@pytest.mark.parametrize("kind", [0, 1], ids=["saved", "loaded"])
@pytest.mark.parametrize("answered", ["twice", "which it was not asked for"])
def test_an_id_is_answered_out_of_turn(start_small: StartSmall, kind: int, answered: str) -> None:
    def finished(base: Any, self: Any, saving: list[int], loading: list[int]) -> Any:
        own = base.get_finished(saving, loading)
        self.told = getattr(self, "told", ([], []))
        wrong = [99] if answered != "twice" else list(self.told[kind])
        self.told[kind].extend(own[kind])
        own[kind].extend(wrong)
        return own

    options = EngineOptions(ranks=2)
    store = filled(start_small, options, PROMPT, is_async=True)
    store.load_polls, store.save_polls = (0, 4), (0, 4)
    engine = start_small(options, store=store, change=ranks_with("get_finished", finished))
    with pytest.raises(ContractBroken, match=answered):
        engine.answer(PROMPT, 6)


def test_an_id_is_answered_after_all_ranks_have(start_small: StartSmall) -> None:
    waiting = Waiting("saved", 2)
    waiting.add(1)
    assert (waiting.hand_out(), waiting.hand_out()) == ([1], [])
    waiting.answered(0, [1])
    assert waiting.done() == []
    waiting.answered(1, [1])
    assert (waiting.done(), waiting.done()) == ([1], [])
    with pytest.raises(ContractBroken, match="not asked for"):
        waiting.answered(1, [1])


def test_an_id_that_a_rank_never_answers(start_small: StartSmall) -> None:
    options = EngineOptions(ranks=2)
    store = filled(start_small, options, PROMPT, is_async=True)
    store.load_polls = (0, 10**9)
    engine = start_small(options, store=store)
    request = engine.submit(PROMPT)
    with pytest.raises(AssertionError, match="LOADING"):
        engine.run_until(lambda: request in engine.outcomes, 0.1)


def test_request_finished_is_not_answered(start_small: StartSmall) -> None:
    engine = start_small(change=leader_with("request_finished", lambda *_: None))
    with pytest.raises(ContractBroken, match="answered None"):
        engine.answer(PROMPT)


@pytest.mark.parametrize("part", ["salt", "lora", "images"])
def test_somebody_elses_kv(start_small: StartSmall, part: str) -> None:
    scope = {
        "salt": Scope(salt="theirs"),
        "lora": Scope(lora=3),
        "images": Scope(images=((1, 4, bytes(range(32))),)),
    }[part]
    engine = start_small(change=leader_with("scope", lambda *_: None))
    engine.answer(PROMPT)
    with pytest.raises(ContractBroken, match="reads wrong bytes"):
        engine.answer(PROMPT, 2, scope)


def raising(*_: Any) -> Any:
    raise RuntimeError("of the connector")


LEADERS = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "request_finished",
)


@pytest.mark.parametrize("name", [*LEADERS, "bind_connector_meta", "start_load_kv", "get_finished"])
@pytest.mark.parametrize("is_v2", [False, True], ids=["V1", "V2"])
def test_raising_outside_every_try_ends_the_engine(start_small: StartSmall, name: str, is_v2: bool) -> None:
    def late(base: Any, self: Any, *arguments: Any) -> Any:
        if name == "start_load_kv" and self.get_connector_meta() is None:
            return None
        return raising()

    make = leader_with if name in LEADERS else ranks_with
    engine = start_small(EngineOptions(is_v2=is_v2), change=make(name, late))
    with pytest.raises(EngineDied, match=f"{name} raised.*of the connector"):
        engine.answer(PROMPT)
    with pytest.raises(EngineDied):
        engine.step()


@pytest.mark.parametrize("name", ["start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"])
def test_raising_in_the_warm_up_ends_the_engine(start_small: StartSmall, name: str) -> None:
    with pytest.raises(EngineDied, match=f"{name} raised"):
        start_small(change=ranks_with(name, raising))


@pytest.mark.parametrize("tells", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("name", ["wait_for_layer_load", "save_kv_layer", "wait_for_save"])
def test_raising_in_the_forward_pass_fails_all_and_the_engine_goes_on(
    start_small: StartSmall, name: str, tells: bool
) -> None:
    def once(base: Any, self: Any, *arguments: Any) -> None:
        if self.get_connector_meta() is not None and not hasattr(self, "has_raised"):
            self.has_raised = True
            raising()
        getattr(base, name)(*arguments)

    options = EngineOptions(ranks=2, tells_finish_of_failed=tells)
    engine = start_small(options, change=ranks_with(name, once))
    for prompt in (PROMPT, PROMPT[::-1]):
        engine.submit(prompt)
    engine.run()
    assert [str(error) for error in engine.failures] == ["of the connector"]
    assert [engine.outcomes[one].status for one in (1, 2)] == ["failed", "failed"]
    assert len(engine.transcript.all("finished")) == (2 if tells else 0)
    with pytest.raises(AssertionError, match="of the connector"):
        engine.answer(PROMPT)  # the other rank has its turn now
    assert engine.answer(PROMPT) == engine.expected(4)
