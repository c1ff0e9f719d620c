"""The engine on graphs of several kinds of attention and weights: every request is answered as if it were alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_models import EXPORT, Workshop

from passes._graph import DATA, GRAPH
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm
from passes.quantize_rtn import QuantizeRtn
from runtime.artifact import verify
from runtime.engine import Engine
from runtime.errors import SessionError
from runtime.generation import TextGenerator
from runtime.invariance import Found, examine
from runtime.sampler import SamplingParams
from runtime.session import DecoderSession
from runtime.tokenizer import Tokenizer

ARTIFACT = Path(__file__).parents[1] / "data" / "artifact-v1"
CONTEXT = 64
PROMPTS = [[(7 * row + 3 * at * at) % 250 + 3 for at in range(count)] for row, count in enumerate((1, 5, 40, 17, 33))]
CHAIN = (EXPORT, FuseGqa(), FuseNorm())


def changed(folder: Path, change: Callable[[ir.Node], None]) -> Path:
    """Write the tests' decoder with its attention nodes changed; return the path of the graph."""
    model = ir.load(ARTIFACT / GRAPH)
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        change(node)
    ir.save(model, folder / GRAPH)
    shutil.copy(ARTIFACT / DATA, folder)
    return folder / GRAPH


def answers(graph: Path, *, together: bool) -> list[tuple[int, ...]]:
    """Answer all prompts in an engine of three slots and the smallest chunks, or one after the other."""
    manifest, tokenizer = verify(ARTIFACT), Tokenizer.load(ARTIFACT)
    options: Any = {"max_tokens": 20, "ignore_eos": True, "sampling": SamplingParams(temperature=1, seed=3)}
    session = DecoderSession(graph, capacity=CONTEXT, threads=1, slots=3 if together else 1)
    if together:
        engine = Engine(manifest, session, tokenizer, max_stall_ms=1e-6)
        return [each.token_ids for each in engine.generate(PROMPTS, **options)]
    generator = TextGenerator(manifest, session, tokenizer)
    return [generator.generate(prompt, **options).token_ids for prompt in PROMPTS]


def window(node: ir.Node) -> None:
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 6)


def cap(node: ir.Node) -> None:
    window(node)
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 1.0)


def store_bytes(node: ir.Node) -> None:
    """Keep keys and values in int8, with a scale for each channel."""
    node.resize_inputs(14)
    for at, kind, scale in ((12, "k", 0.05), (13, "v", 0.025)):  # the largest numbers are about 6 and 3
        name = f"{node.outputs[0].name}.{kind}_scale"
        scales = ir.tensor(np.full((1, 2, 1, 16), scale, np.float32), name=name)
        value = ir.Value(name=name, shape=scales.shape, type=ir.TensorType(scales.dtype), const_value=scales)
        assert node.graph is not None
        node.graph.register_initializer(value)
        node.replace_input_with(at, value)
        node.attributes[f"{kind}_quant_type"] = ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    for cache in (*node.inputs[3:5], *node.outputs[1:3]):
        assert cache is not None
        cache.dtype = ir.DataType.INT8


def keep(node: ir.Node) -> None:
    pass


def test_windows_and_caps_are_answered_as_alone_and_change_the_answers(tmp_path: Path) -> None:
    found = {}
    for change in (keep, window, cap):
        graph = changed(tmp_path, change)
        found[change] = answers(graph, together=True)
        assert found[change] == answers(graph, together=False)
    assert found[keep] != found[window] != found[cap]


def test_a_cache_of_bytes_takes_a_quarter_and_keeps_every_bit_of_an_answer(tmp_path: Path) -> None:
    floats = DecoderSession(changed(tmp_path, keep), capacity=CONTEXT, threads=1)
    want = floats.run(PROMPTS[2]).copy()
    graph = changed(tmp_path, store_bytes)
    session = DecoderSession(graph, capacity=CONTEXT, threads=1, slots=8)
    assert 4 * session.cache.token_bytes == floats.cache.token_bytes
    assert {array.dtype for array in session.cache.view(0, 8).values()} == {np.dtype(np.int8)}
    error = abs(session.run(PROMPTS[2]) - want).max()
    assert 0 < error < 0.2 * abs(want).max()  # 0.095: half a step of 0.05 in keys of up to 6, and weights drawn wide
    assert answers(graph, together=True) == answers(graph, together=False)
    assert examine(session) == Found(even_rows=True, odd_rows=True, chunks=True, phases=True)


def test_a_cache_of_another_type_is_refused(tmp_path: Path) -> None:
    def store_halves(node: ir.Node) -> None:
        store_bytes(node)
        for cache in (*node.inputs[3:5], *node.outputs[1:3]):
            cache.dtype = ir.DataType.UINT8

    with pytest.raises(
        SessionError, match=r"past\.0\.\w+: got tensor\(uint8\), expected tensor\(float\) or tensor\(int8\)"
    ):
        DecoderSession(changed(tmp_path, store_halves), capacity=CONTEXT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_exported_windows_and_caps_are_answered_as_alone(workshop: Workshop, name: str) -> None:
    graph = workshop.run(name, *CHAIN).model.folder / GRAPH
    assert answers(graph, together=True) == answers(graph, together=False)


@pytest.mark.slow
def test_four_bits_in_large_blocks_are_exact_in_even_numbers_of_rows(workshop: Workshop) -> None:
    graph = workshop.run("llama", QuantizeRtn(format="int4", group_size=64), *CHAIN).model.folder / GRAPH
    found = examine(DecoderSession(graph, capacity=CONTEXT, threads=1, slots=8))

    def logprobs(*, exact: bool, together: bool) -> list[list[float]]:
        session = DecoderSession(graph, capacity=CONTEXT, threads=1, slots=3)
        engine = Engine(verify(ARTIFACT), session, Tokenizer.load(ARTIFACT), exact=exact)
        groups = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
        answered = [
            each for group in groups for each in engine.generate(group, max_tokens=20, ignore_eos=True, logprobs=0)
        ]
        return [[token.logprob for token in each.logprobs or ()] for each in answered]

    assert logprobs(exact=True, together=True) == logprobs(exact=True, together=False)
    assert found.odd_rows == (logprobs(exact=False, together=True) == logprobs(exact=False, together=False))
