"""rotate: what turns in a model, that its function is kept, and that outliers are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXTS, Workshop, save_model
from torch import nn

from passes._orthogonal import Turn
from passes._skeleton import Skeleton
from passes._stream import Stream, Turned, find_stream
from passes._walk import walk
from passes.base import Model, PassError
from passes.quantize_rtn import QuantizeRtn
from passes.rotate import Rotate, _turned, _without_gain

ROTATE = Rotate()
KEPT = {"llama": 2, "llama-odd-heads": 2, "llama-narrow": 2, "qwen2": 2, "phi": 2, "gpt2": 0}
"""Model -> layers whose values turn within their heads; GPT-2 has queries, keys and values in one layer."""


def logits_of(model: Model) -> torch.Tensor:
    run: Callable[[Any], torch.Tensor] = lambda module: module(input_ids=torch.tensor([TEXTS[1]])).logits  # noqa: E731
    return next(walk(Skeleton(model), [run]))[1]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / (want.max() - want.min()))


@pytest.mark.parametrize("name", KEPT)
def test_the_function_is_kept_and_the_weights_are_not(workshop: Workshop, tmp_path: Path, name: str) -> None:
    model = workshop.model(name)
    result = workshop.run(name, ROTATE)
    ROTATE.ensures(model, result.model, workshop.context(tmp_path, model))
    assert error(logits_of(result.model), logits_of(model)) < 1e-5  # float32 products in another basis
    assert result.changes["heads_turned"] == KEPT[name]
    before, after = Skeleton(model), Skeleton(result.model)
    for layer, module in before.module.named_modules():
        if "weight" in module._parameters and (module.weight.ndim == 2 or "norm" in layer or "ln_" in layer):
            assert not torch.allclose(before.read(f"{layer}.weight"), after.read(f"{layer}.weight")), layer


def test_what_turns_in_a_llama(workshop: Workshop) -> None:
    stream = find_stream(Skeleton(workshop.model("llama")), TEXTS[0], 0)
    attention, mlp = (f"model.layers.1.{part}" for part in ("self_attn", "mlp"))
    norm, last = "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"
    assert {name: roles for name, roles in stream.layers.items() if "layers.0" not in name} == {
        f"{attention}.q_proj": Turned(inputs=64, norm=norm),
        f"{attention}.k_proj": Turned(inputs=64, norm=norm),
        f"{attention}.v_proj": Turned(inputs=64, norm=norm, outputs=16),
        f"{attention}.o_proj": Turned(inputs=16, outputs=64),
        f"{mlp}.gate_proj": Turned(inputs=64, norm=last),
        f"{mlp}.up_proj": Turned(inputs=64, norm=last),
        f"{mlp}.down_proj": Turned(outputs=64),
        "lm_head": Turned(inputs=64, norm="model.norm"),
        "model.embed_tokens": Turned(outputs=64),
    }
    assert (stream.width, stream.centred, set(stream.norms.values())) == (64, False, {0.0})


def test_layer_norms_keep_their_mean(workshop: Workshop) -> None:
    assert find_stream(Skeleton(workshop.model("gpt2")), TEXTS[0], 0).centred


def test_gains_of_one_more_than_the_weight(workshop: Workshop, tmp_path: Path) -> None:
    module = tiny_gemma()
    model = workshop.once("gemma", lambda folder: save_model(module, folder))
    after = ROTATE.run(model, workshop.context(tmp_path, model)).model
    assert error(logits_of(after), logits_of(model)) < 1e-5  # as above
    assert Skeleton(after).read("model.layers.0.input_layernorm.weight").abs().max() == 0


def tiny_gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = GemmaForCausalLM(GemmaConfig(**sizes, vocab_size=256, num_key_value_heads=1, head_dim=16))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def test_tied_tables_are_two_and_the_note_says_what_that_costs(workshop: Workshop) -> None:
    result = workshop.run("llama", ROTATE)
    after = Skeleton(result.model)
    assert result.note == (
        "lm_head and model.embed_tokens are two tables now, 0.1 MB more: the last norm's gain is in one of them"
    )
    assert after.ties == {}
    assert result.model.config["tie_word_embeddings"] is False
    assert workshop.run("llama-untied", ROTATE).note == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", r"model\.layers\.0: .*post_attention_layernorm is not read by linear layers alone"),
        ("bert", r"bert\.encoder\.layer\.0: .*attention\.output\.LayerNorm is not read by linear layers alone"),
    ],
)
def test_what_does_not_turn_is_refused(workshop: Workshop, tmp_path: Path, name: str, message: str) -> None:
    model = workshop.model(name)
    with pytest.raises(PassError, match=f"^rotate: {message}$"):
        ROTATE.run(model, workshop.context(tmp_path, model))
    with pytest.raises(PassError, match=f"^rotate: {message}$"):
        ROTATE.admits(model, workshop.context(tmp_path, model))


def test_an_embedder_answers_with_the_stream(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    bare = replace(model, config={**model.config, "architectures": ["LlamaModel"]})
    with pytest.raises(PassError, match=r"^rotate: the model answers with the residual stream itself"):
        ROTATE.run(bare, workshop.context(tmp_path, bare))


def test_a_quantized_model_is_refused(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"quantized already; put rotate before it"):
        ROTATE.requires(workshop.run("llama", QuantizeRtn()).model)


def test_answers_that_moved_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.model("llama-untied"), workshop.run("llama", ROTATE).model
    with pytest.raises(PassError, match=r"rotate: answers moved by .* of their range, expected 1e-05"):
        ROTATE.ensures(before, after, workshop.context(tmp_path, before))


def test_a_layer_and_its_norm_by_hand() -> None:
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 4.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 2.0, 0.0, 3.0]))
    module = nn.ModuleDict({"norm": norm, "linear": linear}).requires_grad_(False)
    stream = Stream(4, {"linear": Turned(inputs=4, outputs=2, norm="norm")}, {"norm": 0.0}, centred=True)

    class Stored:
        def read(self, name: str) -> torch.Tensor:
            return module.get_parameter(name)

    turn = stream.turn(4, 0)
    plain = _without_gain("norm", norm, 0.0, turn)
    assert plain["weight"].tolist() == [1, 1, 1, 1]
    assert torch.allclose(turn.back(plain["bias"]).float(), torch.tensor([0.0, 1.0, 0.0, -3.0]))
    new = _turned("linear", linear, stream, Stored(), 0)  # type: ignore[arg-type]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    want = Turn(2, 0)(linear(norm(x))).float()
    normed = nn.functional.layer_norm(turn(x).float(), (4,), plain["weight"], plain["bias"], norm.eps)
    assert torch.allclose(nn.functional.linear(normed, new["weight"], new["bias"]), want, atol=1e-5)


def test_a_channel_that_is_only_added_to_is_refused() -> None:
    norm = nn.LayerNorm(4).requires_grad_(False)
    norm.weight[1], norm.bias[1] = 0.0, 1.0
    with pytest.raises(PassError, match="rotate: ln_f multiplies a channel by zero and adds to it"):
        _without_gain("ln_f", norm, 0.0, Turn(4, 0))


def test_outliers_no_longer_hurt_rounding(workshop: Workshop, tmp_path: Path) -> None:
    """Two channels stand out 100 times in every norm, and the weights that read them are as small."""
    model = workshop.with_outliers("llama-untied", 100)
    want, errors = logits_of(model), []
    for steps in ((QuantizeRtn(group_size="channel"),), (ROTATE, QuantizeRtn(group_size="channel"))):
        made = model
        for number, step in enumerate(steps):
            folder = tmp_path / f"{len(steps)}-{number}"
            folder.mkdir()
            made = step.run(made, workshop.context(folder, made)).model
        errors.append(float((logits_of(made) - want).std() / want.std()))
    assert errors[1] < errors[0] / 2  # int8 activations lose all but the two channels, and int4 weights the two
