"""What the processor can do that changes how a graph must be run."""

from __future__ import annotations

import platform
from pathlib import Path

_EXACT = {"avx512_vnni", "avx_vnni"}


def int8_sums_may_overflow(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Return whether ONNX Runtime's products of uint8 by int8 are summed in 16 bits, where they can overflow.

    They are on x86 without VNNI: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
    Where it cannot be told, they may.

    Args:
        cpuinfo: the system's list of processors and their features.
        machine: kind of processor; None asks the system.
    """
    if (machine or platform.machine()).lower() not in {"x86_64", "amd64", "i386", "i686"}:
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except (OSError, ValueError):
        return True
    features = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return not features or not all(each & _EXACT for each in features)
