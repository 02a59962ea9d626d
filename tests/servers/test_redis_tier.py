"""What a Redis tier keeps on the server, and what it makes of what the server does by itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis_kit import BLOCKS, FINGERPRINT, LAYOUT, fresh_prefix, keys, load, open_tier, store
from redis_server import RedisCluster, RedisServer, free_port, wait_until

from kvferry.connector.errors import TierError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Blocks
from kvferry.connector.tier import Frame, Outcome
from kvferry.plugins.redis import batches
from kvferry.plugins.redis.keyspace import ENTRY_BYTES, PARTITIONS, Keyspace
from kvferry.plugins.redis.wire import pack

StartRedis = Callable[..., RedisServer]
StartCluster = Callable[..., RedisCluster]
ENTRY = HEADER_BYTES + LAYOUT.payload_bytes + ENTRY_BYTES
"""What one block counts towards a capacity."""


@pytest.fixture
def client(shared_redis: RedisServer) -> Iterator[redis.Redis]:
    with contextlib.closing(shared_redis.client()) as client:
        yield client


def name(prefix: str, key: BlockKey) -> str:
    return f"{prefix}:{FINGERPRINT[:4].hex()}:{key.hex()}"


def names(client: redis.Redis, prefix: str) -> set[bytes]:
    return set(client.scan_iter(match=f"{prefix}:*"))


# --- values -------------------------------------------------------------------------------------------


def test_a_block_is_one_value_header_then_body(shared_redis: RedisServer, client: redis.Redis) -> None:
    prefix, (key,) = fresh_prefix(), keys(1)
    tier = open_tier(shared_redis.url, prefix=prefix)
    assert store(tier, [key]) == [Outcome.OK]
    assert names(client, prefix) == {name(prefix, key).encode()}
    assert client.get(name(prefix, key)) == BLOCKS.raw(key)
    assert client.ttl(name(prefix, key)) == -1
    tier.close()


def test_models_and_tenants_find_nothing_of_one_another(shared_redis: RedisServer) -> None:
    prefix, some = fresh_prefix(), keys(3)
    ours = open_tier(shared_redis.url, prefix=prefix)
    theirs = open_tier(shared_redis.url, prefix=prefix, fingerprint=b"t" * 32)
    assert store(ours, some) == [Outcome.OK] * 3
    assert theirs.contains(some) == [False] * 3
    ours.close()
    theirs.close()


def test_a_value_that_no_block_can_have_is_a_failure_and_harms_no_other(
    shared_redis: RedisServer, client: redis.Redis
) -> None:
    prefix, some = fresh_prefix(), keys(5)
    tier = open_tier(shared_redis.url, prefix=prefix)
    assert store(tier, some) == [Outcome.OK] * 5
    whole = HEADER_BYTES + LAYOUT.payload_bytes
    client.set(name(prefix, some[0]), b"x" * (HEADER_BYTES - 1))
    client.set(name(prefix, some[1]), b"x" * (whole + 1))
    client.set(name(prefix, some[2]), b"")
    client.delete(name(prefix, some[3]))
    client.lpush(name(prefix, some[3]), "a list")
    assert load(tier, some) == [Outcome.FAILED] * 4 + [Outcome.OK]
    tier.close()


def test_a_block_expires_after_its_ttl(shared_redis: RedisServer, client: redis.Redis) -> None:
    prefix, (key,) = fresh_prefix(), keys(1)
    tier = open_tier(shared_redis.url, prefix=prefix, ttl_s=0.2)
    assert store(tier, [key]) == [Outcome.OK]
    assert 0 < client.pttl(name(prefix, key)) <= 200
    wait_until(lambda: load(tier, [key]) == [Outcome.MISSING], "the block expires")
    assert tier.contains([key]) == [False]
    tier.close()


def test_what_is_held_is_not_sent_again(shared_redis: RedisServer, client: redis.Redis) -> None:
    prefix, some = fresh_prefix(), keys(4)
    tier = open_tier(shared_redis.url, prefix=prefix)
    store(tier, some[:2])
    before = client.info("stats")["total_net_input_bytes"]
    assert store(tier, some[:2]) == [Outcome.OK] * 2
    assert client.info("stats")["total_net_input_bytes"] - before < LAYOUT.payload_bytes
    assert store(tier, some) == [Outcome.OK] * 4
    tier.close()


def test_a_frame_is_sent_as_the_view_it_is(shared_redis: RedisServer) -> None:
    frame = BLOCKS.sealed(keys(1)).sources()[0]
    sent = pack([(b"SET", b"name", frame)])
    assert [type(part) for part in sent] == [bytes, memoryview, bytes]
    assert sent[1].obj is frame.payload.obj  # type: ignore[union-attr]
    assert len(sent[1]) == LAYOUT.payload_bytes


def test_a_pipeline_carries_a_bounded_number_of_bytes(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    original = batches.pack

    def counting(commands: list[tuple[object, ...]]) -> object:
        rounds.append(
            sum(len(part.body) for command in commands for part in command if isinstance(part, Frame))
        )
        return original(commands)  # type: ignore[arg-type]

    monkeypatch.setattr(batches, "pack", counting)
    monkeypatch.setattr(batches, "PIPELINE_BYTES", 3 * LAYOUT.payload_bytes)
    tier, some = open_tier(shared_redis.url, prefix=fresh_prefix()), keys(10)
    assert store(tier, some) == [Outcome.OK] * 10
    assert [carried // LAYOUT.payload_bytes for carried in rounds if carried] == [3, 3, 3, 1]
    assert load(tier, some) == [Outcome.OK] * 10
    tier.close()


def test_there_are_as_many_connections_as_threads(start_redis: StartRedis) -> None:
    server = start_redis()
    tier, some = open_tier(server.url), keys(8)
    store(tier, some)
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait(10)
        for _ in range(20):
            assert load(tier, some) == [Outcome.OK] * 8

    threads = [threading.Thread(target=work, name=f"worker-{number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with contextlib.closing(server.client()) as client:
        connected = [one for one in client.client_list() if one["addr"].startswith("127.0.0.1")]
    assert 1 <= len(connected) <= 4
    tier.close()


def test_of_a_shared_store_nothing_is_listed(shared_redis: RedisServer) -> None:
    tier = open_tier(shared_redis.url, prefix=fresh_prefix())
    store(tier, keys(2))
    assert list(tier.scan()) == []
    assert tier.capabilities.is_shared
    tier.close()


# --- a server that is full ----------------------------------------------------------------------------


def test_a_full_server_that_evicts_nothing_has_no_room(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    tier, some = open_tier(server.url), keys(400)
    outcomes = [store(tier, [key])[0] for key in some]
    assert set(outcomes) == {Outcome.OK, Outcome.NO_ROOM}
    expected = [Outcome.OK if outcome is Outcome.OK else Outcome.MISSING for outcome in outcomes]
    assert [load(tier, [key])[0] for key in some] == expected
    tier.delete([key for key, outcome in zip(some, outcomes, strict=True) if outcome is Outcome.OK][:50])
    fresh = keys(1, "fresh")
    wait_until(lambda: store(tier, fresh) == [Outcome.OK], "deleting makes room")
    tier.close()


def test_what_the_server_evicts_is_missing(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
    tier, some = open_tier(server.url), keys(400)
    assert tier.capabilities.is_bounded
    for start in range(0, 400, 20):
        assert store(tier, some[start : start + 20]) == [Outcome.OK] * 20
    held = tier.contains(some)
    outcomes = load(tier, some)
    assert set(outcomes) == {Outcome.OK, Outcome.MISSING}
    gone = [outcome for outcome, was_held in zip(outcomes, held, strict=True) if not was_held]
    assert gone == [Outcome.MISSING] * len(gone)
    tier.close()


def test_without_a_capacity_stats_are_the_servers_own(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    first = open_tier(server.url)
    store(first, keys(30))
    first.close()
    second = open_tier(server.url)
    stats = second.stats()
    assert (stats.blocks, stats.capacity_bytes) == (30, 64 << 20)
    assert 30 * LAYOUT.payload_bytes < stats.used_bytes < 64 << 20
    second.close()


def test_a_capacity_is_one_for_all_models_and_tells_each_of_its_own(shared_redis: RedisServer) -> None:
    """Tenants of a cache server have blocks with the same keys."""
    prefix, some, other = fresh_prefix(), keys(10), b"t" * 32
    ours_removed: list[BlockKey] = []
    theirs_removed: list[BlockKey] = []
    ours = open_tier(shared_redis.url, prefix=prefix, capacity=10 * ENTRY, removed=ours_removed)
    theirs = open_tier(
        shared_redis.url, prefix=prefix, capacity=10 * ENTRY, removed=theirs_removed, fingerprint=other
    )
    for key in some:
        assert store(ours, [key]) == [Outcome.OK]
    assert theirs.store(Blocks(LAYOUT, other).sealed(some[:4]).sources()) == [Outcome.OK] * 4
    assert ours.contains(some) == [False] * 4 + [True] * 6
    assert theirs_removed == [], "what went has the keys of blocks that it holds, and is none of them"
    assert store(ours, keys(8, "new")) == [Outcome.OK] * 8
    assert ours_removed == some[4:], "of this model, and only what this engine saw go"
    assert theirs.stats().used_bytes == 10 * ENTRY
    ours.close()
    theirs.close()


# --- a capacity that engines share --------------------------------------------------------------------


def test_engines_hold_one_capacity_together(shared_redis: RedisServer, client: redis.Redis) -> None:
    prefix, some = fresh_prefix(), keys(60)
    engines = [open_tier(shared_redis.url, prefix=prefix, capacity=20 * ENTRY) for _ in range(3)]
    for number, key in enumerate(some):
        assert store(engines[number % 3], [key]) == [Outcome.OK]
        kept = names(client, prefix) - {f"{prefix}:index".encode(), f"{prefix}:sizes".encode()}
        assert len(kept) == min(number + 1, 20)
    assert load(engines[0], some) == [Outcome.MISSING] * 40 + [Outcome.OK] * 20
    stats = engines[0].stats()
    assert (stats.blocks, stats.used_bytes, stats.capacity_bytes) == (20, 20 * ENTRY, 20 * ENTRY)
    for engine in engines:
        engine.close()


def test_the_least_recently_used_goes_first_whoever_used_it(shared_redis: RedisServer) -> None:
    prefix, some = fresh_prefix(), keys(10)
    removed: list[BlockKey] = []
    writer = open_tier(shared_redis.url, prefix=prefix, capacity=10 * ENTRY, removed=removed)
    reader = open_tier(shared_redis.url, prefix=prefix, capacity=10 * ENTRY)
    for key in some:
        store(writer, [key])
    assert load(reader, some[:3]) == [Outcome.OK] * 3
    assert store(reader, some[3:5]) == [Outcome.OK] * 2  # held already: that is a use, too
    store(writer, keys(5, "new"))
    assert writer.contains(some) == [True] * 5 + [False] * 5
    assert removed == some[5:]
    store(writer, keys(2, "newer"))
    assert writer.contains(some) == [True, False, False, True, True] + [False] * 5, "a prefix's tail first"
    assert writer.stats().evictions == 7
    writer.close()
    reader.close()


def test_of_a_batch_the_head_of_the_prefix_stays(shared_redis: RedisServer) -> None:
    tier, some = open_tier(shared_redis.url, prefix=fresh_prefix(), capacity=10 * ENTRY), keys(15)
    assert store(tier, some) == [Outcome.OK] * 10 + [Outcome.NO_ROOM] * 5
    assert tier.contains(some) == [True] * 10 + [False] * 5
    store(tier, keys(1, "next"))
    assert tier.contains(some) == [True] * 9 + [False] * 6
    tier.close()


def test_what_goes_by_itself_stops_counting(shared_redis: RedisServer, client: redis.Redis) -> None:
    prefix, some = fresh_prefix(), keys(8)
    tier = open_tier(shared_redis.url, prefix=prefix, capacity=10 * ENTRY)
    store(tier, some)
    client.unlink(*(name(prefix, key) for key in some[:4]))
    assert load(tier, some) == [Outcome.MISSING] * 4 + [Outcome.OK] * 4
    assert (tier.stats().blocks, tier.stats().used_bytes) == (4, 4 * ENTRY)
    assert store(tier, keys(6, "new")) == [Outcome.OK] * 6
    assert tier.stats().evictions == 0
    tier.delete(some)
    assert tier.stats().blocks == 6
    tier.close()


@pytest.mark.parametrize("lost", [["index"], ["sizes"], ["index", "sizes"]])
def test_a_lost_index_is_found_again_by_use(
    shared_redis: RedisServer, client: redis.Redis, lost: list[str]
) -> None:
    prefix, some = fresh_prefix(), keys(8)
    tier = open_tier(shared_redis.url, prefix=prefix, capacity=10 * ENTRY)
    store(tier, some)
    client.delete(*(f"{prefix}:{name}" for name in lost))
    assert load(tier, some) == [Outcome.OK] * 8
    assert (tier.stats().blocks, tier.stats().used_bytes) == (8, 8 * ENTRY)
    for key in keys(30, "new"):
        assert store(tier, [key]) == [Outcome.OK]
    assert tier.stats().used_bytes == 10 * ENTRY
    kept = names(client, prefix) - {f"{prefix}:index".encode(), f"{prefix}:sizes".encode()}
    assert len(kept) == 10
    tier.close()


def test_a_full_server_refuses_before_anything_is_evicted(start_redis: StartRedis) -> None:
    server = start_redis()
    tier, some = open_tier(server.url, capacity=10 * ENTRY), keys(10)
    store(tier, some)
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory", "1mb")
        assert store(tier, keys(3, "new")) == [Outcome.NO_ROOM] * 3
        client.config_set("maxmemory", 0)
    assert load(tier, some) == [Outcome.OK] * 10
    tier.close()


# --- a cluster ----------------------------------------------------------------------------------------


def test_every_third_of_the_slots_gets_its_share() -> None:
    keyspace = Keyspace("kvferry", FINGERPRINT, True, 1 << 30, 0)
    slots = sorted(
        redis.crc.key_slot(keyspace.name(BlockKey(number.to_bytes(4, "little") + bytes(28))))
        for number in range(PARTITIONS)
    )
    assert [slot * PARTITIONS // 16384 for slot in slots] == list(range(PARTITIONS))
    for number in range(PARTITIONS):
        key = BlockKey(number.to_bytes(4, "little") + bytes(28))
        (_, request), *more = keyspace.reconcile([key])
        assert not more
        index, sizes, name = request.commands[0][3:6]
        assert len({redis.crc.key_slot(one) for one in (index, sizes, name)}) == 1  # type: ignore[arg-type]


def test_blocks_are_spread_over_the_nodes(redis_cluster: RedisCluster) -> None:
    prefix, some = fresh_prefix(), keys(300)
    tier = open_tier(redis_cluster.url, prefix=prefix)
    assert store(tier, some) == [Outcome.OK] * 300
    counts = []
    for node in redis_cluster.nodes:
        with contextlib.closing(node.client()) as client:
            counts.append(len(list(client.scan_iter(match=f"{{{prefix}:*", count=1000))))
    assert sum(counts) == 300
    assert min(counts) > 50
    assert load(tier, some) == [Outcome.OK] * 300
    tier.close()


def test_one_node_that_is_gone_takes_only_its_own_blocks(start_cluster: StartCluster) -> None:
    cluster = start_cluster("--cluster-require-full-coverage", "no")
    tier, some = open_tier(cluster.url, deadline_s=2.0), keys(60)
    assert store(tier, some) == [Outcome.OK] * 60
    cluster.nodes[2].kill()
    outcomes = load(tier, some)
    assert set(outcomes) == {Outcome.OK, Outcome.FAILED}
    assert outcomes.count(Outcome.OK) > 20
    cluster.nodes[2].start()
    cluster.wait_until_whole()
    wait_until(lambda: Outcome.FAILED not in load(tier, some), "the node's blocks can be asked for again")
    tier.close()


def test_blocks_are_found_after_their_slot_moved(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    tier, some = open_tier(cluster.url, prefix="p", capacity=1 << 30), keys(40)
    assert store(tier, some) == [Outcome.OK] * 40
    first = Keyspace("p", FINGERPRINT, True, None, 0).name(some[0])
    slot = redis.crc.key_slot(first)
    source = cluster.nodes[slot * 3 // 16384]
    target = cluster.nodes[(slot * 3 // 16384 + 1) % 3]
    with contextlib.closing(source.client()) as old, contextlib.closing(target.client()) as new:
        old_id, new_id = old.execute_command("CLUSTER MYID"), new.execute_command("CLUSTER MYID")
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", old_id)
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new_id)
        moved = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        assert first.decode() in moved
        old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *moved)
        for node in cluster.nodes:
            with contextlib.closing(node.client()) as client:
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)
    assert load(tier, some) == [Outcome.OK] * 40
    tier.delete(some[:1])
    assert store(tier, some[:1]) == [Outcome.OK]
    tier.close()


# --- sentinels ----------------------------------------------------------------------------------------


def test_after_a_failover_the_new_master_is_used(start_redis: StartRedis, tmp_path: Path) -> None:
    master = start_redis()
    replica = start_redis("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
    directory = tmp_path / "sentinel"
    directory.mkdir()
    (directory / "sentinel.conf").write_text(
        f"sentinel monitor m 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds m 500\n"
    )
    watcher = RedisServer(directory, "--sentinel")
    tier = open_tier(f"redis+sentinel://127.0.0.1:{free_port()},{watcher.address}/m", deadline_s=3.0)
    some = keys(5)
    assert store(tier, some) == [Outcome.OK] * 5
    with contextlib.closing(replica.client()) as client, contextlib.closing(watcher.client()) as asked:
        wait_until(lambda: client.dbsize() == 5, "the replica has the blocks")
        wait_until(lambda: len(asked.sentinel_slaves("m")) == 1, "the sentinel knows the replica")
        master.kill()
        wait_until(lambda: client.info("replication")["role"] == "master", "the replica takes over", 60)

    def is_back() -> bool:
        try:
            return load(tier, some) == [Outcome.OK] * 5
        except TierError:
            return False

    wait_until(is_back, "the blocks are loaded from the new master")
    assert store(tier, keys(2, "new")) == [Outcome.OK] * 2
    tier.close()
    watcher.kill()
