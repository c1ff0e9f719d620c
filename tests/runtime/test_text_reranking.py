"""Scores of two texts through the public door."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.artifact import verify, write_manifest
from runtime.errors import ArtifactError
from runtime.reranking import TextReranker

QUERY = "the quick brown fox"
SCORES = {"fox": 0.584490, "a fox": 0.672236, "the lazy dog": 0.663401}  # of a plain transformers loop, with types
ROUNDING = 1e-5  # onnxruntime and torch add in different orders


@pytest.fixture(scope="module")
def reranker(reranker_folder: Path) -> TextReranker:
    return TextReranker.load(reranker_folder, threads=1)


def test_load_gives_a_reranker_for_a_format_1_artifact(reranker_folder: Path) -> None:
    assert isinstance(load(reranker_folder, threads=1), TextReranker)


def test_scores_are_those_of_the_source_model(reranker: TextReranker) -> None:
    scores = reranker.scores([(QUERY, document) for document in SCORES])
    np.testing.assert_allclose(scores, list(SCORES.values()), atol=ROUNDING)


def test_the_best_document_comes_first_with_its_place(reranker: TextReranker) -> None:
    ranking = reranker.rank(QUERY, list(SCORES))
    assert [(ranked.index, ranked.document) for ranked in ranking] == [(1, "a fox"), (2, "the lazy dog"), (0, "fox")]


def test_equal_documents_stay_in_the_order_given(reranker: TextReranker) -> None:
    assert [ranked.index for ranked in reranker.rank(QUERY, ["fox", "a fox", "fox"])] == [1, 0, 2]


def test_a_score_does_not_depend_on_the_other_pairs(reranker: TextReranker) -> None:
    pairs = [(QUERY, "fox"), ("a", "b"), (QUERY, "fox " * 100), ("a b", "c d e"), ("", "")]
    together = reranker.scores(pairs)
    alone = np.concatenate([reranker.scores([pair]) for pair in pairs])
    np.testing.assert_allclose(together, alone, atol=1e-6)  # a product of more rows


def test_the_longer_text_of_a_pair_is_cut_first(reranker: TextReranker) -> None:
    long, short = reranker.tokenizer.encode_pairs([("a b", "fox " * 100), ("a b", "fox")])
    assert (len(long.ids), long.types.count(0)) == (64, short.types.count(0))


def test_a_pair_that_was_cut_says_so(reranker: TextReranker) -> None:
    ranking = reranker.rank(QUERY, ["fox", "fox " * 100])
    assert {ranked.index: ranked.is_cut for ranked in ranking} == {0: False, 1: True}
    assert all(ranked.is_cut for ranked in reranker.rank("fox " * 100, ["fox", ""]))


def test_scores_without_an_activation_are_the_logits(reranker_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reranker_folder, tmp_path / "artifact")
    write_manifest(folder, dataclasses.replace(verify(folder), activation="identity"))
    (logit,) = TextReranker.load(folder, threads=1).scores([(QUERY, "fox")])
    assert 1 / (1 + np.exp(-logit)) == pytest.approx(SCORES["fox"], abs=ROUNDING)


def test_no_documents_give_no_ranking(reranker: TextReranker) -> None:
    assert reranker.rank(QUERY, []) == []


def test_a_classifier_does_not_rerank(classifier_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a classifier, expected a reranker"):
        TextReranker.load(classifier_folder)
