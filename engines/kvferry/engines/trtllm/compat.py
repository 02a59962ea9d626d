"""What differs between TensorRT-LLM releases, in one place.

The interface moved, grew and was renamed from release to release, and release candidates differ among themselves.
So nothing here looks at a version string to decide: a dialect is told by what the interface's module has, a
field by whether it is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from kvferry.engines.installed import TENSORRT_LLM, distribution_of

__all__ = [
    "Installed",
    "RequestDelta",
    "cache_salt",
    "fact",
    "found",
    "honoured_tokens",
    "installed",
    "interface",
    "mpi_rank",
    "request_deltas",
]

_INTERFACES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)
"""Where the base classes are, newest first."""
_PACKAGE = "tensorrt_llm"
_HONOURED = ("py_num_connector_matched_tokens", "num_connector_matched_tokens")


class Installed(NamedTuple):
    """The TensorRT-LLM that is there."""

    version: str
    dialect: str
    """``1.1``, ``1.2``, ``1.3`` or ``v2``: the form of the connector interface."""


class RequestDelta(NamedTuple):
    """What a step tells about a request, in one form for all dialects."""

    request_id: int
    is_new: bool
    """Reported for the first time since its pages were made: tokens and pages are all there are."""
    tokens: Sequence[int]
    pages: Sequence[int]
    """Of the one layer group."""
    computed: int
    """Tokens with valid KV before the step, as the engine says it."""
    scheduled: int
    """Tokens that the step computes; 0 where the dialect does not say."""


def interface() -> ModuleType:
    """Return the module with the connector's base classes.

    Raises:
        ImportError: TensorRT-LLM is not there, or has no connector interface.
    """
    for name in _INTERFACES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    raise ImportError("TensorRT-LLM has no KV cache connector interface; kvferry needs 1.1 or newer")


def installed() -> Installed:
    """Return the version and the dialect of the TensorRT-LLM that is there; imports it.

    Raises:
        ImportError: As ``interface``.
    """
    module = interface()
    fields = getattr(getattr(module, "RequestData", None), "__dataclass_fields__", {})
    has = {*dir(module.KvCacheConnectorWorker), *fields}.__contains__
    distribution = distribution_of(TENSORRT_LLM)
    version = (
        distribution.version
        if distribution is not None
        else str(getattr(importlib.import_module(_PACKAGE), "__version__", "unknown"))
    )
    return Installed(version, _dialect(module.__name__, has))


def found() -> Installed | None:
    """Return the same from package metadata and source files, importing nothing; None where TensorRT-LLM is not there.

    The dialect is empty where there is no connector interface.
    """
    distribution, spec = distribution_of(TENSORRT_LLM), importlib.util.find_spec(_PACKAGE)
    if distribution is None or spec is None:
        return None
    version = distribution.version
    for name in _INTERFACES:
        for folder in spec.submodule_search_locations or ():
            path = Path(folder, *name.split(".")[1:]).with_suffix(".py")
            if path.is_file():
                words = set(re.findall(r"\w+", path.read_text()))
                return Installed(version, _dialect(name, words.__contains__))
    return Installed(version, "")


def mpi_rank() -> int:
    """Return which rank of the engine this process is."""
    return int(importlib.import_module(_PACKAGE).mpi_rank())


def request_deltas(output: object) -> Iterator[RequestDelta]:
    """Yield what a ``SchedulerOutput`` says, new requests first."""
    for name, is_new in (("new_requests", True), ("cached_requests", False)):
        for data in getattr(output, name, None) or ():
            yield RequestDelta(
                request_id=data.request_id,
                is_new=is_new,
                tokens=getattr(data, "new_tokens", None) or (),
                pages=_pages(data),
                computed=data.computed_position,
                scheduled=getattr(data, "num_scheduled_tokens", None) or 0,
            )


def cache_salt(request: object) -> str:
    """Return whom a request shares its cache with; empty for everybody without a salt.

    Releases with a text keep it as it is, so that equal salts of two engines mean the same. Older ones only have
    a number, which is nobody else's.
    """
    salt = getattr(request, "cache_salt", None)
    if salt:
        return str(salt)
    number = getattr(request, "cache_salt_id", None)
    return "" if number is None else f"cache_salt_id\0{number}"


def honoured_tokens(request: object, offered: int) -> int:
    """Return how many of the offered tokens the engine counts as computed. Known once pages are made."""
    for name in _HONOURED:
        honoured = fact(request, name)
        if isinstance(honoured, int):
            return max(0, min(honoured, offered))
    return offered


def fact(request: object, name: str) -> object:
    """Return an attribute of a request that is a property in one binding and a method in another; None if absent."""
    value = getattr(request, name, None)
    return value() if inspect.isroutine(value) else value


def _pages(data: object) -> Sequence[int]:
    pages: Sequence[int] = getattr(data, "new_block_ids", None) or ()
    if pages:
        return pages
    groups = getattr(data, "new_block_ids_by_layer_group", None) or ()
    by_group = list(groups.values()) if isinstance(groups, dict) else list(groups)
    return by_group[0] if len(by_group) == 1 else ()


def _dialect(module_name: str, has: Callable[[str], bool]) -> str:
    if has("register_kv_cache_layout"):
        return "v2"
    if module_name == _INTERFACES[0]:
        return "1.3"
    return "1.2" if has("num_scheduled_tokens") else "1.1"
