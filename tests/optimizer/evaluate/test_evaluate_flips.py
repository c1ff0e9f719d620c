"""What changed, in words: each task's own answers, what became worse first, texts of bounded length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring_fakes import FakeScorer, documents, one_hot, write_rows, write_tokenizer

from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.choice import Choice
from optimizer.evaluate.classification import Classification
from optimizer.evaluate.flips import LONGEST, SHOWN, _shares, beginning, ending, find_flips
from optimizer.evaluate.generation import Generation, Prompt
from optimizer.evaluate.items import Item
from optimizer.evaluate.lm_eval import LmEval
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Scores
from optimizer.recipe import DataSource
from optimizer.record import Flip, Flips


@pytest.fixture
def reader(tmp_path):
    def of(kind):
        config = {
            "architectures": [{"decoder": "LlamaForCausalLM", "classifier": "BertForSequenceClassification"}[kind]],
            "model_type": {"decoder": "llama", "classifier": "bert"}[kind],
            "vocab_size": 7,
            "max_position_embeddings": 24,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "id2label": {"0": "calm", "1": "angry", "2": "glad"},
        }
        return TextReader.of(write_tokenizer(tmp_path), config)

    return of


def changes(task, items, before, after, reader, kind):
    source = evaluate({"t": task}, {"t": items}, FakeScorer(before, kind), reader=reader)
    model = evaluate({"t": task}, {"t": items}, FakeScorer(after, kind), source, reader=reader)
    (found,) = find_flips({"t": task}, {"t": items}, source, model, reader)
    return found


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_classes_that_became_worse_come_first(reader, metric):
    items = [Item((2, 3), "0", 1), Item((3,), "1", 2), Item((4,), "2", 0), Item((5,), "3", 1)]
    before, after = (one_hot(answers, 3) for answers in ([0, 1, 0, 2], [0, 2, 2, 0]))
    found = changes(Classification(data="d", metric=metric), items, before, after, reader("classifier"), "classifier")
    assert found == Flips(
        "t",
        3,
        4,
        "answers",
        (
            Flip(3, "c", "calm", "glad", "calm", "worse"),
            Flip(2, "b", "angry", "glad", "glad", "better"),
            Flip(4, "d", "glad", "calm", "angry", "other"),
        ),
    )


def test_answer_that_is_no_number_is_told(reader):
    items = [Item((2,), "0", 1)]
    found = changes(
        Classification(data="d"), items, one_hot([1], 3), [[np.nan] * 3], reader("classifier"), "classifier"
    )
    assert found.shown == (Flip(1, "a", "angry", "nan", "angry", "worse"),)


def test_agreement_tells_a_classifiers_classes_without_a_right_one(reader):
    items = [Item((2,), "0"), Item((3,), "1")]
    found = changes(
        Agreement(data="d"), items, one_hot([0, 1], 3), one_hot([2, 1], 3), reader("classifier"), "classifier"
    )
    assert (found.changed, found.answers) == (1, 2)
    assert found.shown == (Flip(1, "a", "calm", "glad", None, "other"),)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_agreement_tells_of_each_document_the_changed_token_the_source_was_surest_of(reader, rows):
    items = documents([2, 3, 4], [5, 2], [2, 2, 2])
    before = [np.array(one_hot([3, 4, 5], 7)), one_hot([2, 2], 7), np.array(one_hot([2, 2, 2], 7)) / 2]
    before[0][1] /= 9
    after = [one_hot([3, 1, 6], 7), one_hot([2, 2], 7), one_hot([3, 4, 2], 7)]
    task, of = Agreement(data="d"), reader("decoder")
    source = evaluate({"t": task}, {"t": items}, FakeScorer(before, rows=rows), reader=of)
    model = evaluate({"t": task}, {"t": items}, FakeScorer(after, rows=rows), source, reader=of)
    surest, next_surest = Flip(1, "a b c", "d", "<unk>", None, "other"), Flip(3, "a", "a", "b", None, "other")
    found = find_flips({"t": task}, {"t": items}, source, model, of)
    assert found == (Flips("t", 4, 8, "next tokens", (surest, next_surest)),)


def test_agreement_of_a_model_that_gives_no_numbers_can_be_told(reader):
    items = documents([2, 3, 4])
    found = changes(
        Agreement(data="d"), items, [one_hot([3, 4, 5], 7)], [[[np.nan] * 7] * 3], reader("decoder"), "decoder"
    )
    assert (found.changed, found.answers) == (0, 3)


def test_choice_tells_the_texts_of_the_choices(reader, tmp_path):
    rows = write_rows(
        tmp_path / "q.jsonl",
        {"prompt": "a b", "choices": ["c", "d"], "answer": 0},
        {"prompt": "b", "choices": ["a", "d"], "answer": 1},
    )
    task, of = Choice(data="d"), reader("decoder")
    items = task.load(DataSource(json=rows), of)
    tokens = {2: "a", 4: "c", 5: "d"}
    assert [tokens[item.targets[0]] for item in items] == ["c", "d", "a", "d"]

    def likely(*wanted):
        """Make token `wanted[q]` the most likely one after question q, whichever choice is asked."""
        return [one_hot([wanted[item.question]] * len(item.ids), 7) for item in items]

    found = changes(task, items, likely(4, 2), likely(5, 5), of, "decoder")
    assert found.shown == (Flip(1, "a b", "c", "d", "c", "worse"), Flip(2, "b", "a", "d", "d", "better"))


def answered(correct, texts):
    values = {"correct": np.array(correct), "answer": np.array([text.encode() for text in texts], dtype=np.bytes_)}
    return TaskResult({"accuracy": Scores("accuracy", "h", ("0",) * len(texts), values, 0.5)})


def test_generation_tells_the_texts_that_were_generated(reader):
    items = [Prompt((2, 3), str(number), reference="7") for number in range(4)]
    before = answered([True, False, False, True], ["7", "5", "5", "so 7"])
    after = answered([False, False, True, True], ["日", "5", "7", "it is 7"])
    task = Generation(data="d", score="numeric", max_tokens=4)
    (found,) = find_flips({"g": task}, {"g": items}, {"g": before}, {"g": after}, reader("decoder"))
    assert [(flip.item, flip.before, flip.after, flip.effect) for flip in found.shown] == [
        (1, "7", "日", "worse"),
        (3, "5", "7", "better"),
        (4, "so 7", "it is 7", "other"),
    ]
    assert {flip.expected for flip in found.shown} == {"7"}


def test_lm_eval_tells_which_documents_became_wrong(reader):
    items = [Item((), f"arc_easy/{number}") for number in range(3)]
    before, after = answered([True, True, False], ["", "", ""]), answered([True, False, False], ["", "", ""])
    (found,) = find_flips({"l": LmEval(name="arc_easy")}, {"l": items}, {"l": before}, {"l": after}, reader("decoder"))
    assert found == Flips("l", 1, 3, "answers", (Flip(2, "arc_easy/1", "right", "wrong", None, "worse"),))


def test_task_without_answers_has_no_flips(reader):
    items = documents([2, 3, 4])
    result = evaluate({"p": Perplexity(data="d")}, {"p": items}, FakeScorer([np.zeros((3, 7))]))
    assert find_flips({"p": Perplexity(data="d")}, {"p": items}, result, result, reader("decoder")) == ()


def test_result_that_does_not_hold_the_answers_has_no_flips(reader):
    bare = TaskResult({"accuracy": Scores("accuracy", "h", ("0",), {"correct": np.array([True])}, 1.0)})
    items = {"t": [Item((2,), "0", 1)]}
    assert find_flips({"t": Classification(data="d")}, items, {"t": bare}, {"t": bare}, reader("classifier")) == ()


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 40))
def test_shares_are_even_and_nothing_is_left_that_someone_wants(wanted, most):
    given_ = _shares(wanted, most)
    assert sum(given_) == min(most, sum(wanted))
    assert all(got <= want for got, want in zip(given_, wanted, strict=True))
    short = [got for got, want in zip(given_, wanted, strict=True) if got < want]
    assert not short or max(given_) - min(short) <= 1


def test_a_run_tells_twenty(reader):
    task = Classification(data="d")
    items = [Item((2,) * (1 + number), str(number), 0) for number in range(50)]
    before, after = one_hot([0] * 50, 3), one_hot([1] * 50, 3)
    source = evaluate({"t": task}, {"t": items}, FakeScorer(before, "classifier"))
    model = evaluate({"t": task}, {"t": items}, FakeScorer(after, "classifier"))
    (found,) = find_flips({"t": task}, {"t": items}, source, model, reader("classifier"))
    assert (found.changed, len(found.shown)) == (50, SHOWN)


def test_what_one_task_told_of_a_text_another_does_not_tell_again(reader):
    tasks = {"accuracy": Classification(data="d"), "same": Agreement(data="d")}
    items = {name: [Item((2,), "0", 0), Item((3,), "1", 0)] for name in tasks}
    source = evaluate(tasks, items, FakeScorer(one_hot([0, 0], 3), "classifier"))
    model = evaluate(tasks, items, FakeScorer(one_hot([1, 2], 3), "classifier"), source)
    found = find_flips(tasks, items, source, model, reader("classifier"))
    assert [(each.changed, len(each.shown)) for each in found] == [(2, 2), (2, 0)]


def test_long_texts_are_cut():
    text = "x" * 100 + "y" * 200
    assert (len(beginning(text)), beginning(text)[-2:], len(ending(text)), ending(text)[:2]) == (
        LONGEST,
        "x…" if LONGEST < 100 else "y…",
        LONGEST,
        "…y",
    )
    assert (beginning("ab"), ending("ab")) == ("ab", "ab")
