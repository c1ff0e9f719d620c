from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from toy_recipes import CHOICES, RIGHT, ExportToy, FuseToy, QuantizeToy

from optimizer.errors import CommandError, RecipeError
from optimizer.evaluate.items import TopUp
from optimizer.evaluate.perplexity import Perplexity
from optimizer.gate import Budget
from optimizer.recipe import Fallback, Gate, Keep, Recipe, Skip, rung_text
from optimizer.recipe_reader import load, parse

LABELLED = RIGHT.replace("task: perplexity", "task: classification").replace("group: path", "label: topic")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    return tmp_path


def read(text: str, folder: Path, *settings: str) -> Recipe:
    return parse(text, "recipe.yaml", (folder,), settings, choices=CHOICES)


def mistakes(text: str, folder: Path, *settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, folder, *settings)
    return [str(mistake) for mistake in caught.value.mistakes]


def test_right_recipe_becomes_typed_values(folder: Path) -> None:
    recipe = read(RIGHT, folder)
    assert recipe.passes == (QuantizeToy(format="int4"), ExportToy(), FuseToy(pattern="gate"))
    assert recipe.data["held_out"].files == (folder / "texts.jsonl",)
    assert (recipe.target.threads, recipe.evaluate["ppl"].context) == (2, 512)  # type: ignore[attr-defined]
    assert (recipe.gate.alpha, recipe.gate.size.max_ratio) == (0.1, 0.4)  # type: ignore[union-attr]
    assert recipe.model_folder is None


def test_what_may_be_left_out_has_defaults(folder: Path) -> None:
    recipe = read("name: n\nmodel: model\npasses: [export_toy]\n", folder)
    assert (recipe.gate.alpha, recipe.target.device, recipe.evaluate) == (0.05, "cpu", {})
    assert recipe.model_folder == folder / "model"


