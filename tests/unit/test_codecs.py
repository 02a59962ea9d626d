"""kvferry's codecs: what comes back, how far off a lossy one may be, and what hostile bodies can cause."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import lz4.block
import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.codec import Codec, lossy_fingerprint
from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout
from kvferry.plugins.codecs import kvferry_codecs
from kvferry.plugins.codecs.fp8 import Fp8Codec
from kvferry.plugins.codecs.planes import join, split

CODECS = {offered.name: offered for offered in kvferry_codecs()}
LOSSLESS = [name for name, offered in CODECS.items() if not offered.is_lossy]
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def layout_of(dtype: str = "bfloat16", **changes: int) -> BlockLayout:
    shape = {"num_layers": 2, "num_kv_heads": 2, "block_tokens": 16, "head_dim": 32} | changes
    return BlockLayout(itemsize=np.dtype(DTYPES[dtype]).itemsize, dtype=dtype, **shape)


LAYOUT = layout_of()
SIZE = LAYOUT.payload_bytes


def kv_like(layout: BlockLayout, seed: int = 0) -> np.ndarray:
    """Return elements distributed roughly as KV is: normal, each channel with a spread of its own."""
    chance = np.random.default_rng(seed)
    vectors = layout.payload_bytes // (layout.head_dim * layout.itemsize)
    spread = np.exp(chance.standard_normal(layout.head_dim))
    return (chance.standard_normal((vectors, layout.head_dim)) * spread).astype(DTYPES[layout.dtype])


def half_zeros(layout: BlockLayout, seed: int = 0) -> np.ndarray:
    """Return elements of which every codec has something to leave out."""
    values = kv_like(layout, seed)
    values[::2] = 0
    return values


def encode(codec: Codec, payload: bytes) -> bytes:
    into = bytearray(len(payload))
    return bytes(into[: codec.encode(memoryview(payload), memoryview(into))])


def decode(codec: Codec, body: bytes, size: int = SIZE) -> bytes:
    into = bytearray(b"\xee" * size)
    codec.decode(memoryview(body), memoryview(into))
    return bytes(into)


def made(name: str, layout: BlockLayout = LAYOUT) -> Codec:
    return CODECS[name].make(layout)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_planes_are_the_bytes_of_each_significance_in_turn(itemsize: int) -> None:
    payload = bytes(range(24))
    planes = bytes(split(memoryview(payload), itemsize))
    assert planes == b"".join(payload[first::itemsize] for first in range(itemsize))
    back = bytearray(24)
    join(planes, itemsize, memoryview(back))
    assert back == payload


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lossless_codec_returns_every_byte(name: str, dtype: str) -> None:
    layout = layout_of(dtype)
    codec, payload = made(name, layout), half_zeros(layout).tobytes()
    body = encode(codec, payload)
    assert 0 < len(body) < len(payload)
    assert decode(codec, body, len(payload)) == payload


@pytest.mark.parametrize("name", LOSSLESS)
def test_elements_of_one_byte_are_encoded_too(name: str) -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=32, itemsize=1)
    codec, payload = made(name, layout), b"abcdefgh" * (layout.payload_bytes // 8)
    assert decode(codec, encode(codec, payload), len(payload)) == payload


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_does_not_get_smaller_is_not_encoded(name: str) -> None:
    noise = np.random.default_rng(1).bytes(SIZE)
    assert encode(made(name), noise) == b""


@pytest.mark.parametrize("name", CODECS)
def test_a_result_that_does_not_fit_is_no_result(name: str) -> None:
    codec, payload = made(name), kv_like(LAYOUT).tobytes()
    whole = len(encode(codec, payload))
    exact = bytearray(whole)
    assert codec.encode(memoryview(payload), memoryview(exact)) == whole
    assert codec.encode(memoryview(payload), memoryview(bytearray(whole - 1))) == 0


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_serves_several_threads_at_once(name: str) -> None:
    codec = made(name)
    payloads = [half_zeros(LAYOUT, seed).tobytes() for seed in range(8)]
    expected = [decode(codec, encode(codec, payload)) for payload in payloads]
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda payload: decode(codec, encode(codec, payload)), payloads * 8))
    assert again == expected * 8


@pytest.mark.parametrize("name", CODECS)
@given(body=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_with_a_value_error(name: str, body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        decode(made(name), body)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_a_spoilt_body_gives_a_value_error_or_a_whole_payload(name: str, data: st.DataObject) -> None:
    codec = made(name)
    body = bytearray(encode(codec, kv_like(LAYOUT).tobytes()))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body
    try:
        assert len(decode(codec, bytes(body))) == SIZE
    except ValueError:
        pass  # what it is for; anything else fails the test


def zeros_compressed_by(name: str, size: int) -> bytes:
    if name == "lz4":
        return bytes(lz4.block.compress(bytes(size), store_size=False))
    return zstandard.ZstdCompressor().compress(bytes(size))


def lying_zstd() -> bytes:
    """Return a frame that says it holds a payload, and holds a thousand times as much."""
    frame = bytearray(zeros_compressed_by("zstd", 1000 * SIZE))
    said = zstandard.get_frame_parameters(bytes(frame))
    assert said.content_size == 1000 * SIZE
    at = bytes(frame).index(struct.pack("<I", 1000 * SIZE))
    frame[at : at + 4] = struct.pack("<I", SIZE)
    return bytes(frame)


def zstd_with_window(size: int, window_log: int) -> bytes:
    """Return zeros whose frame asks for a window of its own rather than for its content's length."""
    parameters = zstandard.ZstdCompressionParameters(window_log=10, write_content_size=True)
    frame = bytearray(zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(size)))
    assert zstandard.get_frame_parameters(bytes(frame)).window_size == 1 << 10
    frame[5] = window_log - 10 << 3
    said = zstandard.get_frame_parameters(bytes(frame))
    assert (said.content_size, said.window_size) == (size, 1 << window_log)
    return bytes(frame)


