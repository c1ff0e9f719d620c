"""quantize_rtn: what it changes, what it leaves alone, what it refuses, and what it promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MANY_BITS, TABLES_IN_INT8, Workshop, file_hashes, save_model, tiny_module

from passes._formats import IntegerFormat
from passes._override import Override
from passes._quantized import LayerSpec, read_specs, write_specs
from passes._safetensors import read_tensor, tensor_index, weight_files, write_safetensors
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Model, PassError
from passes.quantize_rtn import QuantizeRtn

LINEARS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in (0, 1)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in tensor_index(model.folder).items()}


def weight_of(model: Model, layer: str, form: IntegerFormat, features: int) -> torch.Tensor:
    tensors = tensors_of(model)
    return form.load({leaf: tensors[f"{layer}.{leaf}"] for leaf in form.shapes(1, 1)}, features)


def logits_of(model: Model) -> torch.Tensor:
    run = lambda module: module(input_ids=torch.arange(20)[None]).logits  # noqa: E731
    result: torch.Tensor = next(walk(Skeleton(model), [run]))[1]
    return result


def copied(model: Model, folder: Path) -> Model:
    """Return a model whose files may be tampered with."""
    for path in model.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return replace(model, folder=folder)


def changed(model: Model, name: str, value: torch.Tensor) -> None:
    """Replace one stored tensor."""
    entries = tensor_index(model.folder)
    path = entries[name].file
    tensors = {other: read_tensor(entry) for other, entry in entries.items() if entry.file == path}
    write_safetensors(path, tensors | {name: value}, {"quantization": "{}"})


def test_linear_layers_in_the_blocks_become_integers_near_their_weights(workshop: Workshop) -> None:
    result = workshop.run("llama", QuantizeRtn(format="int4", group_size=32))
    assert sorted(read_specs(result.model.folder)) == sorted(LINEARS)
    assert result.changes == {"layers_quantized": 14}
    before, form = tensors_of(workshop.model("llama")), IntegerFormat(4, 32)
    for layer in LINEARS:
        weight = before[f"{layer}.weight"]
        error = (weight_of(result.model, layer, form, weight.shape[1]) - weight).abs().max() / weight.abs().max()
        assert 0.01 < error <= 1 / 8  # a step is 1/8 of the group's extreme; random weights come near half of it


def test_norms_biases_and_tables_are_left_as_they_were(workshop: Workshop) -> None:
    before, after = tensors_of(workshop.model("qwen2")), tensors_of(workshop.run("qwen2", QuantizeRtn()).model)
    kept = [name for name in before if name.removesuffix(".weight") not in LINEARS]
    assert {name for name in kept if name.endswith("q_proj.bias")}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(kept)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert not any(f"{layer}.weight" in after for layer in LINEARS)


def test_excluded_layers_are_left_as_they_were(workshop: Workshop) -> None:
    step = QuantizeRtn(exclude=("*.down_proj", "model.layers.0.self_attn.*"))
    after, before = workshop.run("llama", step).model, tensors_of(workshop.model("llama"))
    expected = [name for name in LINEARS if "down_proj" not in name and "layers.0.self_attn" not in name]
    assert sorted(read_specs(after.folder)) == sorted(expected)
    kept = tensors_of(after)
    assert all(torch.equal(kept[f"{n}.weight"], before[f"{n}.weight"]) for n in LINEARS if n not in expected)


def bits_of(model: Model) -> dict[str, int]:
    return {name: spec.format.bits for name, spec in read_specs(model.folder).items()}


def test_an_override_gives_its_layers_another_format_the_first_that_names_them(workshop: Workshop) -> None:
    result = workshop.run("llama", MANY_BITS)
    expected = {layer: 4 for layer in LINEARS if layer != "model.layers.1.self_attn.k_proj"}
    expected |= {f"model.layers.1.self_attn.{name}_proj": 2 for name in "qvo"}
    expected |= {"model.layers.0.self_attn.v_proj": 8, "model.layers.1.mlp.up_proj": 8}
    assert bits_of(result.model) == expected | {"model.embed_tokens": 8, "lm_head": 8}
    assert result.note == "1 in float, 3 in int2, 2 in int8, of 16 layers"
    kept = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(tensors_of(result.model)[kept], tensors_of(workshop.model("llama"))[kept])


def test_exclude_comes_before_an_override(workshop: Workshop) -> None:
    step = QuantizeRtn(exclude=("*.k_proj",), overrides=(Override(layers="*.self_attn.*", format="int8"),))
    bits = bits_of(workshop.run("llama", step).model)
    assert {name.split(".")[-1] for name, each in bits.items() if each == 8} == {"q_proj", "v_proj", "o_proj"}
    assert not any(name.endswith("k_proj") for name in bits)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_an_override_of_one_name_of_a_tied_table_is_one_of_both(workshop: Workshop, name: str) -> None:
    step = QuantizeRtn(embedding="int8", lm_head="int8", overrides=(Override(layers=name, format="int4"),))
    step.requires(workshop.model("llama"))
    bits = bits_of(workshop.run("llama", step).model)
    assert (bits["lm_head"], bits["model.embed_tokens"]) == (4, 4)
    assert {bits[layer] for layer in LINEARS} == {4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            Override(layers="*.w1", format="int8"),
            r"override pattern '\*\.w1' matches no layer that becomes in",
        ),
        (Override(layers="model.norm", format="int8"), r"override pattern 'model.norm' matches no layer that becomes"),
        (Override(layers="lm_head", format="int8"), r"override pattern 'lm_head' matches no layer that becomes"),
    ],
)
def test_an_override_that_names_no_layer_is_refused(workshop: Workshop, override: Override, message: str) -> None:
    with pytest.raises(PassError, match=f"^quantize_rtn: {message}"):
        QuantizeRtn(overrides=(override,)).requires(workshop.model("llama"))


def test_overrides_that_nothing_computes_are_refused(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match="group_size: got 16, expected 32, 64, 128 or channel"):
        QuantizeRtn(group_size=16, overrides=(Override(layers="*", format="int2"),))
    with pytest.raises(ValueError, match="layers: got none, expected a name or names"):
        Override(layers=(), format="int8")
    step = QuantizeRtn(embedding="int8", lm_head="int8", overrides=(Override(layers="*", format="int2"),))
    with pytest.raises(PassError, match=r"model\.embed_tokens: got the override int2, expected float, int8 or int4"):
        step.requires(workshop.model("llama"))


def test_overriding_everything_with_float_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"matched none of 2 blocks: all are excluded"):
        QuantizeRtn(overrides=(Override(layers="*", format="float"),)).requires(workshop.model("llama"))


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_options_reach_every_layer(workshop: Workshop, activations: Any) -> None:
    step = QuantizeRtn(format="int8", group_size=16, symmetric=False, activations=activations, lm_head="int4")
    specs = read_specs(workshop.run("qwen2", step).model.folder)
    assert specs.pop("lm_head") == LayerSpec(IntegerFormat(4, 16, False), activations)
    assert set(specs.values()) == {LayerSpec(IntegerFormat(8, 16, False), activations)}


@pytest.mark.parametrize("group_size", [128, 256, "channel"])
def test_a_table_takes_the_largest_group_that_divides_its_width(workshop: Workshop, group_size: Any) -> None:
    step = QuantizeRtn(group_size=group_size, embedding="int8", lm_head="int8")
    specs = read_specs(workshop.run("llama", step).model.folder)
    assert {specs.pop("model.embed_tokens"), specs.pop("lm_head")} == {LayerSpec(IntegerFormat(8, 64), "int8")}
    assert set(specs.values()) == {LayerSpec(IntegerFormat(4, group_size), "int8")}


def test_a_table_that_no_group_divides_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"model\.embed_tokens has 40 features, which no group of 16, .* divides"):
        QuantizeRtn(embedding="int8").requires(workshop.model("llama-narrow"))
    QuantizeRtn().requires(workshop.model("llama-narrow"))


def test_a_tied_table_is_stored_once_and_read_by_both_sides(workshop: Workshop) -> None:
    model = workshop.run("llama", QuantizeRtn(embedding="int8", lm_head="int8")).model
    assert {"model.embed_tokens", "lm_head"} <= read_specs(model.folder).keys()
    tables = [name for name in tensor_index(model.folder) if "layers" not in name and name.endswith(".qweight")]
    assert len(tables) == 1
    skeleton = Skeleton(model)
    with skeleton.loaded(""):
        embedding = skeleton.module.get_input_embeddings()(torch.arange(256))
        assert torch.equal(embedding, skeleton.module.get_output_embeddings().dequantized(slice(None)))


def test_more_bits_and_smaller_groups_bring_the_logits_nearer(workshop: Workshop) -> None:
    want = logits_of(workshop.model("llama"))
    steps = [
        QuantizeRtn(format="int2", group_size=32),
        QuantizeRtn(format="int4", group_size="channel"),
        QuantizeRtn(format="int4", group_size=16),
        QuantizeRtn(format="int8", group_size=16),
    ]
    errors = [float((logits_of(workshop.run("llama", step).model) - want).abs().max()) for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20  # 2 against 8 bits: steps 64 times as large
    assert errors[-1] > 0


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama", QuantizeRtn()),
        ("llama", QuantizeRtn(format="int8", group_size=64, embedding="int4", lm_head="int4")),
        ("llama-untied", QuantizeRtn(embedding="int8", lm_head="int4", symmetric=False)),
        ("qwen2", QuantizeRtn(format="int2", group_size="channel", exclude=("*.q_proj",))),
        ("bert", QuantizeRtn(format="int8", group_size=32)),
        ("llama", MANY_BITS),
    ],
)
def test_estimate_agrees_with_what_is_stored(workshop: Workshop, name: str, step: QuantizeRtn) -> None:
    (estimate,), result = workshop.estimate(name, step), workshop.run(name, step)
    assert estimate.matches == result.changes["layers_quantized"]
    assert estimate.bytes == sum(path.stat().st_size for path in weight_files(result.model.folder))
    assert estimate.peak_bytes >= 4 * 256 * 64  # the largest table in float32


def test_the_same_weights_give_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    step, model = QuantizeRtn(symmetric=False, embedding="int8", lm_head="int8"), workshop.model("llama")
    step.run(model, workshop.context(tmp_path, model))
    assert file_hashes(tmp_path) == file_hashes(workshop.run("llama", step).model.folder)


def test_half_precision_weights_are_rounded_from_float32(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "out").mkdir()
    module = tiny_module("llama").bfloat16()
    model = save_model(module, tmp_path / "half")
    after = QuantizeRtn(format="int8").run(model, workshop.context(tmp_path / "out", model)).model
    tensors = tensors_of(after)
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors[f"{LINEARS[0]}.scales"].dtype == torch.float32
    weight = module.get_parameter(f"{LINEARS[0]}.weight").float()
    error = (weight_of(after, LINEARS[0], IntegerFormat(8, 32), 64) - weight).abs().max()
    assert error <= weight.abs().max() / 128


def test_a_pattern_that_names_nothing_is_refused(workshop: Workshop) -> None:
    with pytest.raises(
        PassError, match=r"^quantize_rtn: exclude pattern '\*\.w1' matches no module; one is 'lm_head'$"
    ):
        QuantizeRtn(exclude=("*.down_proj", "*.w1")).requires(workshop.model("llama"))


@pytest.mark.parametrize(
    "fields", [{"embedding": "int8"}, {"lm_head": "int4"}, {"embedding": "int8", "lm_head": "int4"}]
)
def test_tied_tables_in_two_formats_are_refused(workshop: Workshop, fields: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=r"share one tensor, got embedding: \w+ and lm_head: \w+; give both the same"):
        QuantizeRtn(**fields).requires(workshop.model("llama"))
    QuantizeRtn(**fields).requires(workshop.model("llama-untied"))


def test_a_quantized_model_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"the model is quantized already; quantize each layer once"):
        QuantizeRtn().requires(workshop.run("llama", QuantizeRtn()).model)


def test_excluding_everything_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"matched none of 2 blocks"):
        QuantizeRtn(exclude=("model.layers.*",)).requires(workshop.model("llama"))


def test_what_it_made_is_what_it_promises(workshop: Workshop, tmp_path: Path) -> None:
    for name, step in (("llama", TABLES_IN_INT8), ("llama", MANY_BITS), ("bert", QuantizeRtn())):
        model = workshop.model(name)
        step.requires(model)
        step.ensures(model, workshop.run(name, step).model, workshop.context(tmp_path, model))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_ensures_finds_a_scale_that_is_zero_or_not_finite(workshop: Workshop, tmp_path: Path, value: float) -> None:
    step, before = QuantizeRtn(), workshop.model("llama")
    after = copied(workshop.run("llama", step).model, tmp_path)
    scales = tensors_of(after)[f"{LINEARS[8]}.scales"]
    scales[-1, -1] = value
    changed(after, f"{LINEARS[8]}.scales", scales)
    with pytest.raises(PassError, match=rf"quantize_rtn: {LINEARS[8]}: a scale is zero or not finite"):
        step.ensures(before, after, workshop.context(tmp_path, before))


def test_ensures_finds_a_layer_that_was_left_out(workshop: Workshop, tmp_path: Path) -> None:
    step, before = QuantizeRtn(), workshop.model("llama")
    after = copied(workshop.run("llama", QuantizeRtn(exclude=(LINEARS[3],))).model, tmp_path)
    with pytest.raises(PassError, match=r"quantize_rtn: quantized 13 layers, expected 14"):
        step.ensures(before, after, workshop.context(tmp_path, before))


def test_ensures_finds_a_layer_in_another_format(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.model("llama"), workshop.run("llama", MANY_BITS).model
    step = replace(MANY_BITS, overrides=MANY_BITS.overrides[1:])
    with pytest.raises(PassError, match=r"v_proj: got LayerSpec\(format=IntegerFormat\(bits=8, .*, expected LayerSpec"):
        step.ensures(before, after, workshop.context(tmp_path, before))


def test_ensures_finds_a_layer_that_no_spec_names(workshop: Workshop, tmp_path: Path) -> None:
    step, before = QuantizeRtn(), workshop.model("llama")
    after = copied(workshop.run("llama", step).model, tmp_path)
    specs = read_specs(after.folder)
    del specs[LINEARS[5]]
    write_specs(after.folder, specs)
    with pytest.raises(PassError, match=rf"first {LINEARS[5]}\.weight"):
        step.ensures(before, after, workshop.context(tmp_path, before))


def test_weights_with_nan_do_not_pass(workshop: Workshop, tmp_path: Path) -> None:
    module = tiny_module("llama")
    (tmp_path / "out").mkdir()
    with torch.no_grad():
        module.get_parameter(f"{LINEARS[0]}.weight")[3, 3] = float("nan")
    before = save_model(module, tmp_path)
    ctx = workshop.context(tmp_path / "out", before)
    for symmetric in (True, False):
        step = QuantizeRtn(symmetric=symmetric)
        after = step.run(before, workshop.context(ctx.workdir, before)).model
        with pytest.raises(PassError, match="its weights hold NaN or infinity"):
            step.ensures(before, after, ctx)
        for path in ctx.workdir.iterdir():
            path.unlink()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8"])
def test_small_floats_have_no_zero_points(name: Any) -> None:
    with pytest.raises(ValueError, match=f"symmetric: got false, expected true: {name} have no zero points"):
        QuantizeRtn(format=name, symmetric=False, activations="float")


def test_fp8_is_multiplied_in_float_alone() -> None:
    with pytest.raises(ValueError, match="activations: got int8, expected float: no kernel multiplies fp8"):
        QuantizeRtn(format="fp8")


@pytest.mark.parametrize(("name", "largest"), [("nvfp4", 1 / 5), ("mxfp4", 1 / 4), ("fp8", 1 / 24)])
def test_small_floats_are_near_their_weights(workshop: Workshop, name: Any, largest: float) -> None:
    result = workshop.run("llama", QuantizeRtn(format=name, activations="float"))
    before, specs = tensors_of(workshop.model("llama")), read_specs(result.model.folder)
    assert {spec.format.name for spec in specs.values()} == {name}
    for layer in LINEARS:
        weight, form = before[f"{layer}.weight"], specs[layer].weight_format
        stored = {leaf: tensors_of(result.model)[f"{layer}.{leaf}"] for leaf in form.shapes(1, 1)}
        error = (form.load(stored, weight.shape[1]) - weight).abs().max() / weight.abs().max()
        assert largest / 10 < error <= largest  # half of the last step: of 4 to 6, of 6 to 8, of 416 to 448


def test_an_override_may_mix_small_floats_and_integers(workshop: Workshop) -> None:
    step = QuantizeRtn(format="int4", overrides=(Override(layers="*.down_proj", format="nvfp4"),))
    specs = read_specs(workshop.run("llama", step).model.folder)
    assert {name: spec.format.name for name, spec in specs.items()} == {
        name: "nvfp4" if name.endswith("down_proj") else "int4" for name in LINEARS
    }
