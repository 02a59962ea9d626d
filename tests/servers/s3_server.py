"""Real S3 servers for the tests (SeaweedFS, see ``kvferry.plugins.s3.weed``), tiers on them, and a client
for what happens behind a tier's back."""

from __future__ import annotations

import logging
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from botocore.config import Config

from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import TierContext
from kvferry.plugins.s3.opening import open_s3_tier
from kvferry.plugins.s3.options import S3Options
from kvferry.plugins.s3.tier import S3Tier
from kvferry.plugins.s3.weed import BUCKET, OWNER, Weed, running_weed

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2)
"""15,360 bytes of payload in a slot of 16 KiB."""
FINGERPRINT = bytes(range(32))
LOGGER = logging.getLogger("kvferry.test.s3")


def make_context(
    *, layout: BlockLayout = LAYOUT, fingerprint: bytes = FINGERPRINT, deadline_s: float = 10.0
) -> TierContext:
    def no_policy(name: str) -> object:
        raise AssertionError(f"an S3 tier evicts nothing, it has no use for {name}")

    return TierContext(
        name="s3",
        layout=layout,
        fingerprint=fingerprint,
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=no_policy,
        logger=LOGGER,
        deadline_s=deadline_s,
    )


def options_for(weed: Weed, **changes: object) -> S3Options:
    return msgspec.convert(weed.options(**changes), S3Options)


def client(endpoint: str, keys: tuple[str, str] = OWNER) -> Any:
    """Return a plain boto3 client, for what a test does behind a tier's back."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        config=Config(connect_timeout=2, read_timeout=10, s3={"addressing_style": "path"}),
    )


def names_below(endpoint: str, prefix: str) -> list[str]:
    listed = client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [found["Key"] for found in listed.get("Contents", [])]


def make_certificate(directory: Path) -> tuple[Path, Path, Path]:
    """Return PEM files of a fresh CA, and of a certificate for 127.0.0.1 that it signed, and its key."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *new,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=kvferry test CA",
        "-days",
        "7",
    )
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "7")
    openssl("x509", "-req", "-in", "server.csr", "-out", "server.pem", *signing)
    return directory / "ca.pem", directory / "server.pem", directory / "server.key"


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """The server of all tests that leave it as it is."""
    with running_weed(tmp_path_factory.mktemp("weed") / "shared") as server:
        yield server


@pytest.fixture
def own_weed(tmp_path: Path) -> Iterator[Weed]:
    """A server for one test alone, to kill and to freeze."""
    with running_weed(tmp_path / "weed") as server:
        yield server


@pytest.fixture
def s3_tier(weed: Weed, request: pytest.FixtureRequest) -> Iterator[S3Tier]:
    """A tier on the shared server, below a prefix of its own."""
    tier = open_s3_tier(options_for(weed, prefix=prefix_of(request)), make_context())
    yield tier
    tier.close()


def prefix_of(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


OpenS3 = Callable[..., S3Tier]


@pytest.fixture
def open_s3() -> Iterator[OpenS3]:
    """Opens tiers that are closed with the test: ``open_s3(weed, deadline_s=..., **options)``."""
    opened: list[S3Tier] = []

    def make(weed: Weed, context: TierContext | None = None, **options: object) -> S3Tier:
        opened.append(open_s3_tier(options_for(weed, **options), context or make_context()))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
