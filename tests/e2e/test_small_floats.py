"""The embedded model in 4-bit floats, from recipe to answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from passes._parity import range_error
from passes._quantized import FILE, read_specs
from passes._skeleton import Skeleton, read_config
from passes._walk import walk
from passes.base import TORCH, Model
from runtime.artifact import verify
from runtime.session import DecoderSession

from .projects import QUICKSTART, ROOT, Project, call, optimize

OPTIONS = (
    "--set=passes.0.activations=float",
    "--set=gate.perplexity.max_increase=50%",
    "--set=gate.agreement.max_flips=50%",
)
"""What the format loses is measured elsewhere."""
LINEARS = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
BESIDE = 4096 * (256 + 8 * 4) + 13 * 256 * 4 + 2 * 1024 * 32 * 4
"""Bytes: the table in int8 with a scale for 32, norms, cosines and sines."""
RANGE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_four_bits_lie_on_disk_and_answer_as_in_torch(tmp_path: Path, name: str, bits: float) -> None:
    project = Project(QUICKSTART, tmp_path / "store", tmp_path / "out")
    options = (*OPTIONS, f"--set=passes.0.format={name}")
    done = project.run(*options)
    assert (done.returncode, done.stderr) == (0, "")
    size = sum(path.stat().st_size for path in project.output.glob("model.onnx*"))
    assert size == pytest.approx(LINEARS * bits / 8 + BESIDE, rel=0.02)

    planned = call(optimize("plan", QUICKSTART, *options, "--json"), env=project.environment())
    assert json.loads(planned.stdout)["steps"][-1]["bytes"] == pytest.approx(size, rel=0.005)

    assert verify(project.output).graphs == {"model": "model.onnx"}
    answer = call(optimize("generate", project.output, "--prompt", "def read(self", "--max-tokens", 8))
    assert answer.returncode == 0 and answer.stdout.strip()

    source = ROOT / "recipes" / "models" / "stdlib-llama"
    (stage,) = (path.parent for path in project.store.rglob(FILE) if "plan" not in str(path) and _is_stage(path))
    model = Model(TORCH, stage, source, read_config(source))
    ids = np.random.default_rng(0).integers(1, 4096, 100).tolist()
    forward = lambda module: module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()  # noqa: E731
    want = next(walk(Skeleton(model), [forward]))[1]
    got = DecoderSession(project.output / "model.onnx", capacity=128, threads=1).run(ids)
    assert range_error(got, want) <= RANGE


def _is_stage(path: Path) -> bool:
    """Return whether a torch stage has all of its weights: an outline has holes."""
    files = list(path.parent.glob("*.safetensors"))
    specs = read_specs(path.parent)
    return bool(specs) and all(file.stat().st_blocks * 512 >= 0.9 * file.stat().st_size for file in files)
