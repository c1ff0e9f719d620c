"""What `optimize plan` says of a recipe, and what its run comes to: size, memory, seconds, and items of its gates.

    python benchmarks/plan_outcome.py --work DIR RECIPE[,PATH=VALUE...] ...

Each recipe runs twice, each time in a process of its own: with an empty store, where the plan has nothing but the
figures that come with it, and again with what the first run has measured and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import header, machine, say, table, versions, write_json

LIBRARIES = ("torch", "transformers", "onnxruntime", "numpy")
SCRIPT = """
import sys, optimizer
folder, recipe, *settings = sys.argv[1:]
print(optimizer.run(recipe, settings, output=folder + "/out", store=folder + "/store", keep=True).to_json())
"""


def outcomes(recipe: str, work: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of a run with an empty store, then of one with what the first has measured."""
    shutil.rmtree(work, ignore_errors=True)
    for again in (False, True):
        if again:
            shutil.rmtree(work / "store" / "entries")
        say(f"{recipe}: {'again' if again else 'first'}")
        command = [sys.executable, "-c", SCRIPT, str(work), *recipe.split(",")]
        yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(work)


def row(name: str, again: bool, run: dict[str, Any]) -> list[str]:
    """Return planned and made, and their ratio, of the last model's size and the run's memory and seconds."""
    steps = run["steps"]
    pairs = [
        (steps[-1]["planned"]["bytes"], steps[-1]["bytes"]),
        tuple(max(peak(step)[side] for step in steps) for side in (0, 1)),
        tuple(sum(seconds(step)[side] for step in steps) for side in (0, 1)),
    ]
    cells = [
        f"{planned / unit:,.{digits}f} / {made / unit:,.{digits}f} ({made / planned:.{4 if unit == 1e6 else 2}f})"
        for (planned, made), unit, digits in zip(pairs, (1e6, 1e9, 1), (2, 2, 0), strict=True)
    ]
    return [name, "measured here" if again else "nothing measured", *cells]


def peak(step: dict[str, Any]) -> tuple[int, int]:
    """Return the peak of resident memory of a step, planned and seen."""
    return step["planned"]["peak_bytes"], max(step["pass_peak_bytes"], step["score_peak_bytes"])


def seconds(step: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of a step, planned and seen."""
    return step["planned"]["pass_s"] + step["planned"]["score_s"], step["pass_s"] + step["score_s"]


def main() -> None:
    """Run, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE[,PATH=VALUE...]")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and artifacts")
    parser.add_argument("--json", type=Path, help="write the records here")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    rows, records = [], {}
    for recipe in options.recipes:
        records[recipe] = list(outcomes(recipe, work / "run"))
        rows += [row(Path(recipe.split(",")[0]).stem, bool(again), run) for again, run in enumerate(records[recipe])]
    print(header("Plan and outcome", machine(), versions(LIBRARIES)))
    print("Planned / made (made over planned).\n")
    print(table(["recipe", "store", "size, MB", "peak memory, GB", "passes and scoring, s"], rows))
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
