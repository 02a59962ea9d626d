"""What a router says of a handoff: understood, or ignored with a reason; never believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector.errors import ConfigError
from kvferry.engines.handoff.params import MAX_NAME, MAX_TOKENS, Allowed, Wish, answer_params, read_params
from kvferry.engines.jobs import PeerSource

HERE = Allowed((), has_token=False)
ANYWHERE = Allowed((), has_token=True)
ANSWER = answer_params(
    host="127.0.0.1", port=7000, engine_id="p", request_id="r", pages=(3, 1), num_tokens=20, tp_size=2
)
SOURCE = PeerSource("127.0.0.1", 7000, "p", "r", 20)
NULLS = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")


def problem(**changes: object) -> str:
    wish = read_params(ANSWER | changes, HERE)
    assert wish.source is None
    assert wish.problem
    assert "\n" not in wish.problem
    return wish.problem


def test_nothing_said_is_nothing_wished() -> None:
    assert read_params(None, HERE) == read_params({}, HERE) == read_params({"other": 1}, HERE) == Wish()


def test_what_a_router_asks_of_a_prefilling_engine() -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(NULLS)}
    assert read_params(params, HERE) == Wish(hands_over=True)


def test_what_one_engine_answers_the_other_understands() -> None:
    assert ANSWER["remote_block_ids"] == [[3, 1]]
    assert read_params(ANSWER, HERE) == Wish(source=SOURCE)


def test_fields_that_are_not_known_and_nulls_do_no_harm() -> None:
    optional = ("tp_size", "dcp_size", "pp_size", "transfer_mode", "remote_block_ids")
    params = ANSWER | dict.fromkeys(optional) | {"of_tomorrow": object()}
    assert read_params(params, HERE) == Wish(source=SOURCE)
    assert (
        read_params({key: value for key, value in params.items() if value is not None}, HERE).source == SOURCE
    )


def test_a_number_of_tokens_that_was_lost_on_the_way_is_unknown() -> None:
    assert read_params(ANSWER | {"remote_num_tokens": None}, HERE).source == SOURCE._replace(num_tokens=0)


def test_an_engine_may_take_pages_and_hand_them_on() -> None:
    assert read_params(ANSWER | {"do_remote_decode": True}, HERE) == Wish(True, SOURCE)
    broken = read_params(ANSWER | {"do_remote_decode": True, "remote_port": 0}, HERE)
    assert broken.hands_over
    assert broken.problem


def test_missing_fields_are_named() -> None:
    assert "remote_host, remote_request_id missing" in problem(remote_host=None, remote_request_id=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_remote_prefill", "yes"),
        ("do_remote_prefill", 1),
        ("do_remote_decode", []),
        ("remote_host", 5),
        ("remote_host", ""),
        ("remote_host", "a b"),
        ("remote_host", "127.0.0.1\n"),
        ("remote_host", "user@127.0.0.1"),
        ("remote_host", "127.0.0.1:80"),
        ("remote_host", "[::1]"),
        ("remote_host", "::1::"),
        ("remote_host", "a" * 256),
        ("remote_port", 0),
        ("remote_port", 65536),
        ("remote_port", "7000"),
        ("remote_port", True),
        ("remote_port", 7000.0),
        ("remote_engine_id", ""),
        ("remote_engine_id", 7),
        ("remote_engine_id", "x" * (MAX_NAME + 1)),
        ("remote_request_id", "a\x1b[31m"),
        ("remote_request_id", ["r"]),
        ("remote_num_tokens", -1),
        ("remote_num_tokens", MAX_TOKENS + 1),
        ("remote_num_tokens", "20"),
        ("tp_size", 0),
        ("tp_size", 1 << 20),
        ("dcp_size", 2),
        ("pp_size", 2),
        ("transfer_mode", "push"),
        ("transfer_mode", {}),
        ("remote_block_ids", 5),
        ("remote_block_ids", [1, 2]),
        ("remote_block_ids", [[1], [2]]),
        ("remote_block_ids", [[-1]]),
        ("remote_block_ids", [["1"]]),
        ("remote_block_ids", [[1 << 31]]),
        ("remote_block_ids", [[0] * ((1 << 17) + 1)]),
    ],
)
def test_a_field_that_is_not_as_it_has_to_be_is_named(field: str, value: object) -> None:
    assert field in problem(**{field: value})


@pytest.mark.parametrize("params", [[], "do_remote_prefill", 5, True])
def test_what_is_no_mapping_is_ignored(params: object) -> None:
    assert "not a mapping" in read_params(params, ANYWHERE).problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(ANSWER)), JSON, max_size=5), st.booleans())
def test_whatever_is_sent_nothing_is_raised_and_what_comes_out_is_bounded(
    changes: dict[str, object], has_token: bool
) -> None:
    wish = read_params(ANSWER | changes, Allowed((), has_token))
    assert wish.source is None or not wish.problem
    assert len(wish.problem) < 600
    if wish.source is not None:
        assert 1 <= wish.source.port <= 65535
        assert 0 <= wish.source.num_tokens <= MAX_TOKENS
        assert 0 < len(wish.source.host) <= 255
        assert 0 < len(wish.source.request_id) <= MAX_NAME


# --- which hosts are dialled ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
def test_without_a_list_this_machine_is_allowed(host: str) -> None:
    assert host in HERE


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "0.0.0.0", "localhost.evil.example", "127.1", "2130706433", "::"]
)
def test_without_a_list_and_a_token_nothing_else_is(host: str) -> None:
    assert host not in HERE
    assert host in ANYWHERE
    assert "peer.allowed_hosts" in problem(remote_host=host)


def test_a_list_allows_what_it_names_and_nothing_else() -> None:
    allowed = Allowed(("10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "P1.example."), has_token=True)
    for host in ("10.255.0.1", "::ffff:10.0.0.1", "192.0.2.7", "2001:db8::5", "p1.example", "p1.EXAMPLE."):
        assert host in allowed
    for host in ("11.0.0.1", "192.0.2.8", "127.0.0.1", "localhost", "p2.example", "x.p1.example", "10.0"):
        assert host not in allowed


@pytest.mark.parametrize("host", ["10.0.0.1/8", "10.0.0.0/33", "a b", "", "http://a", "a:5", "*"])
def test_an_entry_that_is_none_is_the_operators_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"peer\.allowed_hosts\[1\]"):
        Allowed(("a.example", host), has_token=False)
