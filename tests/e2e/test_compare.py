"""`optimize compare`: one artifact judged against another, as CI does it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from optimizer.cli import main
from optimizer.schema import compare_schema
from optimizer.statistics.spearman import spearman
from optimizer.store import Store
from runtime.artifact import verify, write_manifest
from runtime.embedding import TextEmbedder

from .conftest import Finished
from .projects import ROOT, altered, documents, edit_json, write_texts, write_tokenizer

FEW = ("--set", "evaluate.accuracy.items=50", "--set", "evaluate.agreement.items=50")
CLASSIFIER_POLICY = """\
target: {threads: 1}
data:
  test: {csv: test.csv, text: text, label: mood}
evaluate:
  accuracy: {task: classification, data: test, context: 32}
  agreement: {task: agreement, data: test, context: 32}
gate:
  accuracy: {max_drop: 5pt}
  agreement: {max_flips: 10%}
  size: {max_ratio: 1.1}
"""
DECODER_POLICY = """\
target: {threads: 1}
data:
  texts: {json: texts.jsonl}
evaluate:
  perplexity: {task: perplexity, data: texts, context: 64}
  agreement: {task: agreement, data: texts, context: 64}
gate:
  perplexity: {max_increase: 5%}
  agreement: {max_kl: 0.001}
