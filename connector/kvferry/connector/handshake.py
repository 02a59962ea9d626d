"""The handshake: who is there, before anything else is listened to.

Three pieces of fixed size, then messages (``wire``). Numbers are little-endian:

    server   magic ``KVFERRYS``, lowest and highest protocol version (u16 each), 32 random bytes
    client   magic ``KVFERRYC``, protocol version (u16), kind of credential (u8), 32 random bytes, proof
    server   verdict (u8), proof

A proof is HMAC-SHA256 under the token, of ``client`` or ``server`` and of everything that was sent before it. So the
token never travels, an answer that was overheard is of no use in another connection, nobody can make the two ends
agree on an older version, and the server, too, shows that it knows the token. Without a token a proof is zeros.
Refusals are a number; the sentences for people are made here, at the end that shows them.

An eavesdropper can try tokens against a proof, which is hopeless only if the token is long and random: ``access``
refuses short ones. What follows the handshake is protected by ``tls://`` alone.

The functions that make and check pieces are pure; the two drivers block, each until its deadline.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvferry.connector import wire
from kvferry.connector.channel import Channel
from kvferry.connector.errors import AccessRefused, WireError

__all__ = [
    "ANSWER_BYTES",
    "CREDENTIAL_NONE",
    "CREDENTIAL_TOKEN",
    "GREETING_BYTES",
    "VERDICT_BYTES",
    "Busy",
    "Gatekeeper",
    "Grant",
    "Peer",
    "Verdict",
    "check_verdict",
    "client_answer",
    "client_handshake",
    "make_greeting",
    "server_handshake",
    "server_verdict",
]

_SERVER_MAGIC = b"KVFERRYS"
_CLIENT_MAGIC = b"KVFERRYC"
_GREETING = struct.Struct("<8sHH32s")
_ANSWER = struct.Struct("<8sHB32s32s")
_VERDICT = struct.Struct("<B32s")
GREETING_BYTES = _GREETING.size
ANSWER_BYTES = _ANSWER.size
VERDICT_BYTES = _VERDICT.size
CREDENTIAL_NONE = 0
CREDENTIAL_TOKEN = 1
_PROOF_BYTES = 32
_NO_PROOF = bytes(_PROOF_BYTES)
_OK, _CREDENTIAL, _VERSION, _BUSY = range(4)


class Busy(ConnectionError):
    """The server has as many connections as it may; trying again later makes sense."""


class Peer(NamedTuple):
    """What is known of a client before it has said anything."""

    name: str
    """For logs: where it comes from."""
    is_loopback: bool
    """It came to a listener that only this machine reaches."""
    uid: int | None = None
    """User of the process at the other end of a unix socket."""
    common_name: str | None = None
    """Of its certificate, which was verified."""


class Grant(NamedTuple):
    """A credential that was accepted."""

    tenant: str
    token: str
    """The one that was proved; empty where something else told the tenant."""


class Gatekeeper(Protocol):
    """Decides who is let in; ``server.access.Access`` is one."""

    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        """Return what a client is granted.

        Args:
            peer: Who it is, apart from what it says.
            proves: Tells whether the client has proved that it knows a token; None if it offers none.

        Raises:
            AccessRefused: It is not let in. The message is for the server's log.
        """


class Verdict(NamedTuple):
    """What a server makes of a client's answer."""

    reply: bytes
    """To be sent to the client; empty for somebody who is no client."""
    tenant: str
    error: WireError | AccessRefused | Busy | None


def make_greeting(nonce: bytes) -> bytes:
    """Return what a server says first.

    Args:
        nonce: 32 random bytes, never used before.
    """
    return _GREETING.pack(_SERVER_MAGIC, wire.PROTOCOL_VERSION, wire.PROTOCOL_VERSION, nonce)


def client_answer(greeting: bytes, token: str, nonce: bytes) -> bytes:
    """Return a client's answer to a greeting.

    Args:
        greeting: ``GREETING_BYTES`` that came from the server.
        token: The credential; empty for none.
        nonce: 32 random bytes, never used before.

    Raises:
        WireError: The server is no kvferry server, or none of a version that goes with this one.
    """
    magic, lowest, highest, _ = _GREETING.unpack(greeting)
    if magic != _SERVER_MAGIC:
        raise WireError("no kvferry cache server listens there; check the address")
    if not lowest <= wire.PROTOCOL_VERSION <= highest:
        raise WireError(
            f"the server speaks protocol versions {lowest} to {highest}, this client {wire.PROTOCOL_VERSION}; "
            "update the older of the two"
        )
    kind = CREDENTIAL_TOKEN if token else CREDENTIAL_NONE
    answer = _ANSWER.pack(_CLIENT_MAGIC, wire.PROTOCOL_VERSION, kind, nonce, _NO_PROOF)
    unproved = answer[:-_PROOF_BYTES]
    return unproved + (_proof(token, b"client", greeting + unproved) if token else _NO_PROOF)


