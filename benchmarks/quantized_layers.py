"""Formats of linear layers on this processor: seconds of each over those of float32, as a plan measures them.

python benchmarks/quantized_layers.py [--threads 1] [--outputs 1536] [--inputs 576]

A layer and its float32 form take turns, round by round, with 64 MiB read between two runs, as a model reads its other
layers. A star marks what a plan warns of.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from report import header, machine, say, table, versions, write_json

from optimizer.kernels import CACHE_BYTES, DECODER_ROWS, ENCODER_ROWS, is_slower, measured, spec_text
from passes._formats import ChannelFormat, IntegerFormat
from passes._layers import Linear
from passes._quantized import LayerSpec

BITS: tuple[Literal[8, 4, 2], ...] = (8, 4, 2)
GROUPS: tuple[Literal[32, 128, "channel"], ...] = (32, 128, "channel")
ROWS = sorted((*DECODER_ROWS, *ENCODER_ROWS))


def specs() -> Iterator[LayerSpec]:
    """Yield what `quantize_rtn` and `quantize_int8` make of linear layers, without zero points."""
    for activations in ("int8", "float"):
        yield from (LayerSpec(IntegerFormat(bits, group), activations) for bits in BITS for group in GROUPS)
    yield from (LayerSpec(ChannelFormat(), activations) for activations in ("row", "static"))


def cell(ratios: list[float]) -> str:
    """Return the median and the middle half of the rounds."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}){'*' if is_slower(ratios) else ''}"


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1536, help="output features of the layer")
    parser.add_argument("--inputs", type=int, default=576, help="input features of the layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the ratios of every round here")
    options = parser.parse_args()
    about = machine() | {
        "layer": f"{options.inputs} features to {options.outputs}",
        "threads": str(options.threads),
        "repetitions": "15 to 100 rounds; median (middle half)",
    }
    found = {}
    for spec in specs():
        say(spec_text(spec))
        linear = Linear(options.outputs, options.inputs, spec)
        (found[spec_text(spec)],) = measured([linear], ROWS, CACHE_BYTES, options.threads)
    libraries = versions(("torch", "onnxruntime"))
    print(header("Linear layers in integers: seconds over those of float32", about, libraries))
    columns = ["layer", *(f"{rows} {'row' if rows == 1 else 'rows'}" for rows in ROWS)]
    print(table(columns, ([name, *map(cell, ratios)] for name, ratios in found.items())))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "rows": ROWS, "ratios": found})


if __name__ == "__main__":
    main()
