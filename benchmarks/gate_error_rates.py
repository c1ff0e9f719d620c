"""How often the gate errs at a true loss equal to its budget, and whether it decides as often as was forecast.

python benchmarks/gate_error_rates.py --work DIR > results.md

Counts, no timing: it may run beside other work. What is done stays in DIR and is not done again unless what it asks or
the gate's code changes; all of it takes about 20 minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gate_cells as cells
from gate_cells import ALPHA, Cell
from report import header, machine, say, table, versions, write_json

import optimizer

PAIRED = [(0.005, n) for n in (200, 500, 2000)] + [(0.01, n) for n in (100, 200, 268, 300, 500, 1000, 3000)]
PAIRED += [(0.02, n) for n in (200, 300, 1000)] + [(0.03, n) for n in (50, 200, 1000)]
TOP_UP = [(0.01, 3000), (0.02, 1000), (0.03, 1000), (0.005, 6000)]
FORECAST = [(0.01, 0.01), (0.01, 0.02), (0.01, 0.04), (0.01, 0.08), (0.02, 0.02), (0.02, 0.04), (0.03, 0.06)]
GROUPED = [(5, 0.1), (5, 0.2), (20, 0.1), (20, 0.2)]
DAMAGE = ("symmetric", "skewness 2", "skewness 6", "in 5 % of them")
DOCUMENTS = {45: 4000, 100: 4000, 200: 3000, 400: 3000}
F1 = {"10 equal classes": False, "10 classes, Zipf": True}
F1_ITEMS = {500: 1000, 1000: 1000, 3000: 400}
LOST, GAINED = 0.03, 0.01
SIMULATED = {
    "grouped": "Right or wrong in groups: 1,000 items, 2 points, 6 % discordant; groups of, correlation within them",
    "perplexity": "Perplexity: documents cut at 1,024 tokens; how the damage is spread over them, documents",
    "flips": "Flips: 2 % of positions, correlation 0.02 within documents; documents",
    "score": "Scores that are no mean (BCa): what, items",
}


def named_cells() -> dict[str, partial[Cell]]:
    """Return what is to be computed, by name."""
    found: dict[str, partial[Cell]] = {}
    for margin, n in PAIRED:
        found[f"paired {margin:g} {n}"] = partial(cells.paired_cell, margin, n)
    for margin, most in TOP_UP:
        found[f"top-up {margin:g} {most}"] = partial(cells.top_up_cell, margin, most, ALPHA)
        found[f"top-up, six gates {margin:g} {most}"] = partial(cells.top_up_cell, margin, most, ALPHA / 6)
    for margin, discordance in FORECAST:
        found[f"forecast {margin:g} {discordance:g}"] = partial(cells.forecast_cell, margin, discordance)
    return found | _cells_of_means() | _cells_of_scores()


def _cells_of_means() -> dict[str, partial[Cell]]:
    """Return what is simulated of means: of items in groups, and of documents."""
    found: dict[str, partial[Cell]] = {}
    for size, correlation in GROUPED:
        found[f"grouped {size}, {correlation:g}"] = partial(cells.grouped_cell, size, correlation, 800)
    for damage in DAMAGE:
        for documents, runs in DOCUMENTS.items():
            found[f"perplexity {damage}, {documents}"] = partial(cells.perplexity_cell, damage, documents, runs)
    for damage in DAMAGE[:2]:
        asked = partial(cells.perplexity_cell, damage, 400, 1000, has_looks=True)
        found[f"perplexity {damage}, 400, two looks"] = asked
    for damage in DAMAGE[:2]:
        asked = partial(cells.perplexity_cell, damage, 45, 3000, loss=0.0)
        found[f"forecast of perplexity {damage}, 45, nothing lost"] = asked
        asked = partial(cells.perplexity_cell, damage, 100, 1500, loss=cells.MARGIN / 2)
        found[f"forecast of perplexity {damage}, 100, half the margin lost"] = asked
    for documents in (60, 200):
        found[f"flips {documents}"] = partial(cells.flips_cell, documents, 3000)
    return found


def _cells_of_scores() -> dict[str, partial[Cell]]:
    """Return what is simulated of scores that are no mean; at 500 items also with enough changes for the bootstrap."""
    found: dict[str, partial[Cell]] = {}
    for name, zipf in F1.items():
        for n, runs in F1_ITEMS.items():
            found[f"score macro-F1, {name}, 4 % change, {n}"] = partial(cells.f1_cell, zipf, LOST, GAINED, n, runs)
        asked = partial(cells.f1_cell, zipf, 2 * LOST, 2 * GAINED, 500, 1000)
        found[f"score macro-F1, {name}, 8 % change, 500"] = asked
    found["forecast of macro-F1, 10 equal classes, 4 % change, 1000, nothing lost"] = partial(
        cells.f1_power_cell, 1000, 600
    )
    for is_concentrated, name in ((False, "in all items"), (True, "in 5 % of them")):
        found[f"score Spearman, damage {name}, 1000"] = partial(cells.spearman_cell, is_concentrated, 1000, 800)
    found["score kappa, 10 classes, Zipf, 4 % change, 1000"] = partial(cells.kappa_cell, LOST, GAINED, 1000, 800)
    return found


def percent(share: float, error: float = 0.0) -> str:
    """Write a rate; in bold where it is beyond alpha by more than two standard errors."""
    text = f"{100 * share:.1f}"
    return f"**{text}**" if share > ALPHA + max(2 * error, 1e-9) else text


def paired_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return rates of false pass and false fail, enumerated."""
    rows = []
    for margin, n in PAIRED:
        cell = done[f"paired {margin:g} {n}"]
        rates = [percent(cell[gate][claim]) for claim in ("pass", "fail") for gate in ("gate", "normal", "points")]
        rows.append([f"{100 * margin:g} pt, {n:,}", *rates])
    return rows


