"""What opening a Redis tier says: one clear error for a mistake, one warning for a server that is away."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_kit import fresh_prefix, keys, load, open_tier, store
from redis_server import RedisCluster, RedisServer, free_port, server_speaks_tls
from tls import Certificates, TlsFront

from kvferry.connector.errors import ConfigError, TierError
from kvferry.connector.finding import Finding
from kvferry.connector.tier import Outcome
from kvferry.plugins.redis.check import check_redis_tier
from kvferry.plugins.redis.diagnosis import needed_rules
from kvferry.plugins.redis.options import RedisOptions, parse_target

SECRET = "s3cr3t-and-more"
StartRedis = Callable[..., RedisServer]


def mistake(url: str, **options: object) -> ConfigError:
    """Return the error that opening raises; `kvferry doctor` has to report the same."""
    with pytest.raises(ConfigError) as raised:
        open_tier(url, deadline_s=6.0, **options).close()
    (found,) = findings(url, **options)
    assert (found.level, found.text, found.hint) == (
        "error",
        f"{raised.value.path}: {raised.value.why}",
        raised.value.hint,
    )
    assert SECRET not in str(raised.value)
    return raised.value


def findings(url: str, **options: object) -> list[Finding]:
    return list(check_redis_tier(RedisOptions(url=url, **options), "r"))  # type: ignore[arg-type]


def works(url: str, **options: object) -> None:
    tier = open_tier(url, prefix=fresh_prefix(), **options)
    some = keys(3)
    assert store(tier, some) == [Outcome.OK] * 3
    assert load(tier, some) == [Outcome.OK] * 3
    tier.close()


# --- credentials --------------------------------------------------------------------------------------


def user(name: str, rules: str) -> tuple[str, ...]:
    return ("--user", name, "on", f">{SECRET}", *rules.split())


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server whose default user has a password, with a user for kvferry and one that may only read."""
    server = RedisServer(
        tmp_path_factory.mktemp("redis"),
        *("--requirepass", SECRET),
        *user("kvferry", "resetchannels ~kvferry:* +get +set +exists +unlink +info +dbsize"),
        *user("reader", "resetchannels ~* +@read +info +dbsize"),
        *user("blind", "resetchannels ~kvferry:* +get +set +exists +unlink"),
    )
    yield server
    server.kill()


def test_the_password_of_the_default_user(guarded: RedisServer) -> None:
    works(f"redis://:{SECRET}@{guarded.address}")
    works(guarded.url, password=SECRET)
    assert mistake(guarded.url).path == "tiers.r.password"
    assert "asks for a password" in str(mistake(guarded.url))
    wrong = mistake(f"redis://:{SECRET}1@{guarded.address}")
    assert (wrong.path, "refuses the credentials" in wrong.why) == ("tiers.r.password", True)


def test_the_rules_that_the_hint_names_are_enough(guarded: RedisServer) -> None:
    tier = open_tier(guarded.url, username="kvferry", password=SECRET)
    some = keys(2, fresh_prefix())
    assert store(tier, some) == [Outcome.OK] * 2
    assert load(tier, some) == [Outcome.OK] * 2
    assert tier.contains(some) == [True] * 2
    tier.delete(some)
    assert tier.contains(some) == [False] * 2
    tier.close()


