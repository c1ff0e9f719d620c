"""How often the gate errs at a true loss equal to its budget, and whether it decides as often as was forecast.

python benchmarks/gate_error_rates.py --work DIR > results.md

Counts, no timing: it may run beside other work. What is done stays in DIR and is not done again unless the gate's code
changes; on one core all of it takes about half an hour.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gate_cells as cells
from gate_cells import ALPHA, Cell
from report import header, machine, say, table, versions, write_json

import optimizer
from optimizer.gate import Budget, Spending
from optimizer.power import forecast

PAIRED = [(0.005, n) for n in (200, 500, 2000)] + [(0.01, n) for n in (100, 200, 268, 300, 500, 1000, 3000)]
PAIRED += [(0.02, n) for n in (200, 300, 1000)] + [(0.03, n) for n in (50, 200, 1000)]
TOP_UP = [(0.01, 3000), (0.02, 1000), (0.03, 1000), (0.005, 6000)]
FORECAST = [(0.01, 0.01), (0.01, 0.02), (0.01, 0.04), (0.01, 0.08), (0.02, 0.02), (0.02, 0.04), (0.03, 0.06)]
GROUPED = [(5, 0.1), (5, 0.2), (20, 0.1), (20, 0.2)]
DAMAGE = ("symmetric", "skewness 2", "skewness 6", "in 5 % of them")
DOCUMENTS = {45: 2000, 100: 2000, 200: 1500, 400: 1000}
MARGIN = 0.02  # nats a token
SPREAD = 1.5
F1 = {"10 equal classes": False, "10 classes, Zipf": True}
F1_ITEMS = {500: 1000, 1000: 1000, 3000: 400}
CLASSES = 10
LOST, GAINED = 0.03, 0.01


def named_cells() -> dict[str, Callable[[], Cell]]:
    """Return what is to be computed, by name."""
    found: dict[str, Callable[[], Cell]] = {}
    for margin, n in PAIRED:
        found[f"paired {margin:g} {n}"] = partial(cells.paired_cell, margin, n)
    for margin, most in TOP_UP:
        found[f"top-up {margin:g} {most}"] = partial(cells.top_up_cell, margin, most, ALPHA)
        found[f"top-up, six gates {margin:g} {most}"] = partial(cells.top_up_cell, margin, most, ALPHA / 6)
    for margin, discordance in FORECAST:
        found[f"forecast {margin:g} {discordance:g}"] = partial(cells.forecast_cell, margin, discordance)
    for size, correlation in GROUPED:
        found[f"grouped {size} {correlation:g}"] = partial(cells.grouped_cell, size, correlation, 800)
    for damage in DAMAGE:
        for documents, runs in DOCUMENTS.items():
            found[f"perplexity {damage} {documents}"] = partial(perplexity_cell, damage, documents, MARGIN, runs)
    for damage in DAMAGE[:2]:
        found[f"perplexity, two looks {damage} 400"] = partial(perplexity_cell, damage, 400, MARGIN, 1000, looks=True)
    found["perplexity, no loss symmetric 45"] = partial(perplexity_cell, "symmetric", 45, 0.0, 3000)
    found["perplexity, no loss skewness 2 45"] = partial(perplexity_cell, "skewness 2", 45, 0.0, 3000)
    for documents in (60, 200):
        found[f"flips {documents}"] = partial(flips_cell, documents)
    for name, zipf in F1.items():
        for n, runs in F1_ITEMS.items():
            found[f"f1 {name} {n}"] = partial(f1_cell, zipf, n, runs)
    found["f1, no loss"] = partial(f1_power_cell, 1000, 600)
    for concentrated in (False, True):
        found[f"spearman {'in 5 % of them' if concentrated else 'in all items'} 1000"] = partial(
            spearman_cell, concentrated, 400
        )
    found["kappa 1000"] = partial(kappa_cell, 1000, 400)
    return found


def perplexity_cell(damage: str, documents: int, loss: float, runs: int, looks: bool = False) -> Cell:
    """Simulate documents that lose `loss` nats a token."""
    budget = Budget("perplexity", math.expm1(MARGIN))
    draw = cells.perplexities(damage, SPREAD, documents, loss, seed=documents)
    found = cells.simulated(draw, budget, runs, Spending(documents) if looks else None)
    deviation = cells.perplexity_deviation(damage, SPREAD, loss)
    return found | {"promised": forecast(budget, documents, deviation, loss=math.expm1(loss)).power}


def flips_cell(documents: int) -> Cell:
    """Simulate changed positions at a rate of 2 %, correlated within documents."""
    return cells.simulated(cells.flips(0.02, 0.02, documents, seed=documents), Budget("flips", 0.02), 3000)


def f1_cell(zipf: bool, n: int, runs: int) -> Cell:
    """Simulate labels of which 4 % change."""
    limit = cells.f1_loss(CLASSES, zipf, LOST, GAINED)
    return cells.simulated(cells.labelled(CLASSES, zipf, LOST, GAINED, n, seed=n), Budget("f1", limit), runs)


def f1_power_cell(n: int, runs: int) -> Cell:
    """Simulate a lossless change of 4 % of the answers, and what was forecast of it."""
    budget = Budget("f1", 0.015)
    found = cells.simulated(cells.labelled(CLASSES, False, 0.02, 0.02, n, seed=n), budget, runs)
    return found | {"promised": forecast(budget, n, 0.04).power}


def spearman_cell(concentrated: bool, runs: int) -> Cell:
    """Simulate similarities."""
    budget = Budget("spearman", cells.spearman_loss(concentrated))
    return cells.simulated(cells.orders(concentrated, 1000, seed=7), budget, runs)


def kappa_cell(n: int, runs: int) -> Cell:
    """Simulate a score of which the gate knows nothing."""
    budget = Budget("kappa", cells.kappa_loss(LOST, GAINED), compute=cells.kappa)
    return cells.simulated(cells.kappas(LOST, GAINED, n, seed=n), budget, runs)


def percent(share: float, error: float = 0.0) -> str:
    """Write a rate; in bold where it is beyond alpha by more than two standard errors."""
    text = f"{100 * share:.1f}"
    return f"**{text}**" if share > ALPHA + max(2 * error, 1e-9) else text


def paired_rows(done: dict[str, Cell]) -> list[list[str]]:
    """Return rates of false pass and false fail, enumerated."""
    rows = []
    for margin, n in PAIRED:
        cell = done[f"paired {margin:g} {n}"]
        rates = [percent(cell[gate][claim]) for claim in ("pass", "fail") for gate in ("gate", "normal", "points")]
        rows.append([f"{100 * margin:g} pt, {n:,}", *rates])
    return rows


def top_up_rows(done: dict[str, Cell]) -> list[list[str]]:
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


def power_rows(done: dict[str, Cell]) -> list[list[str]]:
    """Return what looks cost and save."""
    rows = []
    for margin, most in TOP_UP:
        for discordance, row in done[f"top-up {margin:g} {most}"]["power"].items():
            shares = [f"{100 * row[name]:.1f}" for name in ("once", "passed", "promised")]
            rows.append(
                [f"{100 * margin:g} pt, {most:,}, {100 * float(discordance):g} %", *shares, f"{row['items']:,.0f}"]
            )
    return rows


def forecast_rows(done: dict[str, Cell]) -> list[list[str]]:
    """Return forecasts beside what they forecast."""
    rows = []
    for margin, discordance in FORECAST:
        cell = done[f"forecast {margin:g} {discordance:g}"]
        shares = [f"{100 * cell[name]:.1f}" for name in ("promised at 200", "at 200", "power")]
        told = [*shares[:2], f"{cell['items']:,}", shares[2], f"{cell['formula']:,}"]
        rows.append([f"{100 * margin:g} pt, {100 * discordance:g} %", *told])
    return rows


def simulated_rows(done: dict[str, Cell]) -> list[list[str]]:
    """Return rates of simulated gates; no forecast, no normal interval where there is none."""
    rows = []
    for name, cell in done.items():
        if "runs" not in cell or "no loss" in name:
            continue
        error = math.sqrt(ALPHA * (1 - ALPHA) / cell["runs"])
        has_normal = name.startswith(("perplexity", "flips", "grouped"))
        normal = [percent(cell[f"normal {claim}"], error) if has_normal else "-" for claim in ("pass", "fail")]
        rates = [percent(cell[claim], error) for claim in ("pass", "fail")]
        rows.append(
            [name, *rates, *normal, f"{100 * cell['points pass']:.0f}", f"{cell['runs']:,}", f"{100 * error:.2f}"]
        )
    return rows


def promise_rows(done: dict[str, Cell]) -> list[list[str]]:
    """Return forecasts of simulated gates beside what came."""
    return [
        [name, f"{100 * cell['promised']:.1f}", f"{100 * cell['pass']:.1f}", f"{cell['runs']:,}"]
        for name, cell in done.items()
        if "no loss" in name
    ]


def code() -> str:
    """Return the hash of all that decides the numbers."""
    ours = Path(optimizer.__path__[0])
    files = [*ours.glob("statistics/*.py"), *(ours / f"{name}.py" for name in ("gate", "evidence", "scores", "power"))]
    files += [Path(__file__), Path(__file__).with_name("gate_cells.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def computed(work: Path, only: str) -> dict[str, Any]:
    """Compute every cell that is not there yet, one after the other; each is kept at once."""
    kept = work / "gate_error_rates.json"
    document = json.loads(kept.read_text()) if kept.exists() else {}
    if document.get("code") != code():
        document = {"code": code(), "seconds": 0.0, "cells": {}}
    for name, compute in named_cells().items():
        if name in document["cells"] or only not in name:
            continue
        start = time.perf_counter()
        document["cells"][name] = compute()
        document["seconds"] += time.perf_counter() - start
        write_json(kept, document)
        say(f"{time.perf_counter() - start:6.1f} s  {name}")
    return document


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--only", default="", help="compute only cells with this in their name, print nothing")
    options = parser.parse_args()
    document = computed(options.work, options.only)
    if options.only:
        return
    done = document["cells"]
    about = machine() | {
        "level": f"{100 * ALPHA:g} % for pass and for fail, one-sided; rates in %, where the true loss is the margin",
        "bold": "beyond alpha, of simulated cells by more than two standard errors",
        "computing": f"{document['seconds'] / 60:.0f} minutes on one thread, beside other work",
    }
    print(header("How often the gate errs", about, versions(["numpy", "scipy"])))
    print("### Right or wrong: worst rate over all discordances up to 20 %, enumerated\n")
    gates = ["gate", "normal interval", "bare points"]
    print(
        table(
            ["margin, items", *(f"false pass, {g}" for g in gates), *(f"false fail, {g}" for g in gates)],
            paired_rows(done),
        )
    )
    print("### With looks at an eighth, a quarter, a half and all of the items, enumerated\n")
    print(table(["margin, items", "looks that can decide", "false pass", "false fail"], top_up_rows(done)))
    print("### What looks cost and save when nothing is lost, enumerated\n")
    columns = ["margin, items, discordance", "pass, one look", "pass, top-up", "forecast", "items on average"]
    print(table(columns, power_rows(done)))
    print("### Forecast of one look\n")
    columns = ["margin, discordance", "200 items: forecast", "true", "items for 80 %", "true power", "by formula"]
    print(table(columns, forecast_rows(done)))
    print("### All others: simulated\n")
    columns = ["what", "false pass", "false fail", "normal: pass", "normal: fail", "bare points: pass", "runs", "s.e."]
    print(table(columns, simulated_rows(done)))
    print("### Forecast of the others, nothing lost\n")
    print(table(["what", "forecast", "pass", "runs"], promise_rows(done)))


if __name__ == "__main__":
    main()