# Each case: what in RIGHT is replaced, by what, and the one mistake that must be told.
WRONG = {
    "unknown key of the recipe": ("gate:\n", "gat:\n", "9:1: unknown key 'gat'; did you mean 'gate'?"),
    "unknown key of the target": ("threads:", "thread:", "3:23: target: unknown key 'thread'; did you mean 'threads'?"),
    "key that resembles nothing": (
        "threads: 2",
        "colour: 2",
        "3:23: target: unknown key 'colour', expected one of device, threads",
    ),
    "number for a text": ("org/model@main", "5", "2:8: model: got 5, expected a text"),
    "text for a number": ("alpha: 0.1", "alpha: low", "10:10: gate.alpha: got 'low', expected a number"),
    "number with a comma": ("0.40", '"0,40"', "13:21: gate.size.max_ratio: got '0,40', expected a number"),
    "fraction for a whole number": (
        "context: 512",
        "context: 51.2",
        "7:52: evaluate.ppl.context: got 51.2, expected a whole number",
    ),
    "out of range": (
        "alpha: 0.1",
        "alpha: 0.5",
        "10:10: gate.alpha: got 0.5, expected above 0 and below 0.5",
    ),
    "too small": ("context: 512", "context: 1", "7:52: evaluate.ppl.context: got 1, expected at least 2"),
    "not a number": ("alpha: 0.1", "alpha: .nan", "10:10: gate.alpha: got '.nan', expected a number"),
    "infinite": ("0.05", "1e999", "12:33: gate.same.max_kl: got '1e999', expected a number"),
    "truth for a number": ("threads: 2", "threads: true", "3:32: target.threads: got true, expected a whole number"),
    "nothing for a text": ("org/model@main", "", "2:7: model: got nothing, expected a text"),
    "list for a mapping": ("{max_ratio: 0.40}", "[0.40]", "13:9: gate.size: got a list, expected a mapping"),
    "unknown choice": (
        "int4",
        "int5",
        "15:28: passes.0.quantize_toy.format: got 'int5', expected one of int8, int4; did you mean 'int8'?",
    ),
    "options that exclude each other": (
        "format: int4",
        "group_size: 64, format: int8",
        "15:32: passes.0.quantize_toy.group_size: got 64, expected 32 or channel with int8",
    ),
    "option out of range": (
        "format: int4",
        "ratio: 1.5",
        "15:27: passes.0.quantize_toy.ratio: got 1.5, expected above 0 and at most 1",
    ),
    "wrong item of a list": (
        "format: int4",
        "exclude: [a, 3]",
        "15:33: passes.0.quantize_toy.exclude.1: got 3, expected a text",
    ),
    "yes is a text": (
        "format: int4",
        "symmetric: yes",
        "15:31: passes.0.quantize_toy.symmetric: got 'yes', expected true or false",
    ),
    "unknown option": (
        "format: int4",
        "grup_size: 64",
        "15:20: passes.0.quantize_toy: unknown key 'grup_size'; did you mean 'group_size'?",
    ),
    "missing option": (
        "pattern: gate",
        "optional: true",
        "18:7: passes.2.fuse_toy: missing key 'pattern', expected a text",
    ),
    "unknown pass": (
        "- export_toy",
        "- xport_toy",
        "16:5: passes.1: unknown pass 'xport_toy'; did you mean 'export_toy'?",
    ),
    "unknown pass with options": (
        "quantize_toy",
        "quantise_toy",
        "15:5: passes.0: unknown pass 'quantise_toy'; did you mean 'quantize_toy'?",
    ),
    "two keys in one pass": (
        "- export_toy",
        "- export_toy:\n    otherwise: []",
        "17:16: passes.1.otherwise: got an empty list, expected a list of passes, `keep` or `skip`",
    ),
    "pass that is a number": ("- export_toy", "- 3", "16:5: passes.1: got 3, expected a text"),
    "unknown task": (
        "task: perplexity",
        "task: perplex",
        "7:15: evaluate.ppl.task: unknown task 'perplex'; did you mean 'perplexity'?",
    ),
    "missing task": (
        "task: agreement, ",
        "",
        "8:9: evaluate.same: missing key 'task', expected one of perplexity, classification, agreement, similarity",
    ),
    "data without its entry": (
        "perplexity, data: held_out",
        "perplexity, data: heldout",
        "7:33: evaluate.ppl.data: data has no entry 'heldout'; did you mean 'held_out'?",
    ),
    "data that names no file": (
        "texts.jsonl",
        "text.jsonl",
        "5:20: data.held_out.json: no such file, got 'text.jsonl', looked in FOLDER",
    ),
    "data that names a folder": (
        "texts.jsonl",
        "model",
        "5:20: data.held_out.json: got 'model', which is a folder, expected a file",
    ),
    "data of no kind": ("json: texts.jsonl, ", "", "5:13: data.held_out: got neither, expected one of json, csv"),
    "data of two kinds": (
        "json: texts.jsonl",
        "json: texts.jsonl, csv: texts.jsonl",
        "5:13: data.held_out: got both, expected one of json, csv",
    ),
    "gate without its evaluation": (
        "  ppl: {max",
        "  ppx: {max",
        "11:3: gate: unknown key 'ppx'; did you mean 'ppl'?",
    ),
    "budget of another task": (
        "{max_increase: 1%}",
        "{max_increase: 1%, max_kl: 1}",
        "11:27: gate.ppl: unknown key 'max_kl', expected one of max_increase, max_increase_per_byte",
    ),
    "budget without its unit": (
        "1%",
        "1",
        "11:23: gate.ppl.max_increase: got 1, expected a percentage such as 1%",
    ),
    "budget that allows nothing": ("1%", "0%", "11:23: gate.ppl.max_increase: got '0%', expected above 0"),
    "budget that is empty": (
        "{max_flips: 8%, max_kl: 0.05}",
        "{}",
        "12:9: gate.same: got neither, expected max_flips, max_kl or both",
    ),
    "evaluation named as a key of gate": (
        "same: {task",
        "alpha: {task",
        "8:3: evaluate: the name 'alpha' is a key of gate itself, expected another name",
    ),
    "model that is a file": (
        "org/model@main",
        "texts.jsonl",
        "2:8: model: got 'texts.jsonl', which is a file, expected a folder",
    ),
    "model folder that is not there": (
        "org/model@main",
        "./models/toy",
        "2:8: model: no such folder, got './models/toy', expected a folder or org/name@revision of the Hub",
    ),
    "name that is a path": (
        "name: toy",
        "name: ../toy",
        "1:7: name: got '../toy', expected a name of letters, digits, '.', '_' and '-'",
    ),
    "key given twice": (
        "  alpha: 0.1\n",
        "  alpha: 0.1\n  alpha: 0.2\n",
        "11:3: gate: the key 'alpha' is here twice, first in line 10",
    ),
    "key that is no text": ("threads: 2", "2: 2", "3:23: target: got 2 as a key, expected a name"),
    "chain that does not meet": (
        "  - export_toy\n",
        "",
        "16:5: passes.1.fuse_toy: got a model at stage torch, expected onnx (ort); put export_toy between",
    ),
    "chain that goes back": (
        "  - export_toy\n",
        "  - export_toy\n  - quantize_toy\n  - export_toy\n",
        "17:5: passes.2.quantize_toy: got a model at stage onnx (ort), expected torch",
    ),
    "chain that ends too early": (
        "  - export_toy\n  - fuse_toy:\n      pattern: gate\n",
        "",
        "15:5: passes: the chain ends at stage torch, expected onnx (ort), which cpu serves; put export_toy between",
    ),
    "no passes": (
        RIGHT[RIGHT.index("  - quantize") :],
        "  []\n",
        "15:3: passes: got an empty list, expected a list of passes",
    ),
    "missing section": (
        "name: toy\n",
        "",
        "1:1: missing key 'name', expected a name of letters, digits, '.', '_' and '-'",
    ),
    "not YAML": ("{device: cpu, threads: 2}", "{device: cpu", "4:5: not YAML: expected ',' or '}', but got ':'"),
    "tab": ("  alpha", "\talpha", "10:1: not YAML: found character '\\t' that cannot start any token"),
    "control character": ("org/model", "org/\x07", "2:12: not YAML: the character '\\x07' is not allowed"),
    "alias": ("org/model@main", "*m", "2:8: got the alias *m, expected its value"),
    "tag": (
        "org/model@main",
        "!!python/name:os.system x",
        "2:8: got the tag tag:yaml.org,2002:python/name:os.system, expected a plain value",
    ),
    "two documents": ("data:\n", "---\ndata:\n", "4:1: not YAML: but found another document"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_told_with_its_place(case: str, folder: Path) -> None:
    old, new, expected = WRONG[case]
    assert old in RIGHT
    found = mistakes(RIGHT.replace(old, new, 1), folder)
    assert f"recipe.yaml:{expected}".replace("FOLDER", str(folder)) in found


def test_all_mistakes_are_told_at_once_in_order(folder: Path) -> None:
    text = RIGHT.replace("name: toy", "nam: toy").replace("threads: 2", "threads: 0")
    text = text.replace("texts.jsonl", "gone.jsonl").replace("1%", "1").replace("- export_toy", "- export")
    assert [line.split(": ", 1)[0] for line in mistakes(text, folder)] == [
        "recipe.yaml:1:1", "recipe.yaml:1:1", "recipe.yaml:3:32", "recipe.yaml:5:20", "recipe.yaml:11:23",
        "recipe.yaml:16:5",
    ]  # fmt: skip


def test_one_wrong_value_is_one_mistake(folder: Path) -> None:
    for old, new, _ in (WRONG["out of range"], WRONG["unknown choice"], WRONG["unknown task"]):
        assert len(mistakes(RIGHT.replace(old, new, 1), folder)) == 1


def test_drop_without_unit_names_the_two_units(folder: Path) -> None:
    text = LABELLED.replace("{max_increase: 1%}", "{max_drop: 1}")
    assert mistakes(text, folder) == [
        "recipe.yaml:11:19: gate.ppl.max_drop: got 1, "
        "expected a drop such as 1pt (percentage points) or 1% (of the source's score)"
    ]


def test_a_second_text_that_a_task_does_not_read_is_a_mistake(folder: Path) -> None:
    text = LABELLED.replace(", label: topic", ", label: topic, pair: answer").replace("increase: 1%", "drop: 1pt")
    reads = "data.held_out names a second text (pair), expected one text"
    agreement = f"recipe.yaml:8:33: evaluate.same.data: {reads}: agreement reads no more"
    assert mistakes(text, folder) == [
        f"recipe.yaml:7:37: evaluate.ppl.data: {reads}: classification reads no more",
        agreement,
    ]
    assert mistakes(text.replace("task: classification", "task: similarity"), folder) == [agreement]


def test_scores_of_pairs_need_pairs(folder: Path) -> None:
    (mistake,) = mistakes(
        LABELLED.replace(", label: topic", ", score: topic")
        .replace("increase: 1%", "drop: 1pt")
        .replace("task: classification", "task: similarity"),
        folder,
    )
    assert mistake.endswith(
        "data.held_out.score: got 'topic' and no pair, expected `pair: COLUMN` with the second text"
    )


def test_classification_of_data_without_labels_is_a_mistake(folder: Path) -> None:
    text = LABELLED.replace(", label: topic", "").replace("{max_increase: 1%}", "{max_drop: 1pt}")
    assert mistakes(text, folder) == [
        "recipe.yaml:7:37: evaluate.ppl.data: data.held_out names no column of labels, expected `label: COLUMN` there"
    ]


def test_metric_module_is_refused_until_it_is_trusted(folder: Path) -> None:
    text = LABELLED.replace("ppl: {task", "ppl: {metric: my/metric.py, task")
    text = text.replace("{max_increase: 1%}", "{max_drop: 1pt}")
    assert "7:17: evaluate.ppl.metric: got 'my/metric.py'" in mistakes(text, folder)[0]
    trusted = text.replace("metric:", "trust_metric_code: true, metric:")
    (budget,) = read(trusted, folder).limits("ppl")  # the module itself is loaded when it scores
    assert (budget.metric, budget.limit, budget.compute is not None) == ("metric", 0.01, True)
    known = trusted.replace("my/metric.py", "my/spearman.py")
    assert "'spearman' is the name of a metric that is known" in mistakes(known, folder)[0]


def test_points_and_per_cent_are_different_drops(folder: Path) -> None:
    points = read(LABELLED.replace("{max_increase: 1%}", "{max_drop: 1.5pt}"), folder).gate.budgets["ppl"]
    share = read(LABELLED.replace("{max_increase: 1%}", "{max_drop: 1.5%}"), folder).gate.budgets["ppl"]
    assert [(drop.value, drop.relative) for drop in (points.max_drop, share.max_drop)] == [  # type: ignore[attr-defined]
        (0.015, False),
        (0.015, True),
    ]


def test_empty_file_is_a_mistake(folder: Path) -> None:
    assert mistakes("# nothing\n", folder) == ["recipe.yaml:1:1: got an empty document, expected a recipe"]


def test_recipe_that_is_a_list_is_a_mistake(folder: Path) -> None:
    assert mistakes("[1, 2]\n", folder) == ["recipe.yaml:1:1: got a list, expected a mapping"]


def test_deep_nesting_is_refused_before_it_recurses(folder: Path) -> None:
    assert mistakes("a: " + "[" * 20_000, folder) == ["recipe.yaml:1:35: nested deeper than 32 levels"]


def test_huge_file_is_refused(folder: Path) -> None:
    assert "expected at most 1048576" in mistakes("#" * 2_000_000, folder)[0]


def test_damaged_text_is_never_anything_but_mistakes(folder: Path) -> None:
    random = Random(0)
    refused = 0
    for _ in range(300):
        start = random.randrange(len(RIGHT))
        noise = "".join(random.choices("{}[]:,-&*!#%|>'\"\\ \n\t~0a\x00é", k=random.randrange(4)))
        try:
            read(RIGHT[:start] + noise + RIGHT[start + random.randrange(6) :], folder)
        except RecipeError as error:
            refused += 1
            assert all(mistake.line > 0 and mistake.column > 0 for mistake in error.mistakes)
    assert refused > 200


def test_exponent_without_point_is_a_number(folder: Path) -> None:
    assert read(RIGHT.replace("alpha: 0.1", "alpha: 1e-3"), folder).gate.alpha == 0.001


def test_recipe_folder_comes_before_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = folder / "work"
    work.mkdir()
    for name in ("texts.jsonl", "only_here.jsonl"):
        (work / name).write_text("")
    (folder / "recipe.yaml").write_text(RIGHT.replace("texts.jsonl", "[texts.jsonl, only_here.jsonl]"))
    monkeypatch.chdir(work)
    files = load(folder / "recipe.yaml", choices=CHOICES).data["held_out"].files
    assert files == (folder / "texts.jsonl", work / "only_here.jsonl")


def test_file_that_is_not_there_is_a_wrong_command(folder: Path) -> None:
    with pytest.raises(CommandError, match=r"gone\.yaml: cannot be read, no such file"):
        load(folder / "gone.yaml", choices=CHOICES)


FALLBACK = RIGHT.replace(
    "  - quantize_toy: {format: int4}\n",
    """\
  - quantize_toy: {format: int4}
    otherwise:
      - quantize_toy: {format: int8}
      - keep: {worst: 4, format: float}
      - skip
    on_fail: report
""",
)


def test_fallback_is_read_in_its_order(folder: Path) -> None:
    recipe = read(FALLBACK, folder)
    assert recipe.fallback(0) == Fallback((QuantizeToy(format="int8"), Keep(worst=4, format="float"), Skip()), "report")
    assert (recipe.fallback(1), recipe.rungs) == (Fallback(), 4)
    assert [recipe.reports_only(index) for index in range(3)] == [True, False, False]
    assert recipe.passes == read(RIGHT, folder).passes


def test_settings_reach_into_a_fallback(folder: Path) -> None:
    settings = ("passes.0.otherwise.1.keep.worst=9", "passes.0.ratio=1", "passes.0.on_fail=stop")
    recipe = read(FALLBACK, folder, *settings)
    assert recipe.fallback(0).otherwise[1] == Keep(worst=9, format="float")
    assert (recipe.passes[0], recipe.fallback(0).on_fail) == (QuantizeToy(ratio=1.0), "stop")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("on_fail: report", "on_fail: go", "20:14: passes.0.on_fail: got 'go', expected one of stop, report"),
        ("- skip", "- skipp", "19:9: passes.0.otherwise.2: unknown pass 'skipp'"),
        (
            "format: float}",
            "format: int9}",
            "18:15: passes.0.otherwise.1.keep: got the format 'int9', expected a format of float",
        ),
        ("worst: 4", "worst: 0", "18:23: passes.0.otherwise.1.keep.worst: got 0, expected at least 1"),
        (
            "- skip",
            "- export_toy",
            "19:9: passes.0.otherwise.2: export_toy takes a model from torch to onnx (ort), expected torch to torch, "
            "as quantize_toy does",
        ),
        ("format: int8", "format: int5", "17:32: passes.0.otherwise.0.quantize_toy.format: got 'int5'"),
        (
            "  - export_toy\n",
            "  - export_toy:\n    otherwise: [skip]\n",
            "22:17: passes.1.otherwise.0: export_toy cannot",
        ),
        ("  - fuse_toy:\n", "  - otherwise: [skip]\n    fuse_toy:\n", ""),
    ],
)
def test_mistake_in_a_fallback_is_told_with_its_place(old: str, new: str, expected: str, folder: Path) -> None:
    assert old in FALLBACK
    if not expected:  # the order of the keys is the user's
        assert read(FALLBACK.replace(old, new, 1), folder).fallback(2).otherwise == (Skip(),)
        return
    (found,) = mistakes(FALLBACK.replace(old, new, 1), folder)
    assert found.startswith(f"recipe.yaml:{expected}")


