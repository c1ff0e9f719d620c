"""Seconds that `optimize` takes to lower a shape to int4, by phase, everything included.

The command line is run as a user runs it, in a fresh process with an empty store; the seconds of each pass (its work
and its check) are those the run itself reports, and what is left is start-up, hashing and writing the artifact.

    python benchmarks/lowering.py --work DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Spread, header, machine, say, table, versions, write_json
from shapes import SHAPES, write_shape

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime")

RECIPE = """\
name: {name}
model: {model}
target: {{device: cpu, threads: {threads}}}
data:
  calibration: {{json: {texts}, text: text}}
passes:
  - {method}: {{format: int4, group_size: {group_size}, embedding: {head}, lm_head: {head}{calibration}}}
  - export_onnx
{fusions}"""
CALIBRATION = ROOT / "recipes" / "data" / "stdlib-calibration.jsonl"
FUSIONS = ("fuse_gqa", "fuse_norm")
"""The default chain's; `fusions.py` measures what each of them gains."""


class LoweringFailed(Exception):
    """The command line ended with another code than 0; the message is what it said last."""


@dataclass(frozen=True)
class Job:
    """One lowering: the folder of a shape, and where everything it makes goes.

    Attributes:
        source: the Hugging Face folder.
        home: a folder of its own for recipe, store and artifact.
        head: format of the head and of the embedding tied to it.
        method: the pass that quantizes; all but quantize_rtn are calibrated.
        samples: calibration texts, of up to 512 tokens each.
    """

    source: Path
    home: Path
    group_size: int = 32
    threads: int = 2
    fusions: tuple[str, ...] = FUSIONS
    head: str = "int4"
    method: str = "quantize_rtn"
    samples: int = 128

    @property
    def artifact(self) -> Path:
        """Folder of the artifact."""
        return self.home / "artifact"

    def prepare(self) -> list[str]:
        """Write the recipe, empty store and artifact, and return the command that lowers."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        recipe = self.home / "recipe.yaml"
        name = f"{self.source.name}-int4-g{self.group_size}"
        fields = {"name": name, "model": self.source, "threads": self.threads, "group_size": self.group_size}
        fields |= {"head": self.head, "method": self.method, "texts": CALIBRATION}
        is_calibrated = self.method != "quantize_rtn"
        fields["calibration"] = f", calibration: calibration, samples: {self.samples}" if is_calibrated else ""
        fields["fusions"] = "".join(f"  - {fusion}\n" for fusion in self.fusions)
        recipe.write_text(RECIPE.format_map(fields))
        return [sys.executable, "-m", "optimizer.cli", str(recipe), "--output", str(self.artifact), "--json"]

    def environment(self) -> Mapping[str, str]:
        """Return the environment of that command: its own store, no network, no telemetry."""
        own = {"OPTIMIZE_STORE": str(self.home / "store"), "PYTHONPATH": str(ROOT)}
        return os.environ | own | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}


def lower(job: Job) -> tuple[float, dict[str, Any]]:
    """Lower one shape in a fresh process; return its seconds and the document it printed."""
    command = job.prepare()
    start = time.perf_counter()
    done = subprocess.run(command, env=job.environment(), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise LoweringFailed(last_line(done.stderr, done.stdout))
    return seconds, json.loads(done.stdout)


def last_line(*outputs: str) -> str:
    """Return the last line of the first output that says anything."""
    return next((text.strip().splitlines()[-1] for text in outputs if text.strip()), "no message")


def phases(seconds: float, document: Mapping[str, Any]) -> dict[str, float]:
    """Split the seconds of a run by pass; the rest is start-up, hashing and the artifact."""
    by_pass = {step["name"]: float(step["pass_s"]) for step in document["steps"][1:]}
    return by_pass | {"start-up, store, artifact": seconds - sum(by_pass.values())}


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the shape and what is made of it")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    about = machine() | {
        "threads": str(options.threads),
        "repetitions": f"{options.rounds}; median (lowest to highest)",
    }
    source = options.work.absolute() / "shapes" / options.shape
    write_shape(SHAPES[options.shape], source)
    job = Job(source, options.work.absolute() / "lowering", options.group_size, options.threads)
    rounds = []
    for index in range(options.rounds):
        rounds.append(phases(*lower(job)))
        say(f"round {index + 1} of {options.rounds}: {sum(rounds[-1].values()):.1f} s")
    shutil.rmtree(job.home)
    rows = [[phase, Spread.of([one[phase] for one in rounds]).text(1)] for phase in rounds[0]]
    rows.append(["**total**", Spread.of([sum(one.values()) for one in rounds]).text(1)])
    title = f"Lowering {options.shape} to int4 g{options.group_size}"
    libraries = versions(LIBRARIES)
    print(header(title, about, libraries))
    print(table(["phase", "seconds"], rows))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "shape": options.shape, "rounds": rounds})


if __name__ == "__main__":
    try:
        main()
    except LoweringFailed as error:
        sys.exit(f"lowering failed: {error}")