@pytest.mark.parametrize("capacity", [None, 1 << 30])
@pytest.mark.parametrize("is_cluster", [False, True])
def test_the_rules_are_enough_and_none_is_missed(
    start_redis: StartRedis, redis_cluster: RedisCluster, is_cluster: bool, capacity: int | None
) -> None:
    servers = redis_cluster.nodes if is_cluster else [start_redis()]
    url = redis_cluster.url if is_cluster else f"{servers[0].url}/2"
    options = RedisOptions(url=url, prefix=fresh_prefix(), capacity=capacity)
    rules = needed_rules(options, parse_target("r", options)).split()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(server.client())) for server in servers]
        for client in clients:
            client.execute_command("ACL", "SETUSER", "own", "reset", "on", f">{SECRET}", *rules)
            client.execute_command("ACL", "LOG", "RESET")
        tier = open_tier(url, username="own", password=SECRET, prefix=options.prefix, capacity=capacity)
        some = keys(20)
        assert store(tier, some) == [Outcome.OK] * 20
        assert load(tier, some) == [Outcome.OK] * 20
        tier.delete(some)
        assert tier.contains(some) == [False] * 20
        tier.close()
        denied = [entry for client in clients for entry in client.acl_log()]
        assert {entry["object"] for entry in denied} <= {"client|setinfo"}, "redis-py's own greeting may fail"
        for client in clients:
            client.execute_command("ACL", "DELUSER", "own")


def test_a_user_without_the_rights_or_the_keys(guarded: RedisServer) -> None:
    reading = mistake(guarded.url, username="reader", password=SECRET)
    assert reading.path == "tiers.r.username"
    assert "~kvferry:* +get +set +exists +unlink" in reading.hint
    elsewhere = mistake(guarded.url, username="kvferry", password=SECRET, prefix="other")
    assert (elsewhere.path, "~other:*" in elsewhere.hint) == ("tiers.r.username", True)
    counting = mistake(guarded.url, username="kvferry", password=SECRET, capacity=1 << 30)
    assert (counting.path, "+eval" in counting.hint) == ("tiers.r.username", True)


def test_a_user_who_may_not_ask_for_figures_still_has_a_tier(guarded: RedisServer) -> None:
    tier = open_tier(guarded.url, username="blind", password=SECRET)
    some = keys(2, fresh_prefix())
    assert store(tier, some) == [Outcome.OK] * 2
    assert tier.stats().blocks == 0
    assert not tier.capabilities.is_bounded
    tier.close()
    assert "is not known" in " ".join(
        found.text for found in findings(guarded.url, username="blind", password=SECRET)
    )


def test_a_password_for_a_server_without_one(shared_redis: RedisServer) -> None:
    assert mistake(shared_redis.url, password=SECRET).path == "tiers.r.password"


# --- the wrong server ---------------------------------------------------------------------------------


def test_a_database_that_is_not_there(shared_redis: RedisServer) -> None:
    works(f"{shared_redis.url}/3")
    error = mistake(f"{shared_redis.url}/99")
    assert (error.path, "no database 99" in error.why) == ("tiers.r.url", True)


def test_a_unix_socket(shared_redis: RedisServer) -> None:
    works(f"unix://{shared_redis.socket_path}")
    works(f"unix://{shared_redis.socket_path}?db=2")


def test_a_cluster_takes_the_cluster_scheme_and_nothing_else_does(
    redis_cluster: RedisCluster, shared_redis: RedisServer
) -> None:
    works(redis_cluster.url)
    works(f"redis+cluster://{redis_cluster.nodes[1].address}")
    part = mistake(redis_cluster.nodes[0].url)
    assert (part.path, "+cluster" in part.hint) == ("tiers.r.url", True)
    alone = mistake(f"redis+cluster://{shared_redis.address}")
    assert (alone.path, "no cluster" in alone.why) == ("tiers.r.url", True)


