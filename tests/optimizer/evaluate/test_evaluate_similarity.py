"""Pairs of texts and the order of their similarities: closed forms by hand, what data is refused, NaN."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_fakes import FakeScorer, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel

from optimizer.errors import CannotRun
from optimizer.evaluate.data import DataError
from optimizer.evaluate.items import load_items
from optimizer.evaluate.pairs import PairItem, Pairs
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer
from optimizer.evaluate.similarity import Similarity
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import judge
from optimizer.quantities import Drop
from optimizer.recipe import DataSource
from passes._sentence import SentenceSettings
from passes.base import TORCH, Context, Model
from passes.export_onnx import ExportOnnx

WORDS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e", "<unk>"]
STS = [
    {"one": "a b", "two": "c", "gold": 4.5},
    {"one": "b", "two": "c d", "gold": "1"},
    {"one": "a", "two": "b", "gold": 3},
]


def tokenizer(folder: Path) -> None:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.enable_truncation(3)  # which the model's own settings overrule
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture
def reader(tmp_path: Path) -> TextReader:
    tokenizer(tmp_path)
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 9, "max_position_embeddings": 16}
    return replace(TextReader.of(tmp_path, config), sentence=SentenceSettings(("mean",)))


def sts(folder: Path, rows=STS, **columns) -> DataSource:
    return DataSource(
        json=write_rows(folder / "sts.jsonl", *rows), **{"text": "one", "pair": "two", "score": "gold"} | columns
    )


def score(items, scorer, source=None):
    task = Similarity(data="d")
    return evaluate({"task": task}, {"task": items}, scorer, source and {"task": source})["task"]


# ---- items


def test_a_pair_is_two_texts_of_an_embedder_with_its_score(tmp_path, reader):
    items = Pairs(16).load(sts(tmp_path), reader)
    assert items[0] == PairItem((1, 3, 4, 2), "0", second=(1, 5, 2), score=4.5)
    assert [item.score for item in items] == [4.5, 1.0, 3.0]


def test_a_pair_is_one_text_of_a_reranker_with_types(tmp_path, reader):
    items = Pairs(16).load(sts(tmp_path), replace(reader, kind="reranker"))
    assert items[0] == PairItem((1, 3, 4, 2, 5, 2), "0", kinds=(0, 0, 0, 0, 1, 1), score=4.5)


def test_texts_are_read_as_the_model_asks_for_it(tmp_path, reader):
    settings = SentenceSettings(("mean",), lower_case=True, prompts={"sts": "E "}, default_prompt="sts")
    rows = [{"one": "A B C", "two": "c", "gold": gold} for gold in (1, 2)]
    item, _ = Pairs(4).load(sts(tmp_path, rows), replace(reader, sentence=settings))
    assert (item.ids, item.second) == ((1, 7, 3, 2), (1, 7, 5, 2))


def test_without_a_second_column_each_text_is_in_one_pair(tmp_path, reader):
    texts = [" ".join(WORDS[3 + index // 5**place % 5] for place in range(3)) for index in range(21)]
    source = DataSource(json=write_rows(tmp_path / "texts.jsonl", *({"text": text} for text in texts)))
    items = Pairs(16).load(source, reader)
    used = [item.ids for item in items] + [item.second for item in items]
    assert (len(items), len(set(used)), {item.score for item in items}) == (10, 20, {None})
    assert Pairs(16, limit=4).load(source, reader) == items[:4]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"one": 3, "two": "c", "gold": 1}, "one: got 3, expected a text"),
        ({"one": "a", "two": None, "gold": 1}, "two: got nothing, expected a second text"),
        ({"one": "a", "two": "b", "gold": "high"}, "gold: got 'high', expected a number"),
        ({"one": "a", "two": "b", "gold": "nan"}, "gold: got 'nan', expected a number"),
    ],
)
def test_rows_that_are_no_pair_are_named(tmp_path, reader, row, reason):
    with pytest.raises(DataError, match=re.escape(f"sts.jsonl: row 1: {reason}")):
        Pairs(16).load(sts(tmp_path, [row]), reader)


def test_scores_that_are_all_the_same_order_nothing(tmp_path, reader):
    with pytest.raises(DataError, match=r"gold: got the same number 3 for all 3 pairs, expected numbers to order"):
        Pairs(16).load(sts(tmp_path, [row | {"gold": 3} for row in STS]), reader)


def test_one_pair_cannot_be_ordered(tmp_path, reader):
    with pytest.raises(DataError, match="got 1 pairs of texts, expected at least 2"):
        Pairs(16).load(sts(tmp_path, STS[:1]), reader)


def test_groups_of_texts_need_pairs_of_their_own(tmp_path, reader):
    source = sts(tmp_path, pair=None, score=None, group="two")
    with pytest.raises(DataError, match="got groups of texts without pairs"):
        Pairs(16).load(source, reader)


def test_an_encoder_that_does_not_pool_has_no_similarity(tmp_path, reader):
    with pytest.raises(CannotRun, match=r"got an encoder without modules\.json of sentence-transformers"):
        Pairs(16).load(sts(tmp_path), replace(reader, sentence=None))


def test_a_decoder_has_no_similarity(tmp_path, reader):
    with pytest.raises(
        CannotRun, match=r"evaluate\.s: cannot score this kind of model, got decoder, expected embedder or"
    ):
        load_items({"s": Similarity(data="d")}, {"d": sts(tmp_path)}, replace(reader, kind="decoder"))


def test_a_score_without_a_pair_is_a_mistake_of_the_recipe(tmp_path):
    with pytest.raises(ValueError, match="score: got 'gold' and no pair, expected `pair: COLUMN`"):
        sts(tmp_path, pair=None)


# ---- scores


def pairs(*golds):
    return [
        PairItem((1, 2 * index), str(index), second=(1, 2 * index + 1), score=gold) for index, gold in enumerate(golds)
    ]


VECTORS = [[1, 0], [3, 4], [0, 2], [0, 1], [1, 1], [-1, 1]]  # cosines 0.6, 1 and 0


def test_an_embedders_similarity_is_the_cosine():
    found = score(pairs(2.0, 1.0, 0.0), FakeScorer(VECTORS, "embedder")).scores["spearman"]
    np.testing.assert_allclose(found.values["answer"], [0.6, 1, 0], atol=1e-7)  # vectors are float32
    assert found.values["reference"].tolist() == [2, 1, 0]
    assert found.point == pytest.approx(0.5)  # ranks 3 2 1 against 2 3 1: 1 - 6 * 2 / 24


def test_a_rerankers_similarity_is_its_logit():
    found = score(pairs(1.0, 3.0, 2.0), FakeScorer([[-2], [5], [0.5]], "reranker")).scores["spearman"]
    assert (found.values["answer"].tolist(), found.point) == ([-2, 5, 0.5], pytest.approx(1))


def test_without_scores_a_model_is_compared_with_the_source():
    items, other = pairs(None, None, None), [*VECTORS[:4], [1, 1], [3, 1]]  # cosines 0.6, 1 and 0.89
    source = score(items, FakeScorer(VECTORS, "embedder"))
    found = score(items, FakeScorer(other, "embedder"), source).scores["spearman"]
    assert source.scores["spearman"].point == pytest.approx(1)
    assert found.point == pytest.approx(0.5)
    np.testing.assert_array_equal(found.values["reference"], source.scores["spearman"].values["answer"])


def test_texts_that_come_again_are_embedded_once():
    items = [PairItem((1, 2), "0", second=(1, 3), score=1.0), PairItem((1, 3), "1", second=(1, 3), score=2.0)]
    found = score(items, FakeScorer([[1, 0], [0, 1]], "embedder")).scores["spearman"]  # the fake refuses a third
    assert found.values["answer"].tolist() == [0, 1]


@pytest.mark.parametrize("vector", [[0, 0], [np.nan, 1]])
def test_a_vector_without_a_direction_fails_the_gate(vector):
    items = pairs(*range(600))
    vectors = np.random.default_rng(0).normal(size=(1200, 2))
    source = score(items, FakeScorer(vectors, "embedder"))
    vectors[7] = vector
    spoilt = score(items, FakeScorer(vectors, "embedder")).scores["spearman"]
    (budget,) = Similarity.budget(max_drop=Drop.parse("50pt")).limits(Similarity(data="d"))
    verdict = judge(source.scores["spearman"], spoilt, budget)
    assert (verdict.outcome, verdict.flags) == ("fail", ("not a number",))


# ---- scorers


def encoder(folder: Path, kind: type, **settings) -> Model:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, initializer_range=0.5, **settings,
    )  # fmt: skip
    kind(config).eval().save_pretrained(folder)
    tokenizer(folder)
    return Model(TORCH, folder, folder, json.loads((folder / "config.json").read_text()))


def exported(model: Model, folder: Path) -> Path:
    folder.mkdir()
    ExportOnnx().run(model, Context(folder, model))
    return folder / "model.onnx"


@pytest.mark.parametrize("mode", ["mean", pytest.param("cls", marks=pytest.mark.slow)])
def test_torch_and_runtime_embed_alike_and_as_a_plain_loop(tmp_path, mode):
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": mode}))
    content = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (tmp_path / "modules.json").write_text(json.dumps(content))
    model = encoder(tmp_path, BertModel)
    items = [PairItem(tuple(range(1, 1 + length)), "") for length in (3, 7, 3, 5)]
    plain = []
    with torch.no_grad():
        module = BertModel.from_pretrained(tmp_path).eval()
        for item in items:
            hidden = module(torch.tensor([item.ids])).last_hidden_state[0]
            vector = hidden.mean(0) if mode == "mean" else hidden[0]
            plain.append((vector / vector.norm()).numpy())
    torch_vectors = TorchScorer(model, "embedder").embed(items)
    runtime_vectors = RuntimeScorer(exported(model, tmp_path / "onnx"), "embedder", 1).embed(items)
    np.testing.assert_allclose(torch_vectors, plain, atol=1e-6)
    np.testing.assert_allclose(runtime_vectors, plain, atol=1e-5)


def test_torch_and_runtime_give_a_reranker_the_types_of_its_texts(tmp_path):
    model = encoder(tmp_path, BertForSequenceClassification, num_labels=1)
    items = [
        PairItem((1, 3, 2, 4, 2), "", kinds=(0, 0, 0, 1, 1)),
        PairItem((1, 3, 2, 4, 5, 2), "", kinds=(0, 0, 0, 1, 1, 1)),
    ]
    untyped = [replace(item, kinds=()) for item in items]
    torch_logits = TorchScorer(model, "reranker").classify(items)
    runtime_logits = RuntimeScorer(exported(model, tmp_path / "onnx"), "reranker", 1).classify(items)
    np.testing.assert_allclose(runtime_logits, torch_logits, atol=1e-5)
    assert np.abs(TorchScorer(model, "reranker").classify(untyped) - torch_logits).max() > 1e-3
