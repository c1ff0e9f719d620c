"""The runtime stands alone: `pip install .[cpu]` in a fresh environment, no torch, and its tests pass there."""

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_runtime_needs_nothing_but_the_cpu_extra(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, f"{ROOT}[cpu]", "pytest", "pytest-timeout", "hypothesis"], check=True, cwd=tmp_path)
    absent = "import importlib.util as u; print([m for m in ('torch', 'transformers', 'onnx') if u.find_spec(m)])"
    found = subprocess.run([str(python), "-c", absent], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "runtime")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
