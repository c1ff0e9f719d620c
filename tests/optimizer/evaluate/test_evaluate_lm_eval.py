"""Tasks of lm-evaluation-harness on our scorers, beside its own model on the same requests."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scoring_fakes import tiny_llama, write_rows, write_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimizer.errors import CannotRun
from optimizer.evaluate.choice import Choice, LikelihoodTally
from optimizer.evaluate.items import items_hash, load_items
from optimizer.evaluate.lm_eval import LmEval
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.run import evaluate, show
from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Budget, judge
from optimizer.recipe import DataSource
from passes.base import Context
from passes.export_onnx import ExportOnnx

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's and its libraries' own

CHOICE = """\
task: words_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
ANSWER = """\
task: words_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["d"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """\
task: words_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ROWS = [
    {"prompt": "a b c", "choices": ["d a", "b"], "answer": 1},
    {"prompt": "d", "choices": ["a", "b a b"], "answer": 0},
    {"prompt": "", "choices": ["a b", "c"], "answer": 1},
    {"prompt": "a " * 30, "choices": ["c d", "b"], "answer": 0},
    {"prompt": "c c", "choices": ["b", "d b"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(write_tokenizer(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    return TextReader.of(folder, json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def model(folder):
    from passes._skeleton import read_config
    from passes.base import TORCH, Model

    return Model(TORCH, folder, folder, read_config(folder))


@pytest.fixture(scope="module")
def scorer(model):
    return TorchScorer(model, "decoder", 1)


@pytest.fixture(scope="module")
def peer(folder):
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return HFLM(pretrained=LlamaForCausalLM.from_pretrained(folder).eval(), tokenizer=tokenizer, max_length=24)


def task(tmp_path, text, rows=ROWS, **options):
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "task.yaml").write_text(text.format(data=data))
    return LmEval(file=tmp_path / "task.yaml", trust_task_code=True, **options)


def ours(task, scorer, reader):
    items = load_items({"l": task}, {}, reader)["l"]
    return evaluate({"l": task}, {"l": items}, scorer, reader=reader)["l"].scores


def theirs(task, peer):
    found = task.evaluate(peer)
    (samples,) = found["samples"].values()
    return samples, next(iter(found["results"].values()))


def test_multiple_choice_has_lm_evals_answers_document_by_document(tmp_path, scorer, reader, peer):
    given = task(tmp_path, CHOICE)
    found = ours(given, scorer, reader)
    samples, results = theirs(given, peer)
    for metric in ("acc", "acc_norm"):
        assert found[metric].values["correct"].tolist() == [bool(sample[metric]) for sample in samples]
        assert found[metric].point == results[f"{metric},none"]
    assert found["cut"].values["cut"].tolist() == [False, False, False, True, False]


def test_a_metric_that_is_not_right_or_wrong_is_reported_and_no_gate_takes_it(tmp_path, scorer, reader, peer):
    given = task(tmp_path, CHOICE)
    found, (_, results) = ours(given, scorer, reader)["brier_score"], theirs(given, peer)
    # lm-eval's sums are float32
    assert found.point == pytest.approx(results["brier_score,none"], abs=1e-5)
    with pytest.raises(ValueError, match="metrics differ"):
        judge(found, found, Budget("accuracy", 0.1))


def test_choice_and_lm_eval_ask_for_the_same_log_probabilities(tmp_path, scorer, reader, peer):
    from lm_eval.api.instance import Instance

    items = Choice(data="d").load(DataSource(json=write_rows(tmp_path / "d.jsonl", *ROWS)), reader)
    tally = LikelihoodTally(items)
    for _ in show(items, scorer, [tally]):
        pass
    pairs = [(row["prompt"], f" {choice}") for row in ROWS for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = peer.loglikelihood(requests, disable_tqdm=True)
    # float32 softmax against float64
    assert tally.sums == pytest.approx([total for total, _ in expected], abs=1e-5)
    assert tally.is_greedy.tolist() == [is_greedy for _, is_greedy in expected]


def test_greedy_answers_are_lm_evals(tmp_path, scorer, reader, peer):
    given = task(tmp_path, ANSWER, [{**row, "prompt": row["prompt"] or "b", "answer": "c"} for row in ROWS])
    found = ours(given, scorer, reader)
    samples, results = theirs(given, peer)
    assert found["exact_match"].point == results["exact_match,none"]
    assert found["exact_match"].values["correct"].tolist() == [bool(sample["exact_match"]) for sample in samples]


def test_generated_texts_are_lm_evals(tmp_path, scorer, reader, peer):
    from lm_eval.api.instance import Instance

    from optimizer.evaluate.lm_eval_model import ScorerLM

    settings = {"until": ["d"], "max_gen_toks": 8, "do_sample": False}
    prompts = ["a b c", "d d", "b", "a " * 30]
    requests = [Instance("generate_until", {}, (text, dict(settings)), 0, metadata=("t", 0, 1)) for text in prompts]
    mine = ScorerLM(scorer, reader).generate_until(requests)
    alone = [peer.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert mine == alone
    assert len(set(mine)) > 1


def test_whole_texts_in_windows_have_lm_evals_likelihood(tmp_path, scorer, reader, peer):
    given = task(tmp_path, ROLLING, [{"prompt": text} for text in ("a b c d", "b " * 60, "c a")])
    found, (_, results) = ours(given, scorer, reader)["bits_per_byte"], theirs(given, peer)
    # float32 sums of 60 log-probabilities
    assert found.point == pytest.approx(results["bits_per_byte,none"], abs=1e-5)
    assert found.metric == "bits_per_byte"


def test_the_runtime_answers_as_the_torch_walk_does(tmp_path, model, scorer, reader):
    ExportOnnx().run(model, Context(workdir=tmp_path, source=model))
    given, served = task(tmp_path, CHOICE), RuntimeScorer(tmp_path / "model.onnx", "decoder", 1)
    before, after = ours(given, scorer, reader), ours(given, served, reader)
    assert before["acc"].items == after["acc"].items
    assert judge(before["acc"], after["acc"], Budget("accuracy", 0.1)).difference == 0


def test_nan_makes_the_document_nan_and_the_gate_fail(tmp_path, scorer, reader):
    given = task(tmp_path, CHOICE)
    good = ours(given, scorer, reader)["acc"]
    bad = ours(given, Broken(scorer), reader)
    assert np.isnan(bad["acc"].values["correct"]).tolist() == [True, False, False, False, False]
    assert judge(good, bad["acc"], Budget("accuracy", 0.5)).outcome == "fail"
    assert np.isnan(bad["brier_score"].point)


class Broken:
    """Gives no number for the first request's last row."""

    kind = "decoder"

    def __init__(self, scorer):
        self.scorer = scorer

    def logits(self, items, phase="prefill"):
        for index, first, rows in self.scorer.logits(items):
            yield index, first, np.full_like(rows, np.nan) if index == 0 else rows


def test_other_rows_are_other_items(tmp_path, reader):
    hashes = set()
    for rows in (ROWS, ROWS[:3], [*ROWS[:4], {**ROWS[4], "prompt": "c d"}]):
        hashes.add(items_hash(load_items({"l": task(tmp_path, CHOICE, rows)}, {}, reader)["l"], None))
    assert len(hashes) == 3


def test_a_number_of_documents_and_of_examples_can_be_asked_for(tmp_path, reader):
    assert len(load_items({"l": task(tmp_path, CHOICE, items=2)}, {}, reader)["l"]) == 2
    plain, shots = (
        load_items({"l": task(tmp_path, CHOICE, shots=count)}, {}, reader)["l"][0].requests for count in (0, 1)
    )
    assert plain != shots


def test_what_lm_eval_does_not_know_is_one_line(reader):
    with pytest.raises(CannotRun, match="lm_eval: no_such_task_at_all: ") as caught:
        LmEval(name="no_such_task_at_all").load_own(reader)
    assert "\n" not in str(caught.value)


def test_a_task_that_samples_is_refused(tmp_path, scorer, reader):
    given = task(tmp_path, ANSWER.replace("do_sample: false", "do_sample: true, temperature: 1.0"))
    with pytest.raises(CannotRun, match="words_answer: samples or searches"):
        ours(given, scorer, reader)


def test_lm_eval_says_nothing_on_the_terminal(tmp_path, scorer, reader, capfd):
    ours(task(tmp_path, CHOICE), scorer, reader)
    assert capfd.readouterr() == ("", "")


def test_the_source_decides_which_metrics_are_right_or_wrong(tmp_path, scorer, reader):
    given = task(tmp_path, CHOICE)
    items = load_items({"l": given}, {}, reader)["l"]
    found = evaluate({"l": given}, {"l": items}, scorer, reader=reader)["l"].scores
    reported = TaskResult({"acc": replace(found["acc"], metric="acc")})
    again = evaluate({"l": given}, {"l": items}, scorer, {"l": reported}, reader=reader)["l"].scores
    assert (again["acc"].metric, again["acc_norm"].metric) == ("acc", "accuracy")


# ---- without lm-eval


def test_a_task_of_the_users_own_is_code_and_needs_trust(tmp_path):
    with pytest.raises(ValueError, match=r"file: task\.yaml is code: read it, then set `trust_task_code: true`"):
        LmEval(file=tmp_path / "task.yaml")


@pytest.mark.parametrize("options", [{}, {"name": "a", "file": Path("b.yaml"), "trust_task_code": True}])
def test_a_task_is_named_or_a_file(options):
    with pytest.raises(ValueError, match="expected one of name, file"):
        LmEval(**options)


def test_where_lm_eval_is_not_installed_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 7}
    reader = TextReader.of(write_tokenizer(tmp_path), config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"is not installed; install it with: pip install 'optimize-models\[lm-eval\]'"):
        load_items({"l": LmEval(name="arc_easy")}, {}, reader)


def test_the_files_of_a_task_decide_its_identity(tmp_path):
    identities = []
    for text in ("task: a\n", "task: a\n", "task: a  # other\n"):
        (tmp_path / "task.yaml").write_text(text)
        identities.append(LmEval(file=tmp_path / "task.yaml", trust_task_code=True).identity())
    assert identities[0] == identities[1] != identities[2]
    (tmp_path / "utils.py").write_text("")
    assert LmEval(file=tmp_path / "task.yaml", trust_task_code=True).identity() != identities[2]
    assert json.dumps(identities)
