"""Multiple choice: layouts, how requests are encoded and cut, closed forms, NaN, chance, torch and runtime."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_fakes import FakeScorer, random_logits, tiny_llama, write_rows, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM

from optimizer.errors import CannotRun
from optimizer.evaluate.choice import LAYOUTS, Choice, ChoiceTally, Continuation, answer_index, read_question
from optimizer.evaluate.data import DataError, read_records
from optimizer.evaluate.items import items_hash
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Budget, judge
from optimizer.quantities import Drop
from optimizer.recipe import DataSource
from runtime.session import DecoderSession

DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "max_position_embeddings": 24,
    "bos_token_id": 0,
}
GRAPH = Path(__file__).parents[2] / "data" / "artifact-v1" / "model.onnx"
OWN = {"prompt": "{q}", "choices": "{c}", "answer": "a"}


@pytest.fixture
def reader(tmp_path):
    return TextReader.of(write_tokenizer(tmp_path), DECODER)


def source(tmp_path, *rows, **options):
    return DataSource(json=write_rows(tmp_path / "data.jsonl", *rows), **options)


def load(tmp_path, reader, *rows, **options):
    return Choice(data="d", **{**OWN, **options}).load(source(tmp_path, *rows), reader)


def score(items, logits, **options):
    task = Choice(data="d", **{**OWN, **options})
    return evaluate({"c": task}, {"c": items}, FakeScorer(logits))["c"].scores


class OneTally:
    """A task that hands out the same tally to whoever asks."""

    def __init__(self, tally):
        self.given = tally

    def tally(self, *_):
        return self.given


def sums(items, scorer):
    tally = ChoiceTally(items, "name")
    evaluate({"c": OneTally(tally)}, {"c": items}, scorer)
    return tally.sums


def asking(first, *answers, question=0, label=0):
    """Return the items of one question whose choices are the tokens `answers`, and what is read before each."""
    return [
        Continuation(
            (*range(first), *ids)[:-1], str(question), label, targets=ids, question=question, characters=len(ids)
        )
        for ids in answers
    ]


# ---- layouts

ROWS = {
    "blimp": ({"sentence_good": "He ran.", "sentence_bad": "He run."}, [("", "He ran."), ("", "He run.")], 0),
    "arc": (
        {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        [("Question: Why?\nAnswer:", choice) for choice in "abc"],
        1,
    ),
    "piqa": (
        {"goal": "Cut it", "sol1": "knife", "sol2": "spoon", "label": 0},
        [("Question: Cut it\nAnswer:", choice) for choice in ("knife", "spoon")],
        0,
    ),
    "boolq": (
        {"passage": "It is.", "question": "is it", "answer": True},
        [("It is.\nQuestion: is it?\nAnswer:", choice) for choice in ("no", "yes")],
        1,
    ),
    "winogrande": (
        {"sentence": "Ann asked Eve so _ knew.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        [("Ann asked Eve so Ann", "knew."), ("Ann asked Eve so Eve", "knew.")],
        1,
    ),
    "mmlu": (
        {"question": " 1 + 1? ", "choices": ["1", "2", "3", "4"], "answer": 1},
        [("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", letter) for letter in "ABCD"],
        1,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_reads_its_data_set(tmp_path, name):
    row, pairs, answer = ROWS[name]
    (record,) = read_records(source(tmp_path, row), LAYOUTS[name].wanted)
    question = read_question(record, LAYOUTS[name])
    assert (list(question.pairs), question.answer) == (pairs, answer)


def test_a_column_with_the_label_of_boolq_serves_too(tmp_path):
    row = {"passage": "p", "question": "q", "label": 0}
    (record,) = read_records(source(tmp_path, row), LAYOUTS["boolq"].wanted)
    assert read_question(record, LAYOUTS["boolq"]).answer == 0


def test_a_missing_column_of_a_layout_is_one_line(tmp_path, reader):
    with pytest.raises(DataError, match="no column 'goal' for the prompt"):
        Choice(data="d", layout="piqa").load(source(tmp_path, {"text": "x"}), reader)


@pytest.mark.parametrize(
    ("value", "index"), [(2, 2), ("1", 1), ("C", 2), ("b", 1), (True, 1), (False, 0), ("so be it", 0), (" 2 ", 2)]
)
def test_an_answer_is_a_number_a_letter_or_the_text_itself(value, index):
    assert answer_index(value, None, ["so be it", "no", "yes"], "row 1") == index


@pytest.mark.parametrize("value", [3, -1, "D", "ß", "maybe", "", 1.5, None, "3"])
def test_an_answer_that_is_none_of_the_choices_names_its_row(value):
    with pytest.raises(DataError, match=r"row 1: got .*, expected a number from 0 to 2"):
        answer_index(value, None, ["so be it", "no", "yes"], "row 1")


def test_names_that_are_not_one_for_each_choice_are_refused(tmp_path, reader):
    row = {"prompt": "a", "choices": ["b", "c"], "answer": "3"}
    with pytest.raises(DataError, match="row 1: got 3 names for 2 choices, expected one for each"):
        Choice(data="d", names=("1", "2", "3")).load(source(tmp_path, row), reader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "arc", "prompt": "{q}"}, "prompt: the layout arc says it already"),
        ({"choices": "{c", "answer": "a"}, "choices: got '{c'"),
    ],
)
def test_options_that_contradict_each_other_or_themselves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Choice(data="d", **options)


def test_a_question_needs_two_choices(tmp_path, reader):
    with pytest.raises(DataError, match="row 1: got 1 prompts and 1 choices"):
        load(tmp_path, reader, {"q": "a", "c": ["b"], "a": 0})
    with pytest.raises(DataError, match="row 1: got an empty choice"):
        load(tmp_path, reader, {"q": "a", "c": ["b", ""], "a": 0})


def test_a_file_of_the_users_own_needs_no_options(tmp_path, reader):
    row = {"prompt": "a", "choices": ["b", "c"], "answer": "c", "remark": "any"}
    items = Choice(data="d").load(source(tmp_path, row), reader)
    assert [(item.ids, item.targets, item.label) for item in items] == [((2,), (3,), 1), ((2,), (4,), 1)]


# ---- requests


def test_prompt_and_choice_are_one_text_and_the_last_token_is_only_asked_for(tmp_path, reader):
    items = load(tmp_path, reader, {"q": "a b", "c": ["c", "d a"], "a": 1})
    assert [(item.ids, item.targets, item.first) for item in items] == [((2, 3), (4,), 1), ((2, 3, 5), (5, 2), 1)]
    assert {item.label for item in items} == {1}


def test_the_special_tokens_of_the_tokenizer_come_first(tmp_path):
    reader = TextReader.of(write_tokenizer(tmp_path, template=True), DECODER)
    reader.tokenizer.add_special_tokens(["<s>"])
    reader.tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert load(tmp_path, reader, {"q": "a", "c": ["b", "c"], "a": 0})[0].ids == (0, 2)
    assert load(tmp_path, reader, {"q": "<s> a", "c": ["b", "c"], "a": 0})[0].ids == (0, 2)


def test_a_choice_is_as_long_as_its_characters_whatever_stands_before_it(tmp_path, reader):
    items = load(tmp_path, reader, {"q": "a ", "c": ["b \N{EURO SIGN}", "c"], "a": 0})
    assert [item.characters for item in items] == [3, 1]


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_choice(tmp_path, reader):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytewise = replace(reader, tokenizer=tokenizer, vocabulary=256)
    (before, after), (start, alone) = bytewise.encode_pairs([("a \n", "b"), (" ", "b")])
    assert start == [bytewise.prefix]  # nothing is left of that prompt
    assert (tokenizer.decode(before), tokenizer.decode(after), tokenizer.decode(alone)) == ("a", " \nb", " b")


def test_a_choice_without_a_prompt_follows_bos_once(tmp_path, reader):
    reader.tokenizer.add_special_tokens(["<s>"])
    items = load(tmp_path, reader, {"q": "", "c": ["a b", "<s> a b"], "a": 0})
    assert [(item.ids, item.targets) for item in items] == [((0, 2), (2, 3)), ((0, 2), (2, 3))]


def test_without_a_beginning_of_its_own_the_end_token_stands_first(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": {"content": "</s>"}}')
    reader = TextReader.of(tmp_path, DECODER)
    assert load(tmp_path, reader, {"q": "", "c": ["a", "b"], "a": 0})[0].ids == (1,)


def test_a_text_alone_needs_something_before_it(tmp_path):
    reader = TextReader.of(write_tokenizer(tmp_path), DECODER | {"bos_token_id": None})
    with pytest.raises(CannotRun, match="names neither bos_token nor eos_token"):
        load(tmp_path, reader, {"q": "", "c": ["a", "b"], "a": 0})


def test_a_long_prompt_loses_its_beginning_and_the_share_of_such_questions_is_told(tmp_path, reader):
    rows = {"q": "a b c d", "c": ["a", "b c"], "a": 0}, {"q": "a", "c": ["b", "c"], "a": 0}
    items = load(tmp_path, reader, *rows, context=3)
    assert [item.ids for item in items] == [(3, 4, 5), (4, 5, 3), (2,), (2,)]
    found = score(items, random_logits(items, 7, seed=0))
    assert found["cut"].values["cut"].tolist() == [True, False]
    assert found["cut"].point == 0.5


def test_a_model_reads_all_of_its_context_before_the_last_token(tmp_path, reader):
    row = {"q": "a " * 23, "c": ["b c", "d"], "a": 0}
    items = load(tmp_path, reader, row)
    assert [len(item.ids) for item in items] == [24, 23]
    assert not any(item.is_cut for item in items)


def test_a_choice_longer_than_the_context_is_refused(tmp_path, reader):
    with pytest.raises(DataError, match="row 1: got a choice of 4 tokens, expected 1 to 3"):
        load(tmp_path, reader, {"q": "a", "c": ["a b c d", "b"], "a": 0}, context=3)


# ---- scores


def test_the_answer_is_the_choice_with_the_largest_sum_of_log_probabilities():
    items = asking(1, (1,), (2, 2), label=1)
    logits = [np.log([[0.2, 0.3, 0.5]]), np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])]
    found = score(items, logits)
    # 0.3 against 0.5 * 0.8 by sum; -1.20 against -0.46 a character
    assert found["accuracy"].values["correct"].tolist() == [True]
    assert score(asking(1, (1,), (2, 2)), logits)["accuracy"].point == 0


def test_the_sum_per_character_may_choose_otherwise():
    items = asking(1, (1,), (2, 2), label=1)
    logits = [np.log([[0.2, 0.5, 0.3]]), np.log([[0.2, 0.2, 0.6], [0.1, 0.2, 0.7]])]
    found = score(items, logits)  # 0.5 against 0.42; ln 0.5 = -0.69 against ln 0.42 / 2 = -0.43
    assert (found["accuracy"].point, found["accuracy_norm"].point) == (0, 1)
    assert found["accuracy_norm"].metric == "accuracy"


def test_rows_before_the_choice_are_not_looked_at():
    items = asking(4, (1,), (2,))
    logits = random_logits(items, 5, seed=1)
    for rows in logits:
        rows[:3] = np.nan
    assert not np.isnan(score(items, logits)["accuracy"].point)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_how_the_logits_are_sliced_does_not_matter(rows):
    items = asking(3, (1, 2, 3), (4, 2)) + asking(2, (0, 0), (1, 3), question=1)
    logits = random_logits(items, 5, seed=2)
    found, whole = (sums(items, FakeScorer(logits, rows=size)) for size in (rows, 9))
    assert found == pytest.approx(whole, rel=1e-14)  # only the order of a float64 sum differs


def test_a_tie_goes_to_the_first_choice():
    items = asking(1, (1,), (2,)) + asking(1, (1,), (2,), question=1, label=1)
    assert score(items, [np.zeros((1, 4))] * 4)["accuracy"].values["correct"].tolist() == [True, False]


def test_nan_makes_the_question_nan_and_the_gate_fail():
    items = asking(1, (1,), (2,)) + asking(1, (1,), (2,), question=1)
    logits = random_logits(items, 4, seed=3)
    good = score(items, logits)["accuracy"]
    logits[2][0, 3] = np.nan
    bad = score(items, logits)["accuracy"]
    assert np.isnan(bad.values["correct"]).tolist() == [False, True]
    assert judge(good, bad, Budget("accuracy", 0.5)).outcome == "fail"


def test_the_gate_counts_questions_and_their_groups(tmp_path, reader):
    rows = [{"q": "a", "c": ["b", "c", "d"], "a": 0, "set": name} for name in "xxy"]
    items = Choice(data="d", **OWN).load(source(tmp_path, *rows, group="set"), reader)
    found = score(items, random_logits(items, 7, seed=4))["accuracy"]
    assert found.groups == ("x", "x", "y")
    assert found.values["correct"].shape == (3,)


def test_the_hash_of_the_items_covers_what_is_asked_for():
    left, right = asking(2, (1,), (2,)), asking(2, (1,), (3,))
    assert [item.ids for item in left] == [item.ids for item in right]
    assert items_hash(left, 8) != items_hash(right, 8)


def test_a_sample_holds_whole_questions(tmp_path, reader):
    rows = [{"q": "a", "c": ["b", "c d"], "a": 0}, {"q": "b", "c": ["b", "c", "d"], "a": 1}]
    items = load(tmp_path, reader, *rows, items=1)
    assert len({item.question for item in items}) == 1
    assert len(items) in (2, 3)


def test_chance_is_guessing_or_the_most_frequent_of_shared_choices(tmp_path, reader):
    task = Choice(data="d", **OWN)
    differing = [{"q": "a", "c": ["b", "c"], "a": 0}, {"q": "a", "c": ["b", "c", "d", "a"], "a": 0}]
    assert task.chance(load(tmp_path, reader, *differing)) == (1 / 2 + 1 / 4) / 2
    shared = [{"q": "a", "c": ["b", "c"], "a": answer} for answer in (1, 1, 1, 0)]
    assert task.chance(load(tmp_path, reader, *shared)) == 0.75


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_norm"])
def test_the_budget_chooses_which_accuracy_is_judged(metric):
    task = Choice(data="d", layout="blimp")
    (budget,) = task.budget(max_drop=Drop.parse("1pt"), metric=metric).limits(task)
    assert (budget.metric, budget.judges, budget.limit) == ("accuracy", metric, 0.01)


# ---- scorers


def test_the_torch_walk_sums_what_transformers_gives(tmp_path, reader):
    model = tiny_llama(tmp_path)
    items = load(
        tmp_path, reader, {"q": "a b c", "c": ["d a", "b", "c"], "a": 0}, {"q": "d", "c": ["a", "b a"], "a": 1}
    )
    module = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    for item, found in zip(items, sums(items, TorchScorer(model, "decoder", 1)), strict=True):
        ids = torch.tensor([[*item.ids, item.targets[-1]]])
        with torch.no_grad():
            log_probs = module(ids).logits[0].log_softmax(-1)
        rows = range(len(ids[0]) - len(item.targets), len(ids[0]))
        expected = sum(float(log_probs[row - 1, ids[0, row]]) for row in rows)
        assert found == pytest.approx(expected, abs=1e-5)  # float32 softmax against float64


def test_the_runtime_computes_only_the_rows_that_are_asked_for():
    items = [*asking(6, (1, 2), (3,)), *asking(6, (1,), (4,), question=1)]
    found = [(index, first, rows.copy()) for index, first, rows in RuntimeScorer(GRAPH, "decoder", 1).logits(items)]
    session = DecoderSession(GRAPH, capacity=16, threads=1)
    assert sorted((index, first, len(rows)) for index, first, rows in found) == [
        (0, 5, 2),
        (1, 5, 1),
        (2, 5, 1),
        (3, 5, 1),
    ]
    for index, first, rows in found:
        # logits of fewer rows come from a smaller matrix product: rounding of float32
        assert rows == pytest.approx(session.run(items[index].ids)[first:], abs=1e-5)


def test_equal_requests_run_once(monkeypatch):
    runs = []
    run = DecoderSession.run
    monkeypatch.setattr(
        DecoderSession, "run", lambda self, ids, **options: runs.append(ids) or run(self, ids, **options)
    )
    list(RuntimeScorer(GRAPH, "decoder", 1).logits(asking(6, (1,), (2,), (3,), (4, 5))))
    assert len(runs) == 2
