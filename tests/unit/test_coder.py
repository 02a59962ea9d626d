"""The coder: slots into frames and back, and what stays out of a slot's readers' sight."""

from __future__ import annotations

import logging
import sys
import threading
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvferry.connector.codec import Codec, CodecType, lossy_fingerprint
from kvferry.connector.coder import FrameCoder, TierCodec, TierCodecs
from kvferry.connector.coding import block_fingerprint, tier_codecs
from kvferry.connector.config import Config
from kvferry.connector.errors import BlockRefused, ConfigError
from kvferry.connector.frame import CODEC_NONE, HEADER_BYTES, FrameSeal
from kvferry.connector.hooks import hookimpl
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.tier import Frame
from kvferry.plugins import codecs as own_codecs

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2, dtype="bfloat16")
SIZE = LAYOUT.payload_bytes
SEAL = FrameSeal(b"m" * 32, SIZE)
KEY = BlockKey(b"k" * 32)
OTHER = BlockKey(b"o" * 32)
LOGGER = logging.getLogger("kvferry.test.coder")
PAYLOAD = (b"some KV " * SIZE)[:SIZE]


class Deflate:
    """A lossless codec of the simplest kind."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def encode(self, payload: memoryview, into: memoryview) -> int:
        body = zlib.compress(payload)
        into[: len(body)] = body
        return len(body)

    def decode(self, body: memoryview, into: memoryview) -> None:
        self.seen.append(bytes(body))
        try:
            into[:] = zlib.decompress(body)
        except zlib.error as error:
            raise ValueError(str(error)) from error


class Wrong(Deflate):
    """Decodes to something else, as a later version of a library might."""

    def decode(self, body: memoryview, into: memoryview) -> None:
        super().decode(body, into)
        into[17] ^= 1


class Broken(Deflate):
    def decode(self, body: memoryview, into: memoryview) -> None:
        raise RuntimeError("out of order")


class Returns(Deflate):
    """Says that it wrote so many bytes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def encode(self, payload: memoryview, into: memoryview) -> int:
        return self.count


def coder_of(codec: Codec, is_lossy: bool = False, writes: bool = True) -> FrameCoder:
    used = TierCodec("test", 300, is_lossy, codec)
    return FrameCoder(SEAL, TierCodecs(used if writes else None, {300: used}))


def slot(content: bytes = PAYLOAD, key: BlockKey = KEY) -> Frame:
    buffer = memoryview(bytearray(b"\xee" * LAYOUT.slot_bytes))
    buffer[: len(content)] = content
    return Frame(key, memoryview(bytearray(HEADER_BYTES)), buffer, SIZE)


def as_loaded(packed: Frame) -> Frame:
    """Return what a tier that keeps header and body puts into an empty slot."""
    frame = slot(b"", packed.key)
    frame.header[:] = packed.header
    frame.payload[: packed.length] = packed.body
    return frame


def codec_id(frame: Frame) -> int:
    return int.from_bytes(frame.header[12:14], "little")


def test_without_a_codec_the_payload_is_the_slot_itself() -> None:
    frame = slot()
    (packed,) = FrameCoder(SEAL).pack([frame])
    assert packed.payload.obj is frame.payload.obj
    assert (packed.length, codec_id(packed)) == (SIZE, CODEC_NONE)
    assert packed.payload.readonly
    assert packed.header.readonly


@pytest.mark.parametrize("is_lossy", [False, True])
def test_an_encoded_block_comes_back(is_lossy: bool) -> None:
    coder = coder_of(Deflate(), is_lossy)
    (packed,) = coder.pack([slot()])
    assert (codec_id(packed), packed.length < SIZE) == (300, True)
    loaded = as_loaded(packed)
    coder.unpack(loaded)
    assert bytes(loaded.payload[:SIZE]) == PAYLOAD


