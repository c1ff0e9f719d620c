"""`verify` accepts exactly what the manifest lists."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import artifact
from runtime.artifact import Manifest, canonical_json, is_allowed, verify, write_manifest
from runtime.errors import ArtifactError


def refusal(folder: Path, digest: str | None = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify(folder, digest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    change(content)
    (folder / "manifest.json").write_bytes(canonical_json(content))


def test_a_format_1_artifact_is_accepted_for_ever(decoder_folder: Path) -> None:
    manifest = verify(decoder_folder)
    assert manifest.kind == "decoder"
    assert manifest.kv_cache is not None
    assert manifest.kv_cache.layers == 2


def test_the_digest_is_the_hash_of_the_manifest_file(decoder_folder: Path) -> None:
    digest = hashlib.sha256((decoder_folder / "manifest.json").read_bytes()).hexdigest()
    assert verify(decoder_folder, digest.upper()).digest == digest


def test_another_digest_is_refused(decoder_folder: Path) -> None:
    assert "is another artifact" in refusal(decoder_folder, "0" * 64)
    assert "expected 64 hexadecimal digits" in refusal(decoder_folder, "latest")


def test_writing_the_manifest_again_changes_nothing(copied: Path) -> None:
    before = verify(copied)
    after = write_manifest(copied, dataclasses.replace(before, files={}))
    assert after == before == verify(copied)
    assert after.digest == before.digest


def test_a_flipped_bit_is_found_in_every_file(copied: Path) -> None:
    for name in verify(copied).files:
        path = copied / name
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        assert f"{path}: was changed, got sha256" in refusal(copied)
        path.write_bytes(original)
    verify(copied)


def test_a_cut_file_is_found_by_its_size(copied: Path) -> None:
    path = copied / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    assert "was changed, got" in refusal(copied)


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert "lacks tokenizer.json" in refusal(copied)


def test_an_unlisted_file_is_named(copied: Path) -> None:
    (copied / "extra.json").write_text("{}")
    assert "holds extra.json, not listed" in refusal(copied)


def test_evidence_is_outside_the_identity(copied: Path) -> None:
    digest = verify(copied).digest
    (copied / "evidence").mkdir()
    (copied / "evidence" / "timings.csv").write_text("1")
    assert verify(copied).digest == digest


@pytest.mark.parametrize(
    "name", ["weights.pkl", "model.pt", "run.py", "lib.so", ".hidden.json", "model.onnx~", "a b.txt"]
)
def test_anything_but_plain_data_is_refused_before_it_is_read(copied: Path, name: str) -> None:
    (copied / name).write_text("x")
    assert "is not data an artifact may hold" in refusal(copied)


@pytest.mark.parametrize(
    "name", ["LICENSE", "LICENSE.txt", "LICENSE-2.0", "NOTICE", "NOTICE-THIRD-PARTY", "COPYING.md"]
)
def test_a_licence_may_lie_in_an_artifact(name: str) -> None:
    assert is_allowed(name)


@pytest.mark.parametrize(
    "name", ["LICENSE.py", "NOTICE.sh", "../model.onnx", "/etc/a.txt", "a/b.json", "", ".json", "a\n.txt"]
)
def test_these_names_are_not_allowed(name: str) -> None:
    assert not is_allowed(name)


def test_a_symbolic_link_is_refused_even_to_the_right_content(copied: Path, tmp_path: Path) -> None:
    path = copied / "tokenizer.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert f"{path}: is a symbolic link" in refusal(copied)


def test_a_linked_manifest_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "manifest.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert "is a link" in refusal(copied)


def test_evidence_may_not_be_a_link(copied: Path, tmp_path: Path) -> None:
    (copied / "evidence").symlink_to(tmp_path)
    assert "is a symbolic link" in refusal(copied)


def test_a_pipe_is_refused_and_not_waited_for(copied: Path) -> None:
    os.mkfifo(copied / "notes.txt")
    assert "is not a regular file" in refusal(copied)


def test_a_subfolder_is_refused(copied: Path) -> None:
    (copied / "more").mkdir()
    assert "is not a regular file" in refusal(copied)


def test_a_newer_format_is_refused_whatever_else_it_says(copied: Path) -> None:
    (copied / "manifest.json").write_bytes(canonical_json({"format": 2, "anything": []}))
    assert "has format 2, expected at most 1; install a newer optimize-models" in refusal(copied)


@pytest.mark.parametrize("value", [0, -1, "1", True, 1.0, None])
def test_a_format_that_is_no_positive_integer_is_refused(copied: Path, value: object) -> None:
    edit_manifest(copied, lambda content: content.update(format=value))
    assert "format: got" in refusal(copied)


def test_an_unknown_key_is_taken_for_a_newer_version(copied: Path) -> None:
    edit_manifest(copied, lambda content: content.update(zeta=1))
    assert "unknown key 'zeta'" in refusal(copied)


def test_a_manifest_in_another_spelling_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())))
    assert "not in canonical form" in refusal(copied)


def test_a_repeated_key_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'{\n "bos', b'{\n "kind": "embedder",\n "bos'))
    assert "not in canonical form" in refusal(copied)


def test_a_huge_manifest_is_refused_unread(copied: Path) -> None:
    with (copied / "manifest.json").open("ab") as file:
        file.truncate(artifact.MAX_MANIFEST_BYTES + 1)
    assert "is too large" in refusal(copied)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}"])
def test_a_manifest_that_is_no_json_object_is_refused(copied: Path, raw: bytes) -> None:
    (copied / "manifest.json").write_bytes(raw)
    assert "manifest.json: " in refusal(copied)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "pickle"),
        ("graphs", {"model": "../model.onnx"}),
        ("graphs", {"model": "tokenizer.json"}),
        ("files", {"../model.onnx": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"run.py": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", []),
        ("inputs", [{"name": "x"}]),
        ("outputs", [{"name": "x", "dtype": "float32", "shape": [1.5]}]),
        ("kv_cache", None),
        ("kv_cache", {"layers": 0, "heads": 1, "head_width": 8, "dtype": "float32"}),
        ("context_length", True),
        ("vocabulary", 2**80),
        ("eos_token_ids", [288]),
        ("eos_token_ids", "2"),
        ("bos_token_id", -1),
        ("labels", [1]),
        ("lineage", {"base_model": None, "revision": None, "license": None}),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(copied: Path, path: str, value: object) -> None:
    edit_manifest(copied, lambda content: content.update({path: value}))
    assert path in refusal(copied)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pooling", []),
        ("pooling", [1]),
        ("normalized", 1),
        ("lower_case", None),
        ("prompts", {"query": 1}),
        ("prompts", []),
        ("default_prompt", "passage"),
    ],
)
def test_a_wrong_field_of_an_embedder_is_named(embedder_folder: Path, tmp_path: Path, path: str, value: object) -> None:
    folder = Path(shutil.copytree(embedder_folder, tmp_path / "embedder"))
    edit_manifest(folder, lambda content: content["sentence"].update({path: value}))
    assert f"sentence: {path}" in refusal(folder)


def test_only_an_embedder_pools_and_only_a_reranker_has_an_activation(copied: Path, reranker_folder: Path) -> None:
    reranker = json.loads((reranker_folder / "manifest.json").read_bytes())
    edit_manifest(copied, lambda content: content.update(activation=reranker["activation"]))
    assert "activation: expected one for a reranker, and none for another kind" in refusal(copied)
    edit_manifest(copied, lambda content: content.update(activation="tanh"))
    assert "activation: got 'tanh', expected sigmoid or identity" in refusal(copied)
    edit_manifest(copied, lambda content: content.pop("activation"))
    sentence = {"pooling": ["cls"], "normalized": True, "lower_case": False, "prompts": {}, "default_prompt": None}
    edit_manifest(copied, lambda content: content.update(sentence=sentence))
    assert "expected none for a decoder" in refusal(copied)


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_keys_that_came_later_are_written_only_where_there_is_something_to_say(
    kind: str, embedder_folder: Path, reranker_folder: Path, decoder_folder: Path
) -> None:
    folder = {"embedder": embedder_folder, "reranker": reranker_folder}[kind]
    written = json.loads(verify(folder).to_bytes()).keys() - json.loads(verify(decoder_folder).to_bytes()).keys()
    assert written == {{"embedder": "sentence", "reranker": "activation"}[kind]}


def test_a_missing_field_is_named(copied: Path) -> None:
    edit_manifest(copied, lambda content: content.pop("vocabulary"))
    assert "lacks vocabulary" in refusal(copied)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    assert "manifest.json: is missing" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "nowhere")


def test_weights_outside_the_identity_are_refused_although_every_hash_fits(copied: Path) -> None:
    manifest = verify(copied)
    (copied / "evidence").mkdir()
    (copied / "model.onnx.data").rename(copied / "evidence" / "data")
    graph = (copied / "model.onnx").read_bytes().replace(b"model.onnx.data", b"evidence/./data")
    (copied / "model.onnx").write_bytes(graph)
    with pytest.raises(ArtifactError, match=r"keeps weights in 'evidence/\./data'"):
        write_manifest(copied, manifest)


def test_a_manifest_is_not_written_for_what_verify_would_refuse(tmp_path: Path, decoder_folder: Path) -> None:
    description: Manifest = dataclasses.replace(verify(decoder_folder), files={})
    with pytest.raises(ArtifactError, match="graphs: model"):
        write_manifest(tmp_path, description)
    assert not (tmp_path / "manifest.json").exists()