def server_verdict(
    greeting: bytes, answer: bytes, access: Gatekeeper, peer: Peer, has_room: Callable[[], bool]
) -> Verdict:
    """Return what a server makes of a client's answer.

    Args:
        greeting: What was sent to this client.
        answer: ``ANSWER_BYTES`` that came from it.
        access: Decides.
        peer: Who the client is.
        has_room: Takes up room for a client that is let in; False if there is none.
    """
    magic, version, kind, _, proof = _ANSWER.unpack(answer)
    if magic != _CLIENT_MAGIC:
        return Verdict(b"", "", WireError("what connected is no kvferry client"))
    if version != wire.PROTOCOL_VERSION or kind not in (CREDENTIAL_NONE, CREDENTIAL_TOKEN):
        error = WireError(f"the client asks for protocol version {version} and credential kind {kind}")
        return Verdict(_VERDICT.pack(_VERSION, _NO_PROOF), "", error)

    def proves(token: str) -> bool:
        expected = _proof(token, b"client", greeting + answer[:-_PROOF_BYTES])
        return hmac.compare_digest(expected, proof)

    try:
        grant = access.admit(peer, proves if kind == CREDENTIAL_TOKEN else None)
    except AccessRefused as refusal:
        return Verdict(_VERDICT.pack(_CREDENTIAL, _NO_PROOF), "", refusal)
    if not has_room():
        busy = Busy("there are as many connections as there may be")
        return Verdict(_VERDICT.pack(_BUSY, _NO_PROOF), "", busy)
    own = _proof(grant.token, b"server", greeting + answer) if grant.token else _NO_PROOF
    return Verdict(_VERDICT.pack(_OK, own), grant.tenant, None)


def check_verdict(greeting: bytes, answer: bytes, verdict: bytes, token: str) -> None:
    """Return if the server lets the client in, and is the one it is taken for.

    Args:
        greeting: What the server said first.
        answer: What the client answered.
        verdict: ``VERDICT_BYTES`` that came from the server.
        token: The credential; empty for none.

    Raises:
        AccessRefused: One of the two does not accept the other's credential.
        WireError: The server refuses the client's version, or speaks nonsense.
        Busy: The server has no room now.
    """
    code, proof = _VERDICT.unpack(verdict)
    if code == _CREDENTIAL:
        raise AccessRefused(
            "the server refuses the token: is it the right one? (KVFERRY_TOKEN, or token)"
            if token
            else "the server asks for a credential: set KVFERRY_TOKEN, or token"
        )
    if code == _VERSION:
        raise WireError(f"the server refuses protocol version {wire.PROTOCOL_VERSION}; update the older side")
    if code == _BUSY:
        raise Busy("the server has as many connections as it may (server.max_connections)")
    if code != _OK:
        raise WireError(f"the server's verdict is {code}, which means nothing")
    expected = _proof(token, b"server", greeting + answer) if token else _NO_PROOF
    if not hmac.compare_digest(expected, proof):
        raise AccessRefused("the server does not know the token: is it the right one, and the right server?")


def client_handshake(channel: Channel, token: str, deadline: float) -> None:
    """Introduce a client to a server.

    Args:
        channel: Freshly connected; TLS is already there where it has to be.
        token: The credential; empty for none.
        deadline: ``time.monotonic`` until which it may take.

    Raises:
        AccessRefused: One of the two does not accept the other's credential.
        WireError: It is no server of ours, or of another version.
        TimeoutError, OSError: As of the channel; ``Busy`` when the server has no room.
    """
    greeting = channel.receive(GREETING_BYTES, deadline)
    answer = client_answer(greeting, token, os.urandom(32))
    channel.send_bytes([answer], deadline)
    check_verdict(greeting, answer, channel.receive(VERDICT_BYTES, deadline), token)


def server_handshake(
    channel: Channel,
    access: Gatekeeper,
    peer: Peer,
    deadline: float,
    has_room: Callable[[], bool] = lambda: True,
) -> str:
    """Find out who a client is, and tell it what was decided.

    Args:
        channel: Freshly accepted; TLS is already there where it has to be.
        access: Decides.
        peer: What is known without asking.
        deadline: ``time.monotonic`` until which it may take.
        has_room: Takes up room for a client that is let in; False if there is none.

    Returns:
        The tenant.

    Raises:
        AccessRefused: Its credential is not accepted.
        WireError: It is no client of ours, or of another version.
        TimeoutError, OSError: As of the channel; ``Busy`` when there is no room.
    """
    greeting = make_greeting(os.urandom(32))
    channel.send_bytes([greeting], deadline)
    verdict = server_verdict(greeting, channel.receive(ANSWER_BYTES, deadline), access, peer, has_room)
    if verdict.reply:
        channel.send_bytes([verdict.reply], deadline)
    if verdict.error is not None:
        raise verdict.error
    return verdict.tenant


def _proof(token: str, who: bytes, said: bytes) -> bytes:
    return hmac.digest(token.encode(), who + said, "sha256")
