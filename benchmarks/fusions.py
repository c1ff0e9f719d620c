"""What each graph fusion gains in decode and prefill: the same int4 weights, one more fusion at a time.

python benchmarks/fusions.py --work DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from decode import Load, Measured, measure
from report import Spread, header, machine, table, write_json
from shapes import SHAPES
from variants import Setting, Variant, ours

CHAINS: dict[str, tuple[str, ...]] = {
    "export_onnx alone": (),
    "+ fuse_gqa": ("fuse_gqa",),
    "+ fuse_norm": ("fuse_gqa", "fuse_norm"),
    "+ fuse_gate": ("fuse_gqa", "fuse_norm", "fuse_gate"),
}


def chains(group_size: int) -> list[Variant]:
    """Return one variant per chain."""
    return [ours(group_size, label, fusions) for label, fusions in CHAINS.items()]


def gain_rows(results: list[Measured]) -> list[list[str]]:
    """Return each chain's speed and its ratio to the chain before it, formed round by round."""
    rows = []
    for before, one in zip([results[0], *results], results, strict=False):
        prefill = Spread.of([a / b for a, b in zip(one.prefill, before.prefill, strict=True)])
        decode = Spread.of([a / b for a, b in zip(one.decode, before.decode, strict=True)])
        speeds = [Spread.of(one.prefill).text(0), prefill.text(2), Spread.of(one.decode).text(1), decode.text(2)]
        rows.append([one.variant.label, f"{one.weights.size_bytes / 1e6:.1f}", *speeds])
    return rows


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shapes and artifacts; reused")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "qwen2.5-0.5b"])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    load = Load(prompt_tokens=128, new_tokens=64, threads=options.threads, rounds=options.rounds)
    about = machine() | {
        "load per request": f"prompt {load.prompt_tokens}, {load.new_tokens} new tokens, greedy, one sequence",
        "threads": str(load.threads),
        "repetitions": f"{load.rounds} rounds, chains taking turns; median (lowest to highest)",
    }
    setting = Setting(options.work.absolute(), None, None)
    sections, document, libraries = [], [], dict[str, str]()
    for shape in options.shapes:
        results, missing = measure(shape, setting, load, chains(options.group_size))
        for one in results:
            libraries |= one.versions
        columns = ["chain", "MB", "prefill tokens/s", "gain", "decode tokens/s", "gain"]
        sections += [f"### {shape}, int4 g{options.group_size}\n", table(columns, gain_rows(results))]
        sections += [f"Missing: {reason}\n" for reason in missing]
        speeds = [{"chain": r.variant.label, "prefill": r.prefill, "decode": r.decode} for r in results]
        document.append({"shape": shape, "chains": speeds})
    print(header("What each graph fusion gains", about, libraries))
    print("\n".join(sections))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "shapes": document})


if __name__ == "__main__":
    main()
