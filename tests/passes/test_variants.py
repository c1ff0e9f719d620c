"""One layer changed at a time: the numbers of a model written so, and no block run twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_files import write_sentence_files
from tiny_models import TABLES_IN_INT8, Workshop, save_model, tiny_module
from torch import nn

from optimizer import sensitivity as damages
from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.items import Item
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import TorchScorer
from optimizer.sensitivity import LayerDamage, sensitivity
from optimizer.store import Store
from passes import _sensitivity
from passes._kind import kind_of
from passes._sensitivity import Variant, replays, saved_bytes, variants_of, walk_variants
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Model
from passes.quantize_rtn import QuantizeRtn

IDS = torch.arange(24).reshape(2, 12) * 7 % 256
OTHERS = torch.arange(5)[None] * 11 % 256
CODED = QuantizeRtn(format="int2", activations="float")
KEY = "0" * 64
TEXTS = [
    Item(tuple((5 * text + place * place) % 250 for place in range(6 + text % 3)), f"d{text // 2}") for text in range(8)
]


def forward(ids: torch.Tensor) -> Callable[[nn.Module], Any]:
    return lambda module: module(input_ids=ids).logits.numpy()


def alone(workshop: Workshop, name: str, step: QuantizeRtn, layers: Sequence[str]) -> Model:
    """Return a model written with these layers quantized and no other."""
    every = Skeleton(workshop.run(name, step).model).specs
    return workshop.run(name, replace(step, exclude=tuple(layer for layer in every if layer not in layers))).model


def skeletons(workshop: Workshop, name: str, step: QuantizeRtn) -> tuple[Skeleton, Skeleton]:
    return Skeleton(workshop.model(name)), Skeleton(workshop.run(name, step).model)


@pytest.mark.parametrize(("name", "step"), [("llama", TABLES_IN_INT8), ("qwen2", CODED), ("albert", CODED)])
def test_a_variant_is_a_model_written_with_that_layer_changed(workshop: Workshop, name: str, step: QuantizeRtn) -> None:
    before, after = skeletons(workshop, name, step)
    variants = variants_of(before, after)
    forwards = [forward(IDS), forward(OTHERS)]
    got = {(variant, index): answer for variant, index, answer in walk_variants(before, after, variants, forwards)}
    assert len(got) == 2 * (len(variants) + 1)
    for index, ids in enumerate((IDS, OTHERS)):
        expected = next(walk(before, [forward(ids)]))[1]
        np.testing.assert_array_equal(got[None, index], expected)
        for number in (0, len(variants) // 2, len(variants) - 1):
            written = Skeleton(alone(workshop, name, step, variants[number].layers))
            np.testing.assert_array_equal(got[number, index], next(walk(written, [forward(ids)]))[1])
            assert (got[number, index] != expected).any()


def test_tied_tables_are_one_variant_from_the_start(workshop: Workshop) -> None:
    before, after = skeletons(workshop, "llama", TABLES_IN_INT8)
    first, *others = variants_of(before, after)
    assert first == Variant(("model.embed_tokens", "lm_head"))
    assert others[0] == Variant(("model.layers.0.self_attn.q_proj",), "model.layers.0")
    assert len(others) == 14


def test_what_variants_save_adds_up_to_what_the_pass_saves(workshop: Workshop) -> None:
    before, after = skeletons(workshop, "llama", TABLES_IN_INT8)
    sizes = [sum(entry.nbytes for entry in skeleton.entries.values()) for skeleton in (before, after)]
    assert sum(saved_bytes(before, after, each) for each in variants_of(before, after)) == sizes[0] - sizes[1]


def test_blocks_before_the_changed_layer_run_for_the_source_alone(workshop: Workshop) -> None:
    before, after = skeletons(workshop, "llama", CODED)
    runs: Counter[str] = Counter()
    for block in before.blocks:
        norm = before.module.get_submodule(f"{block}.input_layernorm")
        norm.register_forward_hook(lambda *_, block=block: runs.update([block]))
    variants = [each for each in variants_of(before, after) if each.layers[0].endswith("down_proj")]
    assert len(list(walk_variants(before, after, variants, [forward(IDS)]))) == 3
    assert runs == {"model.layers.0": 2, "model.layers.1": 3}


@pytest.mark.parametrize("name", ["llama", "bert-sharp", "albert", "modernbert-sharp"])
def test_outputs_of_the_blocks_are_enough_to_go_on_from(workshop: Workshop, name: str) -> None:
    assert replays(Skeleton(workshop.model(name)), forward(OTHERS))


def test_a_model_that_carries_more_from_block_to_block_is_found_and_run_whole(workshop: Workshop) -> None:
    def with_memory(skeleton: Skeleton) -> Skeleton:
        carried = threading.local()
        first, second = (skeleton.module.get_submodule(f"{block}.mlp") for block in skeleton.blocks)
        first.register_forward_hook(lambda _, x, y: setattr(carried, "output", y))
        second.register_forward_hook(lambda _, x, y: y + getattr(carried, "output", 0))
        return skeleton

    before, after = skeletons(workshop, "llama", CODED)
    assert not replays(with_memory(before), forward(OTHERS))
    variants = variants_of(before, after)[-1:]
    whole = [replace(each, begins="") for each in variants]
    answers = [list(walk_variants(before, after, each, [forward(OTHERS)]))[1][2] for each in (whole, variants)]
    written = with_memory(Skeleton(alone(workshop, "llama", CODED, variants[0].layers)))
    expected = next(walk(written, [forward(OTHERS)]))[1]
    np.testing.assert_array_equal(answers[0], expected)
    assert (answers[1] != expected).any()


def test_nothing_is_left_behind_by_a_walk_that_is_given_up(workshop: Workshop) -> None:
    before, after = skeletons(workshop, "llama", TABLES_IN_INT8)
    threads = threading.active_count()
    walking = walk_variants(before, after, variants_of(before, after), [forward(IDS)])
    next(walking)
    assert threading.active_count() > threads
    walking.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
    assert not any("forward" in vars(before.module.get_submodule(block)) for block in before.blocks)
    for skeleton in (before, after):
        assert all(tensor.is_meta for tensor in skeleton.module.state_dict(keep_vars=True).values())
    assert not any(hasattr(module, "spec") for module in before.module.modules())


def measured(workshop: Workshop, name: str, step: QuantizeRtn, store: Path, **options: Any) -> tuple[LayerDamage, ...]:
    before, after = workshop.model(name), workshop.run(name, step).model
    with Store(store) as opened:
        return sensitivity(before, after, TEXTS, store=opened, key=KEY, **options)


@pytest.mark.parametrize("name", ["llama", "bert-sharp"])
def test_damage_is_the_divergence_from_the_source_worst_first(workshop: Workshop, tmp_path: Path, name: str) -> None:
    found = measured(workshop, name, CODED, tmp_path)
    kind = kind_of(workshop.model(name).config)
    task, items = {"agreement": Agreement(data="texts")}, {"agreement": TEXTS}
    source = evaluate(task, items, TorchScorer(workshop.model(name), kind))
    for each in (found[0], found[len(found) // 2], found[-1]):
        written = alone(workshop, name, CODED, each.layers)
        kl = evaluate(task, items, TorchScorer(written, kind), source)["agreement"].scores["kl"]
        assert each.damage == pytest.approx(kl.point, rel=1e-6)
        assert each.format == "int2"
    assert [each.damage for each in found] == sorted((each.damage for each in found), reverse=True)
    assert len({each.layers for each in found}) == len(Skeleton(workshop.run(name, CODED).model).specs)


def test_the_error_of_a_damage_counts_documents(workshop: Workshop, tmp_path: Path) -> None:
    worst = measured(workshop, "llama", CODED, tmp_path)[0]
    task = {"agreement": Agreement(data="texts")}
    models = (workshop.model("llama"), alone(workshop, "llama", CODED, worst.layers))
    source = evaluate(task, {"agreement": TEXTS}, TorchScorer(models[0], "decoder"))
    scores = evaluate(task, {"agreement": TEXTS}, TorchScorer(models[1], "decoder"), source)["agreement"].scores["kl"]
    sums, tokens = (scores.values[name].reshape(4, 2).sum(1) for name in ("kl", "tokens"))
    residuals = sums - worst.damage * tokens
    assert worst.standard_error == pytest.approx(np.sqrt(4 / 3 * (residuals**2).sum()) / tokens.sum(), rel=1e-6)


@pytest.mark.parametrize("name", ["bert-embedder", "bert-ranker"])
def test_damage_of_vectors_and_scores_is_their_squared_change(workshop: Workshop, tmp_path: Path, name: str) -> None:
    def make(folder: Path) -> Model:
        model = save_model(tiny_module(name), folder)
        if name == "bert-embedder":
            write_sentence_files(folder, normalize=False, word_embedding_dimension=32, pooling_mode_mean_tokens=True)
        return model

    before = workshop.once(("sensitive", name), make)
    (tmp_path / "all").mkdir()
    after = CODED.run(before, workshop.context(tmp_path / "all", before)).model
    with Store(tmp_path / "store") as store:
        found = sensitivity(before, after, TEXTS, store=store, key=KEY)
    (tmp_path / "one").mkdir()
    others = tuple(layer for layer in Skeleton(after).specs if layer not in found[0].layers)
    written = replace(CODED, exclude=others).run(before, workshop.context(tmp_path / "one", before)).model
    kind = kind_of(before.config)
    one, other = (answers(TorchScorer(model, kind)).astype(np.float64) for model in (before, written))
    assert found[0].damage == pytest.approx(((other - one) ** 2).sum() / (one**2).sum(), rel=1e-5)
    assert found[0].damage > 2 * found[-1].damage > 0


def answers(scorer: TorchScorer) -> Any:
    return scorer.embed(TEXTS) if scorer.kind == "embedder" else scorer.classify(TEXTS)


def test_a_second_measurement_is_answered_from_the_store(workshop: Workshop, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    def progress(*report: Any) -> None:
        told.append(report)

    first = measured(workshop, "llama", CODED, tmp_path, progress=progress)
    total = 14 * sum(len(text.ids) for text in TEXTS)
    assert told[-1] == (total, total, "token")
    told.clear()
    assert measured(workshop, "llama", CODED, tmp_path, progress=progress) == first
    assert told == []


def test_a_measurement_that_was_killed_goes_on_and_ends_the_same(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damages, "PASSES", 6)
    whole = measured(workshop, "llama", CODED, tmp_path / "whole")
    told: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        told.append(done)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(workshop, "llama", CODED, tmp_path / "killed", progress=kill)
    walks: list[int] = []
    walking = _sensitivity.walk_variants
    monkeypatch.setattr(_sensitivity, "walk_variants", lambda *asked: walks.append(1) or walking(*asked))
    assert measured(workshop, "llama", CODED, tmp_path / "killed", progress=lambda *_: told.append(0)) == whole
    assert len(walks) == len(told) - 4 - 4 + 1  # all but the four that were done, and the trial of replaying


def test_a_layer_whose_answers_are_no_numbers_is_the_worst(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "after").mkdir()
    before = workshop.model("llama")
    after = CODED.run(before, workshop.context(tmp_path / "after", before)).model
    layer = "model.layers.0.mlp.up_proj"
    from passes._safetensors import read_tensor, tensor_index, write_safetensors

    entries = tensor_index(after.folder)
    path = entries[f"{layer}.scales"].file
    tensors = {name: read_tensor(entry) for name, entry in entries.items() if entry.file == path}
    tensors[f"{layer}.scales"][:] = float("nan")
    write_safetensors(path, tensors, {"quantization": "{}"})
    with Store(tmp_path / "store") as store:
        worst, second, *_ = sensitivity(before, after, TEXTS, store=store, key=KEY)
    assert (worst.layers, np.isnan(worst.damage)) == ((layer,), True)
    assert second.damage > 0


class Sized:
    """Stands for a skeleton: as many blocks, as wide."""

    def __init__(self, blocks: int, width: int) -> None:
        self.blocks = ["block"] * blocks
        self.module = self
        self.config = self
        self.hidden_size, self.vocab_size = width, 1000

    def get_text_config(self) -> Sized:
        return self


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([16, 1024, 16384]),
)
def test_every_text_meets_every_variant_once_within_the_memory(
    lengths: list[int], variants: int, blocks: int, width: int
) -> None:
    texts = [Item((1,) * length, "") for length in lengths]
    met: Counter[tuple[int, int]] = Counter()
    for batches, some in shares(Sized(blocks, width), variants, texts):
        flat = [index for batch in batches for index in batch]
        met.update((index, place) for index in flat for place in some)
        tokens = sum(lengths[index] for index in flat)
        states = tokens * (blocks + _sensitivity.STATES_PER_PASS * (len(some) + 1))
        assert states * 4 * width <= _sensitivity.STATE_BYTES or len(some) == 1 or len(flat) == 1
        assert len(batches) * (len(some) + 1) <= damages.PASSES
    assert met == {(index, place): 1 for index in range(len(lengths)) for place in range(variants)}


def shares(source: Any, variants: int, texts: Sequence[Item]) -> Iterator[tuple[list[list[int]], list[int]]]:
    return damages._shares(source, variants, texts)
