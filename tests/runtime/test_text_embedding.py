"""Vectors through the public door."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.artifact import verify, write_manifest
from runtime.embedding import TextEmbedder
from runtime.errors import ArtifactError, PromptError

TEXTS = ["the quick brown fox", "日本語", "x", "", "two words", "привет мир " * 100, "TWO words"]
KNOWN = {  # first numbers of what a plain transformers loop gives: mean over tokens, then length 1
    "the quick brown fox": (0.084057, 0.092894, 0.301238, -0.239504),
    "日本語": (0.042685, 0.070202, 0.368465, -0.121495),
}
ROUNDING = 1e-5  # onnxruntime and torch add in different orders


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path) -> TextEmbedder:
    return TextEmbedder.load(embedder_folder, threads=1)


def test_load_gives_an_embedder_for_a_format_1_artifact(embedder_folder: Path) -> None:
    assert isinstance(load(embedder_folder, threads=1), TextEmbedder)


def test_vectors_are_those_of_the_source_model(embedder: TextEmbedder) -> None:
    vectors = embedder.embed(list(KNOWN))
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, embedder.width))
    np.testing.assert_allclose(vectors[:, :4], list(KNOWN.values()), atol=ROUNDING)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_a_vector_does_not_depend_on_the_other_texts(embedder: TextEmbedder) -> None:
    together = embedder.embed(TEXTS + TEXTS)
    for index, text in enumerate(TEXTS):
        alone = embedder.embed([text])[0]
        assert np.array_equal(together[index], together[index + len(TEXTS)])
        np.testing.assert_allclose(together[index], alone, atol=1e-6)  # a product of more rows


def test_prompts_go_before_the_text_by_name(embedder: TextEmbedder) -> None:
    prompted = embedder.embed(["the quick brown fox"], "query")
    assert np.array_equal(prompted, embedder.embed(["find: the quick brown fox"]))
    assert np.array_equal(embedder.embed(["x"], "document"), embedder.embed(["x"]))
    with pytest.raises(PromptError, match="prompt: got 'passage', expected document, query"):
        embedder.embed(["x"], "passage")


def test_texts_are_lower_cased_where_the_model_asks_for_it(embedder: TextEmbedder) -> None:
    assert np.array_equal(embedder.embed(["Two WORDS"]), embedder.embed(["two words"]))


def test_long_texts_are_cut_to_what_the_model_reads(embedder: TextEmbedder) -> None:
    assert embedder.manifest.context_length == 24  # below the 64 positions: the model's own max_seq_length
    assert len(embedder.tokenizer.encode("привет мир " * 100)) == 24
    assert [each.is_cut for each in embedder.encode(["x", "привет мир " * 100])] == [False, True]


def test_no_texts_give_no_vectors(embedder: TextEmbedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.width)


def test_an_encoder_that_does_not_say_how_to_pool_is_refused(embedder_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedder_folder, tmp_path / "artifact")
    write_manifest(folder, dataclasses.replace(verify(folder), sentence=None))
    with pytest.raises(ArtifactError, match=r"no modules\.json of sentence-transformers that says how tokens become"):
        load(folder)


def test_a_classifier_makes_no_vectors(classifier_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a classifier, expected an embedder"):
        TextEmbedder.load(classifier_folder)
