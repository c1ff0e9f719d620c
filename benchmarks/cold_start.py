"""From process start to the first token: what a user waits for after typing `optimize generate`.

python benchmarks/cold_start.py artifacts/stdlib-llama-int4
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from report import Spread, header, machine, table, versions, write_json
from variants import environment

STEPS = {
    "python": "pass",
    "import runtime": "import runtime",
    "first token": """
import sys
from runtime import load
stream = load(sys.argv[1]).stream("a", max_tokens=1, ignore_eos=True)
for piece in stream: pass
""",
}


def seconds(code: str, artifact: Path) -> float:
    """Run `code` in a fresh interpreter and return its seconds, start and end included."""
    root = Path(__file__).resolve().parent.parent
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(artifact)], env=environment(root), check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    measured: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in range(options.rounds):
        for step, code in STEPS.items():
            measured[step].append(seconds(code, options.artifact))
    size = sum(path.stat().st_size for path in options.artifact.glob("model.onnx*"))
    about = machine() | {
        "artifact": f"{options.artifact.name}, {size / 1e6:.1f} MB, in the page cache",
        "repetitions": f"{options.rounds} rounds, steps taking turns; median (lowest to highest)",
    }
    libraries = versions(("onnxruntime", "tokenizers", "numpy"))
    print(header("Cold start", about, libraries))
    rows = [[step, Spread.of([1e3 * value for value in values]).text(0)] for step, values in measured.items()]
    print(table(["a fresh process that ends after", "ms"], rows))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "seconds": measured})


if __name__ == "__main__":
    main()