@pytest.fixture
def chatty() -> Iterator[int]:
    """Something that is not Redis: it greets whoever connects, as an SSH or mail server does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"220 hello, this is not what you want\r\n")
                        connection.recv(4096)

        thread = threading.Thread(target=greet, name="chatty", daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_what_is_not_redis_at_all(chatty: int) -> None:
    error = mistake(f"redis://127.0.0.1:{chatty}")
    assert (error.path, "is not Redis" in error.why) == ("tiers.r.url", True)


# --- TLS ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=["front", "server"])
def behind_tls(
    request: pytest.FixtureRequest,
    certificates: Certificates,
    shared_redis: RedisServer,
    start_redis: StartRedis,
) -> Iterator[Callable[..., str]]:
    """Return an address that speaks TLS: a front of the shared server, or a server that can do so itself."""
    fronts: list[TlsFront] = []

    def start(name: str = "server", *, asks_for_client: bool = False) -> str:
        if request.param == "server":
            if not server_speaks_tls():
                pytest.skip("needs a server built with TLS on PATH")
            port = free_port()
            start_redis(
                *("--tls-port", str(port), "--tls-auth-clients", "yes" if asks_for_client else "no"),
                *(
                    "--tls-cert-file",
                    certificates.certificate(name),
                    "--tls-key-file",
                    certificates.key(name),
                ),
                *("--tls-ca-cert-file", certificates.certificate("ca")),
            )
            return f"127.0.0.1:{port}"
        fronts.append(TlsFront(certificates, name, shared_redis.port, asks_for_client=asks_for_client))
        return f"127.0.0.1:{fronts[-1].port}"

    yield start
    for front in fronts:
        front.close()


BehindTls = Callable[..., str]


def test_tls_with_a_certificate_that_is_trusted(behind_tls: BehindTls, certificates: Certificates) -> None:
    works(f"rediss://{behind_tls()}", tls_ca=certificates.certificate("ca"))


def test_tls_with_a_client_certificate(behind_tls: BehindTls, certificates: Certificates) -> None:
    url, ca = f"rediss://{behind_tls(asks_for_client=True)}", certificates.certificate("ca")
    pair = {"tls_cert": certificates.certificate("client"), "tls_key": certificates.key("client")}
    works(url, tls_ca=ca, **pair)
    assert mistake(url, tls_ca=ca).path == "tiers.r.tls_cert"
    swapped = mistake(url, tls_ca=ca, **{**pair, "tls_key": certificates.key("server")})
    assert (swapped.path, "cannot be used" in swapped.why) == ("tiers.r.tls_cert", True)


def test_a_certificate_that_is_not_trusted(behind_tls: BehindTls, certificates: Certificates) -> None:
    url = f"rediss://{behind_tls()}"
    assert mistake(url).path == "tiers.r.tls_ca"
    assert mistake(url, tls_ca=certificates.certificate("other-ca")).path == "tiers.r.tls_ca"
    empty = mistake(url, tls_ca=certificates.key("ca"))
    assert (empty.path, "holds no certificates" in empty.why) == ("tiers.r.tls_ca", True)
    works(url, tls_verify=False)
    assert "tls_verify is false" in " ".join(found.text for found in findings(url, tls_verify=False))


def test_a_certificate_for_another_host(behind_tls: BehindTls, certificates: Certificates) -> None:
    error = mistake(f"rediss://{behind_tls('elsewhere')}", tls_ca=certificates.certificate("ca"))
    assert (error.path, "another host" in error.why) == ("tiers.r.url", True)


def test_tls_to_a_plain_port_and_the_reverse(shared_redis: RedisServer, behind_tls: BehindTls) -> None:
    plain = mistake(f"rediss://{shared_redis.address}")
    assert (plain.path, "does not speak TLS" in plain.why) == ("tiers.r.url", True)
    secure = mistake(f"redis://{behind_tls()}")
    assert (secure.path, "speaks TLS" in secure.why) == ("tiers.r.url", True)


# --- servers that are away ----------------------------------------------------------------------------


def test_a_server_that_comes_later_is_used_then(
    start_redis: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis()
    server.kill()
    url = f"redis://u:{SECRET}@{server.address}"
    tier = open_tier(server.url, prefix=fresh_prefix())
    open_tier(url, prefix=fresh_prefix()).close()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("is not available" in text and "opened anyway" in text for text in warnings)
    assert SECRET not in caplog.text
    some = keys(3)
    with pytest.raises(TierError, match="Connection refused"):
        load(tier, some)
    server.start()
    assert load(tier, some) == [Outcome.MISSING] * 3
    assert store(tier, some) == [Outcome.OK] * 3
    tier.close()


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
def test_opening_waits_no_longer_than_the_deadline(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        path = "/mymaster" if scheme == "redis+sentinel" else ""
        began = time.monotonic()
        tier = open_tier(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}{path}", deadline_s=1.5)
        assert time.monotonic() - began < 1.5 + 1.0
        tier.close()
    assert caplog.text.count("is not available") == 1


def test_doctor_says_that_nobody_answers() -> None:
    (found,) = findings(f"redis://127.0.0.1:{free_port()}")
    assert (found.level, "is not available" in found.text) == ("warn", True)
    (found,) = findings("redis://nobody.invalid")
    assert (found.level, "is not available" in found.text) == ("warn", True)


# --- sentinels ----------------------------------------------------------------------------------------


@pytest.fixture
def sentinel(start_redis: StartRedis, tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A master and a sentinel that watches it."""
    master = start_redis()
    directory = tmp_path / "sentinel"
    directory.mkdir()
    (directory / "sentinel.conf").write_text(f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n")
    watcher = RedisServer(directory, "--sentinel")
    yield master, watcher
    watcher.kill()


def test_the_master_behind_a_sentinel(sentinel: tuple[RedisServer, RedisServer]) -> None:
    _, watcher = sentinel
    works(f"redis+sentinel://{watcher.address}/mymaster")
    works(f"redis+sentinel://127.0.0.1:{free_port()},{watcher.address}/mymaster/1", capacity=1 << 20)
    error = mistake(f"redis+sentinel://{watcher.address}/another")
    assert (error.path, error.hint) == ("tiers.r.url", "they know mymaster")
    assert "redis+sentinel" in mistake(watcher.url).hint


# --- how large it can become --------------------------------------------------------------------------


def test_what_bounds_it_is_said_once(start_redis: StartRedis, caplog: pytest.LogCaptureFixture) -> None:
    def said(server: RedisServer, **options: object) -> tuple[bool, str]:
        caplog.clear()
        tier = open_tier(server.url, **options)
        tier.close()
        return tier.capabilities.is_bounded, " ".join(record.message for record in caplog.records)

    bounded, text = said(start_redis())
    assert (bounded, text.count("nothing bounds it")) == (False, 1)
    keeping = start_redis("--maxmemory", "64mb")
    bounded, text = said(keeping)
    assert (bounded, "takes no more: maxmemory-policy is noeviction" in text) == (True, True)
    assert said(keeping, capacity=32 << 20) == (True, "")
    assert "is more than maxmemory" in said(keeping, capacity=65 << 20)[1]
    assert said(start_redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")) == (True, "")


def test_a_capacity_for_less_than_a_few_blocks(
    shared_redis: RedisServer, redis_cluster: RedisCluster
) -> None:
    with pytest.raises(
        ConfigError, match=r"tiers\.r\.capacity: .* fewer than 4 blocks .*give at least 64512"
    ):
        open_tier(shared_redis.url, capacity=64511)
    open_tier(shared_redis.url, capacity=64512).close()
    with pytest.raises(ConfigError, match="divided over 128 parts"):
        open_tier(redis_cluster.url, capacity=1 << 20)


def test_doctor_says_what_it_found(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "yes")
    found = findings(server.url)
    texts = "\n".join(one.text for one in found)
    assert f"{server.address} answers, version " in texts
    assert "answers a small request in" in texts
    assert "bounded by the server's maxmemory, 64 MiB, allkeys-lru" in texts
    assert "append-only file" in texts
    assert {one.topic for one in found} == {"tier r"}
    evicting = [one.text for one in findings(server.url, capacity=1 << 20)]
    assert "the server evicts by itself and can drop the index that holds the capacity" in evicting
    with contextlib.closing(server.client()) as client:
        assert client.dbsize() == 0, "doctor leaves nothing behind"
