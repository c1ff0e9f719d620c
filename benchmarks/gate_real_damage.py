"""Two real models, damaged in forty ways: what the gate says of parts of the items, beside the loss on all of them.

python benchmarks/gate_real_damage.py --work DIR --model FOLDER --test TEST.csv --label category \
    --decoder FOLDER --documents HELDOUT.jsonl

Every damaged copy answers all items once; its answers stay in DIR and are not asked for again. All else is drawn from
these records. The true loss is that on all items. No timing: it may run beside other work, 40 minutes the first time.

Budgets, numbers of items and rules were set first. Kinds of damage, too; the sizes of the noise and the blocks that are
dropped were then chosen by the true loss of a coarser grid, so that several candidates lie close to the budget.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers
from damaged import Damage, Drop, Noise, Rounding, damaged
from report import header, machine, say, table, versions, write_json
from subsets import ALPHA, RULES, Ended, Judge, Pool, disagreements, judged, topped_up

from optimizer.evaluate.classification import Classification
from optimizer.evaluate.items import Item, items_hash, load_items
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.result import TaskResult, load
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import TorchScorer
from optimizer.evaluate.task import Task
from optimizer.evaluate.text_reader import TextReader
from optimizer.fingerprint import fingerprint
from optimizer.gate import Budget
from optimizer.recipe import DataSource
from optimizer.source import load_source
from optimizer.statistics.rate import clopper_pearson
from optimizer.store import hash_file
from passes._safetensors import weight_files
from passes.base import Model

CLASSIFIER: Sequence[Damage] = (
    *(Rounding(bits) for bits in (8, 4, 3, 2)),
    *(Noise(size, seed) for size in (0.2, 0.3, 0.32, 0.33, 0.34, 0.35) for seed in (1, 2)),
    Drop(4, ("attention",)),
    Drop(4, ("feed-forward",)),
    Drop(1),
    Drop(4),
)
DECODER: Sequence[Damage] = (
    *(Rounding(bits) for bits in (8, 4, 3, 2)),
    *(Noise(size, seed) for size in (0.1, 0.2, 0.23, 0.24, 0.25, 0.27) for seed in (1, 2)),
    *(Drop(block, (part,)) for block in (1, 4) for part in ("attention", "feed-forward")),
)
CHARACTERS = 800
"""Of a document: long enough for some 200 tokens, short enough that the pool holds seven times what a gate sees."""
CONTEXT = 512
ASKED_AGAIN = 40
BANDS = ((-1.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 1e9))


@dataclass(frozen=True)
class Study:
    """One model, what is done to it, and how many of its items a gate sees.

    Attributes:
        subset: items of one look.
        most: items of a gate that tops up.
        runs: of such a gate.
    """

    title: str
    folder: Path
    task: Task
    data: DataSource
    load: Callable[[Path], Any]
    candidates: Sequence[Damage]
    budget: Budget
    subset: int
    most: int
    runs: int


@dataclass(frozen=True)
class Found:
    """One candidate: its pool, what each rule says of parts, and how runs with looks end."""

    name: str
    pool: Pool
    said: Mapping[str, Counter[str]]
    ended: Ended

    def share(self, rule: str, outcome: str) -> float:
        """Return how often a rule says so."""
        return self.said[rule][outcome] / self.said[rule].total()

    @property
    def place(self) -> float:
        """Return the true loss over the budget."""
        return self.pool.true_loss / self.pool.budget.limit


def studies(options: argparse.Namespace) -> list[Study]:
    """Return the two studies."""
    classes, words = transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM
    documents = options.work / "documents.jsonl"
    rows = [json.loads(line)[options.text] for line in options.documents.read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in cut(row, CHARACTERS)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return [
        Study(
            "accuracy",
            options.model,
            Classification(data="data", context=128),
            DataSource(csv=options.test, text=options.text, label=options.label),
            lambda folder: classes.from_pretrained(folder, dtype=torch.float32),
            CLASSIFIER,
            Budget("accuracy", 0.03),
            subset=300,
            most=2400,
            runs=1000,
        ),
        Study(
            "perplexity",
            options.decoder,
            Perplexity(data="data", context=CONTEXT),
            DataSource(json=documents),
            lambda folder: words.from_pretrained(folder, dtype=torch.float32),
            DECODER,
            Budget("perplexity", 0.05, relative=True),
            subset=100,
            most=400,
            runs=options.subsets,
        ),
    ]


def cut(text: str, most: int) -> list[str]:
    """Cut a text at line ends into documents of at most `most` characters; a longer line is one by itself."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if found[-1] and len(found[-1]) + len(line) > most:
            found.append("")
        found[-1] += line
    return [document for document in found if document.strip()]


# ---- asking the models


