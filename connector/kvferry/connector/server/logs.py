"""Logs of ``kvferry serve``: lines of text for people, or one JSON object a line for machines.

Everything goes to standard error. What code gives a log call as ``extra`` (``tenant``, ``model``, ``engine``,
``connection``) becomes a key of the object. Of a value that is no plain datum only the type is written, so that a
configuration that was passed by mistake cannot show a secret.

``configure`` is called once, on the main thread, before any other thread starts.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import datetime
from typing import Literal

from kvferry.connector.errors import ConfigError

__all__ = ["configure"]

_CHATTY = ("uvicorn", "uvicorn.access", "uvicorn.error", "opentelemetry", "urllib3", "botocore", "asyncio")
"""Libraries of which only warnings are wanted."""


def configure(log_format: Literal["text", "json"], level: str = "INFO") -> None:
    """Replace the process' log handlers by one.

    Args:
        log_format: ``text`` or ``json``.
        level: The least of kvferry's own messages; of other libraries warnings are shown.

    Raises:
        ConfigError: What JSON needs is not installed, or there is no such level.
    """
    if level not in logging.getLevelNamesMapping():
        raise ConfigError("log level", f"{level!r} is none", "write DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json_formatter() if log_format == "json" else _text_formatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("kvferry").setLevel(level)
    for name in _CHATTY:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def _text_formatter() -> logging.Formatter:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    return formatter


def _json_formatter() -> logging.Formatter:
    try:
        from pythonjsonlogger.json import JsonFormatter
    except ImportError as error:
        raise ConfigError(
            "server.log_format", "'json' needs python-json-logger", "pip install 'kvferry[server]'"
        ) from error
    return JsonFormatter(
        ["levelname", "name", "threadName", "message"],
        rename_fields={
            "levelname": "level",
            "name": "logger",
            "threadName": "thread",
            "exc_info": "exception",
            "stack_info": "stack",
        },
        timestamp="time",
        json_default=_shown,
    )


def _shown(value: object) -> str:
    """Return what is written of a value that JSON has no form for."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return f"<{type(value).__name__}>"
