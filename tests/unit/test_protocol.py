"""The protocol's page is complete and true: its conversation is held with a real server, byte by byte."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import get_args

import msgspec
import pytest
from server_kit import FINGERPRINT, LAYOUT, ServerInside, soon
from test_docs import DOCS, built

from kvferry.connector import arena, frame, wire
from kvferry.connector.handshake import (
    ANSWER_BYTES,
    GREETING_BYTES,
    VERDICT_BYTES,
    Peer,
    check_verdict,
    client_answer,
    make_greeting,
    server_verdict,
)
from kvferry.connector.layout import BlockLayout
from kvferry.connector.server import index, stream
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.listener import HANDSHAKE_S
from kvferry.connector.server.mapping import MAX_GRANTS

PAGE = "protocol.md"
TEXT = (DOCS / "reference" / PAGE).read_text()
BUILT = built(PAGE)
MESSAGES = (*get_args(wire.Request), *get_args(wire.Reply))
TOKEN = "correct-horse-battery-staple"


def section(page: str, name: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(name)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize("message", [*MESSAGES, wire.ArenaShape, BlockLayout], ids=lambda one: one.__name__)
def test_every_message_is_described_with_all_its_fields(message: type[msgspec.Struct]) -> None:
    name = message.__struct_config__.tag or message.__name__
    text = section(BUILT, str(name))
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows][: len(message.__struct_fields__)] == list(message.__struct_fields__)
    assert [field for field, packed, meaning in rows if not packed.strip() or not meaning.strip()] == []
    assert re.search(r"^[A-Z]", text, re.MULTILINE) or message in (BlockLayout,)


def test_there_are_messages_of_both_sides() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES) > 25


def test_every_refusal_says_what_then() -> None:
    assert [code for code in get_args(wire.RefusalCode) if f"| `{code}` |" not in TEXT] == []


@pytest.mark.parametrize(
    "statement",
    [
        f"describes protocol version {wire.PROTOCOL_VERSION}.",
        f"The server's greeting, {GREETING_BYTES} bytes",
        f"The client's answer, {ANSWER_BYTES} bytes",
        f"The server's verdict, {VERDICT_BYTES} bytes",
        f"at most {wire.MAX_MESSAGE_BYTES:,}",
        f"at most {wire.MAX_KEYS:,} of them",
        f"at most {MAX_GRANTS:,} leases",
        f"together may take {HANDSHAKE_S:.0f} seconds",
        f"{frame.HEADER_BYTES} bytes of header",
        f"nothing was asked for {stream._IDLE_S / 60:.0f} minutes",
        f"leaves more than {index._MAX_UNREAD_BYTES >> 20} MiB of answers",
        f"| 0 | 8 | magic, `{arena._MAGIC.decode()}` |",
        f"| 8 | 4 | version, {arena._VERSION} |",
        f"| {arena._TABLE_OFFSET} | 8 for each slot |",
    ],
)
def test_sizes_and_bounds_are_those_of_the_code(statement: str) -> None:
    assert statement in TEXT


def said() -> list[tuple[str, bytes]]:
    """Who says what in the page's conversation."""
    blocks = re.findall(r"^```hex\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    conversation = []
    for block in blocks:
        (who,) = {line[0] for line in block.splitlines()}
        conversation.append((who, bytes.fromhex("".join(line[1:] for line in block.splitlines()))))
    return conversation


def test_the_pages_handshake_is_that_of_the_code_and_of_its_own_words() -> None:
    (_, greeting), (_, answer), (_, verdict) = said()[:3]
    assert greeting == make_greeting(greeting[12:])
    assert answer == client_answer(greeting, TOKEN, answer[11:43])
    access = Access(ServerConfig(listen=("tcp://127.0.0.1:0",), token=TOKEN))
    assert server_verdict(greeting, answer, access, Peer("the page", True), lambda: True).reply == verdict
    check_verdict(greeting, answer, verdict, TOKEN)
    proof = hmac.new(TOKEN.encode(), b"client" + greeting + answer[:43], hashlib.sha256).digest()
    assert answer[43:] == proof
    proof = hmac.new(TOKEN.encode(), b"server" + greeting + answer, hashlib.sha256).digest()
    assert verdict == b"\0" + proof


def test_the_pages_opening_means_what_it_says() -> None:
    (_, hello), (_, welcome) = said()[3:5]
    assert wire.message_length(hello[:4]) == len(hello) - 4
    assert wire.decode_request(hello[4:]) == wire.Hello(
        mode="stream", fingerprint=FINGERPRINT, layout=LAYOUT, engine="example"
    )
    assert wire.message_length(welcome[:4]) == len(welcome) - 4
    assert isinstance(wire.decode_reply(welcome[4:]), wire.Welcome)


def test_a_real_server_answers_as_the_page_says() -> None:
    payload = bytes(LAYOUT.payload_bytes)
    header = said()[9][1]
    assert len(header) == frame.HEADER_BYTES
    with ServerInside() as inside:
        channel = inside.client().channel
        for who, expected in said()[5:]:
            if who == "C":
                follows = [payload] if expected == header else []
                channel.send_bytes([expected, *follows], soon())
            else:
                assert channel.receive(len(expected), soon()) == expected
        assert channel.receive(len(header) + len(payload), soon()) == header + payload


def test_links_to_messages_lead_somewhere() -> None:
    headings = {heading.lower() for heading in re.findall(r"^#+ (.+)$", BUILT, re.MULTILINE)}
    anchors = {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    assert [link for link in re.findall(r"\]\(#([\w-]+)\)", BUILT) if link not in anchors] == []
