"""quantize_mixed: the best spread of a budget, what damage is, and that layers become what was chosen."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CALIBRATION, TEXTS, Workshop, file_hashes

from passes._budget import answer_damages, block_damages, least_damage
from passes._formats import IntegerFormat, round_to_nearest
from passes._override import Override
from passes._skeleton import Skeleton
from passes.base import Context, PassError
from passes.quantize_mixed import FILE, QuantizeMixed
from passes.quantize_rtn import QuantizeRtn

MIXED = QuantizeMixed(calibration=CALIBRATION)
LAYERS = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


def few_texts(workshop: Workshop, folder: Path) -> Context:
    """Return a context with two calibration texts."""
    folder.mkdir(exist_ok=True)
    return replace(workshop.context(folder, workshop.model("llama")), calibration={CALIBRATION: TEXTS[:2]})


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_no_other_spread_of_a_budget_does_less(data: st.DataObject) -> None:
    layers, forms = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rows = lambda low: data.draw(  # noqa: E731
        st.lists(st.lists(st.integers(low, 50), min_size=forms, max_size=forms), min_size=layers, max_size=layers)
    )
    damages, sizes = ({str(number): row for number, row in enumerate(rows(low))} for low in (0, 1))
    budget = data.draw(st.integers(sum(map(min, sizes.values())), 200))
    chosen = least_damage(damages, sizes, budget)  # type: ignore[arg-type]
    assert sum(sizes[layer][place] for layer, place in chosen.items()) <= budget
    fitting = [
        sum(damages[str(layer)][place] for layer, place in enumerate(places))
        for places in itertools.product(range(forms), repeat=layers)
        if sum(sizes[str(layer)][place] for layer, place in enumerate(places)) <= budget
    ]
    assert sum(damages[layer][place] for layer, place in chosen.items()) == min(fitting)


def test_a_spread_by_hand() -> None:
    """By damage per byte `a` would come first; `b` alone uses the budget better."""
    damages, sizes = {"a": [9.0, 0.0], "b": [12.0, 0.0]}, {"a": [1, 3], "b": [1, 4]}
    assert least_damage(damages, sizes, 5) == {"a": 0, "b": 1}
    with pytest.raises(PassError, match="a budget of 1 bytes, but the smallest formats take 2"):
        least_damage(damages, sizes, 1)


def test_damage_of_a_block_is_that_of_the_layer_really_changed(workshop: Workshop) -> None:
    model, forms = workshop.model("llama"), [IntegerFormat(2, 32), IntegerFormat(4, 32)]
    found = block_damages(Skeleton(model), TEXTS[:2], LAYERS, forms, round_to_nearest)
    outputs = []
    for step in (None, QuantizeRtn(activations="float", format="int2", exclude=tuple(all_but(LAYERS[1])))):
        skeleton = Skeleton(model if step is None else workshop.run("llama", step).model)
        outputs.append(torch.cat([states_after(skeleton, text).flatten() for text in TEXTS[:2]]))
    want = float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())
    assert found[LAYERS[1]][0] == pytest.approx(want, rel=1e-4)  # float32 sums, batched otherwise
    assert all(coarse > 5 * fine > 0 for coarse, fine in found.values())


def all_but(layer: str) -> list[str]:
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return [name for block in (0, 1) for x in names if (name := f"model.layers.{block}.{x}") != layer]


def states_after(skeleton: Skeleton, text: tuple[int, ...]) -> torch.Tensor:
    """Return what the last block puts out."""
    seen: list[torch.Tensor] = []
    block = skeleton.module.get_submodule(skeleton.blocks[-1])
    with skeleton.loaded(""), torch.no_grad(), block.register_forward_hook(lambda _, __, out: seen.append(out)):
        skeleton.module(input_ids=torch.tensor([text]))
    return seen[0]


def test_damage_to_answers_is_the_divergence_of_their_distributions(workshop: Workshop) -> None:
    model, step = workshop.model("llama"), QuantizeRtn(activations="float", format="int2", clip="mse")
    after = workshop.run("llama", step).model
    found = answer_damages(Skeleton(model), Skeleton(after), TEXTS[:3])
    alone = workshop.run("llama", QuantizeRtn(**{**vars(step), "exclude": tuple(all_but(LAYERS[0]))})).model
    total, tokens = 0.0, 0
    for text in TEXTS[:3]:
        p, q = (logits(Skeleton(each), text).log_softmax(-1) for each in (model, alone))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(text)
    assert found[LAYERS[0]] == pytest.approx(total / tokens, rel=1e-3, abs=1e-7)  # float32, batched otherwise
    assert len(found) == 14


def logits(skeleton: Skeleton, text: tuple[int, ...]) -> torch.Tensor:
    with skeleton.loaded(""), torch.no_grad():
        return skeleton.module(input_ids=torch.tensor([text])).logits


@pytest.mark.parametrize("damage", ["block", "answers"])
def test_layers_become_what_was_chosen_within_the_budget(workshop: Workshop, tmp_path: Path, damage: Any) -> None:
    model, step = workshop.model("llama"), QuantizeMixed(calibration=CALIBRATION, damage=damage)
    ctx = few_texts(workshop, tmp_path)
    result = step.run(model, ctx)
    step.ensures(model, result.model, ctx)
    specs = Skeleton(result.model).specs
    entries = json.loads((tmp_path / FILE).read_text())
    chosen = {layer: (each["format"], each["group_size"]) for each in entries for layer in each["layers"]}
    assert {name: (spec.format.name, spec.format.group_size) for name, spec in specs.items()} == chosen  # type: ignore[union-attr]
    assert 1 < len(entries) <= 4
    assert result.note.startswith("4.4")
    assert not list(tmp_path.glob("tmp*"))


def test_more_bits_are_spent_on_more(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    for bits in (3.0, 9.0):
        step = QuantizeMixed(calibration=CALIBRATION, bits=bits, others=("int2 g32", "int8 g32"))
        specs = Skeleton(step.run(model, few_texts(workshop, tmp_path / str(bits))).model).specs
        assert {spec.format.name for spec in specs.values()} == {"int2" if bits == 3 else "int8"}


def test_a_run_that_was_killed_goes_on_with_what_was_chosen(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    MIXED.run(model, few_texts(workshop, tmp_path / "all"))
    ctx = replace(few_texts(workshop, tmp_path / "half"), calibration={})  # nothing is measured again
    (tmp_path / "half" / FILE).write_bytes((tmp_path / "all" / FILE).read_bytes())
    MIXED.run(model, ctx)
    assert file_hashes(tmp_path / "half") == file_hashes(tmp_path / "all")


def test_excluded_and_overridden_layers_are_not_chosen_for(workshop: Workshop, tmp_path: Path) -> None:
    step = QuantizeMixed(
        calibration=CALIBRATION,
        exclude=("*.k_proj",),
        overrides=(Override(layers="*.v_proj", format="int8", group_size=16),),
        lm_head="int8",
        embedding="int8",
    )
    model = workshop.model("llama")
    ctx = few_texts(workshop, tmp_path)
    after = step.run(model, ctx).model
    step.ensures(model, after, ctx)
    specs = Skeleton(after).specs
    assert "model.layers.0.self_attn.k_proj" not in specs
    assert specs["model.layers.0.self_attn.v_proj"].format == IntegerFormat(8, 16)
    assert specs["lm_head"].format.bits == 8
    assert len({spec.format for spec in specs.values()}) > 2


def test_a_budget_that_is_too_small_is_refused(workshop: Workshop) -> None:
    step = QuantizeMixed(calibration=CALIBRATION, bits=2.4)
    with pytest.raises(
        PassError, match=r"quantize_mixed: bits: got 2\.4, which is a budget of .* bytes, but the small"
    ):
        step.requires(workshop.model("llama"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.0}, "bits: got 0.0, expected more than 0"),
        ({"others": ("int3 g32",)}, "others: got 'int3 g32', expected such as 'int8 g128'"),
        ({"others": ("int2 g16",)}, "group_size: got 16, expected 32, 64, 128 or channel"),
        ({"samples": 0}, "samples: got 0"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeMixed(calibration=CALIBRATION, **fields)
