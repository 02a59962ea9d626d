"""What ``kvferry serve`` writes to standard error, in both forms."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from server_kit import ServerInside, prefix, wait_until

from kvferry.connector.errors import ConfigError
from kvferry.connector.server import logs
from kvferry.connector.server.config import ServerConfig, ServerSettings, TenantConfig

LOGGER = logging.getLogger("kvferry.server")
SECRET = "do-not-show-this-token"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    own = logging.getLogger("kvferry").level
    others = {name: logging.getLogger(name).level for name in logs._CHATTY}
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("kvferry").setLevel(own)
    for name, was in others.items():
        logging.getLogger(name).setLevel(was)


def test_a_line_of_text_tells_when_how_grave_where_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    LOGGER.info("engine %r maps the cache", "vllm-0")
    written = capsys.readouterr()
    time, rest = written.err.split(" ", 1)
    assert rest == "INFO kvferry.server engine 'vllm-0' maps the cache\n"
    assert abs(datetime.fromisoformat(time) - datetime.now().astimezone()) < timedelta(minutes=1)
    assert written.out == ""


def one_object(text: str) -> dict[str, object]:
    (line,) = text.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_json_has_one_object_a_line_with_the_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    LOGGER.warning(
        "two\nlines of %s", "text", extra={"tenant": "research", "model": b"\xab\xcd", "blocks": 7}
    )
    found = one_object(capsys.readouterr().err)
    time = datetime.fromisoformat(str(found.pop("time")))
    assert abs(time - datetime.now().astimezone()) < timedelta(minutes=1)
    assert found == {
        "level": "WARNING",
        "logger": "kvferry.server",
        "thread": "MainThread",
        "message": "two\nlines of text",
        "tenant": "research",
        "model": "abcd",
        "blocks": 7,
    }


def test_what_a_server_says_of_an_engine_names_tenant_model_and_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("json")
    with ServerInside() as inside:
        engine = inside.engine(inside.pool("research"))
        engine.reserve(prefix(2))
        engine.die()
        wait_until("its slots are free", lambda: len(inside.ended) == 1)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    about = {"tenant": "research", "model": "66666666", "engine": "engine-0"}
    for text in ("engine 'engine-0' has gone", "took back 2 blocks"):
        (found,) = [one for one in said if one["message"].startswith(text)]
        assert about.items() <= found.items()
    (opened,) = [one for one in said if one["message"].startswith("opened the cache research/66666666")]
    assert (opened["tenant"], opened["model"]) == ("research", "66666666")


def test_json_keeps_an_exception_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    try:
        raise ValueError("the cause")
    except ValueError:
        LOGGER.exception("it failed")
    found = one_object(capsys.readouterr().err)
    assert found["message"] == "it failed"
    assert str(found["exception"]).endswith("ValueError: the cause")


def test_a_configuration_that_is_logged_by_mistake_shows_no_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("json")
    settings = ServerSettings(
        server=ServerConfig(token=SECRET), tenants=(TenantConfig(name="a", token=SECRET),)
    )
    LOGGER.info("it starts", extra={"settings": settings, "tenants": list(settings.tenants)})
    found = one_object(capsys.readouterr().err)
    assert found["settings"] == "<ServerSettings>"
    assert found["tenants"] == ["<TenantConfig>"]
    assert SECRET not in json.dumps(found)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_only_warnings_of_others_are_shown(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json" if log_format == "json" else "text")
    for name in ("uvicorn.error", "somebody.else"):
        logging.getLogger(name).info("chatter of %s", name)
        logging.getLogger(name).warning("trouble of %s", name)
    LOGGER.debug("chatter of ours")
    written = capsys.readouterr().err
    assert "chatter" not in written
    assert [f"trouble of {name}" in written for name in ("uvicorn.error", "somebody.else")] == [True, True]


def test_warnings_of_python_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("something is deprecated", stacklevel=1)
    assert "something is deprecated" in str(one_object(capsys.readouterr().err)["message"])


def test_it_may_be_called_again(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    logs.configure("json", "DEBUG")
    LOGGER.debug("once")
    assert one_object(capsys.readouterr().err)["message"] == "once"


def test_a_level_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="'LOUD' is none"):
        logs.configure("text", "LOUD")


def test_what_json_needs_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonjsonlogger.json", None)
    logs.configure("text")
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[server\]'"):
        logs.configure("json")
