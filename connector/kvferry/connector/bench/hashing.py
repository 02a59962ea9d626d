"""What naming and checking costs: block keys from tokens, checksums of frames."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Sequence

import numpy as np

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure
from kvferry.connector.bench.host import MIB
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import KEY_BYTES, BlockKey, KeyChain, Scope, root_key

__all__ = ["HASHING"]

BLOCK_TOKENS = 64
BLOCKS = 1000
FRAME_BYTES = 8 * MIB


def _measure(context: BenchContext) -> Sequence[Figure]:
    def first_half(part: float) -> None:
        context.progress(part / 2)

    def second_half(part: float) -> None:
        context.progress(0.5 + part / 2)

    return [_keys(context.quick, first_half), *_frames(context.quick, second_half)]


def _keys(quick: bool, progress: Callable[[float], None]) -> Figure:
    generator = random.Random(1)
    blocks = 100 if quick else BLOCKS
    tokens = [generator.randrange(128_000) for _ in range(blocks * BLOCK_TOKENS)]
    root = root_key(bytes(32), Scope())

    def chain(_: int) -> None:
        KeyChain(root, BLOCK_TOKENS).extend(tokens)

    seconds = interleaved({"chain": chain}, 3 if quick else 51, progress)["chain"]
    return Figure(
        name=f"key of a block of {BLOCK_TOKENS} tokens",
        value=seconds / blocks * 1e6,
        unit="us",
        note=f"a prompt of {blocks} blocks",
    )


def _frames(quick: bool, progress: Callable[[float], None]) -> list[Figure]:
    """Seal and verify cold payloads, without and with the operator's secret."""
    size, count = (MIB // 8 if quick else FRAME_BYTES), (4 if quick else 32)
    payloads = [memoryview(mmap.mmap(-1, size)) for _ in range(count)]
    for payload in payloads:
        payload[:] = os.urandom(4096) * (size // 4096)
    header = memoryview(bytearray(HEADER_BYTES))
    target = np.empty(size, np.uint8)
    key = BlockKey(bytes(KEY_BYTES))
    plain = FrameSeal(bytes(32), size)
    signed = FrameSeal(bytes(32), size, "bench")

    def seal_with(seal: FrameSeal) -> Callable[[int], None]:
        def run(repetition: int) -> None:
            seal.seal(key, header, payloads[repetition % count])
            seal.verify(key, header, payloads[repetition % count])

        return run

    sides: dict[str, Callable[[int], None]] = {
        "plain": seal_with(plain),
        "signed": seal_with(signed),
        "memcpy": lambda repetition: np.copyto(target, np.asarray(payloads[repetition % count])),
    }
    seconds = interleaved(sides, 3 if quick else 2 * count, progress)
    return [
        Figure(
            name=f"checksum{what}",
            value=2 * size / seconds[side] / 1e9,
            unit="GB/s",
            raw=size / seconds["memcpy"] / 1e9,
            raw_name="memcpy",
            note="one thread; sealing and verifying read the payload once each",
        )
        for side, what in (("plain", ""), ("signed", " and MAC"))
    ]


HASHING = BenchCase("hashing", "block keys and frame checksums", _measure)
