"""The store: what a kill, a full disk, damage and a second process may do to it, and what never happens."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from optimizer.errors import CannotRun, CommandError, ExitCode
from optimizer.store import DiskFull, Entry, Store, default_limit, default_root, fingerprint, source_fingerprint

KEY = fingerprint("an entry")
OTHER = fingerprint("another")
PARTS = 12

# Builds one entry of PARTS files. A finished part is never written again, so `made` counts what resuming saved.
BUILDER = f"""
import sys, time
from pathlib import Path
from optimizer.store import Store, atomic_write

def make(folder):
    made = 0
    for number in range({PARTS}):
        part = folder / f"part-{{number}}"
        if not part.exists():
            atomic_write(part, bytes([number]) * 300_000)
            made += 1
        print(number, flush=True)
        time.sleep(float(sys.argv[3]))
    return {{"made": made}}

with Store(Path(sys.argv[1]), notify=lambda line: print(line, file=sys.stderr, flush=True)) as store:
    entry = store.get_or_build(sys.argv[2], make)
    print("built" if entry.is_new else "found", entry.meta["made"], flush=True)
"""


def start_builder(root: Path, pause_s: float, key: str = KEY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root), key, str(pause_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_a(folder: Path) -> dict[str, int]:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "a").write_bytes(b"a" * 1000)
    return {"changed": 7}


def never(folder: Path) -> dict[str, int]:
    raise AssertionError("built again")


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, notes: list[str]) -> Store:
    return Store(tmp_path / "store", notify=notes.append)


def test_a_built_entry_is_found_again_with_its_meta(store: Store) -> None:
    built = store.get_or_build(KEY, write_a)
    found = store.get_or_build(KEY, never)
    assert (built.is_new, found.is_new) == (True, False)
    assert found == Entry(KEY, built.folder, {"changed": 7})
    assert (found.folder / "deep" / "a").read_bytes() == b"a" * 1000


def test_get_of_an_unknown_key_is_none_and_writes_nothing(store: Store) -> None:
    assert store.get(KEY) is None
    assert not store.root.exists()


def test_an_exception_leaves_nothing_of_the_build(store: Store) -> None:
    def make(folder: Path) -> dict[str, int]:
        write_a(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get_or_build(KEY, make)
    assert store.contents() == ()
    assert {name.split("/")[0] for name in files_below(store.root)} == {"locks"}


def test_ctrl_c_leaves_the_build_to_be_resumed(store: Store) -> None:
    def interrupted(folder: Path) -> dict[str, int]:
        write_a(folder)
        (folder / ".b.1.1.unfinished").touch()
        raise KeyboardInterrupt

    def resumed(folder: Path) -> dict[str, int]:
        return {"files": len(list(folder.rglob("*")))}

    with pytest.raises(KeyboardInterrupt):
        store.get_or_build(KEY, interrupted)
    # the folder `deep` and the file in it; what atomic_write had not finished is gone
    assert store.get_or_build(KEY, resumed).meta == {"files": 2}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "link", "meta", "manifest"])
def test_a_damaged_entry_is_told_about_and_built_again(store: Store, notes: list[str], damage: str) -> None:
    folder = store.get_or_build(KEY, write_a).folder
    file, listing = folder / "deep" / "a", folder / "entry.json"
    if damage == "flip":
        file.write_bytes(b"a" * 999 + b"b")
    elif damage == "cut":
        file.write_bytes(b"a" * 999)
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        (folder / "extra").touch()
    elif damage == "link":
        file.rename(folder.parent / "elsewhere")
        file.symlink_to(folder.parent / "elsewhere")
    elif damage == "meta":
        listing.write_text(listing.read_text().replace('"changed":7', '"changed":8'))
    else:
        listing.write_text("{")
    assert store.get(KEY) is None
    assert len(notes) == 1 and "damaged" in notes[0]
    assert store.get_or_build(KEY, write_a).is_new
    assert store.get_or_build(KEY, never).meta == {"changed": 7}


def test_links_are_refused_in_an_entry(store: Store) -> None:
    def make(folder: Path) -> dict[str, int]:
        (folder / "link").symlink_to("/etc/hostname")
        return {}

    with pytest.raises(ValueError, match="files and folders only"):
        store.get_or_build(KEY, make)
    assert store.contents() == ()


def test_builds_killed_at_random_moments_resume_and_end_the_same(tmp_path: Path) -> None:
    run_builder(tmp_path / "reference")
    expected = read_listing(tmp_path / "reference")["files"]
    moments, kills, interrupted = random.Random(20), 0, 0
    while kills < 20:
        root = tmp_path / f"store-{kills}"
        was_interrupted = is_finished = False
        while not is_finished and kills < 20:
            builder = start_builder(root, 0.002)
            assert builder.stdout is not None
            for _ in range(moments.randrange(1, PARTS + 1)):  # PARTS: somewhere around the commit
                builder.stdout.readline()
            time.sleep(moments.random() * 0.006)
            builder.kill()
            builder.communicate()
            kills += 1
            with Store(root) as store:
                is_finished = store.get(KEY) is not None
            was_interrupted |= not is_finished
        interrupted += was_interrupted
        made = int(run_builder(root).split()[-1])
        assert made < PARTS or not was_interrupted, "nothing was resumed"
        assert read_listing(root)["files"] == expected
        assert not list((root / "partial").iterdir())
    assert interrupted > 0


def run_builder(root: Path) -> str:
    command = [sys.executable, "-c", BUILDER, str(root), KEY, "0"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_listing(root: Path) -> Any:
    return json.loads((root / "entries" / KEY / "entry.json").read_bytes())


def test_of_two_processes_one_builds_and_the_other_waits_for_it(tmp_path: Path) -> None:
    first = start_builder(tmp_path, 0.05)
    assert first.stdout is not None and first.stdout.readline() == "0\n"
    second = start_builder(tmp_path, 0.05)
    first_out, _ = first.communicate(timeout=60)
    second_out, second_notes = second.communicate(timeout=60)
    assert first_out.splitlines()[-1] == f"built {PARTS}"
    assert second_out == f"found {PARTS}\n"
    assert "another run is building this" in second_notes


def test_when_the_builder_is_killed_the_waiting_process_resumes(tmp_path: Path) -> None:
    first = start_builder(tmp_path, 0.05)
    assert first.stdout is not None and [first.stdout.readline() for _ in range(3)][-1] == "2\n"
    second = start_builder(tmp_path, 0)
    assert second.stderr is not None and "waiting" in second.stderr.readline()
    first.kill()
    first.communicate()
    second_out, _ = second.communicate(timeout=60)
    made = int(second_out.split()[-1])
    assert "built" in second_out and 0 < made <= PARTS - 3


def test_ctrl_c_while_waiting_ends_the_wait(tmp_path: Path) -> None:
    first = start_builder(tmp_path, 0.2)
    assert first.stdout is not None and first.stdout.readline() == "0\n"
    second = start_builder(tmp_path, 0)
    assert second.stderr is not None and "waiting" in second.stderr.readline()
    second.send_signal(signal.SIGINT)
    _, error = second.communicate(timeout=10)
    assert "KeyboardInterrupt" in error and first.poll() is None
    first.kill()
    first.communicate()


def test_threads_that_build_the_same_key_build_it_once(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> dict[str, int]:
        calls.append(folder)
        time.sleep(0.05)
        return write_a(folder)

    stores = [Store(tmp_path, notify=lambda line: None) for _ in range(4)]
    threads = [threading.Thread(target=store.get_or_build, args=(KEY, make)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_file_size_limit_ends_in_disk_full_with_nothing_left(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from optimizer.store import DiskFull, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def make(folder):
    (folder / "small").write_bytes(b"x" * 1000)
    try:
        (folder / "large").write_bytes(b"x" * 200_000)
    except OSError as error:
        raise RuntimeError("the library says no") from error
try:
    Store(Path({str(tmp_path)!r})).get_or_build({KEY!r}, make)
except DiskFull as error:
    print(int(error.exit_code), error.path, error.free_bytes, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{ExitCode.CANNOT_RUN} {tmp_path / 'partial' / KEY} ")
    assert "File too large" in done.stdout and "optimize clean" in done.stdout
    assert {name.split("/")[0] for name in files_below(tmp_path)} == {"locks"}


@pytest.mark.parametrize("words", ["[Errno 28] No space left on device", "write failed: Disk quota exceeded (122)"])
def test_a_full_disk_is_recognised_in_a_librarys_words(store: Store, words: str) -> None:
    def make(folder: Path) -> dict[str, int]:
        raise RuntimeError(words)

    with pytest.raises(DiskFull, match="cannot write"):
        store.get_or_build(KEY, make)
    assert store.contents() == ()


def test_room_is_asked_for_before_the_work(store: Store) -> None:
    with pytest.raises(DiskFull, match=r"1000\.0 TB needed") as caught:
        store.get_or_build(KEY, never, needed_bytes=10**15)
    assert caught.value.needed_bytes == 10**15 and caught.value.free_bytes > 0
    assert store.contents() == ()


def test_a_store_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotRun, match="OPTIMIZE_STORE"):
        Store(tmp_path / "file").get_or_build(KEY, write_a)


def fill(root: Path, count: int, bytes_each: int) -> list[str]:
    keys = [fingerprint(number) for number in range(count)]
    for age, key in enumerate(reversed(keys)):
        with Store(root) as store:
            folder = store.get_or_build(key, lambda folder: {"n": (folder / "x").write_bytes(b"x" * bytes_each)}).folder
        used = time.time() - age * 86_400 - 60
        os.utime(folder / "entry.json", (used, used))
    return keys  # oldest first


def test_clean_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    keys = fill(tmp_path, 4, 100_000)
    store = Store(tmp_path)
    freed = store.clean(keep_bytes=250_000)
    assert [stored.key for stored in store.contents()] == keys[2:]
    assert 200_000 <= freed < 202_000  # two files and their listings


def test_clean_removes_by_age(tmp_path: Path) -> None:
    keys = fill(tmp_path, 4, 10)
    Store(tmp_path).clean(older_than_days=1.5)
    assert [stored.key for stored in Store(tmp_path).contents()] == keys[2:]


def test_using_an_entry_makes_it_recent(tmp_path: Path) -> None:
    keys = fill(tmp_path, 3, 10)
    with Store(tmp_path) as store:
        store.get(keys[0])
    assert [stored.key for stored in Store(tmp_path).contents()] == [keys[1], keys[2], keys[0]]


def test_clean_everything_leaves_no_file(tmp_path: Path) -> None:
    fill(tmp_path, 3, 10)
    (tmp_path / "trash" / "left").mkdir(parents=True)
    (tmp_path / "trash" / "left" / "by a kill").touch()
    assert Store(tmp_path).clean(everything=True) > 0
    assert files_below(tmp_path) == set()


def test_clean_spares_what_a_run_holds(tmp_path: Path) -> None:
    keys = fill(tmp_path, 2, 10)
    with Store(tmp_path) as run:
        assert run.get(keys[0])
        Store(tmp_path).clean(everything=True)
        assert [stored.key for stored in Store(tmp_path).contents()] == [keys[0]]
    Store(tmp_path).clean(everything=True)
    assert Store(tmp_path).contents() == ()


def test_clean_spares_a_build_in_progress_and_takes_an_abandoned_one(tmp_path: Path) -> None:
    builder = start_builder(tmp_path, 0.2)
    assert builder.stdout is not None and builder.stdout.readline() == "0\n"
    assert Store(tmp_path).clean(everything=True) == 0
    builder.kill()
    builder.communicate()
    assert [stored.is_complete for stored in Store(tmp_path).contents()] == [False]
    assert Store(tmp_path).clean(everything=True) >= 300_000
    assert files_below(tmp_path) == set()


def test_the_size_limit_holds_after_each_build_but_never_takes_this_runs_entries(tmp_path: Path) -> None:
    old = fill(tmp_path, 2, 100_000)
    store = Store(tmp_path, limit_bytes=150_000)
    for key in (KEY, OTHER):
        store.get_or_build(key, lambda folder: {"n": (folder / "x").write_bytes(b"x" * 100_000)})
    left = {stored.key for stored in store.contents()}
    assert left == {KEY, OTHER} and not left & set(old)


def test_two_processes_that_build_and_clean_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = f"""
import random, sys
from pathlib import Path
from optimizer.store import Store, fingerprint
dice = random.Random(int(sys.argv[1]))
for _ in range(60):
    with Store(Path({str(tmp_path)!r}), notify=lambda line: None) as store:
        number = dice.randrange(4)
        content = b"%d" % number
        entry = store.get_or_build(fingerprint(number), lambda folder: {{"n": (folder / "x").write_bytes(content)}})
        assert (entry.folder / "x").read_bytes() == content
        store.clean(everything=dice.random() < 0.5)
        assert (entry.folder / "x").read_bytes() == content
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, str(seed)], stderr=subprocess.PIPE) for seed in (1, 2)]
    for run in runs:
        _, error = run.communicate(timeout=60)
        assert run.returncode == 0, error.decode()