def scored(study: Study, options: argparse.Namespace) -> dict[str, TaskResult]:
    """Return what the source ("") and every candidate scored on all items, from the work folder where it is there."""
    source = load_source(str(study.folder), study.folder).model
    reader = TextReader.of(source.assets, source.config)
    items = load_items({study.title: study.task}, {"data": study.data}, reader)[study.title]
    weights = [hash_file(path) for path in weight_files(source.folder)]
    folder = options.work / f"{study.folder.name}-{fingerprint([source.config, weights, items_hash(items, 0)])[:12]}"
    found = {"": kept(folder / "source", partial(ask, study, source, items, options.threads))}
    for damage in study.candidates:
        say(f"{study.folder.name}: {damage.name}")
        place = folder / fingerprint([type(damage).__name__, asdict(damage)])[:12]
        found[damage.name] = kept(place, partial(ask_damaged, study, source, damage, items, options))
    return found


def kept(folder: Path, compute: Callable[[], TaskResult]) -> TaskResult:
    """Return the result in a folder, once it is there."""
    if not (folder / "result.json").exists():
        compute().save(folder)
    return load(folder)


def ask(study: Study, model: Model, items: list[Item], threads: int) -> TaskResult:
    """Return what a model scores on all items."""
    scorer = TorchScorer(model, "decoder" if study.title == "perplexity" else "classifier", threads)
    return evaluate({study.title: study.task}, {study.title: items}, scorer)[study.title]


def ask_damaged(
    study: Study, source: Model, damage: Damage, items: list[Item], options: argparse.Namespace
) -> TaskResult:
    """Make a damaged copy, ask it, and remove it."""
    work = options.work / "copy"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    torch.set_num_threads(options.threads)
    result = ask(study, damaged(source, damage, study.load, work), items, options.threads)
    shutil.rmtree(work)
    return result


# ---- drawing from the records


def found_of(study: Study, options: argparse.Namespace) -> list[Found]:
    """Return every candidate with what was said of it, the least harmed first."""
    results = scored(study, options)
    source = results.pop("").scores[study.title]
    judge_of = Judge(options.work / "verdicts.json")
    judge_of.load()
    found = []
    for seed, (name, result) in enumerate(results.items()):
        say(f"{study.title}: drawing from {name}")
        pool = Pool(source, result.scores[study.title], study.budget)
        said = judged(pool, judge_of, study.subset, options.subsets, seed)
        judge_of.save()
        found.append(Found(name, pool, said, topped_up(pool, study.most, study.runs, 1000 + seed)))
    return sorted(found, key=lambda each: each.place)


# ---- tables


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def loss_text(pool: Pool) -> str:
    """Write the true loss in points or per cent."""
    return f"{100 * pool.true_loss:+.2f}"


def candidate_rows(found: Sequence[Found]) -> list[list[str]]:
    """Return per candidate its true loss and what each rule says of parts."""
    rows = []
    for each in found:
        three = " / ".join(percent(each.share("gate", outcome)) for outcome in ("pass", "fail", "inconclusive"))
        normal = " / ".join(percent(each.share("normal", outcome)) for outcome in ("pass", "fail", "inconclusive"))
        changed = [percent(each.pool.discordance)] if each.pool.budget.metric == "accuracy" else []
        rows.append([each.name, loss_text(each.pool), *changed, three, normal, percent(each.share("points", "pass"))])
    return rows


def band_rows(found: Sequence[Found]) -> list[list[str]]:
    """Return per band of the true loss how often each rule claims what is false, and how often it claims nothing."""
    rows = []
    for low, high in BANDS:
        inside = [each for each in found if low < each.place <= high]
        if not inside:
            continue
        wrong = "pass" if low >= 1 else "fail"
        total = sum(each.said["gate"].total() for each in inside)
        cells = []
        for rule in RULES:
            count = sum(each.said[rule][wrong] for each in inside)
            upper = clopper_pearson(count, total, ALPHA, ALPHA)[1]
            worst = max(each.share(rule, wrong) for each in inside)
            cells.append(f"{percent(count / total)} (≤ {percent(upper)}), {percent(worst)}")
        silent = [percent(sum(each.said[rule]["inconclusive"] for each in inside) / total) for rule in RULES[:2]]
        rows.append([band_name(low, high), str(len(inside)), f"false {wrong}", *cells, *silent])
    return rows


def band_name(low: float, high: float) -> str:
    if low < 0:
        return f"at most {high:g} m"
    return f"above {low:g} m" if high > 1e6 else f"({low:g} m, {high:g} m]"


def top_up_rows(found: Sequence[Found], most: int) -> list[list[str]]:
    """Return per candidate how runs with looks end, after how many items, and how one look at all of them ends."""
    rows = []
    for each in found:
        ended, runs = each.ended, len(each.ended.items)
        shares = [
            " / ".join(percent(outcomes.count(word) / runs) for word in ("pass", "fail", "inconclusive"))
            for outcomes in (ended.outcomes, ended.once)
        ]
        wrong = "pass" if each.place > 1 else "fail"
        false = percent(ended.outcomes.count(wrong) / runs)
        items = [f"{fmean(ended.items):,.0f}", f"{median(ended.items):,.0f}"]
        rows.append([each.name, loss_text(each.pool), *shares, false, *items, percent(fmean(ended.items) / most)])
    return rows


