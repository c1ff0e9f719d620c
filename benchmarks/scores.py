"""Are our scores lm-eval's? Every answer to the same questions, beside lm-evaluation-harness's own model and prompts.

Three sides answer each question: our torch walk, our runtime on the graph of `export_onnx`, and lm-eval's `HFLM` with
the prompts of the tasks that it ships. The sets lie in the layouts of mosaicml/llm-foundry (ARC, PIQA, BoolQ,
WinoGrande), of BLiMP and of GSM8K; the first are written anew as their authors publish them, so that lm-eval reads its
own layout and `choice` is asked by `layout:`. Nothing is timed.

    python benchmarks/scores.py --data DIR --model MODEL [--model MODEL ...] --output results/DATE-scores.md

`DIR` holds `blimp/*.jsonl`, `llm-eval/{arc_easy,piqa,boolq,winogrande}.jsonl` and `gsm8k/test.jsonl`. Needs the extra
`lm-eval`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from report import header, machine, say, table, versions
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from optimizer.evaluate.choice import Choice, ChoiceTally
from optimizer.evaluate.generation import Generation
from optimizer.evaluate.items import items_hash
from optimizer.evaluate.run import evaluate, show
from optimizer.evaluate.scorers import RuntimeScorer, Scorer, TorchScorer
from optimizer.evaluate.text_reader import TextReader, read_settings
from optimizer.recipe import DataSource
from passes._skeleton import read_config
from passes.base import TORCH, Context, Model
from passes.export_onnx import ExportOnnx

LIBRARIES = ("lm_eval", "torch", "transformers", "onnxruntime", "tokenizers")
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
Rows = Sequence[Mapping[str, Any]]


# ---- data sets


def arc(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ARC as AI2 publishes it."""
    labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    question = row["query"].removeprefix("Question: ")
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def piqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of PIQA as its authors publish it."""
    first, second = row["choices"]
    goal = row["query"].removeprefix("Question: ").rstrip("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def boolq(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of BoolQ as SuperGLUE publishes it."""
    passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    is_yes = row["choices"][row["gold"]] == "yes"
    return {"passage": passage, "question": question.removesuffix("?"), "label": int(is_yes)}


def winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of WinoGrande as its authors publish it: a sentence with a blank and two fillings."""
    first, second = row["context_options"]
    same = next((index for index, pair in enumerate(zip(first, second, strict=False)) if len(set(pair)) > 1), None)
    start = first[:same].rpartition(" ")[0] + " "
    options = {"option1": first.removeprefix(start), "option2": second.removeprefix(start)}
    return {"sentence": f"{start}_ {row['continuation']}", "answer": str(row["gold"] + 1), **options}


@dataclass(frozen=True)
class Set:
    """One set of questions.

    Attributes:
        layout: of `choice`.
        task: that lm-eval ships for it.
        file: below the folder of the data.
        publish: makes a row of the layout of a row of the file.
    """

    layout: str
    task: str
    file: str
    publish: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


def choice_sets(data: Path) -> Iterator[Set]:
    """Yield the sets of questions that the folder holds."""
    for path in sorted((data / "blimp").glob("*.jsonl")):
        yield Set("blimp", f"blimp_{path.stem}", f"blimp/{path.name}")
    yield Set("arc", "arc_easy", "llm-eval/arc_easy.jsonl", arc)
    yield Set("piqa", "piqa", "llm-eval/piqa.jsonl", piqa)
    yield Set("boolq", "boolq", "llm-eval/boolq.jsonl", boolq)
    yield Set("winogrande", "winogrande", "llm-eval/winogrande.jsonl", winogrande)


def read_rows(path: Path, count: int) -> Rows:
    """Return the first rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write_rows(path: Path, rows: Rows) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- sides


