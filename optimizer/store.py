"""Keep what the passes made, by content hash, so that a run resumes, reuses and never sees half of anything.

    ROOT/entries/KEY/       finished: the pass's files and `entry.json`, which lists their hashes and is written last
    ROOT/partial/KEY/       being built, or left by a killed build for the next one to resume
    ROOT/locks/KEY.use      shared lock of each run that uses or builds KEY; exclusive while KEY is being removed
    ROOT/locks/KEY.build    exclusive lock of the one run that builds KEY
    ROOT/facts/             what was found out about files outside the store, by path, size and times
    ROOT/measured/          what passes and scorings took, line by line: `costs.py`
    ROOT/trash/             on its way out

A name appears in `entries` by one rename, so a kill at any moment leaves a finished entry or a partial one. Data is
not synced before that rename: after a power cut the hashes tell, and the entry is built again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.errors import CannotRun, CommandError
from optimizer.fingerprint import canonical_json, fingerprint, source_fingerprint
from passes._files import UNFINISHED, atomic_write, hash_file, sync_folder

__all__ = [
    "DiskFull", "Entry", "Store", "Stored", "atomic_write", "default_limit", "default_root", "fingerprint",
    "format_bytes", "hash_file", "source_fingerprint",
]  # fmt: skip

FORMAT = 1
DEFAULT_LIMIT_BYTES = 50 * 10**9
ENTRY_NAME = "entry.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNITS = {"T": 10**12, "G": 10**9, "M": 10**6, "K": 10**3, "": 1}
_KEY = re.compile(r"[0-9a-f]{64}")
_DAY_S = 86_400.0
_FACT_LIFE_S = 90 * _DAY_S
_CLOCK_STEP_NS = 2_000_000_000  # a file changed this recently could change again within one tick of its clock

logger = logging.getLogger(__name__)


class DiskFull(CannotRun):
    """The disk, the quota or the largest allowed file does not hold what was to be written.

    Attributes:
        path: the folder that was being written.
        free_bytes: what was left on its disk.
        needed_bytes: what the work asked for; None when the lack was found by writing.
    """

    def __init__(self, path: Path, reason: str, needed_bytes: int | None = None) -> None:
        self.path, self.needed_bytes = path, needed_bytes
        self.free_bytes = _free_bytes(path)
        need = "" if needed_bytes is None else f", {format_bytes(needed_bytes)} needed"
        super().__init__(
            f"{path}: cannot write: {reason} ({format_bytes(self.free_bytes)} free{need}); "
            "run `optimize clean`, free some space, or set OPTIMIZE_STORE to a folder on a larger disk"
        )


@dataclass(frozen=True)
class Entry:
    """A finished entry: its folder, what its maker said about it, and whether it was made by this very call."""

    key: str
    folder: Path
    meta: Mapping[str, Any]
    is_new: bool = False


@dataclass(frozen=True)
class Stored:
    """What one key takes on the disk; `last_used` in seconds since the epoch."""

    key: str
    bytes: int
    last_used: float
    is_complete: bool


class Store:
    """Entries by key (64 hexadecimal digits) below `root`; many processes may use one store at once.

    Entries that were got or made are safe from every `clean` until `close`, or until the process ends.

    Args:
        root: folder of the store; made when first written to.
        limit_bytes: size to which each new entry shrinks the store, least recently used first; None for no limit.
        notify: told in one line that an entry was damaged, or that this process waits for another.
    """

    def __init__(
        self, root: Path, limit_bytes: int | None = None, notify: Callable[[str], None] = logger.warning
    ) -> None:
        self.root, self.limit_bytes, self._notify = root.absolute(), limit_bytes, notify
        self._used: dict[str, int] = {}  # key -> descriptor that holds its shared lock

    @classmethod
    def default(cls, notify: Callable[[str], None] = logger.warning) -> Store:
        """Return the user's store: where OPTIMIZE_STORE and OPTIMIZE_STORE_LIMIT say, or the defaults."""
        return cls(default_root(), default_limit(), notify)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every entry this store has handed out."""
        while self._used:
            os.close(self._used.popitem()[1])

    def get(self, key: str) -> Entry | None:
        """Return the finished entry `key` if all its files have the hashes it lists, else None.

        A damaged one is removed and told about. The entry counts as used now.
        """
        if not self._entry_folder(key).is_dir():
            return None
        with _disk_full_told(self.root), self._in_use(key):
            entry, damage = _read_entry(self._entry_folder(key), key)
            if damage:
                with self._build_lock(key):
                    entry = self._intact(key)
            return entry

    def get_or_build(
        self, key: str, make: Callable[[Path], Mapping[str, Any]], needed_bytes: int | None = None
    ) -> Entry:
        """Return the entry `key`, having called `make(folder)` if there was none; it returns the entry's `meta`.

        `folder` is empty, or holds what a killed build of the same key left there. One process builds; others wait
        and get its entry. When `make` raises an Exception the folder is removed; Ctrl-C leaves it to be resumed.

        Raises:
            DiskFull: less than `needed_bytes` are free, or writing found the disk full; nothing half-written stays.
        """
        entry = self.get(key)
        if entry is not None:
            return entry
        with _disk_full_told(self.root), self._in_use(key), self._build_lock(key):
            entry = self._intact(key) or self._build(key, make, needed_bytes)
        if self.limit_bytes is not None:
            self.clean(keep_bytes=self.limit_bytes)
        return entry

    def fact(self, path: Path, name: str, find_out: Callable[[Path], Any]) -> Any:
        """Return `find_out(path)` (JSON), remembered for as long as the file keeps its path, inode, size and times."""
        before = _state(path)
        place = self.root / "facts" / fingerprint([name, before])
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(place.read_bytes())
            if known["digest"] == fingerprint(known["value"]):
                return known["value"]
        value = find_out(path)
        if _state(path) == before and time.time_ns() - max(before[-2:]) > _CLOCK_STEP_NS:
            with suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(place, canonical_json({"value": value, "digest": fingerprint(value)}).encode())
        return value

    def contents(self) -> tuple[Stored, ...]:
        """Return what the store holds, least recently used first, unfinished builds included."""
        folders = [*(self.root / "entries").glob("*"), *(self.root / "partial").glob("*")]
        keys = {folder.name for folder in folders if _KEY.fullmatch(folder.name)}
        return tuple(sorted(map(self._stored, keys), key=lambda stored: (stored.last_used, stored.key)))

    def clean(
        self, older_than_days: float | None = None, keep_bytes: int | None = None, everything: bool = False
    ) -> int:
        """Remove entries not used for `older_than_days`, then the least recently used until `keep_bytes` are left.

        With `everything`, all of them. Never one that a run is using or building. Returns the bytes freed.
        """
        self._clean_facts(everything)
        for left_by_a_kill in (self.root / "trash").glob("*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        contents = self.contents()
        total = sum(stored.bytes for stored in contents)
        freed = 0
        for stored in contents:
            is_old = older_than_days is not None and stored.last_used < time.time() - older_than_days * _DAY_S
            is_over = keep_bytes is not None and total - freed > keep_bytes
            if (everything or is_old or is_over) and self._remove(stored.key):
                freed += stored.bytes
        return freed

    def _entry_folder(self, key: str) -> Path:
        assert _KEY.fullmatch(key), key
        return self.root / "entries" / key

    def _partial_folder(self, key: str) -> Path:
        return self.root / "partial" / key

    def _intact(self, key: str) -> Entry | None:
        """Return the entry, or remove it if it is damaged; the build lock is held."""
        folder = self._entry_folder(key)
        entry, damage = _read_entry(folder, key)
        if damage:
            self._notify(f"{folder}: damaged ({damage}); it will be built again")
            self._discard(folder)
        return entry

    def _build(self, key: str, make: Callable[[Path], Mapping[str, Any]], needed_bytes: int | None) -> Entry:
        partial = self._partial_folder(key)
        if needed_bytes is not None and _free_bytes(partial) + _folder_bytes(partial) < needed_bytes:
            raise DiskFull(partial, "not enough room", needed_bytes)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / ENTRY_NAME).unlink(missing_ok=True)
        for unfinished in partial.rglob(f"*{UNFINISHED}"):
            unfinished.unlink()
        try:
            with _disk_full_told(partial):
                meta = make(partial)
                return self._commit(key, meta)
        except Exception:
            self._discard(partial)
            raise

    def _commit(self, key: str, meta: Mapping[str, Any]) -> Entry:
        partial, folder = self._partial_folder(key), self._entry_folder(key)
        files = {name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for name, path in _files(partial)}
        content: dict[str, Any] = {"format": FORMAT, "key": key, "files": files, "meta": dict(meta)}
        content["digest"] = fingerprint(content)
        atomic_write(partial / ENTRY_NAME, canonical_json(content).encode())
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
        sync_folder(folder.parent)
        return Entry(key, folder, json.loads(canonical_json(meta)), is_new=True)

    def _discard(self, folder: Path) -> None:
        """Take a folder out of sight in one step, then delete it."""
        trash = self.root / "trash" / uuid.uuid4().hex
        with suppress(OSError):  # nothing there, or a disk too full for a new name
            trash.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _remove(self, key: str) -> bool:
        use, build = self._lock_path(key, "use"), self._lock_path(key, "build")
        descriptor = _lock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            return False
        try:
            for folder in (self._entry_folder(key), self._partial_folder(key)):
                self._discard(folder)
            for path in (build, use):  # nobody waits for `build` without holding `use`
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return True

    def _stored(self, key: str) -> Stored:
        entry, partial = self._entry_folder(key), self._partial_folder(key)
        times = [_modified(path) for path in (entry / ENTRY_NAME, partial, *_listed(partial))]
        return Stored(key, _folder_bytes(entry) + _folder_bytes(partial), max(times), entry.is_dir())

    def _clean_facts(self, everything: bool) -> None:
        for path in (self.root / "facts").glob("*"):
            if everything or _modified(path) < time.time() - _FACT_LIFE_S:
                path.unlink(missing_ok=True)
        if everything:
            shutil.rmtree(self.root / "measured", ignore_errors=True)

    def _lock_path(self, key: str, purpose: str) -> Path:
        return self.root / "locks" / f"{key}.{purpose}"

    @contextmanager
    def _in_use(self, key: str) -> Iterator[None]:
        """Hold the key's shared lock; keep it beyond the block if there is an entry then."""
        if key not in self._used:
            descriptor = _lock(self._lock_path(key, "use"), fcntl.LOCK_SH)
            assert descriptor is not None
            self._used[key] = descriptor
        try:
            yield
        finally:
            if not self._entry_folder(key).is_dir():
                os.close(self._used.pop(key))

    @contextmanager
    def _build_lock(self, key: str) -> Iterator[None]:
        path = self._lock_path(key, "build")
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            self._notify(f"{self._partial_folder(key)}: another run is building this; waiting for it")
            descriptor = _lock(path, fcntl.LOCK_EX)
        assert descriptor is not None
        try:
            yield
        finally:
            os.close(descriptor)


