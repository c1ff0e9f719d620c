"""Nats per byte: documents that two tokenizers cut differently are still the same texts, and can be compared."""

from dataclasses import replace

import numpy as np
import pytest
from scoring_fakes import FakeScorer, documents, random_logits, write_rows, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from optimizer.evaluate.items import Document, encoded_again, load_items
from optimizer.evaluate.perplexity import Perplexity, PerplexityBudget
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Budget, judge
from optimizer.quantities import Percent
from optimizer.recipe import DataSource

DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
}
TEXTS = [f"{first} {second} {third}" for first in "abcd" for second in "abcd" for third in ("a", "b d", "c")]


@pytest.fixture
def words(tmp_path):
    return TextReader.of(write_tokenizer(tmp_path), DECODER)


@pytest.fixture
def letters(words):
    """Return a reader of the same kind of model whose tokens are bytes; BOS is the last id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return replace(words, tokenizer=tokenizer, vocabulary=257, bos=256)


def items_of(tmp_path, reader, *texts, **options):
    data = {"d": DataSource(json=write_rows(tmp_path / "d.jsonl", *({"text": text} for text in texts)))}
    return load_items({"p": Perplexity(data="d", **options)}, data, reader)["p"]


def scores(items, logits):
    return evaluate({"p": Perplexity(data="d")}, {"p": items}, FakeScorer(logits))["p"].scores


def uniform(items, width):
    return [np.zeros((len(item.ids), width)) for item in items]


def test_nats_per_byte_is_the_loss_over_the_bytes_of_the_texts(tmp_path, words):
    items = items_of(tmp_path, words, "a b", "c d a")
    found = scores(items, uniform(items, 7))
    # five words of ln 7 nats each, in three and five bytes
    assert found["nats_per_byte"].point == pytest.approx(5 * np.log(7) / 8, rel=1e-12)
    assert found["nats_per_byte"].values["bytes"].tolist() == [3, 5]


def test_a_cut_document_counts_the_bytes_that_were_predicted(tmp_path, words):
    (item,) = items_of(tmp_path, words, "a b c d a b", context=4)
    assert (item.ids, item.text) == ((0, 2, 3, 4), "a b c")


def test_a_cut_within_a_character_is_moved_before_it(tmp_path, letters):
    for context, text in {5: "ab", 6: "ab\N{EURO SIGN}", 7: "ab\N{EURO SIGN}c"}.items():
        (item,) = items_of(tmp_path, letters, "ab\N{EURO SIGN}cd", context=context)
        assert item.text == text
        assert letters.decode(item.ids[1:]) == text


@pytest.mark.parametrize("options", [{"bos": False}, {}])
def test_without_a_beginning_not_every_byte_is_predicted_and_none_are_counted(tmp_path, words, options):
    reader = words if options else replace(words, bos=None)
    items = items_of(tmp_path, reader, "a b", **options)
    assert list(scores(items, uniform(items, 7))) == ["perplexity"]


def test_two_tokenizations_of_the_same_documents_can_be_compared(tmp_path, words, letters):
    items = items_of(tmp_path, words, *TEXTS)
    again = encoded_again(items, letters)
    assert [letters.decode(item.ids[1:]) for item in again] == TEXTS
    before = scores(items, uniform(items, 7))
    # as many nats in each text as before, spread over more tokens
    losses = [np.log(7) * len(text.split()) / len(text) for text in TEXTS]
    after = scores(again, [losing(item, loss) for item, loss in zip(again, losses, strict=True)])
    verdict = judge(before["nats_per_byte"], after["nats_per_byte"], Budget("nats_per_byte", 0.02, relative=True))
    assert verdict.outcome == "pass"
    assert verdict.difference == pytest.approx(0, abs=1e-6)  # logits are float32
    assert verdict.limit == pytest.approx(0.02 * before["nats_per_byte"].point)
    with pytest.raises(ValueError, match="answered different items"):
        judge(before["perplexity"], after["perplexity"], Budget("perplexity", 0.02, relative=True))


def losing(item, nats):
    """Return logits that give each next token a loss of `nats`."""
    logits = np.zeros((len(item.ids), 257))
    for row, token in enumerate(item.ids[1:]):
        logits[row, token] = np.log(256 / (np.exp(nats) - 1))
    return logits


def test_a_model_that_loses_more_per_byte_fails(tmp_path, words):
    items = items_of(tmp_path, words, *TEXTS)
    before = scores(items, random_logits(items, 7, seed=0))["nats_per_byte"]
    worse = replace(before, values={**before.values, "nll": before.values["nll"] * 1.1}, point=before.point * 1.1)
    verdict = judge(before, worse, Budget("nats_per_byte", 0.05, relative=True))
    assert verdict.outcome == "fail"
    assert verdict.difference == pytest.approx(0.1 * before.point)


def test_other_texts_missing_documents_and_nan_are_never_within_budget(tmp_path, words):
    items = items_of(tmp_path, words, *TEXTS)
    budget = Budget("nats_per_byte", 0.05, relative=True)
    before = scores(items, uniform(items, 7))["nats_per_byte"]
    for others in (items[1:], [Document((0, 2), items[0].group, text="a"), *items[1:]]):
        with pytest.raises(ValueError, match=r"items are missing|different items"):
            judge(before, scores(others, uniform(others, 7))["nats_per_byte"], budget)
    broken = uniform(items, 7)
    broken[3][0] = np.nan
    assert judge(before, scores(items, broken)["nats_per_byte"], budget).outcome == "fail"


def test_documents_that_the_other_model_cannot_read_whole_are_refused(tmp_path, words, letters):
    with pytest.raises(ValueError, match="item 0: got more than the 32 tokens the model reads"):
        encoded_again(items_of(tmp_path, words, "a " * 20), letters)
    with pytest.raises(ValueError, match="item 0: does not begin with BOS"):
        encoded_again(documents([1, 2]), letters)


def test_the_budget_counts_bytes_only_where_all_are_predicted():
    budget = PerplexityBudget(max_increase_per_byte=Percent.parse("2%"))
    assert [limit.metric for limit in budget.limits(Perplexity(data="d"))] == ["nats_per_byte"]
    with pytest.raises(ValueError, match="max_increase_per_byte: needs `bos: true`"):
        budget.limits(Perplexity(data="d", bos=False))
    with pytest.raises(ValueError, match="got neither"):
        PerplexityBudget()