class Sides:
    """One model, as each side has it."""

    def __init__(self, folder: Path, work: Path, threads: int) -> None:
        model = Model(TORCH, folder, folder, read_config(folder))
        self.reader = TextReader.of(folder, model.config)
        self.scorers: dict[str, Scorer] = {
            "torch walk": TorchScorer(model, "decoder", threads),
            "runtime": RuntimeScorer(_float_graph(model, work), "decoder", threads),
        }
        # transformers may rebuild a tokenizer with other rules than those in tokenizer.json, which an artifact serves.
        named = {
            key: _content(value) for key, value in read_settings(folder).items() if key in ("bos_token", "eos_token")
        }
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
        tokenizer.pad_token = tokenizer.eos_token
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.peer = HFLM(
            pretrained=module, tokenizer=tokenizer, batch_size=1, max_length=module.config.max_position_embeddings
        )

    def ask_peer(self, task: str, file: Path, **settings: Any) -> list[Mapping[str, Any]]:
        """Return lm-eval's samples of a task it ships, on our file and without examples in the prompt."""
        shipped = next(path for path in SHIPPED.rglob("*.yaml") if f"task: {task}" in path.read_text().splitlines())
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        splits = {"test_split": "test", "validation_split": None, "training_split": None, "fewshot_split": None}
        own = {"include": str(shipped), "task": f"{task}_here", **data, **splits, "num_fewshot": 0, **settings}
        place = file.with_suffix(".yaml")
        place.write_text(yaml.safe_dump(own), encoding="utf-8")
        found = TaskManager(include_defaults=False).load([str(place)])
        results = lm_evaluate(self.peer, found, bootstrap_iters=0, log_samples=True)
        (samples,) = results["samples"].values()
        return sorted(samples, key=lambda sample: sample["doc_id"])


SHIPPED = Path(lm_eval.tasks.__file__).parent


def _float_graph(model: Model, work: Path) -> Path:
    ExportOnnx().run(model, Context(workdir=work, source=model))
    return work / "model.onnx"


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


# ---- comparisons


@dataclass(frozen=True)
class Compared:
    """One set on one side of ours, beside lm-eval.

    Attributes:
        questions: compared.
        ours: share of right answers, by sum and by sum per character.
        theirs: the same of lm-eval; the second only where its task reports it.
        differing: questions whose being right differs, by either.
        largest: difference of a log-likelihood, nats.
        flags: requests whose greedy flag differs.
    """

    questions: int
    ours: tuple[float, float]
    theirs: tuple[float, float | None]
    differing: int
    largest: float
    flags: int


def compare_choice(chosen: Set, side: str, sides: Sides, file: Path, samples: Rows) -> Compared:
    """Score one set on one side of ours and compare it with lm-eval's samples."""
    items = Choice(data="d", layout=chosen.layout).load(DataSource(json=file), sides.reader)
    tally = ChoiceTally(items, items_hash(items, None))
    for _ in show(items, sides.scorers[side], [tally]):
        pass
    scores = tally.result().scores
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    if len(answers) != len(items):
        raise SystemExit(
            f"{chosen.task}: got {len(answers)} requests of lm-eval, {len(items)} of ours, expected as many"
        )
    theirs = np.array([likelihood for likelihood, _ in answers])
    is_greedy = np.array([flag for _, flag in answers])
    right = {"accuracy": "acc"} | ({"accuracy_norm": "acc_norm"} if "acc_norm" in samples[0] else {})
    differs = np.zeros(len(samples), bool)
    for ours, metric in right.items():
        differs |= scores[ours].values["correct"] != np.array([bool(sample[metric]) for sample in samples])
    norm = float(np.mean([sample["acc_norm"] for sample in samples])) if "acc_norm" in samples[0] else None
    return Compared(
        len(samples),
        (scores["accuracy"].point, scores["accuracy_norm"].point),
        (float(np.mean([sample["acc"] for sample in samples])), norm),
        int(differs.sum()),
        float(np.abs(theirs - tally.sums).max()),
        int(np.sum(is_greedy != tally.is_greedy)),
    )


def compare_texts(side: str, sides: Sides, file: Path, samples: Rows, max_tokens: int) -> tuple[int, int, str]:
    """Answer GSM8K on one side of ours; return how many texts and how many numbers differ, and our scores in words."""
    # lm-eval also ends an answer where a model spells its end token with other tokens.
    stops = (*GSM8K_STOPS, sides.peer.tok_decode(sides.peer.eot_token_id, skip_special_tokens=False))
    task = Generation(
        data="d", prompt="Question: {question}\nAnswer:", score="numeric", stop=stops, max_tokens=max_tokens
    )
    items = task.load(DataSource(json=file), sides.reader)
    result = evaluate({"g": task}, {"g": items}, sides.scorers[side], reader=sides.reader)["g"]
    texts = [text.decode() for text in result.scores["accuracy"].values["answer"].tolist()]
    # An array of bytes drops zeros at the end; so do we of theirs.
    theirs = [sample["resps"][0][0].encode().rstrip(b"\0").decode() for sample in samples]
    pairs = list(zip(texts, theirs, items, strict=True))
    texts_differ = sum(ours != peer for ours, peer, _ in pairs)
    numbers_differ = sum(
        task.is_right(ours, item.reference) != task.is_right(peer, item.reference) for ours, peer, item in pairs
    )
    points = {name: scores.point for name, scores in result.scores.items()}
    return texts_differ, numbers_differ, ", ".join(f"{name} {100 * point:.1f} %" for name, point in points.items())


