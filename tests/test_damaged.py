import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.damaged import Drop, Noise, rounded
from benchmarks.subsets import (
    ALPHA,
    Judge,
    Pool,
    by_interval,
    by_points,
    decided,
    judged,
    looked,
    once_region,
    topped_up,
)
from optimizer.gate import Budget, Scores, judge
from optimizer.statistics.power import looks_of
from passes._formats import IntegerFormat, round_to_nearest

ACCURACY, PERPLEXITY = Budget("accuracy", 0.03), Budget("perplexity", 0.05, relative=True)


def answers(n, lost, gained):
    """Return a pool of right and wrong answers with so many losses and gains."""
    before, after = np.arange(n) < n - gained, np.arange(n) >= lost
    groups = tuple(map(str, range(n)))
    source, candidate = (
        Scores("accuracy", "all", groups, {"correct": side}, float(side.mean())) for side in (before, after)
    )
    return Pool(source, candidate, ACCURACY)


def documents(loss, n=120):
    """Return a pool of documents of 40 tokens that lose `loss` nats a token, a little more or less each."""
    tokens, groups = np.full(n, 40), tuple(map(str, range(n)))
    wave = np.where(np.arange(n) % 2, 0.2, -0.2)
    nlls = (np.full(n, 80.0), 80.0 + 40 * loss + wave)
    return Pool(*(Scores("perplexity", "all", groups, {"nll": nll, "tokens": tokens}, 7.4) for nll in nlls), PERPLEXITY)


@pytest.mark.parametrize("group", [32, "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_what_the_passes_do(bits, group):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(bits))
    form = IntegerFormat(bits, group)
    expected = form.load(round_to_nearest(weight, form), 128)
    torch.testing.assert_close(rounded(weight, bits, group), expected, rtol=0, atol=1e-6)


def test_three_bits_have_eight_values():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    groups = rounded(weight, 3, 32).reshape(-1, 32)
    assert all(len(torch.unique(group)) <= 8 for group in groups)
    assert (groups - weight.reshape(-1, 32)).abs().max() < weight.abs().max() / 4


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape))


@torch.no_grad()
def test_noise_changes_only_linear_layers_of_blocks():
    module, other = tiny_llama(), tiny_llama()
    Noise(0.5, 1).change(other)
    changed = {name for name, value in other.state_dict().items() if not value.equal(module.state_dict()[name])}
    linear = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    assert changed == linear - {"lm_head.weight"}


@torch.no_grad()
def test_dropped_block_changes_only_its_outputs():
    module = tiny_llama()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Drop(1).change(module)
    changed = {name for name, value in module.state_dict().items() if not value.equal(before[name])}
    assert changed == {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert all(not module.state_dict()[name].any() for name in changed)


def test_drop_refuses_a_block_that_is_not_there():
    with pytest.raises(ValueError, match="found 0 output projections, expected 2"):
        Drop(5).change(tiny_llama())


def test_true_loss_and_margin_are_in_the_unit_of_the_budget():
    assert answers(200, 9, 3).true_loss == pytest.approx(0.03)
    assert answers(200, 9, 3).discordance == pytest.approx(0.06)
    assert documents(np.log(1.05)).true_loss == pytest.approx(0.05)
    assert documents(0.0).margin == pytest.approx(np.log(1.05))


def test_items_drawn_twice_count_twice():
    part = answers(10, 1, 0).part(np.array([0, 0, 5]))
    assert (part.size, part.true_loss) == (3, pytest.approx(2 / 3))


def test_simple_rules_by_hand():
    # 6 of 100 lost: loss 0.06, deviation sqrt(0.06 * 0.94 * 100 / 99), half width 1.645 * 0.0239 = 0.0393
    assert by_interval(answers(100, 6, 0)) == "inconclusive"
    assert by_interval(answers(100, 0, 0)) == "pass"
    assert by_interval(answers(100, 12, 0)) == "fail"
    assert (by_points(answers(100, 3, 0)), by_points(answers(100, 4, 0))) == ("pass", "fail")
    assert (by_points(documents(0.048)), by_points(documents(0.05))) == ("pass", "fail")


def test_documents_are_judged_by_all_rules(tmp_path):
    found = judged(documents(0.01), Judge(tmp_path / "kept.json"), n=100, subsets=3, seed=0)
    assert {rule: counts["pass"] for rule, counts in found.items()} == {"gate": 3, "normal": 3, "points": 3}


def test_verdicts_on_counts_are_kept(tmp_path):
    first, second = Judge(tmp_path / "kept.json"), Judge(tmp_path / "kept.json")
    assert first.outcome(answers(120, 0, 0)) == "pass"
    first.save()
    second.load()
    assert second.known == {"0 0 120 0.03": "pass"}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(lost=st.integers(0, 14), gained=st.integers(0, 6))
def test_regions_decide_as_judge(lost, gained):
    pool = answers(120, lost, gained)
    expected = judge(pool.source, pool.candidate, ACCURACY, alpha=ALPHA).outcome
    assert decided(pool.changes()[0], once_region(0.03, 120)) == expected


def test_a_run_stops_at_the_look_that_decides():
    taken = {look.n: look for look in looks_of((300, 600), 0.03, ALPHA, ALPHA)}
    assert looked(np.zeros(600), taken, 0.03) == ("pass", 300)
    spread = np.where(np.arange(600) % 20 == 0, 1.0, 0.0)  # one in twenty is lost, within the first half and beyond
    assert looked(spread, taken, 0.03)[1] == 600


@pytest.mark.parametrize("pool", [answers(400, 0, 0), documents(0.0)], ids=["answers", "documents"])
def test_lossless_runs_pass_before_their_last_item(pool):
    ended = topped_up(pool, most=800, runs=3, seed=0)
    assert ended.outcomes == ended.once == ["pass"] * 3
    assert max(ended.items) < 800


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gate_real_damage")


def test_texts_are_cut_at_line_ends(script):
    text = "one\ntwo\n" + "x" * 30 + "\nthree\n\nfour"
    found = script.cut(text, 9)
    assert "".join(found) == text
    assert found == ["one\ntwo\n", "x" * 30 + "\n", "three\n\n", "four"]
    assert script.cut("\n \n", 9) == []


def test_bands_count_the_claim_that_is_false(script):
    def found(lost, passes, fails):
        said = Counter({"pass": passes, "fail": fails, "inconclusive": 10 - passes - fails})
        return script.Found("", answers(1000, lost, 0), dict.fromkeys(("gate", "normal", "points"), said), None)

    rows = script.band_rows([found(10, 7, 1), found(20, 6, 3), found(40, 2, 5), found(40, 1, 5)])
    assert [row[:3] for row in rows] == [
        ["at most 0.5 m", "1", "false fail"],
        ["(0.5 m, 1 m]", "1", "false fail"],
        ["(1 m, 1.5 m]", "2", "false pass"],
    ]
    assert [row[3].split(" ")[0] for row in rows] == ["10.0", "30.0", "15.0"]
    assert rows[2][3].endswith("20.0")
