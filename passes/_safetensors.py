"""Read and write safetensors files one tensor at a time, with plain reads.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data,
without gaps or overlaps. A memory map would count every page read as resident memory; `pread` into the tensor's own
storage keeps the peak at one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes._files import atomic_file
from passes.base import PassError

if TYPE_CHECKING:
    import torch

    from passes._checkpoint import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
LARGEST_IN_OUTLINE = 1 << 13
"""Bytes of a tensor that has a content even in outline: the graph's optimizer joins small ones that are equal."""
_READ_BYTES = 1 << 30  # one Linux read returns less than 2 GiB


class SafetensorsError(PassError):
    """A weight file is damaged, incomplete or not what its name says."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`, `dtype` in the format's own names ("BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """Read it in its own dtype."""
        return read_tensor(self)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, in the order of their data.

    Raises:
        SafetensorsError: header or offsets do not describe exactly the bytes of this file.
    """
    size = path.stat().st_size
    header, start = _read_json(path, size)
    header.pop("__metadata__", None)
    entries = sorted(
        (_parse_entry(path, start, name, info) for name, info in header.items()), key=lambda e: (e.offset, e.nbytes)
    )
    end = start
    for entry in entries:
        if entry.offset != end:
            raise _damaged(path, f"tensor {entry.name} begins at byte {entry.offset}, expected {end}")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, but the file has {size}")
    return {entry.name: entry for entry in entries}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text values stored beside the tensors of one file.

    Raises:
        SafetensorsError: the header is damaged.
    """
    header, _ = _read_json(path, path.stat().st_size)
    return dict(header.get("__metadata__", {}))


def tensor_index(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a model folder: `model.safetensors`, else the index's shards, else all safetensors files.

    Raises:
        SafetensorsError: a file is missing or damaged, or two files hold the same name.
    """
    index: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if name in index:
                raise SafetensorsError(f"{folder}: tensor {name} is in both {index[name].file.name} and {path.name}")
            index[name] = entry
    if not (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        for name, shard in _weight_map(folder).items():
            if name not in index or index[name].file.name != shard:
                raise SafetensorsError(f"{folder / INDEX_NAME}: {shard} lacks tensor {name}; fetch the model again")
    return index


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up a model, sorted by name; see `tensor_index` for which ones count.

    Raises:
        SafetensorsError: there is none, or the index names one that is missing.
    """
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SafetensorsError(
                f"{folder / INDEX_NAME}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; "
                "fetch the model again"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SafetensorsError(f"{folder}: no safetensors file")
    return files


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into memory of its own.

    Raises:
        SafetensorsError: torch has no such dtype, or the file is shorter than it was.
    """
    import torch

    if entry.dtype not in _TORCH_NAMES:
        raise SafetensorsError(f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}, which torch cannot hold")
    tensor = torch.empty(entry.shape, dtype=getattr(torch, _TORCH_NAMES[entry.dtype]))
    if entry.nbytes:
        read_into(entry, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def meta_tensor(entry: StoredTensor) -> torch.Tensor:
    """Return a tensor of the same dtype and shape on the meta device."""
    import torch

    return torch.empty(entry.shape, dtype=getattr(torch, _TORCH_NAMES[entry.dtype]), device="meta")


def read_into(entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
    """Fill a writable byte buffer with the tensor's bytes from its byte `start` on.

    Raises:
        SafetensorsError: the file is shorter than its header said.
    """
    with entry.file.open("rb", buffering=0) as file:
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + _READ_BYTES]
            count = os.preadv(file.fileno(), [piece], entry.offset + start + done)
            if count == 0:
                raise _damaged(entry.file, f"it ends inside tensor {entry.name}")
            done += count


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to `path`, all or nothing; the bytes depend only on names, values and metadata.

    Tensors are laid out by falling item size, then name, so that each lies aligned. In the place of one on the meta
    device the file has a hole, which reads as zeros and takes no room; in that of a small one bytes that no other has.
    """
    import torch

    names = {getattr(torch, torch_name): name for name, torch_name in _TORCH_NAMES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        nbytes = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            if tensors[name].is_meta and tensors[name].nbytes > LARGEST_IN_OUTLINE:
                file.seek(tensors[name].nbytes, os.SEEK_CUR)
            elif tensors[name].is_meta:
                file.write(hashlib.shake_128(name.encode()).digest(tensors[name].nbytes))
            elif tensors[name].numel():
                flat = tensors[name].detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
        file.truncate()


def _read_json(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and the byte where the data begins."""
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _damaged(path, f"{size} bytes hold no header")
        length = struct.unpack("<Q", head)[0]
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"its header claims {length} bytes in a file of {size}")
        return _parse_header(path, file.read(length)), 8 + length


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_entry(path: Path, start: int, name: str, info: Any) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        bits = DTYPE_BITS[dtype]
        numbers = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"tensor {name} is described by {str(info)[:200]}") from None
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise _damaged(path, f"tensor {name} has shape {shape} and offsets {begin}, {end}")
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise _damaged(path, f"tensor {name} of {dtype} {shape} has {end - begin} bytes")
    return TensorEntry(name, path, dtype, tuple(shape), start + begin, end - begin)


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        entries = dict(weight_map)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SafetensorsError(f"{path}: no `weight_map` in it; fetch the model again") from None
    for shard in entries.values():
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise SafetensorsError(f"{path}: names {shard!r}, expected a safetensors file beside it")
    return entries


def _damaged(path: Path, reason: str) -> SafetensorsError:
    return SafetensorsError(f"{path}: damaged or truncated safetensors file: {reason}; fetch it again")
