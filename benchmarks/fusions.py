"""What each graph fusion gains: the same weights, one more fusion at a time.

Decoders, int4, random weights of real shapes, prefill and decode; or an encoder of yours, float and int8, over batch
sizes and lengths.

    python benchmarks/fusions.py --work DIR
    python benchmarks/fusions.py --work DIR --encoder FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from encoder_chains import WEIGHTS, EncoderLoad, encoder_sections
from report import Spread, header, machine, table, versions, write_json
from shapes import SHAPES
from turns import Cell, Load, Measured, measure, ratio
from variants import Setting, Variant, ours

CHAINS: dict[str, tuple[str, ...]] = {
    "export_onnx alone": (),
    "+ fuse_gqa": ("fuse_gqa",),
    "+ fuse_norm": ("fuse_gqa", "fuse_norm"),
    "+ fuse_gate": ("fuse_gqa", "fuse_norm", "fuse_gate"),
}
READING, DECODING = Cell(128), Cell(128, 1)


def chains(group_size: int) -> list[Variant]:
    """Return one variant per chain."""
    return [ours(group_size, "int4", label=label, fusions=fusions) for label, fusions in CHAINS.items()]


def gain_rows(results: list[Measured]) -> list[list[str]]:
    """Return each chain's speed and its ratio to the chain before it, formed round by round."""
    rows = []
    for before, one in zip([results[0], *results], results, strict=False):
        speeds = []
        for cell in (READING, DECODING):
            gain = ratio(one, before, cell)
            speeds += [Spread.of(one.speeds[cell]).text(1), gain.text(2) if gain else ""]
        rows.append([one.variant.label, f"{one.weights.size_bytes / 1e6:.1f}", *speeds])
    return rows


def decoder_report(options: argparse.Namespace) -> Report:
    """Measure the decoder shapes."""
    load = Load((READING.context,), (DECODING.sequences,), 64, options.threads, options.rounds)
    about = {"load per request": f"prompt {READING.context}, {load.new_tokens} new tokens, greedy, one sequence"}
    setting = Setting(options.work.absolute(), None, None)
    sections, document, libraries = [], [], dict[str, str]()
    for shape in options.shapes:
        results, missing = measure(shape, setting, load, chains(options.group_size))
        for one in results:
            libraries |= one.facts.versions
        columns = ["chain", "MB", "prefill tokens/s", "gain", "decode tokens/s", "gain"]
        sections += [f"### {shape}, int4 g{options.group_size}\n", table(columns, gain_rows(results))]
        sections += [f"Missing: {reason}\n" for reason in missing]
        speeds = [
            {"chain": r.variant.label, "prefill": r.speeds[READING], "decode": r.speeds[DECODING]} for r in results
        ]
        document.append({"shape": shape, "chains": speeds})
    return Report(about, libraries, sections, {"shapes": document})


def encoder_report(options: argparse.Namespace) -> Report:
    """Measure an encoder of the user's."""
    load = EncoderLoad(options.batches, options.lengths, options.threads, options.rounds)
    about = {"load": "random ids, rows of half the length and more, right-padded", "model": options.encoder.name}
    sections, document = encoder_sections(options.encoder.absolute(), options.work.absolute(), load, options.weights)
    return Report(about, versions(("onnxruntime", "onnx-ir", "torch", "transformers")), sections, {"weights": document})


class Report(NamedTuple):
    """What is printed and written."""

    about: dict[str, str]
    libraries: dict[str, str]
    sections: list[str]
    document: dict[str, Any]


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shapes and artifacts; reused")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "qwen2.5-0.5b"])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--encoder", type=Path, help="folder of an encoder, measured instead of the shapes")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="of the encoder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    about = machine()
    report = encoder_report(options) if options.encoder else decoder_report(options)
    about |= report.about | {
        "threads": str(options.threads),
        "repetitions": f"{options.rounds} rounds, chains taking turns; median (lowest to highest)",
    }
    print(header("What each graph fusion gains", about, report.libraries))
    print("\n".join(report.sections))
    if options.json:
        write_json(options.json, {"about": about, "versions": report.libraries, **report.document})


if __name__ == "__main__":
    main()
