"""From a user's file to items: cutting, BOS, labels, groups, and one clear line for each mistake."""

import logging
import socket
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring_fakes import write_rows, write_tokenizer

from optimizer.errors import CannotRun, ExitCode
from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.classification import Classification
from optimizer.evaluate.data import DataError, read_rows
from optimizer.evaluate.items import Item, items_hash, load_items, majority_share, make_items
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.text_reader import TextReader
from optimizer.recipe import DataSource

DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
}
CLASSIFIER = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 7,
    "max_position_embeddings": 6,
    "id2label": {"0": "card", "1": "cash"},
}


@pytest.fixture
def decoder(tmp_path):
    return TextReader.of(write_tokenizer(tmp_path), DECODER)


@pytest.fixture
def classifier(tmp_path):
    return TextReader.of(write_tokenizer(tmp_path, template=True, max_length=5), CLASSIFIER)


def rows_of(tmp_path, *rows, **columns):
    return read_rows(DataSource(json=write_rows(tmp_path / "data.jsonl", *rows), **columns))


def ids_of(reader, tmp_path, *texts, **options):
    rows = rows_of(tmp_path, *({"text": text} for text in texts))
    return [item.ids for item in make_items(rows, reader, options.pop("context", 8), **options)]


# ---- ids


def test_a_document_begins_with_bos_which_counts_in_the_cut(decoder, tmp_path):
    assert ids_of(decoder, tmp_path, "a b c d a", bos=True, context=4) == [(0, 2, 3, 4)]


def test_without_bos_the_document_stands_alone(decoder, tmp_path):
    assert ids_of(decoder, tmp_path, "a b c d a", context=4) == [(2, 3, 4, 5)]


def test_a_model_without_bos_gets_none(tmp_path):
    reader = TextReader.of(write_tokenizer(tmp_path), DECODER | {"bos_token_id": None})
    assert ids_of(reader, tmp_path, "a b", bos=True) == [(2, 3)]


def test_a_decoder_never_gets_the_special_tokens_of_its_tokenizer_nor_its_cut(tmp_path):
    reader = TextReader.of(write_tokenizer(tmp_path, template=True, max_length=3), DECODER)
    assert ids_of(reader, tmp_path, "a b c d a b") == [(2, 3, 4, 5, 2, 3)]


def test_no_item_is_longer_than_the_model_can_read(decoder, tmp_path):
    assert len(ids_of(decoder, tmp_path, "a " * 50, context=1024)[0]) == 32


def test_a_text_of_fewer_than_two_tokens_predicts_nothing_and_is_left_out(decoder, tmp_path):
    assert ids_of(decoder, tmp_path, "", "a", "a b") == [(2, 3)]


def test_the_limit_counts_items_and_not_rows(decoder, tmp_path):
    assert ids_of(decoder, tmp_path, "a b", "", "b c", "c d", limit=2) == [(2, 3), (3, 4)]


def test_a_classifier_keeps_its_special_tokens_and_the_cut_of_its_tokenizer(classifier, tmp_path):
    assert ids_of(classifier, tmp_path, "a b c d a b", "a") == [(0, 2, 3, 4, 1), (0, 2, 1)]


def test_a_shorter_context_does_not_stick_to_the_reader(classifier, tmp_path):
    assert ids_of(classifier, tmp_path, "a b c d", context=3) == [(0, 2, 1)]
    assert ids_of(classifier, tmp_path, "a b c d", context=8) == [(0, 2, 3, 4, 1)]


@pytest.mark.parametrize("vocabulary", [4, 5])
def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tmp_path, vocabulary):
    reader = TextReader.of(write_tokenizer(tmp_path), DECODER | {"vocab_size": vocabulary})
    with pytest.raises(CannotRun, match=f"got token id 5, expected ids below the vocabulary's {vocabulary}"):
        ids_of(reader, tmp_path, "a d")


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CannotRun, match=r"tokenizer\.json: is") as caught:
        TextReader.of(tmp_path, DECODER)
    assert "\n" not in str(caught.value)


# ---- groups, labels, hash


def test_rows_without_a_group_column_are_groups_of_their_own(decoder, tmp_path):
    rows = rows_of(tmp_path, {"text": "a b"}, {"text": "a b"})
    assert len({item.group for item in make_items(rows, decoder, 8)}) == 2


def test_the_group_column_is_kept(decoder, tmp_path):
    rows = rows_of(tmp_path, {"text": "a b", "doc": 7}, {"text": "a c", "doc": 7}, group="doc")
    assert [item.group for item in make_items(rows, decoder, 8)] == ["7", "7"]


@pytest.mark.parametrize("label", ["cash", 1, "1"])
def test_a_label_is_a_name_or_a_number(classifier, tmp_path, label):
    rows = rows_of(tmp_path, {"text": "a", "label": label}, label="label")
    assert make_items(rows, classifier, 8)[0].label == 1


@pytest.mark.parametrize("label", ["cach", 2, -1, True, 1.5])
def test_a_label_the_model_does_not_know_names_its_row(classifier, tmp_path, label):
    rows = rows_of(tmp_path, {"text": "a", "label": label}, label="label")
    with pytest.raises(DataError, match=r"row 1: unknown label, got .*, expected .* from 0 to 1"):
        make_items(rows, classifier, 8)


def test_a_misspelt_label_gets_a_hint(classifier, tmp_path):
    rows = rows_of(tmp_path, {"text": "a", "label": "cach"}, label="label")
    with pytest.raises(DataError, match="did you mean 'cash'"):
        make_items(rows, classifier, 8)


def test_a_decoder_does_not_mind_labels(decoder, tmp_path):
    rows = rows_of(tmp_path, {"text": "a b", "label": "any"}, label="label")
    assert make_items(rows, decoder, 8)[0].label is None


some_items = st.lists(
    st.builds(
        Item, st.lists(st.integers(0, 9), min_size=1).map(tuple), st.text(max_size=3), st.none() | st.integers(0, 3)
    )
)


@pytest.mark.parametrize("other", [Item((1, 3), "g", 0), Item((1, 2), "h", 0), Item((1, 2), "g", 1), Item((1, 2), "g")])
def test_the_hash_covers_ids_groups_and_labels(other):
    assert items_hash([other], 8) != items_hash([Item((1, 2), "g", 0)], 8)


@given(some_items, some_items)
def test_the_hash_is_equal_exactly_when_the_items_are(left, right):
    assert (items_hash(left, 8) == items_hash(right, 8)) == (left == right)
    assert items_hash(left, 8) != items_hash(left, 9)


# ---- all tasks


def test_tasks_that_ask_for_the_same_ids_get_the_same_list(decoder, tmp_path):
    data = {"held_out": DataSource(json=write_rows(tmp_path / "d.jsonl", {"text": "a b c"}))}
    tasks = {
        "p": Perplexity(data="held_out"),
        "a": Agreement(data="held_out"),
        "n": Perplexity(data="held_out", bos=False),
    }
    items = load_items(tasks, data, decoder)
    assert items["p"] is items["a"]
    assert [item.ids for item in items["n"]] == [(2, 3, 4)]


def test_a_task_for_another_kind_of_model_is_refused_before_anything_is_read(classifier, tmp_path):
    data = {"d": DataSource(json=tmp_path / "none.jsonl")}
    with pytest.raises(CannotRun, match=r"evaluate\.p: cannot score .*, got classifier, expected decoder"):
        load_items({"p": Perplexity(data="d")}, data, classifier)


def test_classification_without_a_label_column_is_refused(classifier, tmp_path):
    data = {"d": DataSource(json=tmp_path / "none.jsonl")}
    with pytest.raises(DataError, match=r"data\.d names no label column; add `label: COLUMN`"):
        load_items({"c": Classification(data="d")}, data, classifier)


# ---- files


def test_csv_texts_that_look_missing_are_texts(tmp_path):
    (tmp_path / "d.csv").write_text('text,label\nnull,x\n"NA, or not",y\n')
    rows = read_rows(DataSource(csv=tmp_path / "d.csv", label="label"))
    assert [(row.text, row.label) for row in rows] == [("null", "x"), ("NA, or not", "y")]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbftext,label\r\n"a,\r\nb",x\r\n\r\nc,y\r\n',
        b'text,label\n"a,\r\nb",x\n  \nc,y',
        b'text,label,more\n"a,\r\nb",x\nc,y\n',
    ],
    ids=["byte order mark", "no end of line", "short rows"],
)
def test_csv_files_of_other_programs_are_read(tmp_path, content):
    (tmp_path / "d.csv").write_bytes(content)
    rows = read_rows(DataSource(csv=tmp_path / "d.csv", label="label"))
    assert [(row.text.replace("\r", ""), row.label) for row in rows] == [("a,\nb", "x"), ("c", "y")]


