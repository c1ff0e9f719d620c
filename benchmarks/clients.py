"""Programs of other people against `optimize serve`: lm-evaluation-harness and GuideLLM. Nothing here is timed.

lm-eval's `local-completions` scores continuations over HTTP (echo and logprobs of token ids); each log-likelihood must
be ours within 1e-4, the precision that JSON keeps of a float32 sum. GuideLLM must complete all its requests.

    python -m venv CLIENTS && CLIENTS/bin/pip install guidellm 'lm-eval[api]'
    python benchmarks/clients.py artifacts/stdlib-llama-int4 --clients CLIENTS/bin
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from report import say
from variants import environment

from runtime import TextGenerator

TOLERANCE = 1e-4
QUESTIONS = [f"def f{index}(self, value):" for index in range(20)]
CHOICES = ["\n        return self.x", "\n    zebra zebra", " pass"]
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@contextmanager
def served(artifact: Path) -> Iterator[str]:
    """Serve an artifact; yield the address."""
    command = [sys.executable, "-m", "optimizer.cli", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
        assert found is not None, "the server did not start"
        try:
            yield found[0]
        finally:
            server.terminate()


def harness(python: Path, artifact: Path, address: str, work: Path) -> list[list[float]]:
    """Return what lm-eval found for the choices of each question, over HTTP."""
    lines = [json.dumps({"question": each, "choices": CHOICES, "answer": 0}) for each in QUESTIONS]
    (work / "questions.jsonl").write_text("\n".join(lines))
    (work / "choices.yaml").write_text(TASK.replace("QUESTIONS", str(work / "questions.jsonl")))
    model = {
        "model": artifact.name,
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(artifact),
        "num_concurrent": "4",
        "max_length": "512",
    }
    arguments = ["--model", "local-completions", "--tasks", "choices", "--include_path", str(work), "--log_samples"]
    arguments += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    subprocess.run(
        [python / "lm_eval", *arguments, "--output_path", str(work / "out")],
        cwd=work,
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    (samples,) = (work / "out").rglob("samples_choices_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda each: each["doc_id"])
    return [[float(answer[0][0]) for answer in each["resps"]] for each in found]


def ours(artifact: Path) -> list[list[float]]:
    """Return the same by our own runtime, in this process."""
    generator = TextGenerator.load(artifact)

    def score(question: str, choice: str) -> float:
        before, whole = generator.tokenizer.encode(question), generator.tokenizer.encode(question + choice)
        done = generator.generate(whole, max_tokens=0, prompt_logprobs=0)
        assert done.prompt_logprobs is not None
        return sum(each.logprob for each in done.prompt_logprobs[len(before) :] if each is not None)

    return [[score(question, choice) for choice in CHOICES] for question in QUESTIONS]


def guide(python: Path, artifact: Path, address: str, work: Path, requests: int) -> tuple[int, int]:
    """Let GuideLLM put load on the server; return how many requests it completed, and how many failed."""
    arguments = ["run", "--backend", f"kind=openai_http,target={address},request_format=/v1/completions"]
    arguments += ["--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={requests}"]
    arguments += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"]
    arguments += ["--tokenizer", f"kind=hf_auto,model={artifact}", "--disable-console"]
    subprocess.run(
        [python / "guidellm", *arguments],
        cwd=work,
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    (benchmark,) = json.loads((work / "benchmarks.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return totals["successful"], totals["errored"]


def main() -> int:
    """Try both; return 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=Path, required=True, help="the bin folder of their environment")
    parser.add_argument("--requests", type=int, default=40)
    options = parser.parse_args()
    artifact = options.artifact.resolve()
    with served(artifact) as address, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found, want = harness(options.clients.resolve(), artifact, address, work), ours(artifact)
        worst = max(abs(a - b) for one, other in zip(found, want, strict=True) for a, b in zip(one, other, strict=True))
        completed, failed = guide(options.clients.resolve(), artifact, address, work, options.requests)
    count = len(QUESTIONS) * len(CHOICES)
    say(f"lm-eval local-completions: {count} log-likelihoods, at most {worst:.1e} from ours (limit {TOLERANCE:.0e})")
    say(f"GuideLLM: {completed} of {options.requests} requests completed, {failed} failed")
    return 0 if worst <= TOLERANCE and completed == options.requests and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
