"""What each codec saves and costs, on real KV or on numbers like it.

    python benchmarks/codecs.py [KV.npy]

KV.npy has bfloat16 blocks as benchmarks/model_kv.py writes them; without it, normal numbers whose channels
have spreads of their own. Speeds are payload bytes per second of one thread's processor time, the fastest of
several rounds over all blocks; ``seal`` and ``verify`` are the whole way, checksums and copies included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import zstandard

from kvferry.connector.codec import Codec
from kvferry.connector.coder import FrameCoder, TierCodec, TierCodecs
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import Frame
from kvferry.plugins.codecs import kvferry_codecs
from kvferry.plugins.codecs.planes import split

ROUNDS = 5
KEY = BlockKey(bytes(32))


def synthetic() -> np.ndarray:
    """Return eight blocks of 1.5 MiB."""
    chance = np.random.default_rng(0)
    shape = (8, 8, 6, 64, 2, 128)
    spread = np.exp(chance.standard_normal((1, 8, 6, 1, 2, 128)))
    return (chance.standard_normal(shape) * spread).astype(ml_dtypes.bfloat16).view(np.uint16)


def layout_of(blocks: np.ndarray) -> BlockLayout:
    heads, layers, tokens, factor, dim = blocks.shape[1:]
    return BlockLayout(
        num_layers=layers,
        num_kv_heads=heads,
        block_tokens=tokens,
        head_dim=dim,
        kv_factor=factor,
        itemsize=2,
        dtype="bfloat16",
    )


def rate(size: int, items: Sequence[memoryview], work: Callable[[memoryview], object]) -> float:
    """Return the MB/s at which ``work`` goes through items that stand for ``size`` bytes, fastest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for item in items:
            work(item)
        best = min(best, time.thread_time() - start)
    return size / best / 1e6


def measure_codec(payloads: list[memoryview], codec: Codec) -> str:
    size = sum(map(len, payloads))
    into = memoryview(bytearray(len(payloads[0])))
    encoded = rate(size, payloads, lambda payload: codec.encode(payload, into))
    bodies = [memoryview(bytes(into[: codec.encode(payload, into)])) for payload in payloads]
    if not all(bodies):
        return f"{1.0:>8.3f} {encoded:>8,.0f} {'-':>8}"
    decoded = rate(size, bodies, lambda body: codec.decode(body, into))
    return f"{sum(map(len, bodies)) / size:>8.3f} {encoded:>8,.0f} {decoded:>8,.0f}"


def measure_coder(payloads: list[memoryview], layout: BlockLayout, used: TierCodec | None) -> str:
    reads = {used.id: used} if used else {}
    coder = FrameCoder(FrameSeal(bytes(32), layout.payload_bytes), TierCodecs(used, reads))
    header = memoryview(bytearray(HEADER_BYTES))
    slot = memoryview(bytearray(layout.slot_bytes))

    def frame(payload: memoryview) -> Frame:
        return Frame(KEY, header, payload, layout.payload_bytes)

    size = sum(map(len, payloads))
    sealed = rate(size, payloads, lambda payload: coder.pack([frame(payload)]))
    (packed,) = coder.pack([frame(payloads[0])])
    stored = bytes(packed.body)

    def unpack(payload: memoryview) -> None:
        slot[: len(stored)] = stored  # what the tier would do
        coder.unpack(Frame(KEY, header, slot, layout.payload_bytes))

    return f"{sealed:>8,.0f} {rate(size, payloads, unpack):>8,.0f}"


def error_of_fp8(payloads: list[memoryview], codec: Codec) -> float:
    """Return the root mean square error, relative to the values' own."""
    into, back = bytearray(len(payloads[0])), bytearray(len(payloads[0]))
    wrong = right = 0.0
    for payload in payloads:
        length = codec.encode(payload, memoryview(into))
        codec.decode(memoryview(into)[:length], memoryview(back))
        exact = np.frombuffer(payload, ml_dtypes.bfloat16).astype(np.float64)
        found = np.frombuffer(back, ml_dtypes.bfloat16).astype(np.float64)
        wrong += float(((exact - found) ** 2).sum())
        right += float((exact**2).sum())
    return (wrong / right) ** 0.5


@click.command(help=__doc__)
@click.argument("kv", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(kv: Path | None) -> None:
    blocks = np.load(kv) if kv else synthetic()
    layout = layout_of(blocks)
    payloads = [memoryview(bytearray(block.tobytes())) for block in blocks]
    size = sum(map(len, payloads))
    click.echo(f"{kv or 'synthetic'}: {len(payloads)} blocks of {layout.payload_bytes:,} bytes, MB/s\n")
    click.echo(f"{'':>12} {'size':>8} {'encode':>8} {'decode':>8} {'seal':>8} {'verify':>8}")
    plain = measure_coder(payloads, layout, None)
    click.echo(f"{'none':>12} {1.0:>8.3f} {'':>8} {'':>8} {plain}")
    for offered in kvferry_codecs():
        codec = offered.make(layout)
        whole = measure_coder(payloads, layout, TierCodec(offered.name, offered.id, offered.is_lossy, codec))
        click.echo(f"{offered.name:>12} {measure_codec(payloads, codec)} {whole}")
        if offered.is_lossy:
            click.echo(f"{'':>12} relative error {error_of_fp8(payloads, codec):.4f} (root mean square)")
    click.echo("\nzstd by level, without and with byte planes:")
    for level in (-1, 1, 3, 6):
        compress = zstandard.ZstdCompressor(level=level).compress
        for name, prepare in (
            ("as it is", lambda payload: payload),
            ("planes", lambda payload: split(payload, 2)),
        ):
            share = sum(len(compress(prepare(payload))) for payload in payloads) / size
            speed = rate(size, payloads, lambda payload: compress(prepare(payload)))  # noqa: B023  # called at once
            click.echo(f"{level:>12} {share:>8.3f} {speed:>8,.0f}  {name}")


if __name__ == "__main__":
    main()
