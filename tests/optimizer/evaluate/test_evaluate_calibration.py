"""Texts for calibration: which, how many, how long, and never those of an evaluation."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from scoring_fakes import write_rows, write_tokenizer

from optimizer.errors import RecipeError
from optimizer.evaluate.calibration import _count_seen, load_calibration
from optimizer.evaluate.data import DataError
from optimizer.evaluate.items import Item
from optimizer.evaluate.text_reader import TextReader
from optimizer.recipe import DataSource
from optimizer.recipe_reader import parse
from passes.base import TORCH, Pass, Stage

DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
}
TEXTS = ["a b c d a", "b b", "c d", "d a b c"]


@dataclass(frozen=True, kw_only=True)
class Calibrated(Pass):
    """Look at texts."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH
    calibration: str | None = field(default="shown", metadata={"names": "data"})
    samples: int = 10
    context: int = 4


def load(tmp_path, step, *judged):
    source = DataSource(json=write_rows(tmp_path / "data.jsonl", *({"text": text} for text in TEXTS)))
    reader = TextReader.of(write_tokenizer(tmp_path), DECODER)
    items = {"ppl": [Item(ids, str(number)) for number, ids in enumerate(judged)]}
    return load_calibration(step, "passes.0.calibrated", {"shown": source}, reader, items)


def test_a_pass_is_shown_the_texts_it_names_cut_to_its_context(tmp_path):
    shown = load(tmp_path, Calibrated())
    assert sorted(shown["shown"]) == [(0, 2, 3, 4), (0, 3, 3), (0, 4, 5), (0, 5, 2, 3)]


def test_samples_are_the_same_few_each_time(tmp_path):
    one, other = (load(tmp_path, Calibrated(samples=2))["shown"] for _ in range(2))
    assert one == other == load(tmp_path, Calibrated())["shown"][:2]


def test_a_pass_that_names_no_data_is_shown_none(tmp_path):
    assert load(tmp_path, Calibrated(calibration=None)) == {}


def test_texts_of_an_evaluation_are_refused_with_their_number(tmp_path):
    message = (
        r"^passes\.0\.calibrated: data\.shown: 2 of 4 calibration texts are texts of "
        r"evaluate\.ppl, or begin as one does, expected none; calibrate on other texts$"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path, Calibrated(), (0, 3, 3), (0, 5, 2, 3), (0, 6))


def test_a_recipe_that_names_no_entry_of_data_is_told_where(tmp_path):
    write_rows(tmp_path / "data.jsonl", {"text": "a"})
    recipe = (
        "name: r\nmodel: org/model@main\ndata:\n  shown: {json: data.jsonl}\n"
        "passes:\n  - quantize_int8: {activations: static, calibration: shwon}\n  - export_onnx\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse(recipe, "recipe.yaml", (tmp_path,))
    assert [str(mistake) for mistake in caught.value.mistakes] == [
        "recipe.yaml:6:55: passes.0.quantize_int8.calibration: data has no entry 'shwon'; did you mean 'shown'?"
    ]


@pytest.mark.parametrize(
    ("judged", "seen"),
    [
        ("What is\n  the WEATHER like", 1),  # in other case and white space
        ("what is", 0),  # the beginning of many questions
        ("what is the weather like today", 0),
        ("word " * 60 + "and so on", 1),  # one goes on where the other was cut
        ("word " * 45, 1),
        ("word " * 60 + "and otherwise", 0),  # both go on, each in its own way
    ],
)
def test_texts_are_the_same_whatever_case_white_space_or_cut(judged, seen):
    shown = ["what is the weather like", ("word " * 60 + "and so on, to the end").strip()]
    assert _count_seen(shown, [" ".join(judged.casefold().split())]) == seen