def top_up_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return rates with looks."""
    rows = []
    for margin, most in TOP_UP:
        for name in ("top-up", "top-up, six gates"):
            cell = done[f"{name} {margin:g} {most}"]
            taken = ", ".join(f"{n:,}" for n in cell["looks"])
            level = "5" if name == "top-up" else "5/6"
            rates = [f"{100 * cell['pass']:.2f}", f"{100 * cell['fail']:.2f} of {level}"]
            rows.append([f"{100 * margin:g} pt, {most:,}", taken, *rates])
    return rows


def power_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return what looks cost and save."""
    rows = []
    for margin, most in TOP_UP:
        for discordance, row in done[f"top-up {margin:g} {most}"]["power"].items():
            shares = [f"{100 * row[name]:.1f}" for name in ("once", "passed", "promised")]
            rows.append(
                [f"{100 * margin:g} pt, {most:,}, {100 * float(discordance):g} %", *shares, f"{row['items']:,.0f}"]
            )
    return rows


def forecast_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return forecasts beside what they forecast."""
    rows = []
    for margin, discordance in FORECAST:
        cell = done[f"forecast {margin:g} {discordance:g}"]
        shares = [f"{100 * cell[name]:.1f}" for name in ("promised at 200", "at 200", "power")]
        told = [*shares[:2], f"{cell['items']:,}", shares[2], f"{cell['formula']:,}"]
        rows.append([f"{100 * margin:g} pt, {100 * discordance:g} %", *told])
    return rows


def simulated_rows(done: Mapping[str, Cell], kind: str) -> list[list[str]]:
    """Return rates of simulated gates of one kind."""
    rows = []
    for name, cell in done.items():
        if not name.startswith(f"{kind} "):
            continue
        error = standard_error(cell)
        rates = [percent(cell[claim], error) for claim in ("pass", "fail", "normal pass", "normal fail")]
        counted = [f"{100 * cell['points pass']:.0f}", f"{cell['runs']:,}", f"{100 * error:.2f}"]
        rows.append([name.removeprefix(f"{kind} "), *rates, *counted])
    return rows


def exceeding_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return what errs more often than alpha, beyond two standard errors, and how often the gate warned then."""
    rows = []
    for name, cell in done.items():
        if not name.startswith(tuple(SIMULATED)):
            continue
        error = standard_error(cell)
        for claim in ("pass", "fail"):
            if cell[claim] > ALPHA + 2 * error:
                warned = f"{100 * cell['warned'] / cell['pass']:.0f}" if claim == "pass" and "warned" in cell else "-"
                rows.append([name, f"false {claim}", f"{100 * cell[claim]:.1f} ± {100 * error:.1f}", warned])
    return rows


