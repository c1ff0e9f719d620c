"""Does an artifact without rounded numbers say what torch says? Greedy tokens, for prompts of several lengths.

    python benchmarks/greedy.py MODEL --text FILE --output results/DATE-greedy.md

The recipe is `export_onnx` and the fusions that fit; the artifact answers through `runtime.load`, transformers through
`generate`. Nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from report import header, machine, table, versions
from transformers import AutoModelForCausalLM

import optimizer
import runtime
from runtime.generation import TextGenerator

TITLE = "Greedy tokens of a float artifact beside torch's"
LENGTHS = (1, 7, 300)
TOKENS = 200
PASSES = ("export_onnx", "fuse_gqa", "fuse_norm")


def main() -> None:
    """Build, ask both, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a text that prompts are cut from")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    rows = [row for model in given.models for row in _compared(model.resolve(), text)]
    head = header(TITLE, machine(), versions(("torch", "transformers", "onnxruntime")))
    page = head + "\n" + table(("model", "prompt tokens", "tokens asked", "equal from the first on"), rows)
    given.output.write_text(page, encoding="utf-8")
    print(page)


def _compared(folder: Path, text: str) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as name:
        artifact = _built(folder, Path(name))
        served = runtime.load(artifact, threads=1)
        assert isinstance(served, TextGenerator)
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        module.generation_config.eos_token_id = None
        for length in LENGTHS:
            prompt = _prompt(served, text, length)
            ids = served.tokenizer.encode(prompt) or [served.manifest.bos_token_id]
            asked = min(TOKENS, served.session.capacity - length)
            ours = served.generate(prompt, max_tokens=asked, ignore_eos=True).token_ids
            with torch.inference_mode():
                out = module.generate(
                    torch.tensor([ids]), attention_mask=torch.ones(1, length), do_sample=False, max_new_tokens=asked
                )
            want = out[0, length:].tolist()
            equal = next((n for n, pair in enumerate(zip(ours, want, strict=True)) if pair[0] != pair[1]), len(want))
            yield folder.name, str(length), str(asked), str(equal)


def _built(folder: Path, work: Path) -> Path:
    """Return the artifact of the float model."""
    recipe = {
        "name": folder.name,
        "model": str(folder),
        "passes": [name if name == "export_onnx" else {name: {"optional": True}} for name in PASSES],
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = optimizer.run(path, output=work / "artifact", store=work / "store")
    assert done.artifact is not None, done
    return Path(done.artifact)


def _prompt(served: TextGenerator, text: str, length: int) -> str:
    """Return a piece of the text that the tokenizer turns into so many ids; the empty one for a model's BOS alone."""
    if length == len(served.tokenizer.encode("")) or (length == 1 and served.manifest.bos_token_id is not None):
        return ""
    words = text.split(" ")
    for start in range(0, len(words), 50):
        for end in range(start + 1, len(words)):
            found = len(served.tokenizer.encode(" ".join(words[start:end])))
            if found == length:
                return " ".join(words[start:end])
            if found > length:
                break
    raise SystemExit(f"no piece of the text has {length} tokens")


if __name__ == "__main__":
    main()
