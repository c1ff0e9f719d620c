"""quantize_prefill: a graph of prompts in INT8 over the same low-bit weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from tiny_models import EXPORT, MANY_BITS, MIXED, TABLES_IN_INT8, Workshop

from passes._formats import round_channels
from passes._graph import DATA, GRAPH, PREFILL, weight_bytes
from passes._quantized import QuantizedLinear
from passes._skeleton import Skeleton
from passes.base import Model, Pass, PassError
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm
from passes.quantize_prefill import QuantizePrefill
from passes.quantize_rtn import QuantizeRtn
from runtime.errors import SessionError
from runtime.invariance import examine
from runtime.session import DecoderSession

STEP = QuantizePrefill()
WIDE = QuantizeRtn(format="int4", group_size=128)  # wider than the layers: the last block is padded
CASES: list[tuple[str, tuple[Pass, ...], int]] = [
    ("llama", (TABLES_IN_INT8, EXPORT), 14),
    ("qwen2", (MIXED, EXPORT), 12),  # zero points, biases, two layers in float
    ("llama", (MANY_BITS, EXPORT), 10),  # 8 bits as well; what is in 2 bits or float stays
    ("llama", (WIDE, EXPORT, FuseGqa(), FuseNorm()), 10),
]


def session(folder: Path, **options: Any) -> DecoderSession:
    return DecoderSession(folder / GRAPH, capacity=64, threads=1, **options)


@pytest.mark.parametrize(("name", "steps", "matched"), CASES)
def test_prompts_are_answered_as_before_but_for_the_rounding(
    workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...], matched: int
) -> None:
    before, result = workshop.run(name, *steps).model, workshop.run(name, *steps, STEP)
    assert result.changes == {"matched": matched}
    STEP.ensures(before, result.model, workshop.context(tmp_path, before))
    ids = np.arange(1, 20)
    want, got = (session(model.folder).run(ids).copy() for model in (before, result.model))
    assert 0 < np.abs(got - want).max() < 0.1 * np.ptp(want)  # 8-bit rows of a model of 64 features


@pytest.mark.parametrize(("name", "steps", "matched"), CASES[:3])
def test_generated_tokens_keep_every_bit_and_so_do_their_files(
    workshop: Workshop, name: str, steps: tuple[Pass, ...], matched: int
) -> None:
    before, after = workshop.run(name, *steps).model, workshop.run(name, *steps, STEP).model
    assert all((before.folder / file).read_bytes() == (after.folder / file).read_bytes() for file in (GRAPH, DATA))
    one, other = session(before.folder, slots=2), session(after.folder, slots=2)
    for position, token in enumerate((5, 9, 200)):
        want = one.decode([token, token + 1], [position] * 2)
        assert np.array_equal(other.decode([token, token + 1], [position] * 2), want)


@pytest.mark.parametrize("quantizer", [TABLES_IN_INT8, WIDE])
def test_the_integers_are_those_of_rounding_the_weights_by_rows(
    workshop: Workshop, tmp_path: Path, quantizer: Pass
) -> None:
    torch_stage = Skeleton(workshop.run("llama", quantizer).model)
    linears = [
        module
        for name, module in torch_stage.module.named_modules()
        if isinstance(module, QuantizedLinear) and ".layers." in name
    ]
    with torch_stage.loaded(*torch_stage.blocks):
        want = [round_channels(linear.dequantized(slice(None))) for linear in linears]
    got = folded_weights(workshop.run("llama", quantizer, EXPORT, STEP).model.folder, tmp_path)
    assert len(got) == len(want) == 14
    for expected in want:
        integers, scales = expected["qweight"].numpy().T, expected["scales"].numpy()
        found = [each for each, steps in got if steps.shape == scales.shape and np.allclose(steps, scales, rtol=1e-6)]
        assert len(found) == 1
        off = np.abs(found[0].astype(int) - integers)
        assert off.max() <= 1 and off.mean() < 0.05  # float16 decides those close to a half: 1 in 32 at most


def folded_weights(folder: Path, into: Path) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return the integers [M, N] and scales [N] of every INT8 product that onnxruntime makes of a graph of prompts."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(into / "folded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(folder / PREFILL, options, providers=["CPUExecutionProvider"])
    shutil.copy(folder / DATA, into)
    graph = onnx.load(into / "folded.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [(tensors[n.input[1]], tensors[n.input[3]]) for n in graph.node if n.op_type == "MatMulIntegerToFloat"]


def test_cuts_of_a_prompt_change_no_bit_and_phases_differ(workshop: Workshop) -> None:
    model = workshop.run("llama", TABLES_IN_INT8, EXPORT, FuseGqa(), STEP).model
    found = examine(session(model.folder, slots=2))
    assert found.chunks and not found.phases
    alone = session(model.folder)
    prompt = alone.run([7]).copy()
    assert not np.array_equal(alone.step(7, 0), prompt[0])  # one token of a prompt is a prompt


def test_the_weights_lie_on_disk_once(workshop: Workshop) -> None:
    before, after = (workshop.run("llama", TABLES_IN_INT8, EXPORT, *more).model for more in ((), (STEP,)))
    assert weight_bytes(after.folder) == weight_bytes(before.folder) + (after.folder / PREFILL).stat().st_size
    assert not list(after.folder.glob(f"{PREFILL}.*"))


def test_the_estimate_is_what_comes_out(workshop: Workshop) -> None:
    steps = (TABLES_IN_INT8, EXPORT, STEP)
    estimate, result = workshop.estimate("llama", *steps)[-1], workshop.run("llama", *steps)
    assert estimate.matches == result.changes["matched"]
    assert estimate.bytes == pytest.approx(
        weight_bytes(result.model.folder), rel=0.01
    )  # names of layers differ in length


def test_a_graph_that_computes_something_else_is_caught(workshop: Workshop, tmp_path: Path) -> None:
    before, after = (workshop.run("llama", TABLES_IN_INT8, EXPORT, *more).model for more in ((), (STEP,)))
    shutil.copytree(after.folder, tmp_path / "broken")
    graph = onnx.load(tmp_path / "broken" / PREFILL, load_external_data=False)
    graph.graph.initializer.append(numpy_helper.from_array(np.uint8(100), "prefill.other"))
    for node in graph.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            node.input[4] = "prefill.other"
    onnx.save(graph, tmp_path / "broken" / PREFILL)
    with pytest.raises(PassError, match=r"quantize_prefill: logits moved by \S+ of their range"):
        STEP.ensures(before, replace(after, folder=tmp_path / "broken"), workshop.context(tmp_path, before))


def test_what_it_cannot_take_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.run("llama", TABLES_IN_INT8, EXPORT, STEP).model
    for step, model, reason in (
        (STEP, workshop.run("bert", EXPORT).model, "the model is no decoder"),
        (STEP, done, "prompts have a graph of their own already; name the pass once"),
        (FuseNorm(), done, "put quantize_prefill after it"),
    ):
        with pytest.raises(PassError, match=f"{step.name()}: .*{reason}"):
            step.requires(model)
    plain = workshop.run("llama", EXPORT).model
    with pytest.raises(PassError, match="matched 0 products; quantize weights"):
        STEP.run(plain, workshop.context(tmp_path, plain))
    assert not list(tmp_path.iterdir())


def test_a_session_refuses_a_graph_of_prompts_of_another_model(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(workshop.run("llama", TABLES_IN_INT8, EXPORT, STEP).model.folder, folder)
    other: Model = workshop.run("llama-odd-heads", EXPORT).model
    shutil.copy(other.folder / DATA, folder / DATA)
    shutil.copy(other.folder / GRAPH, folder / PREFILL)
    (folder / DATA).write_bytes((other.folder / DATA).read_bytes() + bytes(1 << 20))
    shutil.copy(workshop.run("llama", TABLES_IN_INT8, EXPORT).model.folder / GRAPH, folder / GRAPH)
    with pytest.raises(SessionError, match=r"prefill.onnx: has other inputs or outputs than the graph beside it"):
        session(folder)