def test_an_encoded_payload_is_as_long_as_a_slot_and_zero_behind_the_body() -> None:
    coder = coder_of(Deflate())
    coder.pack([slot(bytes(range(256)) * (SIZE // 256))])  # longer, in the same buffer
    (packed,) = coder.pack([slot()])
    assert len(packed.payload) == LAYOUT.slot_bytes
    assert not any(packed.payload[packed.length :])


def test_the_blocks_of_a_batch_have_buffers_of_their_own_on_slot_boundaries() -> None:
    coder = coder_of(Deflate())
    contents = [bytes([number]) * SIZE for number in range(5)]
    packed = coder.pack([slot(content, BlockKey(bytes([n]) * 32)) for n, content in enumerate(contents)])
    for frame, content in zip(packed, contents, strict=True):
        assert np.frombuffer(frame.payload, np.uint8).ctypes.data % SLOT_ALIGNMENT_BYTES == 0
        loaded = as_loaded(frame)
        coder.unpack(loaded)
        assert bytes(loaded.payload[:SIZE]) == content


@pytest.mark.parametrize("count", [0, -1, SIZE - 16, SIZE, SIZE + 1])
def test_what_is_not_smaller_is_stored_as_it_is(count: int) -> None:
    coder = coder_of(Returns(count))
    (packed,) = coder.pack([slot()])
    assert (codec_id(packed), packed.length) == (CODEC_NONE, SIZE)
    assert bytes(packed.body) == PAYLOAD
    loaded = as_loaded(packed)
    coder.unpack(loaded)
    assert bytes(loaded.payload[:SIZE]) == PAYLOAD


@pytest.mark.parametrize("error", [RuntimeError("out of order"), MemoryError()])
def test_a_codec_that_cannot_encode_is_reported_once_and_done_without(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Deflate):
        calls = 0

        def encode(self, payload: memoryview, into: memoryview) -> int:
            self.calls += 1
            raise error

    codec = Fails()
    coder = coder_of(codec)
    for _ in range(3):
        (packed,) = coder.pack([slot()])
        assert (codec_id(packed), bytes(packed.body)) == (CODEC_NONE, PAYLOAD)
    assert codec.calls == 1
    assert caplog.text.count("codec 'test' failed to encode block 6b6b6b6b") == 1


def test_nothing_of_a_body_is_decoded_before_it_is_verified() -> None:
    codec = Deflate()
    coder = coder_of(codec)
    (packed,) = coder.pack([slot()])
    for index in range(packed.length):
        loaded = as_loaded(packed)
        loaded.payload[index] ^= 1
        with pytest.raises(BlockRefused, match="checksum"):
            coder.unpack(loaded)
    other = as_loaded(packed)
    with pytest.raises(BlockRefused, match="key"):
        coder.unpack(Frame(OTHER, other.header, other.payload, SIZE))
    assert codec.seen == []


@pytest.mark.parametrize("codec", [Wrong(), Broken()], ids=["wrong", "broken"])
def test_a_decoder_that_fails_costs_a_miss(codec: Codec) -> None:
    (packed,) = coder_of(Deflate()).pack([slot()])
    with pytest.raises(BlockRefused) as refused:
        coder_of(codec).unpack(as_loaded(packed))
    assert refused.value.reason == "codec"


def test_a_codec_that_the_reader_does_not_have_is_refused() -> None:
    (packed,) = coder_of(Deflate()).pack([slot()])
    with pytest.raises(BlockRefused) as refused:
        FrameCoder(SEAL).unpack(as_loaded(packed))
    assert refused.value.reason == "codec"


def test_a_reader_that_writes_without_a_codec_reads_encoded_blocks() -> None:
    (packed,) = coder_of(Deflate()).pack([slot()])
    loaded = as_loaded(packed)
    coder_of(Deflate(), writes=False).unpack(loaded)
    assert bytes(loaded.payload[:SIZE]) == PAYLOAD


def test_threads_do_not_share_buffers() -> None:
    coder = coder_of(Deflate())
    meeting = threading.Barrier(4, timeout=30)
    wrong: list[int] = []

    def work(number: int) -> None:
        content = bytes([number]) * SIZE
        for _ in range(50):
            packed = coder.pack([slot(content)] * 3)
            meeting.wait()
            loaded = as_loaded(packed[2])
            coder.unpack(loaded)
            if bytes(loaded.payload[:SIZE]) != content:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not meeting.broken


def config_of(*codecs: str) -> Config:
    return Config(
        tiers=tuple({"type": "t", "name": f"t{n}", "codec": codec} for n, codec in enumerate(codecs))
    )


class Plugin:
    """Offers one codec that cannot be made."""

    def __init__(self, make: Callable[[BlockLayout], Codec]) -> None:
        self.make = make

    @hookimpl
    def kvferry_codecs(self) -> Sequence[CodecType]:
        return [CodecType("odd", 400, False, self.make, "for tests")]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PluginRegistry]:
    """Return a registry of kvferry's own codecs and one more plugin."""

    def make(extra: object = None) -> PluginRegistry:
        modules = ["kvferry.plugins.codecs"]
        if extra is not None:
            monkeypatch.setitem(sys.modules, "extra_codecs", extra)
            modules.append("extra_codecs")
        return PluginRegistry(modules, use_entry_points=False)

    return make


def test_a_tier_reads_every_lossless_codec_and_no_lossy_one_but_its_own(
    registry: Callable[..., PluginRegistry],
) -> None:
    made = tier_codecs(config_of("none", "zstd", "fp8"), LAYOUT, registry(), LOGGER)
    ids = {offered.name: offered.id for offered in own_codecs.kvferry_codecs()}
    lossless = {ids["lz4"], ids["zstd"]}
    assert {name: set(codecs.reads) for name, codecs in made.items()} == {
        "t0": lossless,
        "t1": lossless,
        "t2": lossless | {ids["fp8"]},
    }
    assert made["t0"].writes is None
    assert [codecs.writes.id for codecs in made.values() if codecs.writes] == [ids["zstd"], ids["fp8"]]


def test_a_lossy_body_is_refused_by_a_tier_that_is_not_configured_for_it(
    registry: Callable[..., PluginRegistry],
) -> None:
    made = tier_codecs(config_of("none", "fp8"), LAYOUT, registry(), LOGGER)
    (packed,) = FrameCoder(SEAL, made["t1"]).pack([slot(b"\x3f" * SIZE)])
    FrameCoder(SEAL, made["t1"]).unpack(as_loaded(packed))
    with pytest.raises(BlockRefused) as refused:
        FrameCoder(SEAL, made["t0"]).unpack(as_loaded(packed))
    assert refused.value.reason == "codec"


def test_an_unknown_codec_is_a_mistake_and_the_nearest_is_named(
    registry: Callable[..., PluginRegistry],
) -> None:
    for call in (
        lambda: tier_codecs(config_of("none", "ztsd"), LAYOUT, registry(), LOGGER),
        lambda: block_fingerprint(b"m" * 32, config_of("none", "ztsd"), registry()),
    ):
        with pytest.raises(ConfigError, match=r"tiers\[1\]\.codec: .*did you mean 'zstd'"):
            call()


def test_a_codec_that_does_not_fit_the_blocks_is_a_mistake(registry: Callable[..., PluginRegistry]) -> None:
    unknown = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=32, itemsize=2)
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.codec: fp8 cannot encode"):
        tier_codecs(config_of("fp8"), unknown, registry(), LOGGER)
    assert tier_codecs(config_of("none"), unknown, registry(), LOGGER)["t0"].writes is None


def test_a_codec_that_breaks_while_it_is_made_is_done_without(
    registry: Callable[..., PluginRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(layout: BlockLayout) -> Codec:
        raise OSError("no such device")

    made = tier_codecs(config_of("odd", "zstd"), LAYOUT, registry(Plugin(breaks)), LOGGER)
    assert made["t0"].writes is None
    assert made["t1"].writes is not None
    assert "tier 't0' stores blocks without its codec" in caplog.text
    assert "no such device" in caplog.text


def test_a_codec_that_is_not_installed_matters_only_to_who_asks_for_it(
    registry: Callable[..., PluginRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    def absent(layout: BlockLayout) -> Codec:
        raise ConfigError("codec", "odd needs the package odd", "pip install odd")

    plugins = registry(Plugin(absent))
    assert 400 not in tier_codecs(config_of("zstd"), LAYOUT, plugins, LOGGER)["t0"].reads
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.codec: odd needs .*pip install odd"):
        tier_codecs(config_of("odd"), LAYOUT, plugins, LOGGER)


@pytest.mark.parametrize(
    ("codecs", "lossy"),
    [
        ((), []),
        (("none", "lz4", "zstd"), []),
        (("fp8",), ["fp8"]),
        (("none", "zstd", "fp8"), ["fp8"]),
        (("fp8", "fp8"), ["fp8"]),
    ],
)
def test_one_lossy_tier_gives_all_blocks_of_the_deployment_other_keys(
    codecs: tuple[str, ...], lossy: list[str], registry: Callable[..., PluginRegistry]
) -> None:
    model = b"m" * 32
    keyed = block_fingerprint(model, config_of(*codecs), registry())
    assert keyed == lossy_fingerprint(model, lossy)
    assert (keyed == model) == (not lossy)
