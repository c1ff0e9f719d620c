"""A classifier in float32, int8 and int4: accuracy with its gate, latency and size, each on all test texts.

python benchmarks/int8.py --work DIR --model FOLDER --test TEST.csv --calibration TRAIN.csv --label category

Accuracy is that of the graph that is served; the source's is torch's. Forms take turns within a round, in an order that
rotates; a ratio is formed within a round before its median is taken. Static ranges come from texts of TRAIN.csv.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import Spread, header, machine, say, table, versions, write_json

import optimizer
from optimizer.record import Run
from optimizer.statistics.rate import clopper_pearson
from runtime.session import EncoderSession

Ids = NDArray[np.int64]
Answers = Callable[[Ids], object]

SOURCE, BASE = "source, torch float32", "float32"
CALIBRATED = {"activations": "static", "calibration": "train", "embedding": "int8"}
CHAINS: Mapping[str, Sequence[Any]] = {
    BASE: [],
    "int8 per row": [{"quantize_int8": {"embedding": "int8"}}],
    **{
        f"int8 static, {name}": [{"quantize_int8": {**CALIBRATED, "calibrator": name}}]
        for name in ("minmax", "entropy", "percentile", "mse")
    },
    "int8 static, smoothed": [
        {"smooth_quant": {"calibration": "train"}},
        {"quantize_int8": {**CALIBRATED}},
    ],
    "int4 g32": [{"quantize_rtn": {"format": "int4", "group_size": 32, "embedding": "int8"}}],
}
ALPHA = 0.05
SHAPES = [(batch, length) for batch in (1, 16) for length in (16, 64, 128)]
SECONDS = 0.2
"""That one measurement takes: as many runs as fit, three at least; their median counts."""


@dataclass(frozen=True)
class Form:
    """One form of the model.

    Attributes:
        ran: what the recipe's run said.
        answers: runs token ids [B, T].
    """

    name: str
    ran: Run
    answers: Answers
    bytes: int


def build(name: str, steps: Sequence[Any], options: argparse.Namespace) -> tuple[Run, Path]:
    """Run a recipe to its end, whatever its gate says; return what it said, and its artifact."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    texts = {"text": options.text, "label": options.label}
    recipe = {
        "name": slug,
        "model": str(options.model.absolute()),
        "target": {"device": "cpu", "threads": options.threads},
        "data": {
            "test": {"csv": str(options.test.absolute()), **texts}
            | ({"items": options.items} if options.items else {}),
            "train": {"csv": str(options.calibration.absolute()), "text": options.text},
        },
        "evaluate": {"accuracy": {"task": "classification", "data": "test", "context": 128}},
        "gate": {"alpha": ALPHA, "accuracy": {"max_drop": "1pt"}},
        "passes": [*steps, "export_onnx", "fuse_attention"],
    }
    path = options.work / f"{slug}.yaml"
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    say(f"building {name}")
    folder = options.work / slug
    return optimizer.run(path, output=folder, store=options.work / "store", keep=True), folder


def forms(options: argparse.Namespace) -> list[Form]:
    """Return every form, the source first."""
    made = []
    for name, steps in CHAINS.items():
        ran, folder = build(name, steps, options)
        session = EncoderSession(folder / "model.onnx", threads=options.threads)
        made.append(Form(name, ran, _runs(session), ran.steps[-1].bytes))
    source = made[0].ran
    return [Form(SOURCE, source, _torch(options.model, options.threads), source.steps[0].bytes), *made]


def _runs(session: EncoderSession) -> Answers:
    return lambda ids: session.run(ids.tolist())


def _torch(folder: Path, threads: int) -> Answers:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    module = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(ids: Ids) -> object:
        with torch.inference_mode():
            return module(input_ids=torch.from_numpy(ids)).logits

    return answers


def milliseconds(answers: Answers, ids: Ids) -> float:
    """Return the median time of a run."""
    answers(ids)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        start = time.perf_counter()
        answers(ids)
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1000)


def latencies(made: Sequence[Form], rounds: int, vocabulary: int) -> dict[str, dict[str, list[float]]]:
    """Return shape -> form -> milliseconds of each round."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {}
    for batch, length in SHAPES:
        shape = found[f"{batch} × {length}"] = {form.name: [] for form in made}
        ids = rng.integers(1, vocabulary, (batch, length))
        for turn in range(rounds):
            say(f"{batch} x {length}: round {turn + 1} of {rounds}")
            for place in range(len(made)):
                form = made[(place + turn) % len(made)]
                shape[form.name].append(milliseconds(form.answers, ids))
    return found


def accuracy_rows(made: Sequence[Form]) -> list[list[str]]:
    """Return accuracy with a two-sided 90 % interval of its own, what was lost against the source, and size."""
    rows = []
    for form in made:
        verdict = form.ran.steps[-1].gates[0].verdict
        score = verdict.source if form.name == SOURCE else verdict.candidate
        low, high = clopper_pearson(score * verdict.n_items, verdict.n_items, ALPHA, ALPHA)
        lost = f"{verdict.difference:+.2%} [{verdict.lower:+.2%}, {verdict.upper:+.2%}]".replace("%", "")
        own = ["", ""] if form.name == SOURCE else [lost, verdict.outcome]
        rows.append([form.name, f"{score:.2%} [{low:.2%}, {high:.2%}]", *own, f"{form.bytes / 1e6:.1f}"])
    return rows


def latency_rows(found: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> list[list[str]]:
    """Return milliseconds per shape, and how many times as fast as float32 ONNX."""
    rows = []
    for name in names:
        cells = []
        for shape in found.values():
            gain = Spread.of([base / own for base, own in zip(shape[BASE], shape[name], strict=True)])
            cells.append(f"{Spread.of(shape[name]).median:.2f}, {gain.text(2)}")
        rows.append([name, *cells])
    return rows


def main() -> None:
    """Build, measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts; reused")
    parser.add_argument("--model", type=Path, required=True, help="folder of a sequence classifier")
    parser.add_argument("--test", type=Path, required=True, help="CSV file that is scored")
    parser.add_argument("--calibration", type=Path, required=True, help="CSV file whose texts are shown to static")
    parser.add_argument("--text", default="text", help="column with the text")
    parser.add_argument("--label", default="label", help="column with the label")
    parser.add_argument("--items", type=int, help="score the first so many texts only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    about = machine() | {
        "model": options.model.name,
        "threads": str(options.threads),
        "repetitions": f"{options.rounds} rounds, forms taking turns; median (lowest to highest)",
    }
    made = forms(options)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    found = latencies(made, options.rounds, vocabulary)
    libraries = versions(("torch", "transformers", "onnxruntime"))
    print(header("A classifier in float32, int8 and int4", about, libraries))
    print("Loss in points of accuracy against the source, with one-sided 95 % bounds; budget 1 point.\n")
    print(table(["form", "accuracy, %", "loss, points", "verdict", "MB"], accuracy_rows(made)))
    print(f"Milliseconds per run of batch × tokens, and times as fast as {BASE}.\n")
    print(table(["form", *found], latency_rows(found, [form.name for form in made])))
    if options.json:
        scored = {form.name: [asdict(step) for step in form.ran.steps] for form in made}
        write_json(options.json, {"about": about, "versions": libraries, "scores": scored, "milliseconds": found})


if __name__ == "__main__":
    main()
