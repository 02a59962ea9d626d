"""What is wrong with an S3 tier's configuration is said once, at the start, by the name of the option."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from s3_server import (
    BUCKET,
    LOGGER,
    OWNER,
    OpenS3,
    client,
    free_port,
    make_certificate,
    make_context,
    options_for,
)
from s3_stand_in import error, stand_in
from test_s3_tier import empty_frame, key_of, load_verified, sealed_frame

from kvferry.connector.errors import ConfigError, TierUnavailable
from kvferry.connector.schema import decode, is_secret
from kvferry.connector.tier import Outcome
from kvferry.plugins.s3.check import check
from kvferry.plugins.s3.opening import open_s3_tier
from kvferry.plugins.s3.options import S3Options, addressing_style, place_of
from kvferry.plugins.s3.weed import READER, Weed, running_weed

AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
)


@pytest.fixture(autouse=True)
def _no_aws_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may have credentials of their own: they are not found here."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def secure_weed(
    tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path, Path]
) -> Iterator[Weed]:
    """A server with TLS, which also answers to ``bucket.s3.test``."""
    directory = tmp_path_factory.mktemp("weed") / "secure"
    with running_weed(directory, certificate=certificate[1:], domain="s3.test") as server:
        yield server


def round_trip(weed: Weed, open_s3: OpenS3, **options: object) -> None:
    tier = open_s3(weed, **options)
    assert tier.store([sealed_frame(key_of(1))]) == [Outcome.OK]
    assert load_verified(tier, [key_of(1)]) == [Outcome.OK]


# ---- mistakes


MISTAKES: dict[str, tuple[dict[str, object], str, str]] = {
    "unknown access key": ({"access_key_id": "nobody"}, "access_key_id", "does not know these credentials"),
    "wrong secret": ({"secret_access_key": "hush-hush"}, "secret_access_key", "does not belong"),
    "half a pair": ({"secret_access_key": ""}, "secret_access_key", "half a pair"),
    "no credentials": ({"access_key_id": "", "secret_access_key": ""}, "access_key_id", "no credentials"),
    "no such bucket": ({"bucket": "not-there"}, "bucket", "no bucket 'not-there'"),
    "no bucket": ({"bucket": ""}, "bucket", "required"),
    "impossible bucket": ({"bucket": "a b"}, "bucket", "cannot be the name"),
    "two buckets": ({"url": "s3://other"}, "bucket", "twice"),
    "no url of a bucket": ({"bucket": "", "url": "https://x/y"}, "url", "s3://bucket/prefix"),
    "secret in the url": ({"bucket": "", "url": "s3://me:pw@x/y"}, "url", "more than a bucket"),
    "prefix that climbs": ({"prefix": "a/../b"}, "prefix", "'..'"),
    "unknown profile": ({"profile": "nobody"}, "profile", "nobody"),
    "no endpoint": ({"endpoint_url": "minio"}, "endpoint_url", "Invalid endpoint"),
    "password in the endpoint": ({"endpoint_url": "http://me:hush-hush@minio"}, "endpoint_url", "a password"),
    "no CA file": ({"ca_bundle": "/nonexistent.pem"}, "ca_bundle", "cannot be read"),
    "no certificate": ({"ca_bundle": __file__}, "ca_bundle", "no certificate"),
    "may only read": (
        dict(zip(("access_key_id", "secret_access_key"), READER, strict=True)),
        "bucket",
        "not written",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_that_names_the_option(mistake: str, weed: Weed) -> None:
    changes, field, why = MISTAKES[mistake]
    with pytest.raises(ConfigError) as raised:
        open_s3_tier(options_for(weed, **changes), make_context())
    assert raised.value.path == f"tiers.s3.{field}"
    assert why in str(raised.value)
    for secret in ("hush-hush", OWNER[1], READER[1]):
        assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "code", "field", "why"),
    [
        (301, "PermanentRedirect", "region", "another region"),
        (400, "AuthorizationHeaderMalformed", "region", "another region"),
        (403, "AccessDenied", "bucket", "not written"),
    ],
)
def test_a_mistake_that_only_writing_shows(status: int, code: str, field: str, why: str, weed: Weed) -> None:
    """boto3 follows a redirect to another region by itself, obstore does not."""
    with stand_in(error(status, code), takes_probe=False) as (endpoint, _):
        with pytest.raises(ConfigError) as raised:
            open_s3_tier(options_for(weed, endpoint_url=endpoint), make_context())
    assert raised.value.path == f"tiers.s3.{field}"
    assert why in str(raised.value)


def test_https_to_a_port_without_tls(weed: Weed) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.s3\.endpoint_url: .* does not speak TLS"):
        open_s3_tier(options_for(weed, endpoint_url=weed.endpoint.replace("http", "https")), make_context())


def test_http_to_a_port_with_tls(secure_weed: Weed) -> None:
    plain = secure_weed.tls_endpoint.replace("https", "http")
    with pytest.raises(ConfigError, match=r"tiers\.s3\.endpoint_url: .* expects TLS"):
        open_s3_tier(options_for(secure_weed, endpoint_url=plain), make_context())


def test_a_certificate_of_an_unknown_ca(secure_weed: Weed) -> None:
    options = options_for(secure_weed, endpoint_url=secure_weed.tls_endpoint)
    with pytest.raises(ConfigError, match=r"tiers\.s3\.ca_bundle: .* is not trusted"):
        open_s3_tier(options, make_context())


def test_the_ca_of_somebody_else(secure_weed: Weed, tmp_path: Path) -> None:
    other = make_certificate(tmp_path)[0]
    options = options_for(secure_weed, endpoint_url=secure_weed.tls_endpoint, ca_bundle=str(other))
    with pytest.raises(ConfigError, match=r"tiers\.s3\.ca_bundle: .* is not trusted \(check that this file"):
        open_s3_tier(options, make_context())


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="bucket"):
        decode(S3Options, {"buckett": "x"}, "tiers[0]")


def test_the_secret_is_masked_and_the_key_id_is_not() -> None:
    fields = {field.name for field in msgspec.structs.fields(S3Options)}
    assert {name for name in fields if is_secret(name)} == {"secret_access_key"}


def test_without_the_packages_it_says_what_to_install() -> None:
    """In a process of its own, so that nothing was imported before."""
    told = subprocess.run([sys.executable, "-c", WITHOUT_OBSTORE], check=True, capture_output=True, text=True)
    lines = told.stdout.splitlines()
    assert lines[0] == "tiers.s3.type: boto3 and obstore are not installed (pip install 'kvferry[s3]')"
    assert lines[1] == "error pip install 'kvferry[s3]'"


WITHOUT_OBSTORE = """
import sys, types
sys.modules["obstore"] = None
from kvferry.connector.errors import ConfigError
from kvferry.plugins import s3
(tier_type,) = s3.kvferry_tier_types()
options = tier_type.options(bucket="blocks")
try:
    tier_type.create(options, types.SimpleNamespace(name="s3"))
