import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.outliers import READERS, add_outliers
from benchmarks.quantizers.protocol import Unfit, block_linears, effective_weights


@pytest.fixture(scope="module")
def build():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )

    def made():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return made


def test_outliers_are_loud_and_change_no_answer(build):
    plain, loud = build(), build()
    assert add_outliers(loud, share=0.1, factor=100.0, seed=0) == 3
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, after = plain(ids).logits, loud(ids).logits
    # The same products in float32, scaled: 1e-6 of range.
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    for block in loud.model.layers:
        for norm in READERS:
            assert (block.get_submodule(norm).weight == 100).sum() == 3


def test_a_layer_is_read_back_by_its_answers_bias_or_not(build):
    source = build()
    source.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.full((48,), 0.5))
    weights = effective_weights(source, source)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)  # a bias is added and taken off again


def test_only_layers_in_blocks_are_read_back(build):
    names = block_linears(build())
    assert len(names) == 14
    assert "lm_head" not in names


def test_a_tensor_that_is_gone_is_told(build):
    broken = build()
    del broken.model.norm.weight
    with pytest.raises(Unfit, match=r"model\.norm\.weight"):
        effective_weights(broken, build())
