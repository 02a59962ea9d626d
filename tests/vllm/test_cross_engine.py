"""From vLLM to TensorRT-LLM and back: a real vLLM computes, the stand-in for TensorRT-LLM holds every byte that it
loads against the blocks that vLLM stored, and what it stores is vLLM's again.

Pages of both differ in size, order and in how many ranks share them. Keys agree, or nothing would be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from across import KnownModel, read_blocks, trtllm_toml
from cache_server import CacheServer
from engine import Answer, Engines
from ferry import Ferry
from prompts import BLOCK, PROMPTS, Prompt, matched
from reference import kvferry_hits, local_hits, wait_until_stored
from remote import RedisRemote
from standin.executor import Engine as StandIn
from standin.model import Scope
from standin.options import EngineOptions

from kvferry.engines.vllm.demo.model import default_cache_dir, prepare

SOME = PROMPTS[:12]
SALT = "what the stand-in stores"
STORES = ("disk", "redis", "server")
STORE_S = 30.0
"""A tier has so long for a block, however slow the machine is."""
QUERY_S = 1.0
"""The engine's own thread waits so long for a tier, the most that may be configured."""
ALWAYS = {"ask": "always", "admission": "always", "deadline_s": STORE_S}


class Pages(NamedTuple):
    """How the stand-in keeps its KV."""

    tokens: int
    ranks: int
    is_v2: bool

    @property
    def name(self) -> str:
        return f"{self.tokens}-tokens-{self.ranks}-ranks-{'V2' if self.is_v2 else 'V1'}"


EVERY = [
    Pages(tokens, ranks, is_v2) for tokens in (16, 32, 64) for ranks in (1, 2, 4) for is_v2 in (False, True)
]
every_form = pytest.mark.parametrize("pages", EVERY, ids=lambda pages: pages.name)
every_store = pytest.mark.parametrize("store", STORES)


class Stores:
    """A disk, a Redis and a cache server, and how either engine is told to use one of them."""

    def __init__(self, directory: Path, redis: RedisRemote, server: CacheServer) -> None:
        self.directory = directory
        self.redis = redis
        self.server = server

    def tables(self, *stores: str) -> dict[str, Any]:
        """Return kvferry's configuration for some stores; the server alone is one without tiers of one's own."""
        tables: dict[str, Any] = {"block_tokens": BLOCK, "explain": {"enabled": False}}
        if stores == ("server",):
            return tables | {"service": self.server.unix}
        tiers = [self._tier(store) | ALWAYS for store in stores]
        return tables | {"host": {"capacity": "64MiB"}, "load_deadline_s": STORE_S, "tiers": tiers}

    def _tier(self, store: str) -> dict[str, Any]:
        match store:
            case "disk":
                return {"type": "disk", "path": str(self.directory / "disk"), "capacity": "256MiB"}
            case "redis":
                return self.redis.tier()
        return {"type": "remote", "servers": [self.server.tcp]}


