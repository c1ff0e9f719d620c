"""Each way of pooling against sums done by hand, and the graph of an embedder against torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sentence_files import write_sentence_files
from tiny_models import EXPORT, Workshop, save_model, tiny_module

from passes._graph import GRAPH, load_graph, save_graph
from passes._pooling import Pooling
from passes._sentence import MODES, SentenceSettings
from passes.base import ONNX, Model, PassError

HIDDEN = torch.tensor([[[3.0, -4.0], [1.0, 2.0], [99.0, 99.0]], [[1.0, 0.0], [2.0, 5.0], [6.0, -2.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
BY_HAND = {
    "cls": [[3, -4], [1, 0]],
    "lasttoken": [[1, 2], [6, -2]],
    "max": [[3, 2], [6, 5]],
    "mean": [[2, -1], [3, 1]],
    "mean_sqrt_len_tokens": [[4 / 2**0.5, -2 / 2**0.5], [9 / 3**0.5, 3 / 3**0.5]],
    "weightedmean": [[(3 + 2) / 3, (-4 + 4) / 3], [(1 + 4 + 18) / 6, (10 - 6) / 6]],
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_the_sum_done_by_hand_and_sees_no_padding(mode: Any) -> None:
    pooled = Pooling(SentenceSettings(pooling=(mode,)))(HIDDEN, MASK)
    np.testing.assert_allclose(pooled, BY_HAND[mode], rtol=1e-6)


def test_several_modes_stand_side_by_side_in_their_order() -> None:
    pooled = Pooling(SentenceSettings(pooling=("max", "cls")))(HIDDEN, MASK)
    np.testing.assert_allclose(pooled, [[3, 2, 3, -4], [6, 5, 1, 0]])


def test_a_normalized_vector_has_length_one_and_a_vector_of_zeros_stays() -> None:
    pool = Pooling(SentenceSettings(pooling=("cls",), normalized=True))
    np.testing.assert_allclose(pool(HIDDEN, MASK)[0], [0.6, -0.8], rtol=1e-6)
    assert pool(torch.zeros(1, 2, 2), torch.ones(1, 2)).tolist() == [[0, 0]]


def embedder(folder: Path, *, normalize: bool = True, **pooling: Any) -> Model:
    folder.mkdir(exist_ok=True)
    model = save_model(tiny_module("bert-embedder"), folder)
    write_sentence_files(folder, normalize=normalize, **pooling)
    return model


def exported(workshop: Workshop, model: Model, folder: Path) -> Model:
    folder.mkdir()
    return EXPORT.run(model, workshop.context(folder, model)).model


@pytest.fixture(scope="module")
def all_modes(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """An embedder that pools in every way at once, and its graph."""
    folder = tmp_path_factory.mktemp("embedder")
    model = embedder(folder / "model", normalize=False, pooling_mode=list(MODES))
    return model, exported(workshop, model, folder / "graph")


def test_the_graph_pools_in_every_way_as_torch_does(
    workshop: Workshop, all_modes: tuple[Model, Model], tmp_path: Path
) -> None:
    before, after = all_modes
    (output,) = load_graph(after.folder).graph.outputs
    assert (output.name, str(output.shape)) == ("sentence_embedding", "[batch,192]")
    EXPORT.ensures(before, after, workshop.context(tmp_path, before))


def test_a_text_has_the_same_vector_alone_and_in_a_padded_batch(all_modes: tuple[Model, Model]) -> None:
    session = ort.InferenceSession(str(all_modes[1].folder / GRAPH), providers=["CPUExecutionProvider"])

    def run(ids: list[list[int]], mask: list[list[int]]) -> np.ndarray:
        feed = {"input_ids": np.array(ids), "attention_mask": np.array(mask), "token_type_ids": np.zeros_like(mask)}
        return np.asarray(session.run(None, feed)[0])

    together = run([[5, 6, 7, 8], [9, 10, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    # Sums of 4 instead of 2 numbers: another order of addition.
    np.testing.assert_allclose(together[1], run([[9, 10]], [[1, 1]])[0], atol=1e-5)


def test_an_embedder_whose_attention_would_be_off_by_a_hundredth_is_not_admitted(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedder(tmp_path / "model", pooling_mode_mean_tokens=True)
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *rest, **options: original(query * 1.01, *rest, **options),
    )
    with pytest.raises(PassError, match="its graph: differs from torch"):  # on the twin, whose attention is written out
        EXPORT.admits(model, workshop.context(tmp_path, model))


def test_ensures_finds_a_graph_that_pools_padding(
    workshop: Workshop, all_modes: tuple[Model, Model], tmp_path: Path
) -> None:
    before, after = all_modes
    graph = load_graph(after.folder)
    mask = next(value for value in graph.graph.inputs if value.name == "attention_mask")
    ones = ir.node("Sub", [mask, mask])  # a mask of nothing but padding
    graph.graph.insert_before(next(iter(graph.graph)), ones)
    for use, index in list(mask.uses()):
        if use is not ones:
            use.replace_input_with(index, ones.outputs[0])
    save_graph(graph, tmp_path)
    with pytest.raises(PassError, match="the graph of the model differs from torch by"):
        EXPORT.ensures(before, replace(before, stage=ONNX, folder=tmp_path), workshop.context(tmp_path, before))