@pytest.mark.parametrize(
    ("name", "bomb"),
    [
        ("lz4", zeros_compressed_by("lz4", 1000 * SIZE)),
        ("zstd", zeros_compressed_by("zstd", 1000 * SIZE)),
        ("zstd", lying_zstd()),
        ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000 * SIZE))),
        ("zstd", zeros_compressed_by("zstd", SIZE) * 1000),
        ("zstd", zstd_with_window(1000 * SIZE, 10)),
        ("zstd", zstd_with_window(SIZE, 27)),
    ],
    ids=[
        "lz4",
        "zstd",
        "zstd that lies about its size",
        "zstd that keeps silent about it",
        "many in a row",
        "zstd with a small window",
        "zstd with a huge window",
    ],
)
def test_a_bomb_is_refused_without_the_memory_it_asks_for(name: str, bomb: bytes) -> None:
    codec, into = made(name), memoryview(bytearray(SIZE))
    body = memoryview(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
            codec.decode(body, into)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * SIZE


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("size", [2, SIZE - 2, SIZE + 2])
def test_a_payload_of_another_length_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(made(name), zeros_compressed_by(name, size))


def fp8_returns(values: np.ndarray, layout: BlockLayout) -> np.ndarray:
    codec = made("fp8", layout)
    body = encode(codec, values.tobytes())
    assert body
    return np.frombuffer(decode(codec, body, values.nbytes), values.dtype).reshape(values.shape)


def assert_within_bound(values: np.ndarray, returned: np.ndarray) -> None:
    """Each element is within a sixteenth of itself, or within a tiny part of its vector's largest."""
    exact, rounded = values.astype(np.float64), returned.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    bound = np.maximum(np.abs(exact) / 16, largest / 224 / 1024)
    assert (np.abs(exact - rounded) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_fp8_is_as_near_as_it_says(dtype: str, seed: int) -> None:
    layout = layout_of(dtype)
    values = kv_like(layout, seed)
    assert_within_bound(values, fp8_returns(values, layout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_its_word_for_every_magnitude(dtype: str) -> None:
    """Vectors from the smallest ordinary numbers of the type to its largest, which must not become infinite."""
    layout = layout_of(dtype, num_layers=16)
    info = ml_dtypes.finfo(DTYPES[dtype])
    largest, smallest = float(info.max), max(float(info.smallest_normal), 2.0**-110)
    vectors = layout.payload_bytes // (layout.head_dim * layout.itemsize)
    scales = np.geomspace(smallest, largest, vectors)[:, None]
    values = (scales * np.linspace(-1, 1, layout.head_dim)[None, :]).astype(DTYPES[dtype])
    assert np.isfinite(values.astype(np.float64)).all()
    returned = fp8_returns(values, layout)
    assert np.isfinite(returned.astype(np.float64)).all()
    assert_within_bound(values, returned)


def test_fp8_returns_the_smallest_numbers_as_nearly_as_their_scale_allows() -> None:
    """Scales end at 2**-126: what is smaller has fewer digits, and does not come back as something large."""
    bits = np.arange(LAYOUT.payload_bytes // 2, dtype=np.uint16).reshape(-1, LAYOUT.head_dim)
    values = bits.view(ml_dtypes.bfloat16)
    exact, found = values.astype(np.float64), fp8_returns(values, LAYOUT).astype(np.float64)
    assert exact[exact > 0].min() < 2.0**-130
    assert (np.abs(exact - found) <= np.maximum(np.abs(exact) / 16, 2.0**-136)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_loses_nothing_more_the_second_time(dtype: str) -> None:
    layout = layout_of(dtype)
    once = fp8_returns(kv_like(layout), layout)
    assert fp8_returns(once, layout).tobytes() == once.tobytes()


def test_fp8_returns_zeros_as_zeros() -> None:
    values = np.zeros((SIZE // 64, 32), ml_dtypes.bfloat16)
    assert fp8_returns(values, LAYOUT).tobytes() == values.tobytes()


def test_the_table_for_bfloat16_rounds_as_the_conversion_does() -> None:
    codec = Fp8Codec(LAYOUT)
    values = kv_like(LAYOUT).astype(np.float32)
    values *= 448 / np.abs(values).max()
    values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (codec._codes(values) == values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fp8_leaves_a_payload_with_a_nan_or_an_infinity_as_it_is(value: float) -> None:
    values = kv_like(LAYOUT)
    values[-1, -1] = value
    assert encode(made("fp8"), values.tobytes()) == b""


def test_fp8_refuses_a_body_with_a_nan() -> None:
    codec = made("fp8")
    body = encode(codec, kv_like(LAYOUT).tobytes())
    with pytest.raises(ValueError, match="NaN"):
        decode(codec, body[:-1] + b"\x7f")


def test_fp8_halves_a_bfloat16_block() -> None:
    assert len(encode(made("fp8"), kv_like(LAYOUT).tobytes())) == SIZE // 2 + SIZE // 64


@pytest.mark.parametrize("dtype", ["", "uint8", "float8_e4m3fn"])
def test_fp8_refuses_elements_that_it_does_not_understand(dtype: str) -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=32, itemsize=1, dtype=dtype)
    with pytest.raises(ConfigError, match=r"fp8 cannot encode .*zstd"):
        made("fp8", layout)


@pytest.mark.parametrize(("name", "package"), [("lz4", "lz4"), ("zstd", "zstandard"), ("fp8", "ml_dtypes")])
def test_a_missing_library_is_named_with_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{name} needs the package {package}.*kvferry\[codecs\]"):
        made(name)


def test_ids_of_codecs_are_what_they_have_always_been() -> None:
    """They stand in frames that are stored somewhere."""
    assert {name: offered.id for name, offered in CODECS.items()} == {"lz4": 1, "zstd": 2, "fp8": 3}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (
            "lz4",
            "2f80000200fffffffffffffffffffffffffffffffa2f3fc00200"
            "fffffffffffffffffffffffffffffff550c03fc03fc0",
        ),
        ("zstd", "28b52ffd60001f7d00002080003fc00200fb073ede7fbec302"),
        ("fp8", "f9" * 128 + "70f8" * 2048),
    ],
)
def test_bodies_written_long_ago_are_read(name: str, body: str) -> None:
    """Changing what a body means needs a new id."""
    ones_and_minus_twos = bytes.fromhex("803f00c0") * (SIZE // 4)
    assert decode(made(name), bytes.fromhex(body)) == ones_and_minus_twos


def test_only_fp8_is_lossy() -> None:
    assert [offered.name for offered in CODECS.values() if offered.is_lossy] == ["fp8"]


@pytest.mark.parametrize(
    ("names", "same"), [(["fp8", "fp8"], ["fp8"]), (["a", "b"], ["b", "a"])], ids=["repeated", "reordered"]
)
def test_the_fingerprint_depends_on_which_lossy_codecs_there_are(names: list[str], same: list[str]) -> None:
    model = bytes(range(32))
    assert lossy_fingerprint(model, names) == lossy_fingerprint(model, same)
    assert lossy_fingerprint(model, []) == model
    assert len({model, *(lossy_fingerprint(model, lossy) for lossy in (["fp8"], ["a"], ["a", "b"]))}) == 4
