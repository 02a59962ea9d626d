"""Which credential is which tenant, and what a server refuses to start with."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kvferry.connector.errors import AccessRefused, ConfigError
from kvferry.connector.handshake import Grant, Peer
from kvferry.connector.server.access import Access, default_socket
from kvferry.connector.server.config import ServerConfig, ServerTlsConfig, TenantConfig

TOKEN = "the token of the nameless"
SEARCH = "the token of search"
CHAT = "the token of chat"
LOOPBACK = "tcp://127.0.0.1:7070"
UNIX = "unix:///run/kvferry/kvferry.sock"
TLS = ServerTlsConfig(certificate="server.pem", client_ca="ca.pem")

LOCAL = Peer("a process", is_loopback=True, uid=os.geteuid())
SOMEBODY = Peer("a process of another user", is_loopback=True, uid=os.geteuid() + 1)
NEAR = Peer("127.0.0.1:1", is_loopback=True)
FAR = Peer("10.0.0.1:1", is_loopback=False)


def certified(name: str) -> Peer:
    return Peer("10.0.0.1:1", is_loopback=False, common_name=name)


def access(
    *tenants: TenantConfig, listen: str = LOOPBACK, token: str = "", tls: ServerTlsConfig = ServerTlsConfig()
) -> Access:
    return Access(ServerConfig(listen=(listen,), token=token, tls=tls), tenants)


def offering(token: str) -> Callable[[str], bool]:
    return lambda known: known == token


# --- who is let in ------------------------------------------------------------------------------------

TENANTS = (TenantConfig(name="search", token=SEARCH), TenantConfig(name="chat", token=CHAT))
CERTIFIED = (
    TenantConfig(name="search", certificate="search.internal", token=SEARCH),
    TenantConfig(name="chat", certificate="chat.internal"),
)


@pytest.mark.parametrize("peer", [LOCAL, SOMEBODY, NEAR, FAR], ids=lambda peer: peer.name)
@pytest.mark.parametrize(("token", "tenant"), [(TOKEN, ""), (SEARCH, "search"), (CHAT, "chat")])
def test_a_token_tells_the_tenant_wherever_it_comes_from(peer: Peer, token: str, tenant: str) -> None:
    assert access(*TENANTS, token=TOKEN).admit(peer, offering(token)) == Grant(tenant, token)


@pytest.mark.parametrize("peer", [LOCAL, SOMEBODY, NEAR, FAR, certified("x")], ids=lambda peer: peer.name)
@pytest.mark.parametrize("tenants", [(), TENANTS])
def test_a_wrong_token_is_refused_also_where_none_is_needed(
    peer: Peer, tenants: tuple[TenantConfig, ...]
) -> None:
    with pytest.raises(AccessRefused, match="wrong token"):
        access(*tenants).admit(peer, offering("something else"))


def test_all_tokens_are_tried_so_that_time_does_not_tell_which() -> None:
    tried: list[str] = []

    def proves(token: str) -> bool:
        tried.append(token)
        return token == TOKEN

    access(*TENANTS, token=TOKEN).admit(FAR, proves)
    assert sorted(tried) == sorted([TOKEN, SEARCH, CHAT])


@pytest.mark.parametrize("tenants", [(), TENANTS])
def test_the_servers_own_user_needs_no_token_on_a_unix_socket(tenants: tuple[TenantConfig, ...]) -> None:
    assert access(*tenants, token=TOKEN).admit(LOCAL, None) == Grant("", "")


def test_another_user_does() -> None:
    with pytest.raises(AccessRefused, match="not the server's user"):
        access().admit(SOMEBODY, None)


def test_without_any_credential_loopback_is_open_and_nothing_else() -> None:
    assert access().admit(NEAR, None) == Grant("", "")
    with pytest.raises(AccessRefused):
        access().admit(FAR, None)


@pytest.mark.parametrize("open_again", [access(token=TOKEN), access(*TENANTS)], ids=["token", "tenants"])
def test_with_any_credential_loopback_is_closed(open_again: Access) -> None:
    with pytest.raises(AccessRefused):
        open_again.admit(NEAR, None)


def test_a_certificate_tells_the_tenant() -> None:
    gate = access(*CERTIFIED, listen="tls://0.0.0.0:7070", tls=TLS)
    assert gate.admit(certified("chat.internal"), None).tenant == "chat"
    assert gate.admit(certified("search.internal"), None).tenant == "search"
    assert gate.admit(certified("search.internal"), offering(SEARCH)).tenant == "search"
    for stranger in ("other.internal", "CHAT.internal", "chat", ""):
        with pytest.raises(AccessRefused, match="no tenant is called"):
            gate.admit(certified(stranger), None)


def test_a_certificate_and_a_token_of_two_tenants_are_refused() -> None:
    gate = access(*CERTIFIED, listen="tls://0.0.0.0:7070", tls=TLS)
    with pytest.raises(AccessRefused, match="two different tenants"):
        gate.admit(certified("chat.internal"), offering(SEARCH))


def test_a_certificate_without_a_tenant_is_enough_where_nothing_else_is_configured() -> None:
    remote = "tls://0.0.0.0:7070"
    assert access(listen=remote, tls=TLS).admit(certified("anybody"), None) == Grant("", "")
    with pytest.raises(AccessRefused):
        access(listen=remote, tls=TLS, token=TOKEN).admit(certified("anybody"), None)


def test_no_message_holds_a_token() -> None:
    gate = access(*TENANTS, token=TOKEN)
    for peer in (SOMEBODY, NEAR, FAR, certified("x")):
        for proves in (None, offering("something else")):
            with pytest.raises(AccessRefused) as raised:
                gate.admit(peer, proves)
            assert not any(token in str(raised.value) for token in (TOKEN, SEARCH, CHAT))


# --- what a server refuses to start with --------------------------------------------------------------

EVERYWHERE = ("tcp://0.0.0.0:7070", "tcp://[::]:7070", "tcp://10.0.0.1:7070", "tcp://cache.internal:7070")


@pytest.mark.parametrize("listen", EVERYWHERE)
def test_an_address_that_others_reach_needs_a_token(listen: str) -> None:
    with pytest.raises(ConfigError, match="refuses to start") as raised:
        access(listen=listen)
    assert raised.value.path == "server.listen[0]"
    assert "KVFERRY_TOKEN" in raised.value.hint
    assert access(listen=listen, token=TOKEN).addresses
    assert access(*TENANTS, listen=listen).addresses


def test_certificates_protect_tls_and_not_tcp() -> None:
    assert access(listen="tls://0.0.0.0:7070", tls=TLS).addresses
    with pytest.raises(ConfigError, match="refuses to start"):
        access(listen="tcp://0.0.0.0:7070", tls=TLS)


def test_tls_alone_tells_nobody_from_anybody() -> None:
    with pytest.raises(ConfigError, match="refuses to start") as raised:
        access(listen="tls://0.0.0.0:7070", tls=ServerTlsConfig(certificate="server.pem"))
    assert "client_ca" in raised.value.hint


def test_one_open_address_among_safe_ones_is_enough_to_refuse() -> None:
    server = ServerConfig(listen=(UNIX, LOOPBACK, "tcp://10.0.0.1:7070"))
    with pytest.raises(ConfigError) as raised:
        Access(server)
    assert raised.value.path == "server.listen[2]"


@pytest.mark.parametrize(
    ("listen", "token", "warning"),
    [
        (UNIX, "", ""),
        (UNIX, TOKEN, ""),
        (LOOPBACK, TOKEN, ""),
        (LOOPBACK, "", "every user of this machine"),
        ("tcp://10.0.0.1:7070", TOKEN, "not encrypted"),
        ("tls://10.0.0.1:7070", TOKEN, ""),
    ],
)
def test_what_is_allowed_but_should_be_known_is_said_once(listen: str, token: str, warning: str) -> None:
    tls = ServerTlsConfig(certificate="server.pem")
    warnings = access(listen=listen, token=token, tls=tls).warnings
    assert len(warnings) == bool(warning)
    assert warning in "".join(warnings)


def tenant(name: str = "search", token: str = SEARCH, certificate: str = "") -> TenantConfig:
    return TenantConfig(name=name, token=token, certificate=certificate)


@pytest.mark.parametrize(
    ("tenants", "token", "path", "why"),
    [
        ([tenant(), tenant(token=CHAT)], "", "tenants[1].name", "is taken"),
        ([tenant(name="")], "", "tenants[0].name", "found ''"),
        ([tenant(name="a/b")], "", "tenants[0].name", "found 'a/b'"),
        ([tenant(name="default")], "", "tenants[0].name", "server.token"),
        ([tenant(token="")], "", "tenants[0]", "nobody can be tenant 'search'"),
        ([tenant(), tenant(name="chat")], "", "tenants[1].token", "same token"),
        ([tenant()], SEARCH, "tenants[0].token", "same token"),
        ([tenant(token="short")], "", "tenants[0].token", "can be guessed"),
        ([], "fifteen letters", "server.token", "can be guessed"),
        ([], TOKEN + "\n", "server.token", "white space"),
        ([], TOKEN + "\0", "server.token", "control characters"),
        ([tenant(certificate="search.internal")], "", "tenants[0].certificate", "nobody can show it"),
    ],
)
def test_credentials_that_are_ambiguous_weak_or_incomplete_are_refused(
    tenants: list[TenantConfig], token: str, path: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why.replace("(", r"\(")) as raised:
        access(*tenants, token=token)
    assert raised.value.path == path
    assert not any(secret in str(raised.value) for secret in (TOKEN, SEARCH, CHAT, "short", "fifteen"))


def test_two_tenants_with_one_certificate_are_refused() -> None:
    twins = [tenant(token="", certificate="x"), tenant(name="chat", token="", certificate="x")]
    with pytest.raises(ConfigError) as raised:
        access(*twins, listen="tls://127.0.0.1:7070", tls=TLS)
    assert raised.value.path == "tenants[1].certificate"


def test_tls_needs_the_servers_certificate() -> None:
    with pytest.raises(ConfigError) as raised:
        access(listen="tls://127.0.0.1:7070")
    assert raised.value.path == "server.tls.certificate"


def test_an_address_is_given_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        Access(ServerConfig(listen=(LOOPBACK, LOOPBACK)))


def test_without_listen_the_socket_lies_among_runtime_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_socket({}) == "unix:///run/kvferry/kvferry.sock"
    assert default_socket({"XDG_RUNTIME_DIR": ""}) == "unix:///run/kvferry/kvferry.sock"
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}) == "unix:///run/user/7/kvferry.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert [str(address) for address in Access(ServerConfig()).addresses] == [
        "unix:///run/user/7/kvferry.sock"
    ]
