"""The format-1 artifacts that must load for ever, and copies of them to tamper with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime.generation import TextGenerator
from runtime.prediction import TextClassifier

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def decoder_folder() -> Path:
    return DATA / "artifact-v1"


@pytest.fixture(scope="session")
def classifier_folder() -> Path:
    return DATA / "artifact-v1-classifier"


@pytest.fixture(scope="session")
def embedder_folder() -> Path:
    return DATA / "artifact-v1-embedder"


@pytest.fixture(scope="session")
def reranker_folder() -> Path:
    return DATA / "artifact-v1-reranker"


@pytest.fixture
def copied(decoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decoder_folder, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def generator(decoder_folder: Path) -> TextGenerator:
    return TextGenerator.load(decoder_folder, threads=1)


@pytest.fixture(scope="session")
def classifier(classifier_folder: Path) -> TextClassifier:
    return TextClassifier.load(classifier_folder, threads=1)
