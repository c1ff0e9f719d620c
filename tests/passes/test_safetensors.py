"""Our reader and writer of safetensors against the format's own library, and against files that lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes._safetensors import (
    SafetensorsError,
    read_header,
    read_into,
    read_tensor,
    tensor_index,
    weight_files,
    write_safetensors,
)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(3, 5),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(7).bfloat16(),
        "packed": torch.arange(13, dtype=torch.uint8),
        "scales": torch.randn(4).to(torch.float8_e4m3fn),
        "positions": torch.arange(4),
        "mask": torch.tensor([True, False]),
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.float(), right.float())


def test_what_we_write_the_formats_own_library_reads(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", some_tensors()
    write_safetensors(path, tensors, {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_what_the_formats_own_library_writes_we_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    index = tensor_index(tmp_path)
    assert index.keys() == tensors.keys()
    assert all(same(read_tensor(index[name]), tensor) for name, tensor in tensors.items())


def test_the_bytes_do_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_lies_aligned_to_its_items(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors)
    entries = read_header(tmp_path / "a")
    assert all(entries[name].offset % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    with pytest.raises(RuntimeError):
        write_safetensors(path, {"a": torch.ones(2), "sparse": torch.eye(2).to_sparse()})
    assert same(load_file(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_owns_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    read_tensor(read_header(path)["a"]).zero_()
    assert same(read_tensor(read_header(path)["a"]), torch.ones(2))


def test_a_part_of_a_tensor_is_read_from_where_it_lies(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"before": torch.zeros(9), "x": torch.arange(10, dtype=torch.uint8)})
    buffer = bytearray(3)
    read_into(read_header(tmp_path / "a")["x"], memoryview(buffer), start=4)
    assert list(buffer) == [4, 5, 6]


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_safetensors(path, {"x": torch.ones(1000)})
    entry = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SafetensorsError, match="ends inside tensor x"):
        read_tensor(entry)


def write_raw(path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{x", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"a"', "not a JSON object"),
        (b'{"a":{},"a":{}}', "a name occurs twice"),
        ({"a": entry(0, 12)}, "tensors end at byte"),
        ({"a": entry(0, 20)}, "tensors end at byte"),
        ({"a": entry(0, 8), "b": entry(4, 16)}, "tensor b begins"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "tensor b begins"),
        ({"a": entry(4, 16)}, "tensor a begins"),
        ({"a": entry(0, 16, shape=[5])}, "has 16 bytes"),
        ({"a": entry(0, 16, dtype="F99")}, "tensor a is described by"),
        ({"a": entry(0, 16, shape=[-4, -1])}, "has shape"),
        ({"a": entry(0, 16, shape=[4.0])}, "has shape"),
        ({"a": entry(0, 16, shape=4)}, "tensor a is described by"),
        ({"a": [1]}, "tensor a is described by"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(SafetensorsError, match=words):
        read_header(write_raw(tmp_path / "a", header))


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63])
def test_a_header_length_beyond_the_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(SafetensorsError, match=f"claims {length} bytes"):
        read_header(write_raw(tmp_path / "a", {}, length=length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(SafetensorsError, match="damaged or truncated"):
        read_header(tmp_path / "a")


def test_shards_count_only_where_the_index_names_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
    write_safetensors(tmp_path / "stray.safetensors", {"a": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert [path.name for path in weight_files(tmp_path)] == ["one.safetensors"]
    assert tensor_index(tmp_path)["a"].file == tmp_path / "one.safetensors"


def test_without_an_index_every_file_counts_and_no_name_twice(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "block-0.safetensors", {"a": torch.ones(1)})
    write_safetensors(tmp_path / "block-1.safetensors", {"b": torch.ones(1)})
    assert tensor_index(tmp_path).keys() == {"a", "b"}
    write_safetensors(tmp_path / "block-2.safetensors", {"a": torch.ones(1)})
    with pytest.raises(SafetensorsError, match=r"tensor a is in both block-0\.safetensors and block-2\.safetensors"):
        tensor_index(tmp_path)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    with pytest.raises(SafetensorsError, match="expected a safetensors file beside it"):
        weight_files(tmp_path)