except ConfigError as error:
    print(error)
for finding in tier_type.check(options, "s3"):
    print(finding.level, finding.hint)
"""


# ---- ways that work


def test_tls_with_the_ca_of_the_option(
    secure_weed: Weed, certificate: tuple[Path, Path, Path], open_s3: OpenS3
) -> None:
    round_trip(secure_weed, open_s3, endpoint_url=secure_weed.tls_endpoint, ca_bundle=str(certificate[0]))


def test_tls_with_the_ca_of_the_aws_configuration(
    secure_weed: Weed,
    certificate: tuple[Path, Path, Path],
    open_s3: OpenS3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    round_trip(secure_weed, open_s3, endpoint_url=secure_weed.tls_endpoint)


def test_tls_without_verifying(secure_weed: Weed, open_s3: OpenS3) -> None:
    round_trip(secure_weed, open_s3, endpoint_url=secure_weed.tls_endpoint, verify=False)


@pytest.mark.parametrize("addressing", ["path", "virtual"])
def test_both_ways_to_name_the_bucket(
    addressing: str, secure_weed: Weed, open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stands in as an HTTP proxy, which takes whole addresses, so that no DNS is needed."""
    monkeypatch.setenv("HTTP_PROXY", secure_weed.endpoint)
    monkeypatch.setenv("http_proxy", secure_weed.endpoint)
    endpoint = f"http://s3.test:{secure_weed.port}"
    round_trip(secure_weed, open_s3, endpoint_url=endpoint, addressing=addressing, prefix=f"by-{addressing}")
    listed = client(secure_weed.endpoint).list_objects_v2(Bucket=BUCKET, Prefix=f"by-{addressing}/")
    assert listed["KeyCount"] == 1


@pytest.mark.parametrize(
    ("bucket", "endpoint", "style"),
    [
        ("blocks", "https://s3.eu-west-1.amazonaws.com", "virtual"),
        ("blocks.example", "https://s3.eu-west-1.amazonaws.com", "path"),
        ("blocks", "https://minio.example:9000", "path"),
        ("blocks", "https://s3.amazonaws.com.example.org", "path"),
    ],
)
def test_auto_addressing(bucket: str, endpoint: str, style: str) -> None:
    assert addressing_style(S3Options(bucket=bucket), bucket, endpoint) == style
    assert addressing_style(S3Options(bucket=bucket, addressing="path"), bucket, endpoint) == "path"


def test_credentials_and_endpoint_of_the_environment(
    weed: Weed, open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", OWNER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OWNER[1])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", weed.endpoint)
    round_trip(weed, open_s3, access_key_id="", secret_access_key="", endpoint_url="", region="")


