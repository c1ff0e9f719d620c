"""The engine on graphs of several kinds of attention and weights: every request is answered as if it were alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny_models import EXPORT, Workshop

from passes._graph import DATA, GRAPH
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm
from passes.quantize_rtn import QuantizeRtn
from runtime.artifact import verify
from runtime.engine import Engine
from runtime.generation import TextGenerator
from runtime.invariance import examine
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
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
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


def keep(node: ir.Node) -> None:
    pass


def test_windows_and_caps_are_answered_as_alone_and_change_the_answers(tmp_path: Path) -> None:
    found = {}
    for change in (keep, window, cap):
        graph = changed(tmp_path, change)
        found[change] = answers(graph, together=True)
        assert found[change] == answers(graph, together=False)
    assert found[keep] != found[window] != found[cap]


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
