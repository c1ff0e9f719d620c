"""Memory of keys and values: taken as it is written, given back when a slot is freed."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import SessionError
from runtime.kv_cache import KVBuffers, MappedMemory, Memory, PlainMemory, Side

MIB = 2**20
MEMORIES = [PlainMemory, *([MappedMemory] if sys.platform == "linux" else [])]
SHAPES = {"0.key": Side(2, 16), "0.value": Side(2, 16), "1.key": Side(3, 80), "1.value": Side(3, 80)}


def resident() -> int:
    """Bytes of memory that this process has been given."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_view_is_the_buffer_itself_and_reads_zero(memory: type[Memory]) -> None:
    buffers = KVBuffers(SHAPES, slots=4, capacity=10, memory=memory)
    view = buffers.view(1, 2)
    assert {name: array.shape for name, array in view.items()} == {
        name: (2, heads, buffers.capacity, width) for name, (heads, width, _) in SHAPES.items()
    }
    assert not any(array.any() for array in view.values())
    view["0.key"][1] = 7
    assert (buffers.view(2, 1)["0.key"] == 7).all() and not buffers.view(3, 1)["0.key"].any()


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_freed_slot_reads_zero_and_its_neighbours_keep_theirs(memory: type[Memory]) -> None:
    buffers = KVBuffers(SHAPES, slots=3, capacity=10, memory=memory)
    for array in buffers.view(0, 3).values():
        array[:] = np.nan
    buffers.free(1)
    for array in buffers.view(0, 3).values():
        assert not array[1].any() and np.isnan(array[[0, 2]]).all()


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_copy_writes_the_positions_asked_for_and_no_others(memory: type[Memory]) -> None:
    buffers = KVBuffers(SHAPES, slots=3, capacity=10, memory=memory)
    for array in buffers.view(0, 3).values():
        array[:] = np.random.default_rng(0).random(array.shape, np.float32)
    before = {name: array.copy() for name, array in buffers.view(0, 3).items()}
    buffers.copy(source=2, slot=0, first=3, count=4)
    for name, array in buffers.view(0, 3).items():
        before[name][0, :, 3:7] = before[name][2, :, 3:7]
        assert np.array_equal(array, before[name])


def test_every_head_begins_with_a_page() -> None:
    buffers = KVBuffers(SHAPES, slots=2, capacity=10)
    assert buffers.capacity >= 10 and buffers.capacity % buffers.granule == 0
    assert all(buffers.granule * 4 * width % mmap.PAGESIZE == 0 for _, width, _ in SHAPES.values())


def test_a_token_counts_keys_and_values_of_all_layers() -> None:
    assert KVBuffers(SHAPES, slots=2, capacity=10).token_bytes == 4 * 2 * (2 * 16 + 3 * 80)


def test_numbers_of_a_byte_take_a_quarter_and_come_in_four_times_as_many_tokens() -> None:
    floats, bytes_ = ({"0.key": Side(2, 64, np.dtype(kind)), "0.value": Side(2, 64)} for kind in ("f4", "i1"))
    assert (KVBuffers(floats, slots=2, capacity=10).granule, KVBuffers(bytes_, slots=2, capacity=10).granule) == (
        16,
        64,
    )
    buffers = KVBuffers(bytes_, slots=2, capacity=10)
    assert buffers.token_bytes == 2 * 64 + 2 * 64 * 4
    view = buffers.view(0, 2)
    assert {name: array.dtype for name, array in view.items()} == {"0.key": np.int8, "0.value": np.float32}
    for array in view.values():
        array[:] = 1
    buffers.free(1)
    assert all(array[0].all() and not array[1].any() for array in view.values())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere buffers are plain zeros")
def test_memory_comes_with_tokens_and_goes_with_the_slot() -> None:
    # 64 GiB of addresses. 40 MiB are written; what other code takes meanwhile is far less than the 10 MiB of slack.
    buffers = KVBuffers({"0.key": Side(8, 128)}, slots=64, capacity=2**18)
    before = resident()
    for slot in (0, 40):
        buffers.view(slot, 1)["0.key"][0, :, :5120] = 1
    written = resident() - before
    buffers.free(40)
    assert 30 * MIB < written < 50 * MIB
    assert 10 * MIB < resident() - before < written - 10 * MIB


def test_more_than_the_system_has_addresses_for_is_refused_in_one_line() -> None:
    with pytest.raises(SessionError, match=r"capacity: 1024 x 1073741824 tokens need \d+ MiB of cache"):
        KVBuffers({"0.key": Side(64, 128)}, slots=1024, capacity=2**30)