def test_a_fact_is_found_out_once_per_state_of_a_file(store: Store, tmp_path: Path) -> None:
    calls = []

    def find_out(path: Path) -> int:
        calls.append(path)
        return path.stat().st_size

    file = tmp_path / "weights"
    file.write_bytes(b"12345")
    assert [store.fact(file, "size", find_out) for _ in range(2)] == [5, 5]
    assert len(calls) == 2  # too young to trust its times
    wait_until_settled(file)
    assert [store.fact(file, "size", find_out) for _ in range(2)] == [5, 5]
    assert len(calls) == 3
    file.write_bytes(b"1234")
    assert store.fact(file, "size", find_out) == 4


def wait_until_settled(file: Path) -> None:
    time.sleep(max(0.0, file.stat().st_ctime + 2.1 - time.time()))


def test_a_damaged_fact_is_found_out_again(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.touch()
    wait_until_settled(file)
    assert store.fact(file, "answer", lambda path: "right") == "right"
    (fact,) = (store.root / "facts").iterdir()
    fact.write_text(fact.read_text().replace("right", "wrong"))
    assert store.fact(file, "answer", lambda path: "right") == "right"


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPTIMIZE_STORE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path.home() / ".cache" / "optimize-models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "optimize-models"
    monkeypatch.setenv("OPTIMIZE_STORE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"


@pytest.mark.parametrize(("text", "expected"), [("", 50 * 10**9), ("2.5GB", 2_500_000_000), ("800 mb", 8 * 10**8)])
def test_the_limit_is_read_with_its_unit(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv("OPTIMIZE_STORE_LIMIT", text)
    assert default_limit() == expected


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_STORE_LIMIT", "lots")
    with pytest.raises(CommandError, match="'lots', expected a size"):
        default_limit()


def test_a_fingerprint_depends_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(TypeError, match="no JSON form"):
        fingerprint({"a": Path("x")})
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint(float("nan"))


@pytest.mark.parametrize("changed", ["quantize_a", "_near", "_far", "base"])
def test_a_source_fingerprint_sees_every_module_it_reaches(tmp_path: Path, changed: str) -> None:
    package = write_package(tmp_path)
    before = source_fingerprint(package / "quantize_a.py")
    (package / f"{changed}.py").write_text((package / f"{changed}.py").read_text() + "\n# changed\n")
    assert source_fingerprint(package / "quantize_a.py") != before


def test_a_source_fingerprint_ignores_modules_it_does_not_reach(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    before = source_fingerprint(package / "quantize_a.py")
    (package / "_unrelated.py").write_text("x = 1")
    assert source_fingerprint(package / "quantize_a.py") == before


def write_package(folder: Path) -> Path:
    package = folder / "passes"
    package.mkdir()
    sources = {
        "quantize_a": "from passes.base import Pass\ndef f():\n    from passes import _near\n    import torch",
        "_near": "import numpy\nfrom ._far import x",
        "_far": "x = 1",
        "base": "",
        "_unrelated": "",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    return package
