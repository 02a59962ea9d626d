"""boto3, awscrt and obstore as ways to move blocks to and from an S3 store: throughput and client CPU time.

    python benchmarks/s3_data_paths.py [--endpoint URL --bucket NAME] [--megabytes N]

Every path does what the S3 tier has to do: a PUT of header and body that lie in two places, and a GET into
buffers that are there already. Without an endpoint a SeaweedFS is started on this machine; it shares the
processors, so that throughput says less than the CPU seconds, which count this process alone. boto3 and
obstore's ``threads`` run one thread per request, obstore's ``loop`` and awscrt drive all from one.
"""

from __future__ import annotations

import asyncio
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import boto3
import click
import obstore
from botocore.config import Config
from obstore.store import S3Store

from kvferry.plugins.s3.weed import BUCKET, OWNER, running_weed

MIB = 1 << 20
HEADER_BYTES = 256
SIZES = (1 * MIB, 4 * MIB, 16 * MIB)
IN_FLIGHT = (8, 32)
REGION = "us-east-1"


class Target(NamedTuple):
    endpoint: str
    bucket: str
    access_key: str
    secret: str


class Block(NamedTuple):
    name: str
    header: memoryview
    body: memoryview

    @property
    def size(self) -> int:
        return len(self.header) + len(self.body)


class DataPath(Protocol):
    """Moves blocks, many at once. ``load`` must fill the buffers."""

    def store(self, blocks: list[Block]) -> None: ...

    def load(self, blocks: list[Block]) -> None: ...


class Joined(io.RawIOBase):
    """Reads header and body as one file, without joining them in memory."""

    def __init__(self, block: Block) -> None:
        self._block, self._at = block, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._block.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        part = self._block.header[self._at :] or self._block.body[max(0, self._at - HEADER_BYTES) :]
        count = min(len(into), len(part))
        into[:count] = part[:count]
        self._at += count
        return count


def fill(block: Block, start: int, part: memoryview) -> None:
    in_header = part[: max(0, HEADER_BYTES - start)]
    block.header[start : start + len(in_header)] = in_header
    at = start + len(in_header) - HEADER_BYTES
    block.body[at : at + len(part) - len(in_header)] = part[len(in_header) :]


class Boto3:
    def __init__(self, target: Target, in_flight: int) -> None:
        config = Config(
            max_pool_connections=in_flight,
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._bucket = target.bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=target.endpoint,
            region_name=REGION,
            aws_access_key_id=target.access_key,
            aws_secret_access_key=target.secret,
            config=config,
        )
        self._threads = ThreadPoolExecutor(in_flight)

    def store(self, blocks: list[Block]) -> None:
        list(self._threads.map(self._put, blocks))

    def load(self, blocks: list[Block]) -> None:
        list(self._threads.map(self._get, blocks))

    def _put(self, block: Block) -> None:
        self._client.put_object(
            Bucket=self._bucket,
            Key=block.name,
            Body=io.BufferedReader(Joined(block), MIB),
            ContentLength=block.size,
        )

    def _get(self, block: Block) -> None:
        raw = self._client.get_object(Bucket=self._bucket, Key=block.name)["Body"]._raw_stream
        for buffer in (block.header, block.body):
            filled = 0
            while filled < len(buffer):
                count = raw.readinto(buffer[filled:])
                assert count, "the object ends early"
                filled += count


class Obstore:
    def __init__(self, target: Target, in_flight: int) -> None:
        self._in_flight = in_flight
        self._store = S3Store(
            target.bucket,
            endpoint=target.endpoint,
            region=REGION,
            access_key_id=target.access_key,
            secret_access_key=target.secret,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )


class ObstoreThreads(Obstore):
    def __init__(self, target: Target, in_flight: int) -> None:
        super().__init__(target, in_flight)
        self._threads = ThreadPoolExecutor(in_flight)

    def store(self, blocks: list[Block]) -> None:
        list(self._threads.map(self._put, blocks))

    def load(self, blocks: list[Block]) -> None:
        list(self._threads.map(self._get, blocks))

    def _put(self, block: Block) -> None:
        obstore.put(self._store, block.name, [block.header, block.body], use_multipart=False)

    def _get(self, block: Block) -> None:
        fill(block, 0, memoryview(obstore.get_range(self._store, block.name, start=0, length=block.size)))


