"""The kernels' copy loop, run on the host, against HostStaging: on random pages of every engine's layout.

Whatever must not be written is poisoned before and compared after; the emulation counts accesses that are misaligned or
leave the memory they were given, and bytes, so that nothing is copied twice either.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from emulation import Emulation, Report, build, emulation
from page_kit import FAMILIES, Bytes, Case, random_case, shifted

from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.staging import HostStaging
from kvferry.cuda.geometry import CopyGeometry, copy_geometry
from kvferry.cuda.program import KERNELS

MAP_NORESERVE = 0x4000
"""Linux's, which ``mmap`` does not name."""
LAYOUTS_PER_FAMILY = 240
MUTATION_LAYOUTS_PER_FAMILY = 12


def test_at_least_two_thousand_layouts_are_tried() -> None:
    assert len(FAMILIES) * LAYOUTS_PER_FAMILY >= 2000


class Outcome:
    """What HostStaging and the emulation made of one case, from the same memory and the same poison."""

    def __init__(self, case: Case, library: Emulation, geometry: CopyGeometry | None = None) -> None:
        rng = np.random.default_rng(case.num_threads)
        self.geometry = geometry or copy_geometry(case.layout, case.block, case.shard)
        self.case, self.library = case, library
        slots = rng.integers(0, 256, (len(case.page_ids), case.block.slot_bytes), dtype=np.uint8)
        memory = rng.integers(0, 256, case.layout.extent_bytes() + 32, dtype=np.uint8)
        self.memory, self.slots = shifted(memory, case.pages_shift), slots
        copied = int((case.page_ids >= 0).sum())
        self.bytes = copied * self.geometry.shard_bytes // self.geometry.pages_per_block

    def gather(self) -> list[str]:
        """Return what is wrong after a gather."""
        expected, before = self.slots.copy(), self.memory.copy()
        host = HostStaging(self.memory, self.case.layout, self.case.block, self.case.shard)
        host.gather(self.case.page_ids, np.arange(len(expected)), expected)
        shards, report = self._launch("gather", self.memory, self._in_slots(self.slots))
        problems = self._accesses(report)
        if not np.array_equal(shards, self._in_slots(expected)):
            problems.append("gathered bytes differ")
        if not np.array_equal(self.memory, before):
            problems.append("pages were written")
        return problems

    def scatter(self) -> list[str]:
        """Return what is wrong after a scatter."""
        expected, memory = self.memory.copy(), shifted(self.memory, self.case.pages_shift)
        host = HostStaging(expected, self.case.layout, self.case.block, self.case.shard)
        host.scatter(self.case.page_ids, np.arange(len(self.slots)), self.slots)
        shards, report = self._launch("scatter", memory, self._in_slots(self.slots))
        problems = self._accesses(report)
        if not np.array_equal(memory, expected):
            problems.append("scattered bytes differ")
        if not np.array_equal(shards, self._in_slots(self.slots)):
            problems.append("shards were written")
        return problems

    def _in_slots(self, slots: Bytes) -> Bytes:
        first, size = self.geometry.slot_offset, self.geometry.shard_bytes
        return np.ascontiguousarray(slots[:, first : first + size])

    def _launch(self, direction: str, memory: Bytes, content: Bytes) -> tuple[Bytes, Report]:
        shards = shifted(content, self.case.shards_shift)
        aligned = self.geometry.at(memory.ctypes.data, shards.ctypes.data)
        report = self.library.copy(
            direction, aligned, memory, shards, self.case.page_ids, self.case.num_threads
        )
        return shards.reshape(content.shape), report

    def _accesses(self, report: Report) -> list[str]:
        problems = []
        if report.misaligned or report.outside:
            problems.append(f"{report.misaligned} misaligned accesses, {report.outside} outside")
        if report.bytes_stored != self.bytes:
            problems.append(f"{report.bytes_stored} bytes were stored, not {self.bytes}")
        return problems


