"""Frame headers: sealed bodies of any length, every field refused by its reason, nothing decoded before."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.errors import BlockRefused
from kvferry.connector.frame import HEADER_BYTES, FrameSeal, Sealed, peek_key
from kvferry.connector.keys import BlockKey

KEY = BlockKey(bytes(range(32)))
MODEL = b"m" * 32
SIZE = 640
SEAL = FrameSeal(MODEL, SIZE)
SIGNED = FrameSeal(MODEL, SIZE, "secret")
CODEC = 7
CHECK_AT = 136


class Sample:
    """A frame whose body is ``length`` bytes of ``codec``, in a slot that is longer."""

    def __init__(
        self, codec: int = 0, length: int = SIZE, seal: FrameSeal = SEAL, key: BlockKey = KEY
    ) -> None:
        self.header = memoryview(bytearray(b"\xee" * HEADER_BYTES))
        self.slot = memoryview(bytearray((b"payload!" * 128)[: SIZE + 128]))
        seal.seal(key, self.header, self.slot, codec, length)

    def verify(self, seal: FrameSeal = SEAL, codecs: frozenset[int] = frozenset({CODEC})) -> Sealed:
        return seal.verify(KEY, self.header, self.slot, codecs)

    def put(self, offset: int, value: bytes) -> Sample:
        """Change a field, with a header checksum that fits."""
        self.header[offset : offset + len(value)] = value
        check = xxhash.xxh3_64_intdigest(self.header[:CHECK_AT])
        self.header[CHECK_AT : CHECK_AT + 8] = struct.pack("<Q", check)
        return self

    def refusal(self, seal: FrameSeal = SEAL, codecs: frozenset[int] = frozenset({CODEC})) -> str:
        with pytest.raises(BlockRefused) as refused:
            self.verify(seal, codecs)
        return refused.value.reason


@pytest.mark.parametrize("seal", [SEAL, SIGNED], ids=["plain", "signed"])
@pytest.mark.parametrize(("codec", "length"), [(0, SIZE), (CODEC, 1), (CODEC, 333), (CODEC, SIZE)])
def test_a_sealed_frame_says_what_it_holds(seal: FrameSeal, codec: int, length: int) -> None:
    assert Sample(codec, length, seal).verify(seal) == Sealed(codec, length)


def test_a_frame_without_a_codec_is_what_older_readers_know() -> None:
    """Byte for byte version 1 as it was before there were codecs: the body is the payload."""
    sample = Sample()
    fields = struct.unpack("<8sHHHH32s32sQ16s", sample.header[:104])
    assert fields[:8] == (b"KVFERRY\0", 1, 256, 0, 0, KEY, MODEL, SIZE)
    assert fields[8] == xxhash.xxh3_128_digest(sample.slot[:SIZE])
    assert bytes(sample.header[104:136]) == bytes(32)
    assert bytes(sample.header[144:]) == bytes(112)
    assert peek_key(sample.header) == KEY


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"k", "magic"),
        (8, b"\2", "version"),
        (10, b"\1", "version"),
        (12, b"\x08", "codec"),
        (16, b"\xff", "key"),
        (48, b"n", "fingerprint"),
        (80, struct.pack("<Q", SIZE + 1), "length"),
        (80, struct.pack("<Q", 0), "length"),
        (80, struct.pack("<Q", (1 << 64) - 1), "length"),
        (80, struct.pack("<Q", 332), "checksum"),
        (88, b"\0\0\0\0", "checksum"),
    ],
)
def test_a_field_that_is_not_as_expected_has_its_reason(offset: int, value: bytes, reason: str) -> None:
    assert Sample(CODEC, 333).put(offset, value).refusal() == reason


def test_a_codec_that_is_not_accepted_is_refused_before_anything_of_the_body_is_read() -> None:
    sample = Sample(CODEC, 333)
    sample.slot[:] = bytes(len(sample.slot))
    assert sample.refusal(codecs=frozenset()) == "codec"


def test_a_reader_without_codecs_refuses_every_codec() -> None:
    sample = Sample(CODEC, 333)
    with pytest.raises(BlockRefused, match="codec"):
        SEAL.verify(KEY, sample.header, sample.slot)


@pytest.mark.parametrize("length", [1, SIZE - 1])
def test_a_body_that_claims_to_be_the_payload_is_as_long_as_it(length: int) -> None:
    assert Sample(0, length).refusal() == "length"


@pytest.mark.parametrize(("codec", "length"), [(0, SIZE), (CODEC, 333)])
def test_every_byte_of_the_body_counts_and_none_behind_it(codec: int, length: int) -> None:
    for index in range(length):
        sample = Sample(codec, length)
        sample.slot[index] ^= 1
        assert sample.refusal() == "checksum"
    sample = Sample(codec, length)
    for index in range(length, len(sample.slot)):
        sample.slot[index] ^= 1
    assert sample.verify() == Sealed(codec, length)


@pytest.mark.parametrize(("codec", "length"), [(0, SIZE), (CODEC, 333)])
def test_a_signature_covers_codec_length_and_body(codec: int, length: int) -> None:
    """Whoever can write to the storage, but has no secret, can repair every checksum."""

    def resealed(change: int) -> Sample:
        sample = Sample(codec, length, SIGNED)
        sample.slot[change] ^= 1
        return sample.put(88, xxhash.xxh3_128_digest(sample.slot[:length]))

    assert resealed(5).refusal(SIGNED) == "mac"
    other_codec = Sample(CODEC, SIZE, SIGNED).put(12, b"\0")
    assert other_codec.refusal(SIGNED) == "mac"
    shorter = Sample(CODEC, length, SIGNED).put(80, struct.pack("<Q", 100))
    assert shorter.put(88, xxhash.xxh3_128_digest(shorter.slot[:100])).refusal(SIGNED) == "mac"


def test_a_reader_with_a_secret_refuses_frames_without_or_with_another() -> None:
    assert Sample(CODEC, 333).refusal(SIGNED) == "mac"
    assert Sample(CODEC, 333, FrameSeal(MODEL, SIZE, "other")).refusal(SIGNED) == "mac"


@given(header=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_arbitrary_headers_are_refused(header: bytes) -> None:
    with pytest.raises(BlockRefused):
        SEAL.verify(KEY, memoryview(header), memoryview(bytes(SIZE)))


@given(index=st.integers(0, 143), bit=st.integers(0, 7))
def test_one_flipped_bit_of_the_header_is_refused(index: int, bit: int) -> None:
    sample = Sample(CODEC, 333, SIGNED)
    sample.header[index] ^= 1 << bit
    sample.refusal(SIGNED)
