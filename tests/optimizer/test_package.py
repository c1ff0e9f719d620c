import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.errors import CannotRun, CommandError
from optimizer.package import Contents, has_artifact, model_card, require_replaceable, write_artifact
from optimizer.source import Source
from passes.base import ONNX, Model
from runtime.artifact import Manifest, Sentence, verify

DATA = Path(__file__).parents[1] / "data"


def evidence(folder: Path) -> None:
    (folder / "run.json").write_text("{}")


CONTENTS = Contents("name: r\n", b"{}\n", "# r\n", evidence)


def source_of(name: str, **changes: object) -> Source:
    folder = DATA / name
    config = json.loads((folder / "config.json").read_text())
    kind = "BertForSequenceClassification" if config["model_type"] == "bert" else "LlamaForCausalLM"
    model = Model(ONNX, folder, folder, {"max_position_embeddings": 128, **config, "architectures": [kind], **changes})
    return Source(model, "org/base", "c0ffee", "psf-2.0")


def write(folder: Path, source: Source, contents: Contents = CONTENTS) -> Manifest:
    return write_artifact(folder, source, source.model, contents)


@pytest.fixture
def decoder() -> Source:
    return source_of("artifact-v1")


@pytest.fixture
def made(tmp_path: Path, decoder: Source) -> Iterator[Path]:
    write(tmp_path / "deep" / "out", decoder)
    yield tmp_path / "deep" / "out"
    assert sorted(path.name for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")) == []


def test_artifact_is_whole_and_says_where_it_comes_from(made: Path) -> None:
    manifest = verify(made)
    assert (manifest.kind, manifest.lineage.base_model, manifest.lineage.license) == ("decoder", "org/base", "psf-2.0")
    assert {"model.onnx", "tokenizer.json", "config.json", "LICENSE", "recipe.yaml", "README.md"} <= set(manifest.files)
    assert (made / "evidence" / "run.json").read_text() == "{}"


def test_same_contents_have_the_same_identity_wherever_they_lie(made: Path, tmp_path: Path, decoder: Source) -> None:
    assert write(tmp_path / "other", decoder).digest == verify(made).digest


def test_recipe_is_part_of_the_identity_and_evidence_is_not(made: Path, tmp_path: Path, decoder: Source) -> None:
    other_evidence = replace(CONTENTS, write_evidence=lambda folder: (folder / "more.txt").write_text("x"))
    other_recipe = replace(CONTENTS, recipe="name: q\n")
    assert write(tmp_path / "a", decoder, other_evidence).digest == verify(made).digest
    assert write(tmp_path / "b", decoder, other_recipe).digest != verify(made).digest


def test_older_artifact_is_replaced_whole(made: Path, decoder: Source) -> None:
    (made / "model.onnx").write_bytes(b"damaged")
    write(made, decoder, replace(CONTENTS, recipe="name: new\n"))
    verify(made)
    assert (made / "recipe.yaml").read_text() == "name: new\n"


def test_what_a_killed_run_left_beside_is_removed(made: Path, decoder: Source) -> None:
    for name in (".out.unfinished", ".out.old"):
        (made.parent / name).mkdir()
        (made.parent / name / "model.onnx").write_bytes(b"half")
    write(made, decoder)  # the fixture looks for leftovers


def test_model_that_does_not_answer_leaves_the_older_artifact(made: Path, decoder: Source) -> None:
    before = verify(made).digest
    with pytest.raises(CannotRun, match=r"the artifact does not answer: .*vocabulary"):
        write(made, source_of("artifact-v1", vocab_size=4096))
    assert verify(made).digest == before


def test_evidence_that_cannot_be_written_leaves_the_older_artifact(made: Path, decoder: Source) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = verify(made).digest
    with pytest.raises(CannotRun, match="out: cannot write: No space left on device; free some space"):
        write(made, decoder, replace(CONTENTS, write_evidence=full))
    assert verify(made).digest == before


def test_link_as_output_is_followed(tmp_path: Path, decoder: Source) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large-disk")
    write(tmp_path / "out", decoder)
    assert (tmp_path / "out").is_symlink()
    verify(tmp_path / "large-disk")


def test_links_of_a_hub_cache_become_files(tmp_path: Path, decoder: Source) -> None:
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in decoder.model.folder.iterdir():
        (cache / path.name).symlink_to(path)
    write(tmp_path / "out", replace(decoder, model=replace(decoder.model, assets=cache)))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_end_tokens_of_both_configurations_end_a_text(tmp_path: Path, decoder: Source) -> None:
    assets = Path(shutil.copytree(decoder.model.assets, tmp_path / "assets"))
    (assets / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model = replace(decoder.model, assets=assets, config={**decoder.model.config, "eos_token_id": 3})
    manifest = write_artifact(tmp_path / "out", replace(decoder, model=model), model, CONTENTS)
    assert manifest.eos_token_ids == (3, 5, 7)


def test_labels_stand_in_the_order_of_the_logits(tmp_path: Path) -> None:
    count = len(verify(DATA / "artifact-v1-classifier").labels or ())
    named = {str(index): f"label {index}" for index in reversed(range(count))}
    manifest = write(tmp_path / "out", source_of("artifact-v1-classifier", id2label=named))
    assert manifest.labels == tuple(f"label {index}" for index in range(count))


def test_empty_folder_and_new_place_may_be_written(tmp_path: Path, made: Path) -> None:
    for place in (tmp_path, tmp_path / "a" / "b", made):
        (tmp_path / "empty").mkdir(exist_ok=True)
        require_replaceable(tmp_path / "empty" if place == tmp_path else place)
    assert not (tmp_path / "a").exists()


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CommandError, match="holds files that are no artifact"):
        require_replaceable(tmp_path)
    assert not has_artifact(tmp_path)


def test_card_tells_passes_with_their_options(decoder: Source) -> None:
    options = {"format": "int4", "exclude": (), "overrides": ({"layers": ("a", "b"), "format": "int8"},)}
    card = model_card("small", decoder, [("quantize_rtn", options), ("export_onnx", {})])
    assert card.startswith("---\nlicense: psf-2.0\nbase_model: org/base\n---\n# small\n\nMade from org/base at c0ffee")
    assert (
        "- `quantize_rtn`: format int4, exclude [], overrides [{layers: [a, b], format: int8}]\n- `export_onnx`\n"
        in card
    )
    assert "optimize generate DIR" in card


def test_manifest_of_an_embedder_says_what_its_sentence_files_say(tmp_path: Path) -> None:
    source = source_of("artifact-v1-embedder", architectures=["BertModel"])
    shutil.copytree(source.model.assets, tmp_path / "source")
    _write_sentence_files(tmp_path / "source")
    source = replace(source, model=replace(source.model, assets=tmp_path / "source"))
    manifest = write(tmp_path / "out", source)
    assert manifest.sentence == Sentence(("mean",), True, True, {"query": "find: "}, None)
    assert manifest.context_length == 24
    assert not {"modules.json", "sentence_bert_config.json"} & set(manifest.files)  # it would point to folders


def test_what_a_reranker_scores_goes_through_is_in_the_manifest(tmp_path: Path) -> None:
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    manifest = write(tmp_path / "out", source_of("artifact-v1-reranker", sentence_transformers=identity))
    assert (manifest.kind, manifest.activation) == ("reranker", "identity")


@pytest.mark.parametrize(
    ("name", "architecture", "line"),
    [
        ("artifact-v1-embedder", "BertModel", "optimize embed DIR < texts"),
        ("artifact-v1-reranker", "BertForSequenceClassification", 'optimize rerank DIR --query "..." < documents'),
    ],
)
def test_model_card_says_how_the_artifact_is_asked(name: str, architecture: str, line: str) -> None:
    card = model_card("r", source_of(name, architectures=[architecture]), [])
    assert f"    {line}\n" in card


def _write_sentence_files(folder: Path) -> None:
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (folder / "1_Pooling").mkdir()
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "find: "}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
