"""Find the files that an ONNX graph keeps its weights in, without onnx.

A graph may name any file beside it. ONNX Runtime refuses `..`, absolute paths and links itself, but not a file that the
manifest does not cover, so `verify` asks here. This is a walk over the protobuf wire format along those fields that can
lead to a tensor (onnx/onnx.proto3); everything else is skipped unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

# message -> field number -> message of that field
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH: Final = 64


class MalformedGraph(Exception):
    """The bytes are not a protobuf message."""


def external_locations(model: bytes) -> set[str]:
    """Return every `location` under a tensor's `external_data` in a serialized ModelProto.

    Raises:
        MalformedGraph: when the bytes cannot be read as protobuf.
    """
    locations: set[str] = set()
    _walk(memoryview(model), "model", locations, 0)
    return locations


def _walk(view: memoryview, message: str, locations: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise MalformedGraph(f"nested deeper than {_MAX_DEPTH}")
    for number, value in _messages(view):
        child = _FIELDS[message].get(number)
        if child == "entry":
            fields = dict(_messages(value))
            if bytes(fields.get(_KEY, b"")) == b"location":
                locations.add(bytes(fields.get(_VALUE, b"")).decode(errors="backslashreplace"))
        elif child is not None:
            _walk(value, child, locations, depth + 1)


def _messages(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, payload) of every length-delimited field."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        wire = tag & 7
        if tag >> 32:
            raise MalformedGraph("a field number is too large")  # readers differ in how they cut it
        if wire == _BYTES:
            size, at = _varint(view, at)
            if size > end - at:
                raise MalformedGraph("it ends in the middle of a field")
            yield tag >> 3, view[at : at + size]
            at += size
        elif wire == _VARINT:
            _, at = _varint(view, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise MalformedGraph(f"wire type {wire}")
    if at != end:
        raise MalformedGraph("it ends in the middle of a field")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise MalformedGraph("a number does not end")