class ObstoreLoop(Obstore):
    """As the tier does it: a bounded read, in parts as they come."""

    def store(self, blocks: list[Block]) -> None:
        asyncio.run(self._all(self._put, blocks))

    def load(self, blocks: list[Block]) -> None:
        asyncio.run(self._all(self._get, blocks))

    async def _all(self, work: Callable[[Any], Any], items: Sequence[Any]) -> None:
        slots = asyncio.Semaphore(self._in_flight)

        async def one(item: Any) -> None:
            async with slots:
                await work(item)

        await asyncio.gather(*map(one, items))

    async def _put(self, block: Block) -> None:
        await obstore.put_async(self._store, block.name, [block.header, block.body], use_multipart=False)

    async def _get(self, block: Block) -> None:
        result = await obstore.get_async(self._store, block.name, options={"range": (0, block.size + 1)})
        filled = 0
        async for part in result.stream(min_chunk_size=4 * MIB):
            fill(block, filled, memoryview(part))
            filled += len(part)
        assert filled == block.size


class ObstoreLoopWhole(ObstoreLoop):
    """The object in one piece, at the price that nothing bounds what is read."""

    async def _get(self, block: Block) -> None:
        data = await obstore.get_range_async(self._store, block.name, start=0, length=block.size)
        fill(block, 0, memoryview(data))


class Awscrt:
    def __init__(self, target: Target, in_flight: int) -> None:
        from awscrt import auth, s3
        from awscrt import io as crt_io

        group = crt_io.EventLoopGroup()
        bootstrap = crt_io.ClientBootstrap(group, crt_io.DefaultHostResolver(group))
        credentials = auth.AwsCredentialsProvider.new_static(target.access_key, target.secret)
        signing = s3.create_default_s3_signing_config(region=REGION, credential_provider=credentials)
        self._s3, self._target, self._in_flight = s3, target, in_flight
        self._client = s3.S3Client(
            bootstrap=bootstrap,
            region=REGION,
            tls_mode=s3.S3RequestTlsMode.DISABLED,
            signing_config=signing,
            part_size=32 * MIB,
            throughput_target_gbps=10,
        )

    def store(self, blocks: list[Block]) -> None:
        self._all(self._put, blocks)

    def load(self, blocks: list[Block]) -> None:
        self._all(self._get, blocks)

    def _all(self, start: Callable[[Block], Any], blocks: list[Block]) -> None:
        under_way: list[Any] = []
        for block in blocks:
            if len(under_way) == self._in_flight:
                under_way.pop(0).finished_future.result(60)
            under_way.append(start(block))
        for request in under_way:
            request.finished_future.result(60)

    def _request(self, method: str, block: Block, body: Any = None) -> Any:
        from awscrt.http import HttpHeaders, HttpRequest

        headers = HttpHeaders([("Host", urlsplit(self._target.endpoint).netloc)])
        if body is not None:
            headers.add("Content-Length", str(block.size))
        return HttpRequest(method, f"/{self._target.bucket}/{block.name}", headers, body)

    def _put(self, block: Block) -> Any:
        body = io.BufferedReader(Joined(block), MIB)
        request = self._request("PUT", block, body)
        return self._client.make_request(type=self._s3.S3RequestType.PUT_OBJECT, request=request)

    def _get(self, block: Block) -> Any:
        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            fill(block, offset, memoryview(chunk))

        request = self._request("GET", block)
        return self._client.make_request(
            type=self._s3.S3RequestType.GET_OBJECT, request=request, on_body=on_body
        )


PATHS: Mapping[str, Callable[[Target, int], DataPath]] = {
    "boto3": Boto3,
    "awscrt": Awscrt,
    "obstore, threads": ObstoreThreads,
    "obstore, loop": ObstoreLoop,
    "obstore, loop, whole": ObstoreLoopWhole,
}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[list[Block]], None], blocks: list[Block]) -> tuple[float, float]:
    """Return seconds and CPU seconds of one call."""
    started, cpu = time.perf_counter(), cpu_seconds()
    work(blocks)
    return time.perf_counter() - started, cpu_seconds() - cpu