def choice_lines(sides: Sides, data: Path, work: Path, counts: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the lines of the table of one model; the files of BLiMP are one line for each side."""
    found: dict[tuple[str, str], list[Compared]] = {}
    for chosen in choice_sets(data):
        say(f"  {chosen.task}")
        rows = [chosen.publish(row) for row in read_rows(data / chosen.file, counts[chosen.layout])]
        file = write_rows(work / f"{chosen.task}.jsonl", rows)
        samples = sides.ask_peer(chosen.task, file)
        for side in sides.scorers:
            found.setdefault((chosen.layout, side), []).append(compare_choice(chosen, side, sides, file, samples))
    for (layout, side), parts in found.items():
        weights = [part.questions for part in parts]
        norms = [part.theirs[1] for part in parts]
        yield [
            f"{layout} ({len(parts)} files)" if len(parts) > 1 else layout,
            side,
            str(sum(weights)),
            _percent(np.average([part.ours[0] for part in parts], weights=weights)),
            _percent(np.average([part.theirs[0] for part in parts], weights=weights)),
            _percent(np.average([part.ours[1] for part in parts], weights=weights)),
            "" if None in norms else _percent(np.average(np.array(norms, float), weights=weights)),
            str(sum(part.differing for part in parts)),
            f"{max(part.largest for part in parts):.1e}",
            str(sum(part.flags for part in parts)),
        ]


def _percent(share: Any) -> str:
    return f"{100 * float(share):.1f}"


def model_section(folder: Path, data: Path, counts: Mapping[str, int], max_tokens: int, threads: int) -> str:
    """Return what is reported of one model."""
    say(folder.name)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sides = Sides(folder, work, threads)
        columns = ["set", "side", "questions", "accuracy %", "lm-eval acc %", "accuracy_norm %", "lm-eval acc_norm %"]
        columns += ["questions that differ", "largest difference, nats", "greedy flags that differ"]
        text = f"### {folder.name}\n\n" + table(columns, choice_lines(sides, data, work, counts)) + "\n"
        say("  gsm8k")
        file = write_rows(work / "gsm8k.jsonl", read_rows(data / "gsm8k" / "test.jsonl", counts["gsm8k"]))
        settings = {"until": list(GSM8K_STOPS), "do_sample": False, "max_gen_toks": max_tokens}
        samples = sides.ask_peer("gsm8k", file, generation_kwargs=settings)
        answers = [sample for sample in samples if sample["filter"] == "flexible-extract"]
        lines = []
        for side in sides.scorers:
            texts, numbers, points = compare_texts(side, sides, file, answers, max_tokens)
            lines.append(["gsm8k", side, str(len(answers)), str(texts), str(numbers), points])
        columns = ["set", "side", "prompts", "texts that differ", "last numbers judged differently", "our scores"]
        return text + table(columns, lines) + "\n"


def main() -> None:
    """Compare and print Markdown, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", type=Path, action="append", required=True, help="folder of a model; may be repeated")
    parser.add_argument("--questions", type=int, default=100, help="first so many of each set (default 100)")
    parser.add_argument("--per-file", type=int, default=50, help="of each file of BLiMP (default 50)")
    parser.add_argument("--prompts", type=int, default=40, help="of GSM8K (default 40)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default 128)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the report there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    counts = dict.fromkeys(("arc", "piqa", "boolq", "winogrande"), given.questions)
    counts |= {"blimp": given.per_file, "gsm8k": given.prompts}
    about = {key: text for key, text in machine().items() if key != "load"}
    about["items"] = (
        f"the first {given.questions} questions of each set, {given.per_file} of each file of BLiMP, {given.prompts} "
        f"prompts of GSM8K with answers of at most {given.max_tokens} tokens; no examples in a prompt; float32, "
        f"{given.threads} thread{'' if given.threads == 1 else 's'}"
    )
    text = header("Our scores beside lm-eval's", about, versions(LIBRARIES)) + "\n"
    for folder in given.model:
        text += model_section(folder, given.data, counts, given.max_tokens, given.threads)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
