"""How much each form changes what gates judge: the table that `plan` forecasts with where nothing was measured yet.

    python benchmarks/spreads.py --work DIR --classifier FOLDER --test TEST.csv --label category \
        --embedder FOLDER --decoder recipes/models/stdlib-llama --documents DOCUMENTS.jsonl

Prints lines of `optimizer/spreads.py`, one for each kind of model, metric and form. Untimed: other work may go on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from report import header, machine, say, versions

import optimizer

WIDE = {"max_drop": "50pt"}
FORMS: Mapping[str, list[Any]] = {
    "float": ["export_onnx"],
    "int8 row": [{"quantize_int8": {}}],
    "int8": [{"quantize_rtn": {"format": "int8", "group_size": 32}}],
    "int4 g32": [{"quantize_rtn": {"format": "int4", "group_size": 32}}],
    "int4": [{"quantize_rtn": {"format": "int4", "group_size": 128}}],
    "int4 channel": [{"quantize_rtn": {"format": "int4", "group_size": "channel"}}],
    "int2": [{"quantize_rtn": {"format": "int2", "group_size": 32}}],
}


def recipes(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kind of each model, and its recipe but for the passes."""
    texts = {"csv": str(options.test.absolute()), "label": options.label}
    yield (
        "classifier",
        {
            "model": str(options.classifier.absolute()),
            "data": {"texts": texts},
            "evaluate": {
                "accuracy": {"task": "classification", "data": "texts", "context": 128},
                "f1": {"task": "classification", "data": "texts", "context": 128, "metric": "f1"},
                "agreement": {"task": "agreement", "data": "texts", "context": 128},
            },
            "gate": {"accuracy": WIDE, "f1": WIDE, "agreement": {"max_flips": "90%", "max_kl": 9.0}},
        },
    )
    yield (
        "embedder",
        {
            "model": str(options.embedder.absolute()),
            "data": {"texts": {"csv": str(options.test.absolute())}},
            "evaluate": {"similarity": {"task": "similarity", "data": "texts", "context": 128}},
            "gate": {"similarity": WIDE},
        },
    )
    yield (
        "decoder",
        {
            "model": str(options.decoder.absolute()),
            "data": {"texts": {"json": str(options.documents.absolute())}},
            "evaluate": {
                "perplexity": {"task": "perplexity", "data": "texts", "context": 512, "items": options.items},
                "agreement": {"task": "agreement", "data": "texts", "context": 512, "items": options.items},
            },
            "gate": {"perplexity": {"max_increase": "900%"}, "agreement": {"max_flips": "99%", "max_kl": 9.0}},
        },
    )


def spreads(kind: str, recipe: Mapping[str, Any], form: str, options: argparse.Namespace) -> Iterator[str]:
    """Yield a line of the table for each gate."""
    passes = FORMS[form] if form == "float" else [*FORMS[form], "export_onnx"]
    path = options.work / "recipe.yaml"
    path.write_text(json.dumps({"name": "spreads", **recipe, "passes": passes, "target": {"threads": options.threads}}))
    run = optimizer.run(path, store=options.work / "store", output=options.work / "out", keep=True)
    for gate in run.verdicts:
        verdict = gate.verdict
        if math.isnan(verdict.spread):  # too few changes for one
            continue
        yield f'    ("{kind}", "{verdict.metric}", "{form}"): ({verdict.spread:.2g}, {max(0, verdict.difference):.2g}),'


def main() -> None:
    """Run every form on every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the store")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of a classifier")
    parser.add_argument("--test", type=Path, required=True, help="CSV with its texts and labels")
    parser.add_argument("--label", default="label", help="column with the labels")
    parser.add_argument("--embedder", type=Path, required=True, help="folder of an embedder")
    parser.add_argument("--decoder", type=Path, required=True, help="folder of a decoder")
    parser.add_argument("--documents", type=Path, required=True, help="JSON lines with held-out documents")
    parser.add_argument("--items", type=int, default=200, help="documents")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(header("Spreads", machine(), versions(("torch", "transformers", "onnxruntime"))))
    for kind, recipe in recipes(options):
        for form in FORMS:
            say(f"{kind} {form}")
            print("\n".join(spreads(kind, recipe, form, options)), flush=True)


if __name__ == "__main__":
    main()
