"""The walk over a graph's bytes finds every place a tensor can hide in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.external_data import MalformedGraph, external_locations


def field(number: int, payload: bytes) -> bytes:
    """Encode one length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    head = value & 0x7F
    return bytes([head | 0x80]) + varint(value >> 7) if value >> 7 else bytes([head])


TENSOR = field(13, field(1, b"location") + field(2, b"other.bin")) + field(13, field(1, b"offset") + field(2, b"0"))
ATTRIBUTE = field(5, TENSOR)
NODE = field(5, ATTRIBUTE)


@pytest.mark.parametrize(
    "model",
    [
        field(7, field(5, TENSOR)),  # initializer
        field(7, field(15, field(1, TENSOR))),  # sparse initializer
        field(7, field(1, NODE)),  # Constant
        field(7, field(1, field(5, field(10, TENSOR)))),  # list of tensors
        field(7, field(1, field(5, field(6, field(5, TENSOR))))),  # subgraph of If
        field(7, field(1, field(5, field(11, field(1, NODE))))),
        field(7, field(1, field(5, field(22, field(1, TENSOR))))),
        field(25, field(7, NODE)),  # function
        field(25, field(11, ATTRIBUTE)),
        field(20, field(1, field(5, TENSOR))),  # training
    ],
)
def test_the_location_is_found_wherever_a_tensor_may_stand(model: bytes) -> None:
    assert external_locations(varint(8) + varint(10) + model) == {"other.bin"}


def test_a_real_graph_names_its_data_file(decoder_folder: Path) -> None:
    assert external_locations((decoder_folder / "model.onnx").read_bytes()) == {"model.onnx.data"}


@pytest.mark.parametrize(
    "raw", [b"\x3a\x05ab", b"\x0b", b"\xff" * 12, b"\x0d\x00", varint(1 << 35 | 7 << 3 | 2) + b"\x00"]
)
def test_bytes_that_are_no_protobuf_are_refused(raw: bytes) -> None:
    with pytest.raises(MalformedGraph):
        external_locations(raw)


def test_endless_nesting_is_refused() -> None:
    graph = b""
    for _ in range(100):
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(MalformedGraph, match="nested"):
        external_locations(field(7, graph))


@given(st.binary(max_size=200))
def test_random_bytes_give_an_answer_or_a_refusal(raw: bytes) -> None:
    with contextlib.suppress(MalformedGraph):
        external_locations(raw)
