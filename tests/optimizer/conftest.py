"""A ladder to climb."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import ARTIFACT, Ladder, MadeUp
from safetensors.numpy import save_file


@pytest.fixture
def ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ladder:
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((ARTIFACT / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    shutil.copyfile(ARTIFACT / "tokenizer.json", source / "tokenizer.json")
    save_file({"w": np.ones(200_000, np.float32)}, source / "model.safetensors")
    asked: list[int] = []
    monkeypatch.setattr("optimizer.package._prove", lambda folder, kind: None)  # a second for each artifact
    monkeypatch.setattr("optimizer.examiner.scorer_of", lambda model, kind, threads, alone=False: MadeUp(model, asked))
    return Ladder(tmp_path, asked)