def standard_error(cell: Cell) -> float:
    """Return the standard error of a rate of alpha."""
    return math.sqrt(ALPHA * (1 - ALPHA) / cell["runs"])


def promise_rows(done: Mapping[str, Cell]) -> list[list[str]]:
    """Return forecasts of simulated gates beside what came."""
    return [
        [
            name.removeprefix("forecast of "),
            f"{100 * cell['promised']:.1f}",
            f"{100 * cell['pass']:.1f}",
            f"{cell['runs']:,}",
        ]
        for name, cell in done.items()
        if name.startswith("forecast of ")
    ]


def code() -> str:
    """Return the hash of all that decides the numbers, but for what each cell asks."""
    ours, here = Path(optimizer.__path__[0]), Path(__file__).parent
    files = [*ours.glob("statistics/*.py"), *(ours / f"{name}.py" for name in ("gate", "evidence", "scores", "power"))]
    files += [here / "gate_cells.py", here / "gate_samples.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def computed(work: Path, only: str) -> dict[str, Cell]:
    """Compute every cell that is not there yet, one after the other; each is kept at once, with its processor time."""
    kept = work / "gate_error_rates.json"
    document = json.loads(kept.read_text()) if kept.exists() else {}
    if document.get("code") != code():
        document = {"code": code(), "cells": {}}
    done: dict[str, Cell] = {}
    for name, compute in named_cells().items():
        asked = f"{compute.func.__name__} {compute.args} {compute.keywords}"
        cell = document["cells"].get(name, {})
        if cell.get("asked") != asked and only in name:
            start = time.process_time()
            cell = compute() | {"asked": asked, "cpu_s": time.process_time() - start}
            document["cells"][name] = cell
            write_json(kept, document)
            say(f"{cell['cpu_s']:6.1f} s  {name}")
        done[name] = cell
    return done


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--only", default="", help="compute only cells with this in their name, print nothing")
    options = parser.parse_args()
    done = computed(options.work, options.only)
    if options.only:
        return
    about = machine() | {
        "level": f"{100 * ALPHA:g} % for pass and for fail, one-sided; rates in %, where the true loss is the margin",
        "bold": "beyond alpha, of simulated cells by more than two standard errors",
        "processor time": f"{sum(cell['cpu_s'] for cell in done.values()) / 60:.1f} minutes for {len(done)} cells",
    }
    print(header("How often the gate errs", about, versions(["numpy", "scipy"])))
    print_enumerated(done)
    columns = ["false pass", "false fail", "normal: pass", "normal: fail", "bare points: pass", "runs", "s.e."]
    for kind, title in SIMULATED.items():
        print(f"### {title}, simulated\n")
        print(table(["what", *columns], simulated_rows(done, kind)))
    print("### Beyond alpha by more than two standard errors: all simulated cells\n")
    print(table(["what", "claim", "rate", "of these warned, %"], exceeding_rows(done)))
    print("### Forecast of the others, simulated\n")
    print(table(["what", "forecast", "pass", "runs"], promise_rows(done)))


def print_enumerated(done: Mapping[str, Cell]) -> None:
    """Print what is exact: right and wrong answers."""
    print("### Right or wrong: worst rate over all discordances up to 20 %, enumerated\n")
    gates = ["gate", "normal interval", "bare points"]
    columns = [f"false {claim}, {gate}" for claim in ("pass", "fail") for gate in gates]
    print(table(["margin, items", *columns], paired_rows(done)))
    print("### With looks at an eighth, a quarter, a half and all of the items, enumerated\n")
    print(table(["margin, items", "looks that can decide", "false pass", "false fail"], top_up_rows(done)))
    print("### What looks cost and save when nothing is lost, enumerated\n")
    columns = ["margin, items, discordance", "pass, one look", "pass, top-up", "forecast", "items on average"]
    print(table(columns, power_rows(done)))
    print("### Forecast of one look, enumerated\n")
    columns = ["margin, discordance", "200 items: forecast", "true", "items for 80 %", "true power", "by formula"]
    print(table(columns, forecast_rows(done)))


if __name__ == "__main__":
    main()
