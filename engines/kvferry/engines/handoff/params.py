"""Parameters: what a router says of a request's handoff, and what it is answered.

The fields are those of vLLM's own connector (``kv_transfer_params``), so that its routers work unchanged. They come
from whoever may send requests, so nothing in them is believed: types, lengths and numbers are checked here, and a host
is dialled only where the operator allows it. Parameters that cannot be used are ignored, with a reason, and the request
is computed.

Pure functions and values; any thread.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvferry.connector.address import is_loopback, parse_address
from kvferry.connector.errors import ConfigError
from kvferry.engines.jobs import PeerSource

__all__ = ["MAX_NAME", "MAX_TOKENS", "Allowed", "Wish", "answer_params", "read_params"]

MAX_NAME = 256
"""Characters of an engine's or a request's name."""
MAX_TOKENS = 1 << 28
_MAX_HOST = 255
_MAX_PAGES = 1 << 17
"""As many as one message of the side channel may name."""
_MAX_PAGE_ID = 1 << 31
_MAX_TP = 1024

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Wish(NamedTuple):
    """What is wished for a request."""

    hands_over: bool = False
    """Another engine will ask for its pages."""
    source: PeerSource | None = None
    """Who holds its pages; None: nobody."""
    problem: str = ""
    """Why what was said of a source is ignored, one line; empty when it is not."""


class Allowed:
    """Which hosts may be dialled because a request says so.

    Args:
        hosts: Names, addresses and networks (``peer.allowed_hosts``). None given: this machine, and with a token any.
        has_token: Whether the other side has to prove that it knows the token.

    Raises:
        ConfigError: An entry is neither of the three.
    """

    def __init__(self, hosts: Sequence[str], has_token: bool) -> None:
        self._names: set[str] = set()
        self._networks: list[_Network] = []
        self._is_any = not hosts and has_token
        self._is_loopback = not hosts
        for index, host in enumerate(hosts):
            self._add(host, f"peer.allowed_hosts[{index}]")

    def __contains__(self, host: str) -> bool:
        if self._is_any or (self._is_loopback and is_loopback(host)):
            return True
        ip = _ip(host)
        if ip is not None and any(ip in network for network in self._networks):
            return True
        return _canonical(host) in self._names

    def _add(self, host: str, path: str) -> None:
        try:
            network = ipaddress.ip_network(_ip(host) or host)
        except ValueError as error:
            if "/" in host:
                raise ConfigError(path, f"{host!r} is no network: {error}", "write 10.0.0.0/8") from error
            parse_address(f"tcp://{_bracketed(host)}:1", path)
            self._names.add(_canonical(host))
        else:
            self._networks.append(network)


def read_params(params: object, allowed: Allowed) -> Wish:
    """Return what a request's ``kv_transfer_params`` wish for.

    Args:
        params: As they came; None for none. Fields that are not known are left alone, as are nulls.
        allowed: Which hosts may be dialled.
    """
    if params is None:
        return Wish()
    if not isinstance(params, Mapping):
        return Wish(problem=f"kv_transfer_params is a {type(params).__name__}, not a mapping")
    hands_over = params.get("do_remote_decode") is True
    try:
        for field in ("do_remote_decode", "do_remote_prefill"):
            if not isinstance(params.get(field), bool | None):
                raise _Unusable(f"{field} is neither true nor false")
        if params.get("do_remote_prefill") is not True:
            return Wish(hands_over)
        return Wish(hands_over, _source(params, allowed))
    except _Unusable as error:
        return Wish(hands_over, problem=str(error))


def answer_params(
    *,
    host: str,
    port: int,
    engine_id: str,
    request_id: str,
    pages: Sequence[int],
    num_tokens: int,
    tp_size: int,
) -> dict[str, object]:
    """Return what an engine answers that holds a request's pages for another.

    Args:
        host: Where its side channel is reached.
        port: Likewise.
        engine_id: Its name.
        request_id: The request's name in its ``HandoffTable``.
        pages: The page ids; routers look at them, the other engine asks the side channel.
        num_tokens: Tokens whose KV the pages hold.
        tp_size: Its number of tensor-parallel ranks.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(pages)],
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
        "tp_size": tp_size,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": num_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
    }


class _Unusable(Exception):
    """Why parameters cannot be used."""


def _source(params: Mapping[object, object], allowed: Allowed) -> PeerSource:
    required = ("remote_host", "remote_port", "remote_engine_id", "remote_request_id")
    missing = [field for field in required if params.get(field) is None]
    if missing:
        raise _Unusable(f"{', '.join(missing)} missing: is the router one for prefill and decode?")
    if params.get("transfer_mode") not in (None, "pull"):
        raise _Unusable("transfer_mode is not pull, which is the only one")
    for field in ("dcp_size", "pp_size"):
        if _number(params, field, 1, 1 << 16) > 1:
            raise _Unusable(f"{field} is over 1, which cannot be read from")
    _number(params, "tp_size", 1, _MAX_TP)
    _check_pages(params.get("remote_block_ids"))
    port = _number(params, "remote_port", 1, 65535)
    return PeerSource(
        host=_host(params, port, allowed),
        port=port,
        engine_id=_name(params, "remote_engine_id"),
        request_id=_name(params, "remote_request_id"),
        num_tokens=_number(params, "remote_num_tokens", 0, MAX_TOKENS),
    )


def _host(params: Mapping[object, object], port: int, allowed: Allowed) -> str:
    host = _name(params, "remote_host", _MAX_HOST)
    try:
        parse_address(f"tcp://{_bracketed(host)}:{port}", "remote_host")
    except ConfigError as error:
        raise _Unusable(f"remote_host {host!r} is neither a host's name nor an address") from error
    if host not in allowed:
        raise _Unusable(
            f"remote_host {host!r} is not allowed: list it in peer.allowed_hosts, or give both engines a token"
        )
    return host


def _name(params: Mapping[object, object], field: str, longest: int = MAX_NAME) -> str:
    value = params.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise _Unusable(f"{field} is no text of 1 to {longest} printable characters")
    return value


def _number(params: Mapping[object, object], field: str, least: int, most: int) -> int:
    """Return a number; ``least`` where there is none."""
    value = params.get(field)
    if value is None:
        return least
    if type(value) is not int or not least <= value <= most:
        raise _Unusable(f"{field} is no number from {least} to {most}")
    return value


def _check_pages(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or not all(isinstance(group, list | tuple) for group in value):
        raise _Unusable("remote_block_ids is no list of lists")
    if len(value) != 1:
        raise _Unusable(f"remote_block_ids has {len(value)} cache groups; one is what can be read")
    (group,) = value
    if len(group) > _MAX_PAGES:
        raise _Unusable(f"remote_block_ids names more than {_MAX_PAGES} pages")
    if not all(type(page) is int and 0 <= page < _MAX_PAGE_ID for page in group):
        raise _Unusable("remote_block_ids holds something that is no page")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _canonical(name: str) -> str:
    return name.lower().removesuffix(".")


def _ip(host: str) -> _Ip | None:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip
