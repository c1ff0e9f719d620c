"""Generation: what is compared, what is truncated or unparsable, stops, chats; torch walk against runtime."""

import json
from decimal import Decimal

import numpy as np
import pytest
import torch
from scoring_fakes import tiny_llama, write_rows, write_tokenizer
from transformers import LlamaForCausalLM

from optimizer.errors import CannotRun
from optimizer.evaluate import greedy
from optimizer.evaluate.data import DataError
from optimizer.evaluate.generation import Generation, Prompt, Stop, last_number
from optimizer.evaluate.greedy import Answer, cache_bytes_per_token, walks
from optimizer.evaluate.items import Item
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Budget, judge
from optimizer.recipe import DataSource
from passes import _walk
from passes.base import Context
from passes.export_onnx import ExportOnnx

DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "max_position_embeddings": 24,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GSM8K = {
    "question": "How many?",
    "answer": "She has 5 - 2 = <<5-2=3>>3, then 3 * 24 = $<<3*24=72>>72.\n#### 1,072",
}


@pytest.fixture
def reader(tmp_path):
    return TextReader.of(write_tokenizer(tmp_path), DECODER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    ExportOnnx().run(model, Context(workdir=folder, source=model))
    return folder / "model.onnx"


class FakeWriter:
    """Answers every prompt with the ids it was given for it."""

    kind = "decoder"

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, items, max_tokens, ends):
        for index in reversed(range(len(items))):
            yield index, self.answers[index]


def said(reader, *texts, is_complete=True, is_finite=True):
    return [Answer(tuple(reader.encode_whole([text])[0]), is_complete, is_finite) for text in texts]


def load(tmp_path, reader, *rows, max_tokens=4, **options):
    task = Generation(data="d", max_tokens=max_tokens, **options)
    return task.load(DataSource(json=write_rows(tmp_path / "d.jsonl", *rows)), reader)


def scores(reader, references, answers, **options):
    items = [Prompt((2,), str(number), reference=reference) for number, reference in enumerate(references)]
    task = Generation(data="d", **options)
    return evaluate({"g": task}, {"g": items}, FakeWriter(*answers), reader=reader)["g"].scores


# ---- what is compared


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 72", "72"),
        ("#### 1,234,567.50", "1234567.50"),
        ("5-3 = 2", "2"),
        ("it falls by 5 to -3", "-3"),
        ("-$5", "-5"),
        ("$.50", "0.50"),
        ("72.", "72"),
        ("1,2 or 3,4567", "4567"),
        ("1234,567", "567"),
        ("none at all", None),
        ("", None),
        (". , - $", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_gsm8k_reference_is_the_number_after_its_mark(tmp_path, reader):
    (item,) = load(tmp_path, reader, GSM8K, prompt="Question: {question}\nAnswer:", score="numeric")
    assert item.reference == "1072"


def test_numbers_are_compared_by_value():
    task = Generation(data="d", score="numeric")
    assert [task.is_right(text, "1072") for text in ("so 1,072.00", "$1072", "1073", "no")] == [True, True, False, None]


def test_exact_compares_the_whole_text_without_white_space_around_it(tmp_path, reader):
    task = Generation(data="d")
    assert task.is_right(" Paris\n", "Paris") is True
    assert task.is_right("Paris.", "Paris") is False
    (item,) = load(tmp_path, reader, {"prompt": "a", "answer": " Paris "})
    assert item.reference == "Paris"


def test_a_pattern_compares_its_group_and_reads_the_reference_too(tmp_path, reader):
    options = {"score": "regex", "pattern": r"#### (-?[0-9.,]+)"}
    task = Generation(data="d", **options)
    (item,) = load(tmp_path, reader, GSM8K, prompt="{question}", **options)
    assert item.reference == "1,072"
    found = [task.is_right(text, "1,072") for text in ("#### 1,072 #### 3", "#### 1072", "1,072")]
    assert found == [True, False, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "regex"}, "pattern: got none with score regex"),
        ({"pattern": "(a)"}, r"pattern: got '\(a\)' with score exact"),
        ({"score": "regex", "pattern": "(a)(b)"}, "pattern: got 2 groups"),
        ({"score": "regex", "pattern": "(a"}, "which is no regular expression"),
        ({"stop": ("",)}, "stop: got an empty text"),
        ({"prompt": "{"}, "prompt: got '{'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Generation(data="d", **options)


@pytest.mark.parametrize("answer", ["", None, [1]])
def test_a_row_without_a_right_answer_is_one_line(tmp_path, reader, answer):
    with pytest.raises(DataError, match="row 1: answer: got"):
        load(tmp_path, reader, {"prompt": "a", "answer": answer})


def test_a_reference_without_a_number_is_one_line(tmp_path, reader):
    with pytest.raises(DataError, match="row 1: answer: got 'many', expected a number"):
        load(tmp_path, reader, {"prompt": "a", "answer": "many"}, score="numeric")


# ---- scores


def test_right_answers_are_counted_and_kept(reader):
    found = scores(reader, ["a b", "c"], said(reader, "a b", "d"))
    assert found["accuracy"].values["correct"].tolist() == [True, False]
    assert found["accuracy"].values["answer"].tolist() == [b"a b", b"d"]
    assert (found["truncated"].point, found["unparsable"].point) == (0, 0)


def test_truncated_and_unparsable_answers_are_wrong_and_counted_apart(reader):
    answers = [*said(reader, "a b", "a b", is_complete=False), *said(reader, "c")]
    found = scores(reader, ["a b"] * 3, answers, score="regex", pattern="(a b)")
    assert found["accuracy"].point == 0
    assert found["truncated"].values["truncated"].tolist() == [True, True, False]
    assert found["accuracy"].values["truncated"].tolist() == [
        True,
        True,
        False,
    ]  # the gate compares it with the source's
    assert found["unparsable"].values["unparsable"].tolist() == [False, False, True]


def test_a_model_without_numbers_gives_nan_and_fails_the_gate(reader):
    good = scores(reader, ["a", "b"], said(reader, "a", "b"))["accuracy"]
    bad = scores(reader, ["a", "b"], [*said(reader, "a"), *said(reader, "b", is_complete=False, is_finite=False)])
    assert np.isnan(bad["accuracy"].values["correct"]).tolist() == [False, True]
    assert bad["truncated"].point == 0
    assert judge(good, bad["accuracy"], Budget("accuracy", 0.5)).outcome == "fail"


def test_answers_to_other_prompts_are_not_compared(reader):
    before, after = (scores(reader, [text], said(reader, "a"))["accuracy"] for text in "ab")
    with pytest.raises(ValueError, match="answered different items"):
        judge(before, after, Budget("accuracy", 0.5))


# ---- prompts and stops


def test_prompts_hold_the_tokenizers_own_beginning_and_leave_room_for_the_answer(tmp_path, reader):
    rows = {"prompt": "a b c d", "answer": "x"}, {"prompt": "a", "answer": "x"}
    items = load(tmp_path, reader, *rows, context=10, max_tokens=8)
    assert [(item.ids, item.is_cut) for item in items] == [((4, 5), True), ((2,), False)]


def test_an_answer_longer_than_the_context_is_refused(tmp_path, reader):
    with pytest.raises(CannotRun, match="max_tokens: got 256, expected below the context of 24 tokens"):
        load(tmp_path, reader, {"prompt": "a", "answer": "x"}, max_tokens=256)


def test_an_empty_prompt_names_its_row(tmp_path, reader):
    with pytest.raises(DataError, match="row 1: got a prompt without tokens"):
        load(tmp_path, reader, {"prompt": "", "answer": "x"})


def test_the_chat_template_frames_the_prompt_and_nothing_is_added_to_it(tmp_path):
    write_tokenizer(tmp_path, template=True)
    settings = {"chat_template": "{% for m in messages %}d {{ m.content }}{% endfor %} c"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reader = TextReader.of(tmp_path, DECODER)
    (item,) = load(tmp_path, reader, {"prompt": "a b", "answer": "x"}, chat=True)
    assert item.ids == (5, 2, 3, 4)


def test_a_chat_needs_a_template(tmp_path, reader):
    with pytest.raises(CannotRun, match="has no chat_template"):
        load(tmp_path, reader, {"prompt": "a", "answer": "x"}, chat=True)


def test_an_answer_ends_at_an_end_id_or_a_string_and_holds_neither(reader):
    stop = Stop(reader, ("b c", "d"))
    assert [stop(ids) for ids in ([2], [2, 3], [2, 3, 4], [2, 1], [5])] == [False, False, True, True, True]
    assert stop.text((2, 3, 4, 2)) == "a "
    assert Stop(reader).text((2, 3)) == "a b"


def test_every_end_id_of_the_generation_settings_counts(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert TextReader.of(tmp_path, DECODER).eos == {1, 4, 5}


# ---- scorers

PROMPTS = [Item(ids, str(number)) for number, ids in enumerate([(0, 2, 3), (0, 4, 5), (0, 3), (2, 5, 4, 3, 2), (6,)])]


def answers(scorer, ends=lambda ids: ids[-1] in (1, 6), max_tokens=12):
    return dict(scorer.generate(PROMPTS, max_tokens, ends))


def test_torch_walk_and_runtime_and_transformers_give_the_same_tokens(model, graph):
    walked, served = answers(TorchScorer(model, "decoder", 1)), answers(RuntimeScorer(graph, "decoder", 1))
    assert walked == served
    assert {answer.is_complete for answer in walked.values()} == {True, False}
    module = LlamaForCausalLM.from_pretrained(model.folder).eval()
    for index, item in enumerate(PROMPTS):
        ids = list(item.ids)
        with torch.no_grad():
            while len(ids) - len(item.ids) < 12 and (ids == list(item.ids) or ids[-1] not in (1, 6)):
                ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
        assert walked[index].ids == tuple(ids[len(item.ids) :])


def test_how_many_prompts_walk_together_does_not_matter(model, monkeypatch):
    together = answers(TorchScorer(model, "decoder", 1))
    monkeypatch.setattr(greedy, "CACHE_BYTES", 1)
    assert answers(TorchScorer(model, "decoder", 1)) == together


def test_one_block_at_a_time_is_in_memory_while_answers_are_written(model, monkeypatch):
    seen = []
    loaded = _walk.Skeleton.loaded

    def watched(skeleton, *names):
        present = [
            name for name in skeleton.blocks if not next(skeleton.module.get_submodule(name).parameters()).is_meta
        ]
        seen.append((len(present), names[0]))
        return loaded(skeleton, *names)

    monkeypatch.setattr(_walk.Skeleton, "loaded", watched)
    found = answers(TorchScorer(model, "decoder", 1), ends=lambda ids: False, max_tokens=5)
    assert {present for present, _ in seen} == {0}
    # five prompts, each five tokens long in the end: every block is read once for each token, whatever the prompts
    assert [names.rpartition(".")[2] for _, names in seen[1:]] == ["0", "1"] * 5
    assert {len(answer.ids) for answer in found.values()} == {5}


def test_a_walk_holds_as_many_caches_as_its_memory_allows(monkeypatch):
    monkeypatch.setattr(greedy, "CACHE_BYTES", 100)
    lengths = [5, 5, 5, 10, 40]
    assert list(walks([[0, 1, 2], [3], [4]], lengths, 10)) == [[[0, 1]], [[2]], [[3]], [[4]]]
    monkeypatch.setattr(greedy, "CACHE_BYTES", 260)
    assert list(walks([[0, 1, 2], [3], [4]], lengths, 10)) == [[[0, 1, 2], [3]], [[4]]]


def test_a_tokens_cache_is_keys_and_values_of_all_layers(model):
    config = LlamaForCausalLM.from_pretrained(model.folder).config
    assert cache_bytes_per_token(config) == 2 * 2 * 1 * 16 * 4


@pytest.mark.parametrize("make", ["torch", "runtime"])
def test_the_task_asks_the_scorer_and_reads_its_answers(tmp_path, reader, model, graph, make):
    scorer = TorchScorer(model, "decoder", 1) if make == "torch" else RuntimeScorer(graph, "decoder", 1)
    rows = [{"prompt": text, "answer": "c"} for text in ("a b", "c d", "b")]
    task = Generation(data="d", max_tokens=6)
    items = task.load(DataSource(json=write_rows(tmp_path / "d.jsonl", *rows)), reader)
    told = []
    found = evaluate({"g": task}, {"g": items}, scorer, progress=lambda *report: told.append(report), reader=reader)
    assert told[-1] == (3, 3, "answer")
    texts = found["g"].scores["accuracy"].values["answer"].tolist()
    expected = answers_of(scorer, items, reader)
    assert [text.decode() for text in texts] == expected


def answers_of(scorer, items, reader):
    found = dict(scorer.generate(items, 6, Stop(reader)))
    return [reader.decode(found[index].ids) for index in range(len(items))]


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_settings_that_are_no_json_object_are_one_line(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text("[1]")
    with pytest.raises(CannotRun, match=f"{name}: got a JSON list, expected an object"):
        TextReader.of(tmp_path, DECODER)