def test_items_are_a_number_or_as_many_as_gates_need(folder: Path) -> None:
    def items(written: str) -> object:
        return read(RIGHT.replace("context: 512", f"items: {written}"), folder).evaluate["ppl"].items  # type: ignore[attr-defined]

    assert (items("200"), items("{most: 3000}")) == (200, TopUp(most=3000))
    (found,) = mistakes(RIGHT.replace("context: 512", "items: {most: 0}"), folder)
    assert "evaluate.ppl.items.most: got 0, expected at least 1" in found


def test_what_a_rung_is_in_words(folder: Path) -> None:
    words = [rung_text(rung) for rung in read(FALLBACK, folder).fallback(0).otherwise]
    assert words == ["quantize_toy format int8", "keep worst 4 in float", "skip"]


def test_file_that_is_not_utf8_tells_the_byte(folder: Path) -> None:
    (folder / "latin.yaml").write_bytes(b"name: a\nmodel: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml:2:11: got the byte 0xe9, expected UTF-8"):
        load(folder / "latin.yaml", choices=CHOICES)


def test_settings_change_the_recipe_and_its_text(folder: Path) -> None:
    settings = ("passes.0.group_size=channel", "passes.1.optional=true", "gate.fail_alpha=0.2", "model=model")
    recipe = read(RIGHT, folder, *settings)
    assert recipe.passes[:2] == (QuantizeToy(group_size="channel"), ExportToy(optional=True))
    assert (recipe.gate.fail_alpha, recipe.model_folder) == (0.2, folder / "model")
    assert replace(read(recipe.text, folder), text="") == replace(recipe, text="")


