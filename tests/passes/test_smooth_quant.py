"""smooth_quant: which pairs there are in a model, what the scales are, and that the function is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CALIBRATION, DECODER, ENCODER, TEXTS, Workshop, save_model
from torch import nn

from passes._pairs import Found, Pair, find_pairs
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Model, PassError
from passes.quantize_int8 import QuantizeInt8
from passes.smooth_quant import SmoothQuant, _fold, _largest, _scales

SMOOTH = SmoothQuant(calibration=CALIBRATION)
GPT2 = {
    "vocab_size": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {"vocab_size": 256, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 16}),
    "opt": ("OPTForCausalLM", {**OPT, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**ENCODER, "max_position_embeddings": 64, "pad_token_id": 0},
    ),
}
LLAMA = {
    "input_layernorm": (0.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    "post_attention_layernorm": (0.0, {"mlp.gate_proj", "mlp.up_proj"}),
    "self_attn.v_proj": (None, {"self_attn.o_proj"}),
    "mlp.up_proj": (None, {"mlp.down_proj"}),
}
GEMMA = {
    "input_layernorm": (1.0, LLAMA["input_layernorm"][1]),
    "pre_feedforward_layernorm": (1.0, LLAMA["post_attention_layernorm"][1]),
    "self_attn.v_proj": (None, {"self_attn.o_proj"}),
    "mlp.up_proj": (None, {"mlp.down_proj"}),
}
PAIRS: dict[str, tuple[str, dict[str, tuple[float | None, set[str]]]]] = {
    "llama": ("model.layers.1", LLAMA),
    "gemma2": ("model.layers.1", GEMMA),
    "gpt2": ("transformer.h.1", {"ln_1": (0.0, {"attn.c_attn"}), "ln_2": (0.0, {"mlp.c_fc"})}),
    "opt": (
        "model.decoder.layers.1",
        {
            "self_attn_layer_norm": (0.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
            "final_layer_norm": (0.0, {"fc1"}),
            "self_attn.v_proj": (None, {"self_attn.out_proj"}),
            "fc1": (None, {"fc2"}),  # a positive factor passes through ReLU
        },
    ),
    "bert": ("bert.encoder.layer.1", {"attention.self.value": (None, {"attention.output.dense"})}),
    "modernbert": ("model.layers.1", {"attn_norm": (0.0, {"attn.Wqkv"}), "mlp_norm": (0.0, {"mlp.Wi"})}),
}


def model_of(workshop: Workshop, name: str) -> Model:
    if name not in OTHERS:
        return workshop.model(name)

    def make(folder: Path) -> Model:
        architecture, settings = OTHERS[name]
        kind = getattr(transformers, architecture)
        torch.manual_seed(0)
        module = kind(kind.config_class(**settings)).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return save_model(module, folder)

    made: Model = workshop.once(name, make)
    return made


def found_in(workshop: Workshop, name: str) -> Found:
    made: Found = workshop.once(("pairs", name), lambda _: find_pairs(Skeleton(model_of(workshop, name)), TEXTS[0]))
    return made


def logits_of(model: Model) -> torch.Tensor:
    run: Callable[[Any], torch.Tensor] = lambda module: module(input_ids=torch.tensor([TEXTS[1]])).logits  # noqa: E731
    return next(walk(Skeleton(model), [run]))[1]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_those_that_can_be_scaled(workshop: Workshop, name: str) -> None:
    block, want = PAIRS[name]
    pairs = {pair.source: pair for pair in found_in(workshop, name).pairs if pair.source.startswith(f"{block}.")}
    got = {
        source.removeprefix(f"{block}."): (
            pair.gain_offset, {reader.removeprefix(f"{block}.") for reader in pair.readers}
        )
        for source, pair in pairs.items()
    }  # fmt: skip
    assert got == want


def test_heads_that_are_repeated_share_their_channels(workshop: Workshop) -> None:
    pair = next(p for p in found_in(workshop, "llama").pairs if p.source == "model.layers.0.self_attn.v_proj")
    width = 16  # of 4 heads that read 2
    assert pair.channels.tolist() == [(j // width // 2) * width + j % width for j in range(4 * width)]


def test_a_layer_that_is_left_says_why(workshop: Workshop) -> None:
    refusals = found_in(workshop, "bert").refusals
    layer = "bert.encoder.layer.0."
    assert refusals[f"{layer}intermediate.dense"] == (
        f"{layer}attention.output.LayerNorm is read by more than linear layers, such as a residual"
    )
    # What lies between is a GELU; and queries are read from the block before, whose norm the residual reads too.
    for name in ("output.dense", "attention.self.query"):
        assert refusals[f"{layer}{name}"] == "no norm or linear layer of its block reaches it channel by channel"
    assert len(refusals) == 10


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_is_kept_and_the_weights_are_not(workshop: Workshop, tmp_path: Path, name: str) -> None:
    model = model_of(workshop, name)
    ctx = workshop.context(tmp_path, model)
    SMOOTH.requires(model)
    result = SMOOTH.run(model, ctx)
    SMOOTH.ensures(model, result.model, ctx)
    want, got = logits_of(model), logits_of(result.model)
    assert float((got - want).abs().max() / (want.max() - want.min())) < 1e-5  # products of scaled float32
    pairs = found_in(workshop, name).pairs
    assert result.changes["pairs_folded"] == len(pairs)
    assert f"ranges found on {len(TEXTS)} calibration texts" in result.note
    before, after = Skeleton(model), Skeleton(result.model)
    assert all(not torch.equal(before.read(f"{p.source}.weight"), after.read(f"{p.source}.weight")) for p in pairs)


def test_scales_by_hand() -> None:
    pair = Pair("a", 0.0, ("b",), torch.arange(4))
    inputs, columns = torch.tensor([16.0, 1.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert _scales(pair, [inputs], [columns], 4, 0.5).tolist() == [4.0, 1.0, 2.0, 0.5]
    assert _scales(pair, [inputs], [columns], 4, 1.0).tolist() == [16.0, 1.0, 4.0, 1.0]
    assert _scales(pair, [inputs], [columns], 4, 0.0).tolist() == [1.0, 1.0, 1.0, 0.25]
    repeated = Pair("a", None, ("b",), torch.tensor([0, 1, 0, 1]))  # the larger of two readers of a channel counts
    assert _scales(repeated, [inputs], [columns], 2, 1.0).tolist() == [16.0, 1.0]


def test_a_four_by_four_pair_by_hand() -> None:
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([8.0, 0.0, 2.0, 1.0]))
        linear.weight.copy_(torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 4.0]))
    module = nn.ModuleDict({"block": nn.ModuleDict({"norm": norm, "linear": linear})}).requires_grad_(False)
    pair = Pair("block.norm", 0.0, ("block.linear",), torch.arange(4))
    largest = {"block.linear": torch.tensor([16.0, 1.0, 4.0, 1.0])}
    new = _fold([pair], largest, 0.5, "block", module, None)  # type: ignore[arg-type]
    assert new["block.norm.weight"].tolist() == [0.25, 1.0, 0.5, 2.0]
    assert new["block.norm.bias"].tolist() == [2.0, 0.0, 1.0, 2.0]
    assert new["block.linear.weight"].diagonal().tolist() == [4.0, 1.0, 2.0, 2.0]
    assert new.keys() == {"block.norm.weight", "block.norm.bias", "block.linear.weight"}


@pytest.fixture(scope="module")
def outliers(workshop: Workshop) -> Model:
    """A model with two channels that stand out 60 times in every norm, and the weights that read them as small."""
    return workshop.with_outliers("llama", 60)


def test_smoothing_before_static_int8_brings_the_answers_nearer(
    workshop: Workshop, tmp_path: Path, outliers: Model
) -> None:
    want, errors = logits_of(outliers), []
    static = QuantizeInt8(activations="static", calibration=CALIBRATION, calibrator="minmax")
    for name, steps in {"plain": (static,), "smooth": (SMOOTH, static)}.items():
        model = outliers
        for step in steps:
            folder = tmp_path / f"{name}-{step.name()}"
            folder.mkdir()
            model = step.run(model, workshop.context(folder, model)).model
        errors.append(float((logits_of(model) - want).std() / want.std()))
    assert errors[1] < errors[0] / 3  # a range of 60 becomes one of sqrt(60)
    assert errors[1] < 0.1


def test_a_channel_stands_out_less_far(workshop: Workshop, tmp_path: Path, outliers: Model) -> None:
    after = SMOOTH.run(outliers, workshop.context(tmp_path, outliers)).model
    layer = "model.layers.1.self_attn.q_proj"
    was, now = (_largest(Skeleton(model), [layer], TEXTS)[layer] for model in (outliers, after))
    assert was.max() / was.mean() > 20
    assert now.max() / now.mean() < 5


def test_alpha_that_makes_ranges_wider_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    step = SmoothQuant(calibration=CALIBRATION, alpha=1.0)
    ctx = workshop.context(tmp_path, model)
    flat = step.run(model, ctx).model  # every channel of its inputs has the same range
    with pytest.raises(PassError, match=r"the largest channel is .* times the mean one, 1\.00 before; raise alpha"):
        SMOOTH.ensures(flat, model, ctx)


def test_excluded_layers_are_left_as_they_were(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    step = SmoothQuant(calibration=CALIBRATION, exclude=("*.k_proj", "*.mlp.*"))
    result = step.run(model, workshop.context(tmp_path, model))
    assert result.changes["layers_smoothed"] == 2  # o_proj of either block; k_proj holds back its norm
    before, after = Skeleton(model), Skeleton(result.model)
    changed = {n for n in before.entries if not torch.equal(before.read(n), after.read(n))}
    assert changed == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "vo"}


def test_a_model_without_a_pair_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    step = SmoothQuant(calibration=CALIBRATION, exclude=("*.value",))
    with pytest.raises(
        PassError, match=r"^smooth_quant: matched none of 2 blocks; first refusal: bert\.encoder\.layer"
    ):
        step.run(workshop.model("bert"), workshop.context(tmp_path, workshop.model("bert")))


@pytest.mark.parametrize(
    ("fields", "message"), [({"alpha": 1.1}, "alpha: got 1.1"), ({"samples": 0}, "samples: got 0")]
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothQuant(calibration=CALIBRATION, **fields)


def test_a_quantized_model_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"quantized already; put smooth_quant before it"):
        SMOOTH.requires(workshop.run("llama", QuantizeInt8()).model)
