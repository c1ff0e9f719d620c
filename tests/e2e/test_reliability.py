"""What a run survives: kills, Ctrl-C, damage, a full disk, another run beside it."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Finished, digest_in
from .projects import ROOT, Project, call, optimize

FAST_KILLS, ALL_KILLS = 3, 30
INTERRUPTED = (130, -signal.SIGINT)
"""Python itself ends by the signal when Ctrl-C met it inside `exec`; a shell says 130 for both."""


def start(project: Project, *arguments: object) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, so that a signal reaches nobody else."""
    return subprocess.Popen(
        project.command(*arguments),
        env=project.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_after(running: subprocess.Popen[str], seconds: float) -> bool:
    """Kill a run at a moment; say whether it was still there."""
    try:
        running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
    return running.returncode == -signal.SIGKILL


def when(running: subprocess.Popen[str], has_come: Callable[[], bool]) -> bool:
    """Wait until something has come, or the run has ended; say which."""
    while running.poll() is None:
        if has_come():
            return True
        time.sleep(0.001)
    return False


def entries(store: Path, *words: str) -> list[Path]:
    """Return the finished entries whose record has all the words."""
    found = [path.parent for path in store.glob("entries/*/entry.json")]
    return [folder for folder in found if all(word in (folder / "entry.json").read_text() for word in words)]


def forget(store: Path, *, but: str) -> None:
    """Remove all entries from a store but those whose record has a word."""
    for folder in set(entries(store)) - set(entries(store, but)):
        shutil.rmtree(folder)


def whole(project: Project, digest: str) -> bool:
    """Say whether the output is the artifact of this identity, with nothing left beside it."""
    beside = [path.name for path in project.output.parent.iterdir() if "unfinished" in path.name or ".old" in path.name]
    return call(optimize("verify", project.output, "--digest", digest)).returncode == 0 and not beside


@pytest.mark.slow
def test_run_killed_again_and_again_goes_on_and_ends_with_the_same_identity(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path, with_store=False)
    moments = random.Random(7)
    killed = [kill_after(start(project), moments.uniform(1.5, 5.0)) for _ in range(FAST_KILLS)]
    assert any(killed)
    done = project.run()
    assert (done.returncode, digest_in(done.stdout)) == (0, decoder.digest)
    assert whole(project, decoder.digest)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(ALL_KILLS))
def test_run_killed_at_a_random_moment_ends_with_the_same_identity(
    decoder: Finished, tmp_path: Path, seed: int
) -> None:
    project = decoder.project.copy(tmp_path, with_store=False)
    full_s = float(decoder.first.stdout.splitlines()[-1].removesuffix(" s"))
    moments = random.Random(seed)
    while not kill_after(start(project), moments.uniform(0.2, full_s + 1)):  # it had ended: once more, from nothing
        shutil.rmtree(project.store)
        shutil.rmtree(project.output)
    assert not project.output.exists() or whole(project, decoder.digest)
    done = project.run()
    assert (done.returncode, digest_in(done.stdout)) == (0, decoder.digest)
    assert whole(project, decoder.digest)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("model.onnx", marks=pytest.mark.slow),
        "manifest.json",
        pytest.param("evidence", marks=pytest.mark.slow),
    ],
)
def test_kill_while_packing_leaves_no_half_artifact(decoder: Finished, tmp_path: Path, moment: str) -> None:
    project = decoder.project.copy(tmp_path)
    unfinished = project.output.with_name(f".{project.output.name}.unfinished")
    running = start(project)
    came = when(running, (unfinished / moment).exists)
    running.kill()
    running.communicate()
    assert came
    assert not project.output.exists() or whole(project, decoder.digest)
    assert project.run("--quiet").returncode == 0
    assert whole(project, decoder.digest)


@pytest.mark.slow
def test_two_runs_at_once_end_well(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path)
    forget(project.store, but='"nodes"')  # all but the export is made again, by both
    both = [start(project), start(project)]
    ended = [(running.communicate()[0], running.returncode) for running in both]
    assert [(code, digest_in(out)) for out, code in ended] == [(0, decoder.digest)] * 2
    assert whole(project, decoder.digest)


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ('"matched"', "entry.json"),
        pytest.param('"layers_quantized"', "*.*", marks=pytest.mark.slow),
        pytest.param("result.npz", "*.npz", marks=pytest.mark.slow),
    ],
)
def test_damaged_entry_is_told_in_a_line_and_built_again(
    decoder: Finished, tmp_path: Path, words: str, file: str
) -> None:
    project = decoder.project.copy(tmp_path)
    for entry in entries(project.store, words):
        damage(max(entry.rglob(file), key=lambda path: path.stat().st_size))
    done = project.run()
    warning = r".*/entries/[0-9a-f]{64}: damaged \(.* was changed\); it will be built again"
    assert done.stderr
    assert all(re.fullmatch(warning, line) for line in done.stderr.splitlines())
    assert (done.returncode, digest_in(done.stdout)) == (0, decoder.digest)


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_ctrl_c_is_one_line_and_130_and_the_next_run_goes_on(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path)
    forget(project.store, but='"layers_quantized"')
    running = start(project)
    assert when(running, lambda: any(project.store.glob("partial/*/")))
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert err == "interrupted; the next run continues from here\n"
    assert running.returncode in INTERRUPTED
    assert not project.output.exists()
    assert project.run("--stop-after", "quantize_rtn").returncode == 0


def limited(project: Project, limit: int) -> subprocess.CompletedProcess[str]:
    """Run a project where no file may become larger than `limit` bytes, as on a disk that is full."""

    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return project.run(preexec_fn=limit_files)


def test_full_disk_in_the_store_is_exit_4_with_nothing_half_written(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path, with_store=False)
    done = limited(project, 20_000)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4
    assert re.search(r"cannot write: File too large \(.* free\); run `optimize clean`, free some space", line)
    assert not any(project.store.glob("partial/*")) and not project.output.exists()


def test_full_disk_while_packing_is_exit_4_with_nothing_half_written(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path)
    done = limited(project, 20_000)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line) == (
        4,
        f"{project.output}: cannot write: File too large; free some space, or name another folder by --output",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", "store"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_right_to_write_is_found_before_the_work(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path, with_store=False)
    (tmp_path / "closed").mkdir(mode=0o555)
    done = project.run("--output", tmp_path / "closed" / "out")
    assert done.returncode == 2
    assert done.stderr.endswith("cannot be written: Permission denied; name another folder\n")
    assert not project.store.exists()


def test_reader_that_goes_away_is_no_bug(decoder: Finished) -> None:
    command = " ".join(decoder.project.command())
    done = call(["bash", "-c", f"{command} | head -1"], env=decoder.project.environment())
    assert done.stdout.startswith("0/3 source")
    assert done.stderr == ""


def test_only_what_is_missing_is_made_again(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path)
    shutil.rmtree(entries(project.store, '"matched"')[0])
    done = project.run("--json")
    assert [step["is_stored"] for step in json.loads(done.stdout)["steps"]] == [False, True, True, False]