class Written(NamedTuple):
    """What vLLM computed and stored."""

    hits: dict[Prompt, Answer]
    """Its answers, with every full block from its own prefix cache."""
    model: KnownModel
    """The KV of these prompts."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    directory = tmp_path_factory.mktemp("across")
    redis = RedisRemote(tmp_path_factory.mktemp("redis"))
    config = {"host": {"capacity": "128MiB"}}
    try:
        with CacheServer(tmp_path_factory.mktemp("server"), config) as server:
            yield Stores(directory, redis, server)
    finally:
        redis.kill()


@pytest.fixture(scope="module")
def written(engines: Engines, tiny: Path, stores: Stores) -> Written:
    """vLLM has filled every store, and is gone."""
    engine = engines.start("across-writer", tiny, kvferry=stores.tables("disk", "redis", "remote"))
    hits = local_hits(engine, SOME)
    wait_until_stored(engine, SOME, "disk", "redis", "remote")
    engines.close()
    return Written(hits, read_blocks(tiny, stores.tables("disk"), SOME))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """Return what starts a stand-in for TensorRT-LLM: ``start(checkpoint, model, pages, tables)``."""
    ferry = Ferry(tmp_path, monkeypatch)

    def start(checkpoint: Path, model: KnownModel, pages: Pages, tables: dict[str, Any]) -> StandIn:
        options = EngineOptions(
            model=model,
            ranks=pages.ranks,
            page_tokens=pages.tokens,
            num_pages=2 * len(max(PROMPTS, key=len)) // pages.tokens,
            is_v2=pages.is_v2,
            query_limit_s=STORE_S,
            poll_limit_s=STORE_S,
        )
        config = trtllm_toml(tables | {"trtllm": {"query_wait_s": QUERY_S}})
        return ferry.start(options, config=config, checkpoint=checkpoint, dtype="float32")

    yield start
    ferry.close()


def run(engine: StandIn, prompt: Prompt, salt: str = "", wanted: int = 2) -> int:
    """Run a prompt of which the engine has nothing itself; return how many tokens kvferry brought."""
    engine.allocator.evict(engine.options.num_pages)
    engine.answer(list(prompt), wanted, Scope(salt=salt))
    return int(engine.transcript.all("query")[-1].answer[0])


def settle(engine: StandIn) -> None:
    """Have all that was saved be committed."""
    engine.run()
    for _ in range(2):
        engine.step()


@every_store
@every_form
def test_the_stand_in_reads_what_vllm_wrote(
    stand_in: Callable[..., StandIn], tiny: Path, stores: Stores, written: Written, store: str, pages: Pages
) -> None:
    engine = stand_in(tiny, written.model, pages, stores.tables(store))
    for prompt in SOME[:4]:
        assert run(engine, prompt) == matched(prompt), (
            "and every byte is vLLM's, or the stand-in would have said so"
        )


def test_a_block_that_is_not_vllms_is_found(
    stand_in: Callable[..., StandIn], tiny: Path, stores: Stores, written: Written
) -> None:
    engine = stand_in(
        tiny, read_blocks(tiny, stores.tables("disk"), SOME[:1]), EVERY[0], stores.tables("disk")
    )
    changed = engine.options.model.kv(Scope(), SOME[0][:BLOCK])
    changed[BLOCK // 2, 1, 1, 1, 0] ^= 1
    engine.options.model._blocks[SOME[0][:BLOCK]] = changed  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=f"wrong bytes of 1 of .* from token {BLOCK // 2} on"):
        run(engine, SOME[0])


def test_another_salt_finds_nothing(
    stand_in: Callable[..., StandIn], tiny: Path, stores: Stores, written: Written
) -> None:
    engine = stand_in(tiny, written.model, EVERY[0], stores.tables("redis"))
    assert run(engine, SOME[0], "somebody else") == 0
    assert run(engine, SOME[0]) == matched(SOME[0])


@every_store
def test_vllm_reads_what_the_stand_in_wrote(
    engines: Engines,
    stand_in: Callable[..., StandIn],
    tiny: Path,
    stores: Stores,
    written: Written,
    store: str,
) -> None:
    salt = f"{SALT}: {store}"
    engines.close()
    for index, pages in enumerate([Pages(16, 4, False), Pages(32, 2, True), Pages(64, 1, False)]):
        engine = stand_in(tiny, written.model, pages, stores.tables(store))
        for prompt in SOME[index::3]:
            run(engine, prompt, salt)
        settle(engine)
        engine.close()
    reader = engines.start(f"across-{store}", tiny, kvferry=stores.tables(store))
    assert kvferry_hits(reader, SOME, salt=salt) == written.hits, "bit for bit, log-probabilities too"


def test_prefill_on_one_decode_on_the_other(
    engines: Engines, stand_in: Callable[..., StandIn], tiny: Path, stores: Stores, written: Written
) -> None:
    """By content, over the cache server: the next engine finds the prefix as soon as the first has answered."""
    vllm = engines.start(
        "across-handoff", tiny, kvferry=stores.tables("server"), kv_transfer={"kv_role": "kv_producer"}
    )
    trtllm = stand_in(tiny, written.model, Pages(32, 1, True), stores.tables("server"))
    for prompt in SOME:
        vllm.generate([{"tokens": prompt, "salt": "to the stand-in", "max_tokens": 1}])
        assert run(trtllm, prompt, "to the stand-in") == matched(prompt)
    for prompt in SOME:
        run(trtllm, prompt, "to vLLM", wanted=1)
        assert kvferry_hits(vllm, [prompt], salt="to vLLM") == {prompt: written.hits[prompt]}


def test_a_real_model_crosses_both_ways(
    engines: Engines, stand_in: Callable[..., StandIn], tmp_path: Path
) -> None:
    engines.close()
    smollm = prepare(default_cache_dir())
    prompts = real_prompts(smollm)
    there, back = (disk_tables(tmp_path / name) for name in ("there", "back"))
    writer = engines.start("across-real-writer", smollm, kvferry=there)
    hits = local_hits(writer, prompts)
    wait_until_stored(writer, prompts, "disk")
    engines.close()
    model = read_blocks(smollm, there, prompts)
    forms = [Pages(16, 1, False), Pages(32, 3, True), Pages(64, 3, False)]
    for pages in forms:
        engine = stand_in(smollm, model, pages, there)
        for prompt in prompts:
            assert run(engine, prompt) == matched(prompt)
        engine.close()
    for pages, prompt in zip(forms, prompts, strict=True):
        engine = stand_in(smollm, model, pages, back)
        assert run(engine, prompt) == 0
        settle(engine)
        engine.close()
    reader = engines.start("across-real-reader", smollm, kvferry=back)
    assert kvferry_hits(reader, prompts) == hits, "bit for bit, log-probabilities too"


def disk_tables(path: Path) -> dict[str, Any]:
    disk = {"type": "disk", "path": str(path), "capacity": "512MiB", **ALWAYS}
    return {
        "block_tokens": BLOCK,
        "explain": {"enabled": False},
        "host": {"capacity": "256MiB"},
        "load_deadline_s": STORE_S,
        "tiers": [disk],
    }


def real_prompts(model: Path) -> list[Prompt]:
    """Return three passages of prose that begin differently, each ending a few tokens behind a block."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    passages = (Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n")
    texts = ["\n\n".join(passages[start : start + 7]) for start in (0, 10, 20)]
    return [tuple(tokenizer.encode(text))[: 2 * BLOCK + 9] for text in texts]
