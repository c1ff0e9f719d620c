"""What an installation costs: packages, megabytes, import time, and a fresh process until its first token.

Each product is installed by pip into a virtual environment of its own; llama-cpp-python, which compiles for minutes,
may come from one that has it (`--llama-python`). Packages and megabytes are those of the product and of all that it
requires, by their own lists of files. Processes of all products take turns within a round.

    python benchmarks/install.py --work DIR --ours artifacts/NAME --gguf FILE.gguf --genai FOLDER

A product without a model is installed and imported, and starts nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from report import Spread, header, machine, say, table, write_json
from variants import environment

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "pass"

OURS = """
import sys
from runtime import load
stream = load(sys.argv[1]).stream([1, 2, 3], max_tokens=1, ignore_eos=True)
for piece in stream: pass
"""
SERVED = """
import json, os, re, subprocess, sys, urllib.request
command = [sys.executable, "-m", "optimizer.cli", "serve", sys.argv[1], "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
address = re.search(r"http://[0-9.]+:[0-9]+", server.stdout.readline())[0]
body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1, "ignore_eos": True}).encode()
asked = urllib.request.Request(address + "/v1/completions", body, {"Content-Type": "application/json"})
assert urllib.request.urlopen(asked).status == 200
server.kill()
"""
CLOSURE = """
import importlib.metadata as m, json, sys
from pip._vendor.packaging.requirements import Requirement
def key(name): return name.lower().replace("_", "-").replace(".", "-")
wanted, found = [Requirement(sys.argv[1])], {}
while wanted:
    each = wanted.pop()
    if (key(each.name), tuple(sorted(each.extras))) in found: continue
    package = m.distribution(each.name)
    found[key(each.name), tuple(sorted(each.extras))] = package
    for text in package.requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *each.extras)):
            wanted.append(needed)
packages = {name: package for (name, _), package in found.items()}
files = [file.locate() for package in packages.values() for file in package.files or ()]
print(json.dumps([len(packages), sum(file.stat().st_size for file in files if file.is_file())]))
"""
LLAMA = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, verbose=False)
model.eval([1, 2, 3])
model.sample(temp=0)
"""
GENAI = """
import sys
import numpy as np
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=8)
generator = og.Generator(model, params)
generator.append_tokens(np.array([1, 2, 3], np.int32))
generator.generate_next_token()
"""


@dataclass(frozen=True)
class Product:
    """What is installed, and what it is asked.

    Attributes:
        label: its name in the table.
        package: for pip.
        requirement: its name and extras.
        imported: a statement.
        first_token: a program that ends with it; its argument is the model.
        option: of the command line, that says where the model is.
        folder: of its environment; products of one folder share it.
    """

    label: str
    package: str
    requirement: str
    imported: str
    first_token: str
    option: str
    folder: str


NAME, LLAMA_SERVER, GENAI_NAME = "optimize-models", "llama-cpp-python[server]", "onnxruntime-genai"
PRODUCTS = (
    Product("ours, [cpu]", f"{ROOT}[cpu]", f"{NAME}[cpu]", "from runtime import Engine", OURS, "ours", "ours"),
    Product(
        "ours, [cpu,serve], over HTTP",
        f"{ROOT}[cpu,serve]",
        f"{NAME}[cpu,serve]",
        "from runtime.server.app import create_app",
        SERVED,
        "ours",
        "ours-serve",
    ),
    Product(LLAMA_SERVER, LLAMA_SERVER, LLAMA_SERVER, "import llama_cpp", LLAMA, "gguf", "llama"),
    Product(GENAI_NAME, GENAI_NAME, GENAI_NAME, "import onnxruntime_genai", GENAI, "genai", "genai"),
)


def installed(product: Product, work: Path, ready: Path | None) -> tuple[Path, int, int]:
    """Return a Python with the product, the number of packages it needs, and their bytes."""
    python = ready or work / product.folder / "bin" / "python"
    if not python.exists():
        venv.create(work / product.folder, with_pip=True)
        say(f"installing {product.label}")
        subprocess.run([python, "-m", "pip", "install", "--quiet", product.package], check=True)
    asked = [python, "-c", CLOSURE, product.requirement]
    count, size = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    return python, count, size


def seconds(python: Path, code: str, *arguments: str) -> float:
    """Run `code` in a fresh interpreter; return its seconds, start and end included."""
    start = time.perf_counter()
    subprocess.run([python, "-c", code, *arguments], env=environment(), check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the environments are made, and kept")
    parser.add_argument("--ours", help="an artifact")
    parser.add_argument("--gguf", help="the same model for llama.cpp")
    parser.add_argument("--genai", help="the same model for onnxruntime-genai")
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    ready = {LLAMA_SERVER: options.llama_python}
    pythons = {each.label: installed(each, options.work, ready.get(each.label)) for each in PRODUCTS}
    imports: dict[str, list[float]] = {product.label: [] for product in PRODUCTS}
    tokens: dict[str, list[float]] = {product.label: [] for product in PRODUCTS}
    for index in range(-1, options.rounds):  # round -1 fills the page cache
        for product in PRODUCTS:
            python, model = pythons[product.label][0], getattr(options, product.option)
            plain = seconds(python, PLAIN)
            imported = seconds(python, product.imported) - plain
            first = seconds(python, product.first_token, model) if model else float("nan")
            if index >= 0:
                imports[product.label].append(1e3 * imported)
                tokens[product.label].append(1e3 * first)
        say(f"round {index + 1} of {options.rounds}")
    about = machine() | {
        "models": ", ".join(
            f"{name}: {Path(getattr(options, name) or 'none').name}" for name in ("ours", "gguf", "genai")
        ),
        "repetitions": f"{options.rounds} rounds, products taking turns; median (lowest to highest)",
    }
    print(header("Installation and cold start", about, {}))
    rows = [
        [
            label,
            str(count),
            f"{size / 1e6:.0f}",
            Spread.of(imports[label]).text(0),
            Spread.of(tokens[label]).text(0),
        ]
        for label, (_, count, size) in pythons.items()
    ]
    print(table(["installed", "packages", "MB", "import, ms", "process start to first token, ms"], rows))
    if options.json:
        write_json(options.json, {"about": about, "import_ms": imports, "first_token_ms": tokens})


if __name__ == "__main__":
    main()
