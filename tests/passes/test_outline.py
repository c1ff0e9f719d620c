"""What a chain of passes would leave, told from headers, against what it leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import CALIBRATION, EXPORT, TABLES_IN_INT8, Workshop

from passes._graph import DATA, in_outline, initializer, lazy, load_graph, save_graph, weight_bytes
from passes._safetensors import SINGLE_NAME, read_header, weight_files, write_safetensors
from passes._skeleton import Skeleton
from passes.base import Model, Pass, PassError
from passes.fuse_attention import FuseAttention
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm
from passes.fuse_rotary import FuseRotary
from passes.quantize_int8 import QuantizeInt8
from passes.smooth_quant import SmoothQuant

STATIC = QuantizeInt8(activations="static", calibration=CALIBRATION)
CHAINS = [
    pytest.param("llama-deep", 2, (TABLES_IN_INT8, EXPORT, FuseGqa(), FuseNorm()), marks=pytest.mark.slow),
    pytest.param("modernbert-deep", 2, (STATIC, EXPORT, FuseRotary(), FuseAttention()), marks=pytest.mark.slow),
    pytest.param("gpt2", 1, (SmoothQuant(calibration=CALIBRATION), EXPORT), marks=pytest.mark.slow),
]
"""Model, how many graphs stand for its own, passes."""


@pytest.mark.parametrize(("name", "graphs", "steps"), CHAINS)
def test_each_pass_is_estimated_on_what_those_before_it_leave(
    workshop: Workshop, name: str, graphs: int, steps: tuple[Pass, ...]
) -> None:
    for count, estimate in enumerate(workshop.estimate(name, *steps), 1):
        assert len(list(estimate.model.folder.glob("*/model.onnx"))) in (0, graphs)
        result = workshop.run(name, *steps[:count])
        assert estimate.bytes == pytest.approx(size_of(result.model), rel=0.01)
        assert estimate.matches == result.changes.get("matched", estimate.matches)
        assert estimate.parameters == sum(each.numel() for each in numbers(workshop, name))


def size_of(model: Model) -> int:
    if model.stage.name == "onnx":
        return weight_bytes(model.folder)
    return sum(path.stat().st_size for path in weight_files(model.folder))


def numbers(workshop: Workshop, name: str) -> list:
    module = Skeleton(workshop.model(name)).module
    return list({id(each): each for each in module.parameters()}.values())


def test_no_weight_is_read(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama-deep")
    hollow = Path(shutil.copytree(model.folder, tmp_path / "hollow"))
    begin = min(entry.offset for entry in read_header(hollow / SINGLE_NAME).values())
    with (hollow / SINGLE_NAME).open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(begin)
        file.truncate(size)
    context = workshop.context(tmp_path, model)
    told = TABLES_IN_INT8.estimate(replace(model, folder=hollow), replace(context, workdir=fresh(tmp_path, "a")))
    again = TABLES_IN_INT8.estimate(model, replace(context, workdir=fresh(tmp_path, "b")))
    assert (told.bytes, told.matches) == (again.bytes, again.matches)


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_an_outline_takes_no_room_and_small_tensors_differ(tmp_path: Path) -> None:
    tensors = {name: torch.empty(size, device="meta") for name, size in (("large", 1 << 22), ("a", 100), ("b", 100))}
    write_safetensors(tmp_path / SINGLE_NAME, tensors)
    status, entries = (tmp_path / SINGLE_NAME).stat(), read_header(tmp_path / SINGLE_NAME)
    assert status.st_size > 1 << 24 > 16 * 512 * status.st_blocks
    assert {name: entry.shape for name, entry in entries.items()} == {"large": (1 << 22,), "a": (100,), "b": (100,)}
    assert entries["a"].read().tolist() != entries["b"].read().tolist()
    assert not entries["large"].read().any()


def test_a_graph_in_outline_reads_no_large_tensor(workshop: Workshop, tmp_path: Path) -> None:
    def refuse() -> NDArray[np.float32]:
        raise AssertionError("a weight was read")

    graph = load_graph(workshop.run("llama-deep", EXPORT).model.folder)
    graph.graph.initializers["w"] = initializer(lazy("w", (1 << 12, 1 << 10), ir.DataType.FLOAT, refuse))
    with in_outline():
        save_graph(graph, tmp_path)
    status = (tmp_path / DATA).stat()
    assert status.st_size > 1 << 24 > 16 * 512 * status.st_blocks
    with pytest.raises(AssertionError, match="a weight was read"):
        save_graph(graph, tmp_path)


def test_a_pass_that_finds_no_place_in_the_outline_is_refused_in_its_own_words(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"fuse_gqa: matched 0 of 2 places; first refusal: .* heads are 24 wide"):
        workshop.estimate("llama-odd-heads", EXPORT, FuseGqa())
    with pytest.raises(PassError, match="quantized already"):
        TABLES_IN_INT8.requires(workshop.estimate("llama", TABLES_IN_INT8)[0].model)
