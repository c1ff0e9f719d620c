"""Text from cells: placeholders, paths, braces, and one clear line for what is not there."""

import pytest

from optimizer.evaluate.data import DataError
from optimizer.evaluate.templates import check_template, columns_of, render, render_all

CELLS = {"q": "Why?", "choices": {"text": ["so", "no"]}, "n": 3, "a.b": "dotted"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Question: {q}", "Question: Why?"),
        ("{choices.text.1}{n}", "no3"),
        ("{a.b}", "dotted"),
        ("{{q}} {q}", "{q} Why?"),
        ("plain", "plain"),
    ],
)
def test_a_placeholder_is_the_cell_it_names(template, text):
    check_template(template)
    assert render(template, CELLS, "row 1") == text


def test_what_a_cell_holds_is_never_read_as_a_template():
    assert render("{q}", {"q": "{n} {{"}, "row 1") == "{n} {{"


def test_attributes_and_formats_are_no_placeholders():
    with pytest.raises(DataError, match="which has no '__class__'"):
        render("{q.__class__}", CELLS, "row 1")
    with pytest.raises(DataError, match="got None"):
        render("{n:>10}", CELLS, "row 1")


def test_one_placeholder_of_a_list_is_all_its_texts():
    assert render_all("{choices.text}", CELLS, "row 1") == ["so", "no"]
    assert render_all("{q}", CELLS, "row 1") == ["Why?"]
    assert render_all(("{n}", "x"), CELLS, "row 1") == ["3", "x"]


@pytest.mark.parametrize("template", ["{", "}", "{}", "a {b"])
def test_a_brace_that_means_nothing_is_refused(template):
    with pytest.raises(ValueError, match="for a brace"):
        check_template(template)


def test_the_columns_of_a_template_are_those_of_the_file():
    assert columns_of("{choices.text} {q} {q} {a.b}", ["q", "choices", "a.b"]) == ["choices", "q", "a.b"]


def test_a_list_in_the_middle_of_a_text_names_its_row():
    with pytest.raises(DataError, match=r"f: row 2: choices\.text: got \['so', 'no'\], expected a text or a number"):
        render("all {choices.text}", CELLS, "f: row 2")
