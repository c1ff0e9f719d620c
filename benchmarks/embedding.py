"""What lower precision does to vectors: similarity of pairs, and retrieval by intent, each against float32.

python benchmarks/embedding.py --work DIR --model FOLDER --corpus TRAIN.csv --queries TEST.csv --label category

Accuracy only, no timing. Texts are labelled; a document answers a query when it has the query's label.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import header, machine, say, table, versions, write_json

import optimizer
from optimizer.statistics.bca import bca_interval
from optimizer.statistics.paired import upper_bound
from optimizer.statistics.spearman import Orders, spearman, spearman_interval
from runtime.embedding import TextEmbedder

Vectors = NDArray[np.float32]

CHAINS: dict[str, str] = {
    "float32": "",
    "int8 g32": "  - quantize_rtn: {format: int8, group_size: 32, embedding: int8}\n",
    "int8 per row": "  - quantize_int8: {activations: row, embedding: int8}\n",
    "int8 static": "  - quantize_int8: {activations: static, calibration: documents, embedding: int8}\n",
    "int4 g32": "  - quantize_rtn: {format: int4, group_size: 32, embedding: int8}\n",
    "int4 g128": "  - quantize_rtn: {format: int4, group_size: 128, embedding: int8}\n",
}
ALPHA = 0.05
DEPTH = 10
QUERIES_AT_ONCE = 256
PLAIN_BATCH = 32


@dataclass(frozen=True)
class Texts:
    """Texts and their labels."""

    texts: list[str]
    labels: NDArray[Any]

    @classmethod
    def read(cls, path: Path, text: str, label: str) -> Texts:
        """Read two columns of a CSV file."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return cls([row[text] for row in rows], np.array([row[label] for row in rows]))


@dataclass(frozen=True)
class Measured:
    """One form of the model.

    Attributes:
        megabytes: of graph and weights.
        queries: vectors of the queries.
        hits: per query [n, DEPTH], whether the document at each rank has its label.
    """

    name: str
    megabytes: float
    queries: Vectors
    hits: NDArray[np.bool_]

    @property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """Return per-query values: is the first right, is one of ten right, gain discounted by rank over the ideal."""
        discounts = 1 / np.log2(np.arange(DEPTH) + 2)
        gain = self.hits @ discounts / discounts.sum()  # every label has ten documents or more
        return {
            "recall@1": self.hits[:, 0].astype(np.float64),
            f"recall@{DEPTH}": self.hits.any(axis=1).astype(np.float64),
            f"nDCG@{DEPTH}": gain,
        }


def build(name: str, steps: str, options: argparse.Namespace) -> Path:
    """Run a recipe without gates and return its artifact; documents are what static ranges are found on."""
    slug, work = name.replace(" ", "-"), options.work
    recipe = work / f"{slug}.yaml"
    data = f"data:\n  documents: {{csv: {options.corpus.absolute()}, text: {options.text}}}\n"
    text = f"name: {slug}\nmodel: {options.model.absolute()}\n{data}passes:\n{steps}  - export_onnx\n"
    recipe.write_text(text, encoding="utf-8")
    optimizer.run(recipe, output=work / slug, store=work / "store")
    return work / slug


