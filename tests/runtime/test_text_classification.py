"""Prediction through the public door."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.artifact import verify, write_manifest
from runtime.errors import ArtifactError
from runtime.generation import TextGenerator
from runtime.prediction import TextClassifier

TEXTS = ["the quick brown fox", "日本語", "x", "", "привет мир " * 100]


def test_load_gives_a_classifier_for_a_format_1_artifact(classifier_folder: Path) -> None:
    assert isinstance(load(classifier_folder, threads=1), TextClassifier)
    assert verify(classifier_folder).labels == ("weather", "music", "travel")


def test_a_prediction_is_the_largest_softmax(classifier: TextClassifier) -> None:
    (prediction,) = classifier.predict(["the quick"])
    logits = classifier.logits([classifier.tokenizer.encode("the quick")])[0].astype(float)
    assert prediction.index == logits.argmax()
    assert prediction.label == ("weather", "music", "travel")[prediction.index]
    assert prediction.probability == pytest.approx(np.exp(logits).max() / np.exp(logits).sum(), rel=1e-9)


def test_an_answer_does_not_depend_on_the_other_texts(classifier: TextClassifier) -> None:
    texts = [*TEXTS, "y", *TEXTS]
    for got, text in zip(classifier.predict(texts), texts, strict=True):
        (alone,) = classifier.predict([text])
        assert got.label == alone.label
        assert got.probability == pytest.approx(alone.probability, abs=1e-6)  # a text alone may round differently


def test_classes_without_names_are_numbered(classifier_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "artifact")
    write_manifest(folder, dataclasses.replace(verify(folder), labels=None))
    assert TextClassifier.load(folder, threads=1).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_names_that_are_not_as_many_as_the_logits_are_refused(classifier_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "artifact")
    write_manifest(folder, dataclasses.replace(verify(folder), labels=("a", "b")))
    with pytest.raises(ArtifactError, match="got 3 logits, expected one for each of 2 labels"):
        TextClassifier.load(folder)


def test_long_texts_are_cut_to_the_context_and_keep_their_special_tokens(classifier: TextClassifier) -> None:
    ids = classifier.tokenizer.encode("привет мир " * 100)
    assert (len(ids), ids[0], ids[-1]) == (64, 1, 2)


def test_a_text_that_was_cut_says_so(classifier: TextClassifier) -> None:
    words = "x " * 100
    fits = next(n for n in range(200, 0, -1) if len(classifier.tokenizer.encode(words[:n])) < 64)
    texts = ["x", words, words[:fits], ""]
    assert [prediction.is_cut for prediction in classifier.predict(texts)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("cut", "note"),
    [
        ([], ""),
        ([False, False], ""),
        ([False, True], "1 of 2 texts was cut to 64 tokens: line 2"),
        ([True, False, True], "2 of 3 texts were cut to 64 tokens: lines 1, 3"),
        ([True] * 12, "12 of 12 texts were cut to 64 tokens: lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"),
    ],
)
def test_what_was_cut_is_told_by_line(classifier: TextClassifier, cut: list[bool], note: str) -> None:
    assert classifier.cut_note(cut) == note


def test_no_texts_give_no_predictions(classifier: TextClassifier) -> None:
    assert classifier.predict([]) == []


def test_a_decoder_does_not_predict_and_a_classifier_does_not_generate(
    decoder_folder: Path, classifier_folder: Path
) -> None:
    with pytest.raises(ArtifactError, match="is a decoder, expected a classifier"):
        TextClassifier.load(decoder_folder)
    with pytest.raises(ArtifactError, match="is a classifier, expected a decoder"):
        TextGenerator.load(classifier_folder)