def default_root() -> Path:
    """Return OPTIMIZE_STORE, else `optimize-models` in XDG_CACHE_HOME, else in ~/.cache."""
    if root := os.environ.get("OPTIMIZE_STORE"):
        return Path(root).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "optimize-models"


def default_limit() -> int:
    """Return OPTIMIZE_STORE_LIMIT in bytes, else 50 GB.

    Raises:
        CommandError: the variable holds no size.
    """
    text = os.environ.get("OPTIMIZE_STORE_LIMIT")
    if not text:
        return DEFAULT_LIMIT_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise CommandError(f"OPTIMIZE_STORE_LIMIT: got {text!r}, expected a size such as 50GB or 800MB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """Write a number of bytes for people: `1.5 GB`."""
    unit = next(unit for unit, size in _UNITS.items() if count >= size or size == 1)
    return f"{count / _UNITS[unit]:.{1 if unit else 0}f} {unit}B"


def _read_entry(folder: Path, key: str) -> tuple[Entry | None, str]:
    """Return the entry, or why it is damaged; neither when there is none. Marks it as used."""
    if not folder.is_dir():
        return None, ""
    try:
        content = json.loads((folder / ENTRY_NAME).read_bytes())
        digest = content.pop("digest")
        if (content["format"], content["key"], digest) != (FORMAT, key, fingerprint(content)):
            return None, f"{ENTRY_NAME} was changed"
        found = dict(_files(folder))
        del found[ENTRY_NAME]
        if found.keys() != content["files"].keys():
            return None, f"files differ from its list: {sorted(found.keys() ^ content['files'].keys())[:3]}"
        for name, path in found.items():
            listed = content["files"][name]
            if path.stat().st_size != listed["bytes"] or hash_file(path) != listed["sha256"]:
                return None, f"{name} was changed"
        os.utime(folder / ENTRY_NAME)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return Entry(key, folder, content["meta"]), ""


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: a stored folder may hold files and folders only")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _state(path: Path) -> tuple[str, int, int, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _listed(folder: Path) -> list[Path]:
    """Return the files below a folder that another process may be removing."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in _listed(folder):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _lock(path: Path, operation: int) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None when it is taken and must not be waited for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _lock_file(path, operation)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise CannotRun(
            f"{path.parent}: cannot be used by the store: {error.strerror}; "
            "set OPTIMIZE_STORE to a local folder you can write to"
        ) from error


def _lock_file(path: Path, operation: int) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed while this process waited for it


@contextmanager
def _disk_full_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        reason = _full_reason(error)
        if reason is None:
            raise
        raise DiskFull(folder, reason) from error


def _full_reason(error: BaseException | None) -> str | None:
    """Return what the system said when a full disk is behind an exception; C++ libraries only quote its words."""
    while error is not None:
        for code in _FULL:
            words = os.strerror(code)
            if (isinstance(error, OSError) and error.errno == code) or words in str(error):
                return words
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