"""


@dataclass
class Shelf:
    """Artifacts of one model, side by side: as it was made, with equal answers, and damaged."""

    folder: Path
    store: Path
    first: Path
    made: dict[str, Path] = field(default_factory=dict)

    def artifact(self, name: str, noise: float = 0.0) -> Path:
        if name not in self.made:
            self.made[name] = altered(self.first, self.folder / name, noise)
        return self.made[name]

    @property
    def equal(self) -> Path:
        return self.artifact("equal")

    @property
    def damaged(self) -> Path:
        return self.artifact("damaged", 2.0)


@pytest.fixture(scope="module")
def shelf(classifier: Finished, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copyfile(classifier.project.folder / "test.csv", folder / "test.csv")
    (folder / "gate.yaml").write_text(CLASSIFIER_POLICY)
    return Shelf(folder, folder / "store", Path(shutil.copytree(classifier.project.output, folder / "first")))


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("decoders")
    write_texts(folder / "texts.jsonl", documents(40))
    (folder / "gate.yaml").write_text(DECODER_POLICY)
    first = Path(shutil.copytree(ROOT / "tests/data/artifact-v1", folder / "first"))
    edit_json(first / "config.json", {"architectures": ["LlamaForCausalLM"], "bos_token_id": 0})
    write_manifest(first, verify(ROOT / "tests/data/artifact-v1"))
    return Shelf(folder, folder / "store", first)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return what compares within a shelf's folder: exit code, standard output and error."""

    def run(shelf: Shelf, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(shelf.folder)
        code = main(["compare", *map(str, arguments), "--store", str(shelf.store)])
        return code, *capsys.readouterr()

    return run


Said = Callable[..., tuple[int, str, str]]


# ---- verdicts


def test_artifact_with_equal_answers_passes(shelf: Shelf, said: Said) -> None:
    code, out, err = said(shelf, shelf.first, shelf.equal, "--policy", "gate.yaml")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith(f"baseline   {shelf.first} | ")
    assert lines[2].startswith("against the baseline  accuracy 90.00 % -> 90.00 %, +0.00 pt [")
    assert [line.endswith(": PASS") for line in lines[2:5]] == [True] * 3
    assert lines[-1].startswith("PASS, ")


def test_damaged_artifact_fails_and_its_report_shows_flips(shelf: Shelf, said: Said, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    code, out, _ = said(shelf, shelf.first, shelf.damaged, "--policy", "gate.yaml", "--report", report)
    assert code == 1
    assert "agreement flips: FAIL, shown to be worse than the budget allows" in out
    assert "| right → wrong |" in report.read_text()


@pytest.mark.parametrize(("chosen", "expected"), [(None, 3), ("fail", 1), ("pass", 0)])
def test_fifty_items_cannot_decide(shelf: Shelf, said: Said, chosen: str | None, expected: int) -> None:
    more = ("--on-inconclusive", chosen) if chosen else ()
    code, out, _ = said(shelf, shelf.first, shelf.equal, "--policy", "gate.yaml", *FEW, *more)
    assert code == expected
    assert "accuracy: INCONCLUSIVE, 50 items cannot pass: 59 needed even with none lost" in out


def test_recipe_of_the_candidate_is_the_policy_where_none_is_given(shelf: Shelf, said: Said) -> None:
    code, out, _ = said(shelf, shelf.first, shelf.equal)
    assert code == 0
    assert "of 5.00 pt: PASS" in out


def test_copy_of_an_artifact_is_the_same_one_whatever_the_items(shelf: Shelf, said: Said, tmp_path: Path) -> None:
    copy = shutil.copytree(shelf.first, tmp_path / "copy")
    code, out, _ = said(shelf, shelf.first, copy, "--policy", "gate.yaml", *FEW)
    assert code == 0
    assert "the same artifact, byte for byte: no answer can differ" in out
    assert "size 0.09 MB, 100.0 % of the baseline's" in out


def test_size_is_judged_by_a_policy_but_not_by_a_recipe(shelf: Shelf, said: Said) -> None:
    tight = ("--set", "gate.size.max_ratio=0.5")
    code, out, _ = said(shelf, shelf.first, shelf.equal, "--policy", "gate.yaml", *tight)
    assert (code, "of at most 50.0: FAIL" in out) == (1, True)
    code, out, _ = said(shelf, shelf.first, shelf.equal, *tight)
    assert (code, "not judged, a recipe's budget counts against its own source" in out) == (0, True)


@pytest.mark.slow
def test_speed_is_measured_by_a_policy_but_not_by_a_recipe(shelf: Shelf, said: Said) -> None:
    fast = ("--set", "gate.latency_ms={max: 60000, max_ratio: 20}", "--set", "gate.workload.input_tokens=16")
    code, out, _ = said(shelf, shelf.first, shelf.equal, "--policy", "gate.yaml", *fast)
    assert (code, out.count("latency_ms "), "speed: 8 restarts of 8 pairs" in out) == (0, 2, True)
    code, out, _ = said(shelf, shelf.first, shelf.equal, *fast)
    assert (code, "speed: not judged, a recipe's budget counts against its own source" in out) == (0, True)


def test_candidate_that_is_as_good_as_the_last_but_not_as_the_pinned_one_fails(shelf: Shelf, said: Said) -> None:
    again = shelf.artifact("damaged again", 2.0)
    edit_recipe = ("--policy", "gate.yaml", "--set", "gate.size=")
    assert said(shelf, shelf.damaged, again, *edit_recipe)[0] == 0
    code, out, _ = said(shelf, shelf.damaged, again, *edit_recipe, "--pinned", shelf.first)
    assert code == 1
    assert out.index("against the baseline") < out.index("against the pinned")
    assert "pinned     " in out


def test_decoders_are_compared_and_their_tokens_shown(decoders: Shelf, said: Said, tmp_path: Path) -> None:
    assert said(decoders, decoders.first, decoders.equal, "--policy", "gate.yaml")[0] == 0
    report = tmp_path / "report.md"
    code, out, _ = said(decoders, decoders.first, decoders.damaged, "--policy", "gate.yaml", "--report", report)
    assert (code, "agreement kl: FAIL" in out) == (1, True)
    assert re.search(
        r"^\*\*agreement\*\*: [\d,]+ of [\d,]+ next tokens changed; 20 of them:$", report.read_text(), re.M
    )


def test_embedder_is_read_as_its_manifest_says(said: Said, tmp_path: Path) -> None:
    old, (first, second) = ROOT / "tests/data/artifact-v1-embedder", (documents(60, seed=seed) for seed in (1, 2))
    rows = [{"a": a.upper(), "b": b, "gold": n % 7} for n, (a, b) in enumerate(zip(first, second, strict=True))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gate.yaml").write_text(
        "data: {pairs: {json: pairs.jsonl, text: a, pair: b, score: gold}}\n"
        "evaluate: {people: {task: similarity, data: pairs}}\ngate: {people: {max_drop: 10pt}}\n"
    )
    vectors = [TextEmbedder.load(old, threads=1).embed([row[name] for row in rows]) for name in ("a", "b")]
    order = spearman(np.array([row["gold"] for row in rows], float), (vectors[0] * vectors[1]).sum(axis=1))
    shelf = Shelf(tmp_path, tmp_path / "store", old)
    _, out, err = said(shelf, old, shelf.artifact("damaged", 1.0), "--policy", "gate.yaml")
    assert (f"people spearman {order:.4f} -> " in out, err) == (True, "")


# ---- where answers come from


def test_second_comparison_finds_the_answers_in_the_store(shelf: Shelf, said: Said) -> None:
    fewer = ("--policy", "gate.yaml", "--set", "data.test.items=90")
    first, second = (said(shelf, shelf.first, shelf.equal, *fewer)[1].splitlines()[:2] for _ in range(2))
    assert all(line.endswith(" s scoring") for line in first)
    assert all(line.endswith(" | stored") for line in second)


def test_seconds_of_a_side_are_its_own(shelf: Shelf, said: Said, tmp_path: Path) -> None:
    alone = replace(shelf, store=tmp_path / "store")
    document = json.loads(said(alone, shelf.first, shelf.equal, "--policy", "gate.yaml", "--json")[1])
    told = [document["against"][0]["reference"]["score_s"], document["candidate"]["score_s"]]
    with Store(alone.store) as store:
        entries = [store.get(stored.key) for stored in store.contents()]
    assert sorted(told) == sorted(entry.meta["seconds"] for entry in entries if entry and "seconds" in entry.meta)


@pytest.fixture
def forged(shelf: Shelf) -> Path:
    """Return a damaged artifact whose evidence says that every answer is right."""
    path = shelf.damaged / "evidence/items/accuracy/artifact/result.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["values/accuracy/correct"] = np.ones_like(arrays["values/accuracy/correct"])
    arrays["point/accuracy"] = np.array(1.0)
    np.savez(path, **arrays)
    (shelf.folder / "accuracy.yaml").write_text(
        "\n".join(line for line in CLASSIFIER_POLICY.splitlines() if "agreement" not in line and "size" not in line)
    )
    return shelf.damaged


def test_evidence_is_not_believed(shelf: Shelf, forged: Path, said: Said) -> None:
    code, out, _ = said(shelf, shelf.first, forged, "--policy", "accuracy.yaml")
    assert (code, "-> 100.00 %" in out) == (1, False)


def test_evidence_is_believed_when_asked_for_and_the_record_says_so(shelf: Shelf, forged: Path, said: Said) -> None:
    code, out, _ = said(shelf, shelf.first, forged, "--policy", "accuracy.yaml", "--trust-evidence")
    assert (code, "accuracy 90.00 % -> 100.00 %" in out) == (0, True)
    assert "accuracy: the candidate's answers are those of its evidence, which anyone can edit" in out
    assert [line.rpartition(" | ")[2] for line in out.splitlines()[:2]] == ["from its evidence"] * 2


def test_evidence_to_other_items_is_never_believed(shelf: Shelf, forged: Path, said: Said) -> None:
    code, out, _ = said(shelf, shelf.first, forged, "--policy", "gate.yaml", *FEW, "--trust-evidence")
    assert (code, "evidence" in out) == (1, False)


# ---- documents


def test_json_is_one_document_of_the_published_schema(shelf: Shelf, said: Said) -> None:
    validator = jsonschema.Draft7Validator(compare_schema())
    validator.check_schema(compare_schema())
    for candidate, code in ((shelf.equal, 0), (shelf.damaged, 1)):
        got, out, err = said(shelf, shelf.first, candidate, "--policy", "gate.yaml", "--pinned", shelf.first, "--json")
        document = json.loads(out)
        validator.validate(document)
        assert (got, err, document["exit_code"]) == (code, "", code)
        assert [each["reference"]["role"] for each in document["against"]] == ["baseline", "pinned"]


def test_quiet_comparison_says_nothing(shelf: Shelf, said: Said) -> None:
    assert said(shelf, shelf.first, shelf.damaged, "--policy", "gate.yaml", "--quiet") == (1, "", "")


# ---- two tokenizers


@pytest.fixture(scope="module")
def other_tokens(decoders: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a decoder that reads the same texts as other tokens, single bytes."""
    tokenizer = tmp_path_factory.mktemp("bytes")
    write_tokenizer(tokenizer, [])
    folder = decoders.artifact("other")
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    write_manifest(folder, verify(decoders.first))
    return folder


def test_other_tokens_are_refused(decoders: Shelf, other_tokens: Path, said: Said) -> None:
    code, out, err = said(decoders, decoders.first, other_tokens, "--policy", "gate.yaml")
    assert (code, out) == (2, "")
    assert err == (
        f"BASELINE: {decoders.first} reads the texts of evaluate.perplexity as other tokens than CANDIDATE; of two "
        "tokenizers only perplexity can be compared, with max_increase_per_byte alone\n"
    )


def test_of_other_tokens_perplexity_per_byte_is_compared(decoders: Shelf, other_tokens: Path, said: Said) -> None:
    budget = "gate:\n  perplexity: {max_increase_per_byte: 5%}\n"
    (decoders.folder / "bytes.yaml").write_text(DECODER_POLICY.partition("gate:")[0] + budget)
    short = ("--policy", "bytes.yaml", "--set", "evaluate.perplexity.context=12")
    code, out, err = said(decoders, decoders.first, other_tokens, *short)
    assert (code, err) == (1, "")  # of random weights the more tokens the more nats
    assert "agreement: left out, for the baseline reads its texts as other tokens" in out
    long = ("--policy", "bytes.yaml", "--set", "evaluate.perplexity.context=128")
    code, _, err = said(decoders, decoders.first, other_tokens, *long)
    assert (code, "got more than the 128 tokens the model reads" in err) == (
        4,
        True,
    )


# ---- wrong input


def wrong(shelf: Shelf, said: Said, *arguments: object) -> tuple[int, str]:
    code, out, err = said(shelf, *arguments)
    assert out == ""
    (line,) = err.splitlines()
    return code, line


def test_what_is_no_artifact_is_refused(shelf: Shelf, said: Said, tmp_path: Path) -> None:
    for name, arguments in (
        ("BASELINE", (tmp_path, shelf.equal)),
        ("CANDIDATE", (shelf.first, tmp_path / "gone")),
        ("--pinned", (shelf.first, shelf.equal, "--pinned", tmp_path)),
    ):
        code, line = wrong(shelf, said, *arguments)
        assert (code, line.startswith(f"{name}: ")) == (2, True)
        assert line.endswith("is no artifact, expected a folder with manifest.json")


def test_one_folder_twice_is_refused(shelf: Shelf, said: Said) -> None:
    code, line = wrong(shelf, said, shelf.first, shelf.folder / "." / "first")
    assert (code, "which is CANDIDATE too, expected another artifact" in line) == (2, True)


def test_artifact_that_was_tampered_with_is_never_loaded(shelf: Shelf, said: Said, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shelf.equal, tmp_path / "tampered"))
    edit_json(folder / "config.json", {"colour": 1})
    code, line = wrong(shelf, said, shelf.first, folder)
    assert (code, "config.json: was changed" in line) == (4, True)


def test_two_kinds_of_model_are_refused(shelf: Shelf, decoders: Shelf, said: Said) -> None:
    code, line = wrong(shelf, said, decoders.first, shelf.first)
    assert (code, line.endswith("is a decoder, CANDIDATE a classifier; expected two artifacts of one kind")) == (
        2,
        True,
    )


def test_missing_data_is_one_line_that_says_what_to_do(
    shelf: Shelf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(shelf.first), str(shelf.equal)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{shelf.equal / 'recipe.yaml'}:5:15: data.test.csv: no such file, got 'test.csv', looked in "
    )
    assert line.endswith("; this is the candidate's own recipe: correct it by --set, or give a --policy")


def test_data_that_no_evaluation_reads_may_be_missing(shelf: Shelf, said: Said) -> None:
    more = ("--set", "data.calibration={csv: gone.csv}")
    assert said(shelf, shelf.first, shelf.equal, "--policy", "gate.yaml", *more)[0] == 0


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("evalute: {}\n", ["1:1: unknown key 'evalute'; did you mean 'evaluate'?"]),
        (
            "data: {t: {csv: test.csv, label: mood}}\nevaluate: {a: {task: classification, data: tt}}\n",
            ["2:44: evaluate.a.data: data has no entry 'tt'; did you mean 't'?"],
        ),
        ("gate: [\n", ["2:1: not YAML: expected the node content, but found '<stream end>'"]),
    ],
)
def test_mistakes_of_a_policy_have_line_and_column(shelf: Shelf, said: Said, text: str, lines: list[str]) -> None:
    (shelf.folder / "wrong.yaml").write_text(text)
    code, out, err = said(shelf, shelf.first, shelf.equal, "--policy", "wrong.yaml")
    assert (code, out, err.splitlines()) == (2, "", [f"wrong.yaml:{line}" for line in lines])


def test_policy_without_a_budget_is_refused(shelf: Shelf, said: Said) -> None:
    (shelf.folder / "empty.yaml").write_text("target: {threads: 1}\n")
    code, line = wrong(shelf, said, shelf.first, shelf.equal, "--policy", "empty.yaml")
    assert (code, line.startswith("empty.yaml: gate: has no budget that two artifacts can be judged by")) == (2, True)


def test_artifact_without_a_recipe_needs_a_policy(decoders: Shelf, said: Said) -> None:
    code, line = wrong(decoders, said, decoders.first, decoders.equal)
    message = f"CANDIDATE: {decoders.equal} has no recipe.yaml with data and budgets; give a --policy"
    assert (code, line) == (2, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on-inconclusive", "maybe"], "--on-inconclusive: got 'maybe', expected fail or pass"),
        (["--junit", "gone/j.xml"], "--junit: gone/j.xml cannot be written, no such file or directory"),
        (["--policy", "gone.yaml"], "gone.yaml: cannot be read, no such file or directory"),
    ],
)
def test_wrong_option_is_one_line(shelf: Shelf, said: Said, options: list[str], message: str) -> None:
    assert wrong(shelf, said, shelf.first, shelf.equal, *options) == (2, message)