def measure(name: str, artifact: Path, corpus: Texts, queries: Texts, threads: int | None) -> Measured:
    """Embed all texts and look up every query."""
    documents, asked = (embed(artifact, each.texts, threads) for each in (corpus, queries))
    size = sum((artifact / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    hits = np.concatenate(
        [
            corpus.labels[nearest(documents, asked[start : start + QUERIES_AT_ONCE])]
            == queries.labels[start : start + QUERIES_AT_ONCE, None]
            for start in range(0, len(asked), QUERIES_AT_ONCE)
        ]
    )
    return Measured(name, size / 1e6, asked, hits)


def embed(artifact: Path, texts: Sequence[str], threads: int | None) -> Vectors:
    """Return the vectors of texts; those that this artifact made of them before are read from beside it."""
    embedder = TextEmbedder.load(artifact, threads=threads)
    name = hashlib.sha256("\0".join([embedder.manifest.digest, *texts]).encode()).hexdigest()[:16]
    path = artifact.with_name(f"{artifact.name}-{name}.npy")
    if not path.exists():
        np.save(path, embedder.embed(texts), allow_pickle=False)
    return np.asarray(np.load(path, allow_pickle=False), np.float32)


def nearest(documents: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """Return the DEPTH documents of largest cosine to each query, best first [n, DEPTH]."""
    lengths = np.linalg.norm(documents, axis=1)
    scores = queries @ documents.T / lengths
    best = np.argpartition(-scores, DEPTH, axis=1)[:, :DEPTH]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def plain(model: Path, texts: Sequence[str], most_tokens: int) -> Vectors:
    """Return what a plain transformers loop gives: mean over a padded batch's real tokens, then length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, module = (
        AutoTokenizer.from_pretrained(model),
        AutoModel.from_pretrained(model, dtype=torch.float32).eval(),
    )
    rows = []
    for start in range(0, len(texts), PLAIN_BATCH):
        batch = list(texts[start : start + PLAIN_BATCH])
        feed = tokenizer(batch, padding=True, truncation=True, max_length=most_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = module(**feed).last_hidden_state
        mask = feed["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        rows.append((mean / mean.norm(dim=1, keepdim=True)).numpy())
    return np.concatenate(rows)


def pair_similarities(vectors: Vectors, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the cosines of texts two by two in the order of their hashes: each text is in one pair."""
    order = sorted(range(len(texts)), key=lambda index: hashlib.sha256(texts[index].encode()).hexdigest())
    order = order[: len(order) // 2 * 2]
    first, second = (vectors[order[side::2]].astype(np.float64) for side in (0, 1))
    return np.sum(first * second, axis=1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


def all_similarities(vectors: Vectors) -> NDArray[np.float32]:
    """Return the cosines of every pair of texts."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(unit), 1)], np.float32)


def similarity_row(before: Measured, after: Measured, texts: Sequence[str]) -> list[str]:
    """Return one form's line: correlation with float32 and its interval, of all pairs, smallest cosine to its twin."""
    source, candidate = (pair_similarities(each.queries, texts) for each in (before, after))
    groups = tuple(map(str, range(len(source))))
    lower, upper = spearman_interval(Orders(source, source, candidate, groups), ALPHA, ALPHA)
    every = spearman(*(all_similarities(each.queries).astype(np.float64) for each in (before, after)))
    cosines = np.sum(before.queries * after.queries, axis=1)
    cosines /= np.linalg.norm(before.queries, axis=1) * np.linalg.norm(after.queries, axis=1)
    within = f"{spearman(source, candidate):.4f} [{1 - upper:.4f}, {1 - lower:.4f}]"
    return [after.name, f"{after.megabytes:.1f}", within, f"{every:.4f}", f"{cosines.min():.3f}"]


def retrieval_row(before: Measured, after: Measured) -> list[str]:
    """Return one form's line: each metric, and what it lost against float32 in points."""
    cells = [after.name]
    for name, values in after.metrics.items():
        lost = before.metrics[name] - values
        text = f"{100 * values.mean():.2f}"
        if after is not before:
            lower, upper = loss_interval(lost)
            text += f", lost {100 * lost.mean():+.2f} [{100 * lower:+.2f}, {100 * upper:+.2f}]"
        cells.append(text)
    return cells


def loss_interval(lost: NDArray[np.float64]) -> tuple[float, float]:
    """Bound the mean loss: by the exact paired test where a query is answered or not, by BCa for gains."""
    if set(np.unique(lost)) <= {-1.0, 0.0, 1.0}:
        counts = int(np.sum(lost > 0)), int(np.sum(lost < 0))
        return -upper_bound(*counts[::-1], len(lost), ALPHA), upper_bound(*counts, len(lost), ALPHA)
    return bca_interval(lambda weights: weights @ lost / weights.sum(axis=1), len(lost), ALPHA, ALPHA)


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts; reused")
    parser.add_argument(
        "--model", type=Path, required=True, help="mean-pooled, normalized embedder in sentence-transformers' format"
    )
    parser.add_argument("--corpus", type=Path, required=True, help="CSV of documents")
    parser.add_argument("--queries", type=Path, required=True, help="CSV of queries")
    parser.add_argument("--text", default="text", help="column with the text")
    parser.add_argument("--label", default="label", help="column with the label")
    parser.add_argument("--first", type=int, help="use only so many documents and queries, to try it out")
    parser.add_argument("--threads", type=int, help="threads of the runtime; all there are if not given")
    parser.add_argument("--json", type=Path, help="write every per-query value here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    corpus, queries = (Texts.read(path, options.text, options.label) for path in (options.corpus, options.queries))
    if options.first:
        corpus, queries = (
            Texts(each.texts[: options.first], each.labels[: options.first]) for each in (corpus, queries)
        )
    results = []
    for name, steps in CHAINS.items():
        say(f"{name}: building and embedding {len(corpus.texts) + len(queries.texts):,} texts")
        artifact = build(name, steps, options)
        results.append(measure(name, artifact, corpus, queries, options.threads))
    say("plain transformers loop")
    context = TextEmbedder.load(options.work / "float32").manifest.context_length
    error = float(np.abs(plain(options.model, queries.texts, context) - results[0].queries).max())
    about = machine() | {
        "model": options.model.name,
        "texts": f"{len(corpus.texts):,} documents, {len(queries.texts):,} queries, {len(set(corpus.labels))} labels",
        "intervals": f"one-sided bounds, {1 - ALPHA:.0%} each: exact paired test for recall, else BCa (pairs, queries)",
        "float32 against a plain transformers loop": f"largest difference of a number {error:.1e} over all queries",
    }
    libraries = versions(["onnxruntime", "torch", "transformers", "tokenizers"])
    print(header("What lower precision does to vectors", about, libraries))
    print("### Similarity: Spearman's correlation with float32\n")
    columns = [
        "form",
        "MB",
        f"{len(queries.texts) // 2:,} disjoint pairs",
        "all pairs",
        "least cosine of a text's two vectors",
    ]
    print(table(columns, [similarity_row(results[0], each, queries.texts) for each in results[1:]]))
    print("### Retrieval: queries against documents, %\n")
    print(table(["form", *results[0].metrics], [retrieval_row(results[0], each) for each in results]))
    if options.json:
        values = {each.name: {name: v.tolist() for name, v in each.metrics.items()} for each in results}
        write_json(options.json, {"about": about, "versions": libraries, "per query": values})


if __name__ == "__main__":
    main()