def make_blocks(size: int, in_flight: int, total: int) -> list[Block]:
    count = max(in_flight, total // size)
    noise = os.urandom(size)
    return [
        Block(f"{index:04x}", memoryview(bytearray(os.urandom(HEADER_BYTES))), memoryview(bytearray(noise)))
        for index in range(count)
    ]


def measure(
    target: Target,
    made: Mapping[str, Callable[[Target, int], DataPath]],
    size: int,
    in_flight: int,
    total: int,
    rounds: int,
) -> Iterator[str]:
    """Yield a table row for each data path; they take turns, round by round."""
    blocks = make_blocks(size, in_flight, total)
    gigabytes = sum(block.size for block in blocks) / 1e9
    paths = {name: make(target, in_flight) for name, make in made.items() if name != "awscrt" or has_awscrt()}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            wanted = os.urandom(8)
            for block in blocks:
                block.body[-8:] = wanted
            stored = timed(path.store, blocks)
            for block in blocks:
                block.body[-8:] = bytes(8)
            loaded = timed(path.load, blocks)
            assert all(bytes(block.body[-8:]) == wanted for block in blocks), f"{name} loaded something else"
            if turn:
                taken.setdefault((name, "put"), []).append(stored)
                taken.setdefault((name, "get"), []).append(loaded)
    for name in paths:
        cells = []
        for verb in ("put", "get"):
            seconds = statistics.median(time for time, _ in taken[name, verb])
            cpu = statistics.median(cpu for _, cpu in taken[name, verb])
            cells.append(f"{gigabytes / seconds:.2f} | {cpu / gigabytes:.2f}")
        yield f"| {size // MIB} MiB | {in_flight} | {name} | {' | '.join(cells)} |"


class InSegments(ObstoreLoop):
    """Sixteen neighbouring blocks in one object; each is loaded by its range."""

    PER_SEGMENT = 16

    def store(self, blocks: list[Block]) -> None:
        firsts = range(0, len(blocks), self.PER_SEGMENT)
        asyncio.run(
            self._all(self._put_segment, [blocks[first : first + self.PER_SEGMENT] for first in firsts])
        )

    def load(self, blocks: list[Block]) -> None:
        self._order = {block.name: index for index, block in enumerate(blocks)}
        super().load(blocks)

    async def _put_segment(self, blocks: list[Block]) -> None:
        parts = [part for block in blocks for part in (block.header, block.body)]
        await obstore.put_async(self._store, f"segment-{blocks[0].name}", parts, use_multipart=False)

    async def _get(self, block: Block) -> None:
        within = self._order[block.name] % self.PER_SEGMENT
        first = f"{self._order[block.name] - within:04x}"
        data = await obstore.get_range_async(
            self._store, f"segment-{first}", start=within * block.size, length=block.size
        )
        fill(block, 0, memoryview(data))


SEGMENT_PATHS: Mapping[str, Callable[[Target, int], DataPath]] = {
    "an object per block": ObstoreLoopWhole,
    "16 blocks per object": InSegments,
}


def has_awscrt() -> bool:
    try:
        import awscrt.s3  # noqa: F401  # whether it is there is the question
    except ImportError:
        return False
    return True


@contextmanager
def the_target(endpoint: str | None, bucket: str | None, scratch: str) -> Iterator[Target]:
    """The store that was named, with credentials from the environment, or a SeaweedFS of its own."""
    if endpoint:
        found = boto3.Session().get_credentials()
        if found is None or not bucket:
            raise click.UsageError("an endpoint needs --bucket, and credentials where boto3 finds them")
        yield Target(endpoint, bucket, found.access_key, found.secret_key)
        return
    with running_weed(Path(scratch) / "weed", volume_mb=1024, volumes=24) as weed:
        yield Target(weed.endpoint, BUCKET, *OWNER)


@click.command(help=__doc__)
@click.option("--endpoint", help="An S3 endpoint; a SeaweedFS is started without it.")
@click.option("--bucket", help="A bucket to write to, with --endpoint.")
@click.option(
    "--megabytes", default=256, help="Bytes of one round, at least one block per request in flight."
)
@click.option(
    "--segments", is_flag=True, help="Compare an object per block with segments, at 1 MiB, instead."
)
@click.option("--rounds", default=3, help="Rounds that count; one before them does not.")
def main(endpoint: str | None, bucket: str | None, megabytes: int, segments: bool, rounds: int) -> None:
    print("| block | in flight | path | put GB/s | put CPU s/GB | get GB/s | get CPU s/GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    paths = SEGMENT_PATHS if segments else PATHS
    for size in SIZES[:1] if segments else SIZES:
        for in_flight in IN_FLIGHT:
            with ExitStack() as stack:
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                target = stack.enter_context(the_target(endpoint, bucket, scratch))
                for row in measure(target, paths, size, in_flight, megabytes * MIB, rounds):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