def test_a_profile(weed: Weed, open_s3: OpenS3, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        f"[cache]\naws_access_key_id = {OWNER[0]}\naws_secret_access_key = {OWNER[1]}\n"
    )
    (tmp_path / "config").write_text(f"[profile cache]\nregion = us-east-1\nendpoint_url = {weed.endpoint}\n")
    round_trip(
        weed, open_s3, access_key_id="", secret_access_key="", endpoint_url="", region="", profile="cache"
    )


def test_credentials_are_renewed_while_the_tier_is_open(
    weed: Weed, open_s3: OpenS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role's credentials expire; whatever gives them is asked again."""
    asked = tmp_path / "asked"
    program = tmp_path / "credentials.py"
    program.write_text(CREDENTIAL_PROGRAM.format(asked=str(asked), access_key=OWNER[0], secret=OWNER[1]))
    (tmp_path / "config").write_text(
        f"[profile role]\nregion = us-east-1\ncredential_process = {sys.executable} {program}\n"
    )
    monkeypatch.setattr("kvferry.plugins.s3.access._CREDENTIALS_TTL", timedelta(seconds=1))
    tier = open_s3(weed, access_key_id="", secret_access_key="", profile="role", prefix="renewed")
    end = time.monotonic() + 30
    while len(asked.read_text()) < 4:
        assert tier.store([sealed_frame(key_of(1))]) == [Outcome.OK]
        assert time.monotonic() < end, "the credentials are never asked for again"


CREDENTIAL_PROGRAM = """
import datetime, json
open({asked!r}, "a").write("x")
soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=1)
names = dict(AccessKeyId={access_key!r}, SecretAccessKey={secret!r}, Expiration=soon.isoformat())
print(json.dumps(dict(Version=1, **names)))
"""


def test_options_win_over_the_environment_on_both_paths(
    weed: Weed, open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reads variables too: one that it takes and boto3 does not would split the two."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    round_trip(weed, open_s3)


def test_the_probe_leaves_nothing_behind(weed: Weed, open_s3: OpenS3) -> None:
    open_s3(weed, prefix="probed")
    assert client(weed.endpoint).list_objects_v2(Bucket=BUCKET, Prefix="probed").get("KeyCount") == 0


# ---- a store that does not answer


def test_an_unreachable_store_is_a_warning_and_the_tier_opens(
    weed: Weed, open_s3: OpenS3, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING, LOGGER.name):
        tier = open_s3(weed, endpoint_url=endpoint)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{endpoint}/{BUCKET} cannot be used now: it cannot be reached" in caplog.text
    with pytest.raises(TierUnavailable, match="no connection"):
        tier.load([empty_frame(key_of(1))])


def test_a_frozen_store_is_a_warning_within_seconds(own_weed: Weed, open_s3: OpenS3) -> None:
    own_weed.freeze()
    started = time.monotonic()
    open_s3(own_weed, make_context(deadline_s=1.0))
    assert time.monotonic() - started < 5


# ---- kvferry doctor


def levels(weed: Weed, **changes: object) -> list[tuple[str, str]]:
    return [(found.level, found.text) for found in check(options_for(weed, **changes), "s3")]


def test_doctor_says_what_works_and_warns_of_blocks_that_never_expire(own_weed: Weed) -> None:
    found = levels(own_weed)
    assert found[0][0] == "ok"
    assert "answers; region us-east-1, path-style, credentials: explicit" in found[0][1]
    assert ("warn", f"{own_weed.endpoint} is not encrypted") in found
    assert any(level == "warn" and "blocks stay for ever" in text for level, text in found)
    rule = {"ID": "blocks", "Status": "Enabled", "Filter": {"Prefix": "kvferry/"}, "Expiration": {"Days": 7}}
    put_lifecycle(own_weed, rule)
    assert levels(own_weed)[-1] == ("ok", f"blocks expire after 7 days, as {BUCKET!r} is configured")
    assert levels(own_weed, prefix="elsewhere")[-1][0] == "warn"


def put_lifecycle(weed: Weed, rule: dict[str, Any]) -> None:
    client(weed.endpoint).put_bucket_lifecycle_configuration(
        Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]}
    )


def test_doctor_reports_mistakes_as_errors_and_an_absent_store_as_a_warning(weed: Weed) -> None:
    ((level, text),) = levels(weed, secret_access_key="hush-hush")
    assert level == "error"
    assert "secret_access_key" in text
    assert "hush-hush" not in text
    ((level, text),) = levels(weed, endpoint_url=f"http://127.0.0.1:{free_port()}")
    assert level == "warn"
    assert "cannot be reached" in text


def test_a_place_in_the_bucket() -> None:
    place = place_of(S3Options(url="s3://blocks/team/a"), "s3")
    assert place.name(b"\x01" * 32, key_of(1)).startswith("team/a/01010101/")
    assert (
        place_of(S3Options(bucket="blocks", prefix=""), "s3").name(b"\x01" * 32, key_of(1))[:9] == "01010101/"
    )
