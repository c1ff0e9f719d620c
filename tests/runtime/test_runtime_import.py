"""What the runtime loads, and when."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


def test_importing_the_runtime_and_verifying_load_only_the_standard_library(decoder_folder: Path) -> None:
    heavy = ["numpy", "onnxruntime", "tokenizers", "jinja2", "torch", "transformers"]
    code = (
        f"import sys, runtime; runtime.verify({str(decoder_folder)!r}); print([m for m in {heavy} if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_generating_loads_neither_torch_nor_the_compiler(decoder_folder: Path) -> None:
    heavy = ["torch", "transformers", "onnx", "jinja2", "optimizer", "passes", "pydantic", "yaml"]
    code = f"""
import sys, runtime
runtime.load({str(decoder_folder)!r}, threads=1).generate("hi", max_tokens=2)
print([m for m in {heavy} if m in sys.modules])
"""
    assert python(code) == "[]"


@pytest.mark.parametrize(("before", "after"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_telemetry_is_switched_off_unless_the_user_says_otherwise(
    decoder_folder: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    code = f"import os, runtime; runtime.load({str(decoder_folder)!r}); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, **before) == after


def test_without_onnxruntime_one_line_says_what_to_install(decoder_folder: Path) -> None:
    code = f"""
import sys, runtime
sys.modules["onnxruntime"] = None
try:
    runtime.load({str(decoder_folder)!r})
except runtime.ServingError as error:
    print(error)
"""
    assert python(code).endswith("install it with: pip install 'optimize-models[cpu]'")


def test_every_public_name_exists() -> None:
    import runtime

    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing


def test_no_module_takes_the_name_of_something_public() -> None:
    import runtime

    modules = {module.name for module in pkgutil.iter_modules(runtime.__path__)}
    assert not modules & set(runtime.__all__)  # importing such a one would put it in its place