def test_a_csv_cell_may_be_long(tmp_path):
    text = "a" * 200_000  # the csv module takes 131,072 unless told
    (tmp_path / "d.csv").write_text(f"text\n{text}\n")
    assert read_rows(DataSource(csv=tmp_path / "d.csv"))[0].text == text


def test_a_json_array_is_read_too(tmp_path):
    (tmp_path / "d.json").write_text('[{"text": "a"}, {"text": "b"}]')
    assert [row.text for row in read_rows(DataSource(json=tmp_path / "d.json"))] == ["a", "b"]


def test_several_files_are_read_in_order_up_to_the_limit(tmp_path):
    files = tuple(write_rows(tmp_path / f"{name}.jsonl", {"text": name}, {"text": name * 2}) for name in "xy")
    assert [row.text for row in read_rows(DataSource(json=files, items=3))] == ["x", "xx", "y"]


def test_reading_uses_no_network_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    assert rows_of(tmp_path, {"text": "a"})[0].text == "a"
    (tmp_path / "d.csv").write_text("text\nb\n")
    assert read_rows(DataSource(csv=tmp_path / "d.csv"))[0].text == "b"
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "home").exists()


def test_the_library_that_reads_files_says_nothing_of_its_own(tmp_path, capfd):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("datasets").addHandler(handler)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DataError):
        read_rows(DataSource(json=tmp_path / "d.jsonl"))
    logging.getLogger("datasets").removeHandler(handler)
    assert said == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", None, "no such file"),
        ("d.jsonl", "", "is empty, expected rows"),
        ("d.jsonl", "\n\n", "d.jsonl: "),
        ("d.jsonl", "[]", "d.jsonl: "),
        ("d.jsonl", '{"text": "a"}\n{"text": ', "cannot be read as json"),
        ("d.jsonl", "\x00\x01", "cannot be read as json"),
        ("d.jsonl", '{"txt": "a"}', "no column 'text' for the text; did you mean 'txt'"),
        ("d.jsonl", '{"text": "a"}\n{"text": null}', "row 2: text: got nothing, expected a text"),
        ("d.jsonl", '{"text": 3}', "row 1: text: got 3, expected a text"),
        ("d.csv", "text\n", "got a header without rows"),
        ("d.csv", "text,label\na,x\n\nb,x,3\n", "row 2 (line 4): got 3 cells, expected at most 2, as in the header"),
        ("d.csv", "text,label\na,b,x\na,b,x\n", "row 1 (line 2): got 3 cells"),  # pandas takes a for the row's name
        ("d.csv", 'text\na\n"b\nc\n', "row 2 (line 3): its double quotes do not match"),
        ("d.csv", 'text\n"a ""b"" c"\n"a "b" c"\n', "row 2 (line 3): its double quotes do not match"),
        ("d.csv", '"text\na\n', "header (line 1): its double quotes do not match"),
        ("d.csv", "text\na\nb\0\n", "line 3: got a NUL character, expected text"),
        ("d.csv", "text\na\ncaf\udce9\n", "line 3: got the byte 0xe9, expected UTF-8"),
        ("d.csv", "text\n1\n2\n", "row 1: text: got 1, expected a text"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_with_exit_code_2(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError) as caught:
        read_rows(DataSource(**{"csv" if name.endswith("csv") else "json": path}))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.WRONG_INPUT


def test_documents_without_any_tokens_are_refused(decoder, tmp_path):
    with pytest.raises(DataError, match="got no text of two tokens or more"):
        ids_of(decoder, tmp_path, "", "a")


def test_the_majority_share_is_what_guessing_gets_right():
    items = [Item((1,), str(number), label) for number, label in enumerate([2, 0, 2, 1])]
    assert majority_share(items) == 0.5
    assert majority_share([Item((1,), "0")]) is None


def test_a_classifier_is_not_scored_token_by_token(classifier, tmp_path):
    data = {"d": DataSource(json=tmp_path / "none.jsonl")}
    with pytest.raises(CannotRun, match=r"evaluate\.a: phase: got decode, expected prefill"):
        load_items({"a": Agreement(data="d", phase="decode")}, data, classifier)