@pytest.fixture(scope="module")
def library() -> Emulation:
    return emulation()


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_copy_exactly_what_the_host_does(library: Emulation, family: str) -> None:
    for seed in range(LAYOUTS_PER_FAMILY):
        outcome = Outcome(random_case(family, seed), library)
        assert outcome.gather() + outcome.scatter() == [], f"seed {seed}: {outcome.case}"


def test_the_layouts_reach_every_kernel_and_every_form_of_it(library: Emulation) -> None:
    """Else the random layouts would prove less than they seem to."""
    seen = {"vectors": set(), "lanes": set(), "stretches": set(), "kept": set(), "replicas": set()}
    for family in FAMILIES:
        for seed in range(LAYOUTS_PER_FAMILY):
            case = random_case(family, seed)
            geometry = copy_geometry(case.layout, case.block, case.shard)
            geometry = geometry.at(case.pages_shift, case.shards_shift)
            seen["vectors"].add(geometry.vector_bytes)
            seen["lanes"].add(geometry.lanes)
            seen["stretches"].add(min(geometry.slices // geometry.lanes, 3))
            seen["replicas"].add(case.shard.is_writer)
            steps = ("num_heads", "num_layers", "num_tokens", "num_kv")
            seen["kept"].add(tuple(getattr(geometry, name) > 1 for name in steps))
    assert seen["vectors"] == {1, 2, 4, 8, 16}
    assert seen["lanes"] == {1, 2, 4, 8, 16, 32}
    assert seen["stretches"] == {1, 2, 3}
    assert seen["replicas"] == {True, False}
    # No dimension, every single one, and all of them are steps of some layout.
    assert {(False,) * 4, (True,) * 4} <= seen["kept"]
    assert all(any(kept[index] for kept in seen["kept"]) for index in range(4))


STRIDES = [
    *("page_stride", "head_page_stride", "token_page_stride", "kv_page_stride", "shard_bytes"),
    *(
        "page_shard_stride",
        "head_shard_stride",
        "layer_shard_stride",
        "token_shard_stride",
        "kv_shard_stride",
    ),
]


@pytest.mark.parametrize("name", STRIDES)
def test_a_wrong_stride_is_found(library: Emulation, name: str) -> None:
    """One vector too far in any stride: the negative control of the comparison."""
    found = 0
    for family in FAMILIES:
        for seed in range(MUTATION_LAYOUTS_PER_FAMILY):
            case = random_case(family, seed)
            right = copy_geometry(case.layout, case.block, case.shard)
            wrong = msgspec.structs.replace(right, **{name: getattr(right, name) + right.vector_bytes})
            found += bool(Outcome(case, library, wrong).gather())
    assert found > 10


# Each of them still ends: what never does would be found too, but by a deadline.
MUTANTS = {
    "a carry of two": ("return is_over ? 1 : 0;", "return is_over ? 2 : 0;"),
    "a digit that grows too far": ("sum >= size", "sum > size"),
    "a digit that starts again at zero": ("is_over ? sum - size : sum", "is_over ? 0 : sum"),
    "a carry out of nothing": ("step.token, carry,", "step.token, 1,"),
    "the page's carry for the shard's": ("g.pages_per_block);\n  place.shard", "1);\n  place.shard"),
    "layers and heads exchanged": (
        "place.head * g.head_shard_stride",
        "place.layer * g.head_shard_stride",
    ),
    "the first layer only": ("layer_offsets[place.layer]", "layer_offsets[0]"),
    "offsets of 16 bits": ("return layer_offsets", "return (i16)layer_offsets"),
    "a lane twice": (") + lane) *", ") + lane / 2 * 2) *"),
    "pages that are left out are copied": ("page_id < 0", "page_id < -2147483647 - 1"),
    "one page too few": ("< static_cast<u64>(num_pages)", "+ 1 < static_cast<u64>(num_pages)"),
    "past the end of a run": ("first + i * step < run_bytes", "first <= run_bytes"),
    "three vectors of four": (
        "for (u32 i = 0; i < kVectorsPerThread",
        "for (u32 i = 0; i < kVectorsPerThread - 1",
    ),
    "the wrong way round": ("is_gather ? in_pages : in_shards", "is_gather ? in_shards : in_pages"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_header_is_found(tmp_path: Path, name: str) -> None:
    before, after = MUTANTS[name]
    is_changed = False
    for path in KERNELS.glob("*.cuh"):
        source = path.read_text().replace("using i64", "using i16 = short;\nusing i64")
        is_changed |= before in source
        (tmp_path / path.name).write_text(source.replace(before, after))
    assert is_changed, "the mutant is not of these headers"
    library = build(tmp_path, tmp_path)
    cases = (random_case(family, seed) for family in FAMILIES for seed in range(MUTATION_LAYOUTS_PER_FAMILY))
    outcomes = (Outcome(case, library) for case in cases)
    assert any(outcome.gather() + outcome.scatter() for outcome in outcomes)


def test_offsets_beyond_four_gib(library: Emulation) -> None:
    """Layers, pages and heads that lie further apart than 32 bits reach, in memory that is mapped but not there."""
    far = (1 << 32) + 4096
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=4, head_dim=8, itemsize=2)
    layout = PageLayout(
        num_pages=2,
        page_tokens=2,
        num_heads=2,
        head_bytes=16,
        kv_factor=2,
        layer_offsets=(4 * far, 0),
        page_stride=2 * far,
        head_stride=far,
        token_stride=32,
        kv_stride=16,
    )
    shard = block.shard(0, 1)
    geometry = copy_geometry(layout, block, shard)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = np.frombuffer(mmap.mmap(-1, layout.extent_bytes(), flags=flags), np.uint8)
    content = np.random.default_rng(0).integers(0, 256, (1, block.slot_bytes), dtype=np.uint8)
    shards = content[0, : block.payload_bytes].copy()
    page_ids = np.array([[1, 0]], np.int32)
    report = library.copy("scatter", geometry, memory, shards, page_ids, 32)
    assert (report.misaligned, report.outside, report.bytes_stored) == (0, 0, block.payload_bytes)
    back = np.zeros_like(content)
    HostStaging(memory, layout, block, shard).gather(page_ids, np.array([0]), back)
    assert np.array_equal(back[0, : block.payload_bytes], shards)
    again = np.zeros_like(shards)
    library.copy("gather", geometry, memory, again, page_ids, 32)
    assert np.array_equal(again, shards)


def test_python_packs_the_struct_that_the_compiler_lays_out(library: Emulation) -> None:
    *fields, end = library.fields()
    values = {field.name: 1000 + index for index, field in enumerate(fields)}
    computed = {"num_layers", "lanes_log2", "slices"}
    geometry = CopyGeometry(
        **{name: value for name, value in values.items() if name not in computed},
        layer_offsets=tuple(range(7)),
        slot_offset=0,
        vector_bytes=1,
    )
    values |= {"num_layers": 7, "lanes_log2": geometry.lanes.bit_length() - 1, "slices": geometry.slices}
    packed = geometry.pack()
    assert len(packed) == end.offset
    forms = {4: "<I", 8: "<q"}
    unpacked = {
        field.name: struct.unpack_from(forms[field.size], packed, field.offset)[0] for field in fields
    }
    assert unpacked == values


def test_both_sides_agree_on_a_threads_share(library: Emulation) -> None:
    geometry = geometry_of_one_stretch()
    assert geometry.run_bytes == geometry.lanes * library.vectors_per_thread * geometry.vector_bytes
    assert geometry.slices == geometry.lanes


def geometry_of_one_stretch() -> CopyGeometry:
    """A run of 2 KiB: 32 lanes of four vectors of 16 bytes."""
    block = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=64, itemsize=2)
    layout = PageLayout(
        num_pages=1,
        page_tokens=8,
        num_heads=1,
        head_bytes=128,
        kv_factor=2,
        layer_offsets=(0,),
        page_stride=2048,
        head_stride=2048,
        token_stride=256,
        kv_stride=128,
    )
    return copy_geometry(layout, block, block.shard(0, 1))