def test_setting_replaces_a_whole_pass(folder: Path) -> None:
    assert read(RIGHT, folder, "passes.0={quantize_toy: {ratio: 1}}").passes[0] == QuantizeToy(ratio=1.0)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("passes.0.group_size=33", "passes.0.quantize_toy.group_size: got 33, expected one of 32, 64, channel"),
        ("passes.0.grup_size=32", "passes.0.quantize_toy: unknown key 'grup_size'; did you mean 'group_size'?"),
        ("passes.9.ratio=1", "passes: got entry '9', expected 0 to 2"),
        ("passes.quantize_toy.ratio=1", "passes: got entry 'quantize_toy', expected 0 to 2"),
        ("name.first=1", "name: is a single value, it has no 'first'"),
        ("gat.alpha=1", "unknown key 'gat'; did you mean 'gate'?"),
        ("gate.alpha", "got 'gate.alpha', expected PATH=VALUE such as passes.0.group_size=32"),
        ("gate..alpha=1", "got 'gate..alpha=1', expected PATH=VALUE such as passes.0.group_size=32"),
        ("gate.alpha={", "not YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_wrong_setting_is_told_by_its_own_text(setting: str, expected: str, folder: Path) -> None:
    assert f"--set {setting}: {expected}" in mistakes(RIGHT, folder, setting)


def test_unknown_stop_is_a_wrong_command(folder: Path) -> None:
    recipe = read(RIGHT, folder)
    assert recipe.index_of("export_toy") == 1
    with pytest.raises(CommandError, match=r"--stop-after: unknown pass 'export'; did you mean 'export_toy'\?"):
        recipe.index_of("export")


def test_ranges_hold_without_a_recipe_too() -> None:
    with pytest.raises(ValueError, match="context: got 1, expected at least 2"):
        Perplexity(data="x", context=1)
    with pytest.raises(ValueError, match=r"alpha: got 0\.5, expected above 0 and below 0\.5"):
        Gate(alpha=0.5)


def test_limits_become_the_gates_budgets(folder: Path) -> None:
    recipe = read(RIGHT, folder)
    assert recipe.limits("ppl") == (Budget("perplexity", 0.01, relative=True),)
    assert recipe.limits("same") == (Budget("flips", 0.08), Budget("kl", 0.05))
    assert read(RIGHT.replace("  ppl: {max_increase: 1%}\n", ""), folder).limits("ppl") == ()
