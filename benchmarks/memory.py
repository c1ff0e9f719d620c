"""Peak memory of `optimize` from a model's folder to its int4 artifact, at several depths of one shape.

The claim: it is the memory of one block (and of the embedding), so the peak is flat in depth. The command line is run
as a user runs it, in a fresh process. Three numbers are taken of it: the peak resident set as the kernel counts it
(`VmHWM`), and, polled, the peaks of its anonymous pages, which it must have, and of its file-backed pages, which
are the page cache of files it has mapped and can be dropped. At its end the build lets the artifact answer in a process
of its own, as a server would load it; what that one needs grows with the artifact and stands in a column of its own.
Random bf16 weights are written shard by shard by another process.

    python benchmarks/memory.py --work DIR
    python benchmarks/memory.py --work DIR --shape llama-3.2-3b --depths 28 --method quantize_gptq
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowering import LIBRARIES, Job, LoweringFailed, last_line
from report import header, machine, say, table, versions, write_json
from shapes import SHAPES

POLL_S = 0.05
MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Peaks of one process, in bytes; each on its own, so they need not add up.

    Attributes:
        resident: largest resident set of the build, as the kernel counts it.
        with_proof: largest resident set of the build or of the process that proves the artifact.
        anonymous: largest amount of private memory seen by polling.
        file_backed: largest amount of resident pages of mapped files seen by polling.
        anonymous_at_s: when `anonymous` was seen.
        seconds: how long the process ran.
    """

    resident: int
    with_proof: int
    anonymous: int
    file_backed: int
    anonymous_at_s: float
    seconds: float


def watch(command: list[str], environment: dict[str, str], log: Path) -> Peak:
    """Run a command and return its peaks; raise LoweringFailed when it fails."""
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    anonymous = file_backed = highest = 0
    anonymous_at_s = 0.0
    while True:
        # Not Popen.poll: only wait4 tells the kernel's own peak.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        elapsed_s = time.perf_counter() - start
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        resident_now, anonymous_now = _resident(process.pid)
        highest = max(highest, _high_water(process.pid))
        file_backed = max(file_backed, resident_now - anonymous_now)
        if anonymous_now > anonymous:
            anonymous, anonymous_at_s = anonymous_now, elapsed_s
        time.sleep(POLL_S)
    if process.returncode:
        raise LoweringFailed(f"ended with {process.returncode}: {last_line(log.read_text())}")
    return Peak(highest, usage.ru_maxrss * 1024, anonymous, file_backed, anonymous_at_s, elapsed_s)


def _high_water(pid: int) -> int:
    """Return the largest resident set a process has had, in bytes; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _resident(pid: int) -> tuple[int, int]:
    """Return (resident, anonymous) bytes of a process; nothing when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return kib.get("Rss", 0) * 1024, kib.get("Anonymous", 0) * 1024


def measure(depth: int, options: argparse.Namespace) -> tuple[int, Peak]:
    """Lower the shape at one depth; return the bytes of its weights and the peaks, and leave no files behind."""
    work = options.work.absolute() / "memory"
    source = work / f"{options.shape}-{depth}"
    writer = [sys.executable, str(Path(__file__).with_name("shapes.py")), options.shape, str(source)]
    try:
        subprocess.run([*writer, "--layers", str(depth)], check=True, stdout=subprocess.DEVNULL)
        weights_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        job = Job(
            source, work / "job", options.group_size, options.threads, method=options.method, samples=options.samples
        )
        return weights_bytes, watch(job.prepare(), dict(job.environment()), work / f"{depth}.log")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(work / "job", ignore_errors=True)


def imports_alone(work: Path) -> Peak:
    """Return the peaks of a process that only imports the libraries: the floor of every other number."""
    work.mkdir(parents=True, exist_ok=True)
    imports = "import torch, transformers.modeling_utils, onnx, onnx_ir, onnxscript, onnxruntime"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    return watch([sys.executable, "-c", imports], environment, work / "imports.log")


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way; up to 12 GB")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", default="quantize_rtn", help="the pass that quantizes")
    parser.add_argument("--samples", type=int, default=128, help="calibration texts of 512 tokens, 105 at most")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    about = machine() | {"threads": str(options.threads)}
    floor = imports_alone(options.work.absolute() / "memory")
    peaks = {}
    rows = [_row("imports alone", "", "", floor)]
    for depth in options.depths:
        weights_bytes, peaks[depth] = measure(depth, options)
        shape = replace(SHAPES[options.shape], layers=depth)
        rows.append(_row(str(depth), f"{shape.parameters / 1e6:.0f}", f"{weights_bytes / MIB:.0f}", peaks[depth]))
        say(f"{depth} layers: {peaks[depth].resident / MIB:.0f} MiB")
    columns = [
        "layers",
        "parameters, M",
        "bf16 weights, MiB",
        "peak RSS, MiB",
        "anonymous",
        "file-backed",
        "with the proof",
        "seconds",
    ]
    libraries = versions(LIBRARIES)
    print(
        header(
            f"Peak memory of lowering {options.shape} to int4 g{options.group_size} by {options.method}",
            about,
            libraries,
        )
    )
    print(table(columns, rows))
    first, last = peaks[options.depths[0]], peaks[options.depths[-1]]
    print(
        f"From {options.depths[0]} to {options.depths[-1]} layers: peak RSS x{last.resident / first.resident:.2f}, "
        f"anonymous x{last.anonymous / first.anonymous:.2f}."
    )
    if options.json:
        document = {"about": about, "versions": libraries, "shape": options.shape, "imports": asdict(floor)}
        write_json(options.json, document | {"depths": {depth: asdict(peak) for depth, peak in peaks.items()}})


def _row(name: str, parameters: str, weights: str, peak: Peak) -> list[str]:
    sizes = [f"{size / MIB:.0f}" for size in (peak.resident, peak.anonymous, peak.file_backed, peak.with_proof)]
    return [name, parameters, weights, *sizes, f"{peak.seconds:.0f}"]


if __name__ == "__main__":
    try:
        main()
    except LoweringFailed as error:
        sys.exit(f"lowering failed: {error}")
