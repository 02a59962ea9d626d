"""Request records: written cheaply, bounded, private, and read without trusting them."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from kvferry.connector import rotation
from kvferry.connector.cli.explain import HANDOFF_REASONS, REASONS, story, summary
from kvferry.connector.config import ExplainConfig
from kvferry.connector.errors import HandoffFailed
from kvferry.connector.explain import (
    MAX_ENGINES,
    ExplainLog,
    NoLog,
    RequestRecord,
    explain_directory,
    open_log,
    read_records,
)
from kvferry.connector.rotation import RotatedFile, file_name, prune
from kvferry.connector.service import MissReason

MIB = 1 << 20


def record(number: int, **fields: object) -> RequestRecord:
    return RequestRecord(request_id=f"req-{number}", engine="e0", arrived=float(number), **fields)  # type: ignore[arg-type]


def written(directory: Path, *records: RequestRecord, engine: str = "e0", max_bytes: int = MIB) -> ExplainLog:
    log = ExplainLog(directory, engine, max_bytes)
    for one in records:
        log.record(one)
    log.close()
    return log


# --- writing ------------------------------------------------------------------------------------------


def test_what_was_recorded_can_be_read_back(tmp_path: Path) -> None:
    first = record(
        1,
        model="m",
        block_tokens=64,
        prompt_tokens=1752,
        matched_tokens={"disk": 832},
        missing_block=13,
        missing_reason="never_stored",
        wait_ms=1.5,
    )
    log = written(tmp_path, first, record(2))
    assert read_records(tmp_path).records == [first, record(2)]
    assert log.dropped == 0


def test_files_are_private_even_where_the_directory_was_not(tmp_path: Path) -> None:
    directory = tmp_path / "explain"
    directory.mkdir(mode=0o755)
    written(directory, record(1))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (path,) = directory.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_engines_files_stay_within_their_bound(tmp_path: Path) -> None:
    bound = 8192
    log = ExplainLog(tmp_path, "e0", bound)
    for number in range(1000):
        log.record(record(number))
    log.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound
    newest = read_records(tmp_path).records
    assert newest[-1] == record(999)
    assert len(newest) > 50


def test_an_engine_that_starts_again_continues_its_file(tmp_path: Path) -> None:
    written(tmp_path, record(1))
    written(tmp_path, record(2))
    assert [one.request_id for one in read_records(tmp_path).records] == ["req-1", "req-2"]


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    written(tmp_path, record(1))
    (path,) = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(b'{"request_id": "req-2", "arr')
    assert read_records(tmp_path).unreadable == 1
    written(tmp_path, record(3))
    reading = read_records(tmp_path)
    assert [one.request_id for one in reading.records] == ["req-1", "req-3"]
    assert reading.unreadable == 1


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path: Path) -> None:
    log = ExplainLog(tmp_path, "e0", MIB)
    log.close()
    for number in range(10):
        log.record(record(number))
    assert log.dropped == 10


def test_a_write_that_fails_is_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ExplainLog(tmp_path, "e0", MIB, logging.getLogger("test"))
    log.record(record(1, model="\ud800"))  # not encodable
    log.close()
    assert log.dropped == 1
    assert [message.levelname for message in caplog.records] == ["WARNING"]


def test_a_directory_that_cannot_be_used_is_a_warning_not_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    config = ExplainConfig(directory=str(tmp_path / "file" / "explain"))
    log = open_log(config, "e0", {}, logging.getLogger("test"))
    log.record(record(1))
    log.close()
    assert isinstance(log, NoLog)
    assert "cannot be used" in caplog.text


def test_records_that_are_off_leave_no_file(tmp_path: Path) -> None:
    directory = tmp_path / "explain"
    log = open_log(ExplainConfig(enabled=False, directory=str(directory)), "e0", {})
    log.record(record(1))
    log.close()
    assert not directory.exists()


def test_the_default_directory_follows_xdg() -> None:
    config = ExplainConfig()
    assert explain_directory(config, {"XDG_STATE_HOME": "/s"}) == Path("/s/kvferry/explain")
    assert explain_directory(config, {"HOME": "/home/me"}) == Path("/home/me/.local/state/kvferry/explain")
    assert explain_directory(ExplainConfig(directory="/d"), {}) == Path("/d")


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["../../etc/passwd", "a/b", "", "ü", "x" * 300, ".hidden", "a b"])
def test_any_engine_id_makes_a_harmless_file_name(identity: str) -> None:
    name = file_name(identity)
    assert "/" not in name
    assert not name.startswith(".")
    assert len(name) < 100


def test_engine_ids_that_look_alike_keep_their_own_files() -> None:
    assert len({file_name(identity) for identity in ("a/b", "a_b", "a b")}) == 3


def test_a_link_in_the_files_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("untouched")
    (tmp_path / "e0.jsonl").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        ExplainLog(tmp_path, "e0", MIB)
    assert target.read_text() == "untouched"


def test_only_the_newest_engines_files_are_kept_and_none_in_use(tmp_path: Path) -> None:
    oldest = RotatedFile(tmp_path / "in-use.jsonl", MIB)
    oldest.append([b"{}\n"])
    os.utime(tmp_path / "in-use.jsonl", (1, 1))
    for number in range(MAX_ENGINES + 3):
        path = tmp_path / f"engine-{number:02}.jsonl"
        path.write_bytes(b"{}\n")
        path.with_name(path.name + ".1").write_bytes(b"{}\n")
        os.utime(path, (1000 + number, 1000 + number))
    prune(tmp_path, MAX_ENGINES)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "in-use.jsonl" in left
    assert left[0] == "engine-03.jsonl"
    assert len(left) == 2 * MAX_ENGINES + 1
    oldest.close()


# --- reading what nobody promised to have written -------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'{"request_id": 3}',
        b'{"request_id": "x", "prompt_tokens": 1e400}',
        b'{"request_id": "x", "matched_tokens": {"disk": "many"}}',
        b"[" * 50_000,
        b'"' + b"x" * (2 * rotation.MAX_LINE_BYTES),
        b"\xff\xfe\x00",
        b'{"request_id": "\xff"}',
    ],
)
def test_hostile_lines_are_skipped_and_counted(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, record(1))
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(line + b"\n" + good)
    reading = read_records(tmp_path)
    assert reading.records == [record(1)]
    assert reading.unreadable == 1


def test_a_field_of_a_later_version_does_not_hide_the_record(tmp_path: Path) -> None:
    (tmp_path / "e0.jsonl").write_text(
        json.dumps({"request_id": "req-1", "arrived": 1.0, "invented": 1}) + "\n"
    )
    (found,) = read_records(tmp_path).records
    assert found.request_id == "req-1"


def test_the_newest_of_all_engines_are_found_oldest_first(tmp_path: Path) -> None:
    written(tmp_path, record(1), record(4), engine="a")
    written(tmp_path, record(2), record(3), engine="b")
    assert [one.request_id for one in read_records(tmp_path, last=3).records] == ["req-2", "req-3", "req-4"]


def test_a_request_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    written(tmp_path, record(1), record(2), record(21))
    assert [one.request_id for one in read_records(tmp_path, "req-2").records] == ["req-2", "req-21"]


def test_an_absent_directory_holds_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "absent").records == []


# --- telling ------------------------------------------------------------------------------------------


def test_the_story_of_a_partial_hit() -> None:
    text = "\n".join(
        story(
            record(
                1,
                block_tokens=64,
                prompt_tokens=1752,
                matched_tokens={"disk": 768, "host": 64},
                offered_tokens=832,
                loaded_tokens=832,
                missing_block=13,
                missing_reason="never_stored",
                bytes_loaded=19 * MIB,
                wait_ms=12.3,
                load_ms=4.5,
                saved_blocks=14,
                bytes_saved=20 * MIB,
            )
        )
    )
    assert "832 of 1,752 tokens loaded; found 768 from disk and 64 from host" in text
    assert "first missing block 13 (from token 832): never stored" in text
    assert "loaded 19 MiB: waited 12.3 ms, copied 4.5 ms" in text
    assert "saved 14 blocks, 20 MiB" in text


def test_the_story_of_a_load_that_was_not_worth_it() -> None:
    fields = {
        "missing_block": 4,
        "missing_reason": "slower_than_recompute",
        "expected_ms": 850.0,
        "recompute_ms": 120.0,
        "declined_blocks": {"s3": 40},
        "regret_ms": 12.5,
        "regret_tier": "disk",
    }
    text = "\n".join(story(record(1, block_tokens=64, **fields)))
    assert "first missing block 4 (from token 256): computing it was faster than loading it" in text
    assert "expected of what the tiers hold: loading 850.0 ms, computing 120.0 ms" in text
    assert "left 40 blocks in s3: computing them was faster" in text
    assert "lost 12.5 ms by waiting for disk" in text


def test_the_story_of_a_request_that_another_engine_prefilled() -> None:
    fields = {"prompt_tokens": 1752, "matched_tokens": {"peer": 1752}, "loaded_tokens": 1751, "peer_ms": 41.2}
    text = "\n".join(story(record(1, **fields)))
    assert "1,751 of 1,752 tokens loaded; found 1,752 from peer" in text
    assert "the other engine's pages took 41.2 ms" in text


def test_the_story_of_a_handoff_that_failed() -> None:
    fields = {"prompt_tokens": 1752, "failed": True, "peer_failed": "expired", "peer_ms": 3.0}
    lines = list(story(record(1, **fields)))
    assert (
        "  no handoff: the other engine's promise to hold the pages had ended; the prompt was computed here"
        in lines
    )
    assert not any("a load failed" in line or "took" in line for line in lines), "one line says it"


def test_the_summary_counts_why_handoffs_failed() -> None:
    records = [record(1, peer_failed="expired"), record(2, peer_failed="expired"), record(3)]
    text = "\n".join(summary(records))
    assert "why handoffs failed:\n  2  the other engine's promise" in text
    assert "handoffs" not in "\n".join(summary([record(1), record(2)]))


def test_the_summary_adds_up_regret() -> None:
    records = [record(1, regret_ms=12.5, regret_tier="disk"), record(2, regret_ms=2.0, regret_tier="s3")]
    assert "14.5 ms lost to waits that took longer than computing" in "\n".join(summary(records))
    assert "lost" not in "\n".join(summary([record(1)]))


def test_the_story_of_a_request_that_was_left_alone() -> None:
    assert list(story(record(1, passed="prompt embeddings")))[1:] == ["  left alone: prompt embeddings"]


def test_a_story_never_sends_control_characters_to_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\u202e\n"
    text = "\n".join(
        story(
            RequestRecord(
                request_id=hostile,
                model=hostile,
                engine=hostile,
                missing_block=1,
                missing_reason=hostile,
                declined_blocks={hostile: 1},
                regret_ms=1.0,
                regret_tier=hostile,
                peer_failed=hostile,
            )
        )
    )
    assert not any(character in text for character in "\x1b\x07\u202e")


@pytest.mark.parametrize("arrived", [1e300, -1e300, float("inf")])
def test_an_impossible_time_is_shown_as_unknown(arrived: float) -> None:
    assert "unknown time" in next(story(RequestRecord(request_id="x", arrived=arrived)))


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"passed": "prompt embeddings"}, "passed"),
        ({"failed": True, "loaded_tokens": 64}, "failed"),
        ({}, "miss"),
        ({"loaded_tokens": 64}, "hit"),
        ({"loaded_tokens": 64, "missing_block": 1}, "partial"),
    ],
)
def test_outcomes(fields: dict[str, object], outcome: str) -> None:
    assert record(1, **fields).outcome == outcome


def test_the_summary_counts_reasons() -> None:
    records = [
        record(1, prompt_tokens=100, loaded_tokens=64, missing_block=1, missing_reason="evicted"),
        record(2, prompt_tokens=100, missing_block=0, missing_reason="evicted"),
        record(3, prompt_tokens=100, passed="prompt embeddings"),
    ]
    text = "\n".join(summary(records))
    assert "3 requests: 1 partial, 1 miss, 1 passed" in text
    assert "2  evicted" in text
    assert "1  prompt embeddings" in text


def test_every_reason_for_a_miss_has_its_words() -> None:
    assert set(REASONS) == {reason.value for reason in MissReason} - {"none"}


def test_every_reason_of_a_failed_handoff_has_its_words() -> None:
    assert set(HANDOFF_REASONS) == set(HandoffFailed.REASONS)