def told(study: Study, found: Sequence[Found], subsets: int) -> str:
    """Return everything about one model in Markdown."""
    pool, is_accuracy = found[0].pool, study.title == "accuracy"
    unit, item = ("points", "texts") if is_accuracy else ("% of perplexity", "documents")
    limit = f"{100 * study.budget.limit:g} {unit}"
    tokens = "" if is_accuracy else f" ({int(pool.source.values['tokens'].sum()):,} tokens)"
    changed = ["changed, %"] if is_accuracy else []
    three = "pass / fail / undecided, %"
    ends = ["false claims, %", f"{item} on average", "median", "% of one look"]
    rules = ["gate: false claims", "normal interval", "bare points"]
    near = sum(1 < each.place <= 1.5 for each in found)
    factor = 1 - study.subset / pool.size
    average = 100 * fmean(fmean(each.ended.items) for each in found) / study.most
    decided, decided_once = (
        100 * fmean(outcome != "inconclusive" for each in found for outcome in outcomes(each.ended))
        for outcomes in (lambda ended: ended.outcomes, lambda ended: ended.once)
    )
    lines = [
        f"### {study.folder.name}: {study.title}, {len(found)} candidates\n",
        f"Source {pool.source.point:.4g} on all {pool.size:,} {item}{tokens}. Budget m = {limit}; {near} candidates in "
        f"(m, 1.5 m]. {subsets} parts of {study.subset} {item} each, drawn without replacement: the variance of such a "
        f"part is {factor:.2f} of that of as many independent {item}, which makes errors a little rarer.\n",
        table(
            ["candidate", f"true loss, {unit}", *changed, f"gate: {three}", f"normal: {three}", "points pass"],
            candidate_rows(found),
        ),
        "False claims in % of the parts (one-sided 95 % bound of the rate), then the worst candidate of the band; and "
        "how often nothing is claimed.\n",
        table(["true loss", "candidates", "claim", *rules, "gate undecided", "normal undecided"], band_rows(found)),
        f"Topped up to {study.most:,} {item}, {study.runs:,} runs, {item} drawn with replacement: as from an endless "
        "population that loses exactly what the pool loses.\n",
        table(
            ["candidate", f"true loss, {unit}", f"top-up: {three}", f"one look: {three}", *ends],
            top_up_rows(found, study.most),
        ),
        f"Over all candidates {average:.0f} % of the {item} of one look: {decided:.0f} % of the runs end with a "
        f"verdict, of single looks {decided_once:.0f} %.\n",
    ]
    return "\n".join(lines)


def main() -> None:
    """Ask, draw, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for answers and verdicts; reused")
    parser.add_argument("--model", type=Path, required=True, help="folder of a sequence classifier")
    parser.add_argument("--test", type=Path, required=True, help="CSV file that it is scored on")
    parser.add_argument("--text", default="text", help="column with the text, of both files")
    parser.add_argument("--label", default="label", help="column with the label")
    parser.add_argument("--decoder", type=Path, required=True, help="folder of a language model")
    parser.add_argument("--documents", type=Path, required=True, help="JSON lines that it is scored on")
    parser.add_argument("--subsets", type=int, default=200, help="parts drawn for each candidate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    about = machine() | {
        "threads": str(options.threads),
        "level": f"{100 * ALPHA:g} % one-sided, of pass and of fail",
        "candidates": "sizes of noise and dropped blocks chosen by true loss, for several to lie close to the budget",
        "normal": "loss and 1.645 of its standard errors either way; points: passes where the loss seen is within m",
    }
    parts, document = [], {}
    for study in studies(options):
        found = found_of(study, options)
        parts.append(told(study, found, options.subsets))
        document[study.title] = [
            {"name": each.name, "true_loss": each.pool.true_loss, "said": each.said, "ended": asdict(each.ended)}
            for each in found
        ]
        if study.title == "accuracy":
            nearest = min(found, key=lambda each: abs(each.place - 1))
            differ, runs = disagreements(nearest.pool, study.most, ASKED_AGAIN, seed=7)
            parts.append(
                f"Top-up of answers is decided by the regions of counts that `judge` passes and fails; asked itself in "
                f"{runs} runs on the candidate nearest to the budget, it ended otherwise in {differ}.\n"
            )
    print(header("Forty damaged models under the gate", about, versions(("torch", "transformers", "numpy", "scipy"))))
    print("\n".join(parts))
    if options.json:
        write_json(options.json, document)


if __name__ == "__main__":
    main()
