"""The artifact: a flat folder of data files and the manifest that names each of them by hash.

`verify` reads nothing but the folder and needs nothing but the standard library. A folder is accepted only when it
holds exactly what its manifest lists (`evidence/` aside), byte for byte. Between the check and the loading nobody else
may write to the folder: a hash says what was read, not what will be read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast

from runtime.errors import ArtifactError, DigestError
from runtime.external_data import MalformedGraph, external_locations

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
PREFILL: Final = "prefill.onnx"  # the graph of prompts: a session takes it where it lies beside its own
EVIDENCE: Final = "evidence"  # verdicts and timings: outside the identity, never read by the runtime
MAX_MANIFEST_BYTES: Final = 4 << 20
Kind = Literal["decoder", "classifier", "reranker", "embedder"]
KINDS: Final[tuple[Kind, ...]] = ("decoder", "classifier", "reranker", "embedder")
Activation = Literal["sigmoid", "identity"]
ACTIVATIONS: Final[tuple[Activation, ...]] = ("sigmoid", "identity")

_SUFFIXES: Final = (".onnx", ".data", ".json", ".jinja", ".txt", ".yaml", ".lock", ".md")
_LEGAL: Final = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)([-_][\w-]+(\.\d+)*)?(\.rst)?", re.ASCII | re.IGNORECASE)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FLOAT32: Final = "float32"
_NEWER: Final = ("sentence", "activation")  # keys that the first writers of format 1 did not know: left out when None


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file: its SHA-256 in lower-case hexadecimal and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph; an axis is a length or the name of a length known only at run time."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class KVCache:
    """Shape of a decoder's key/value cache: per layer and side one buffer `[B, heads, capacity, head_width]`."""

    layers: int
    heads: int
    head_width: int
    dtype: str = _FLOAT32


@dataclass(frozen=True)
class Sentence:
    """How an embedder reads a text and forms its vector.

    Attributes:
        pooling: how the graph makes one vector of a text's tokens; those of several modes stand side by side.
        normalized: whether the graph scales that vector to length 1.
        lower_case: whether a text is lower-cased before the tokenizer sees it.
        prompts: name to what is put before a text.
        default_prompt: name of the prompt used when none is asked for.
    """

    pooling: tuple[str, ...]
    normalized: bool
    lower_case: bool
    prompts: Mapping[str, str]
    default_prompt: str | None


@dataclass(frozen=True)
class Lineage:
    """Where the weights come from: Hub id or folder name, resolved commit, licence (as the source states it)."""

    base_model: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, and so the identity of the artifact.

    Attributes:
        kind: what the graph answers: the next token, a class, the score of two texts, or a vector.
        graphs: role to file name: "model", and "prefill" where prompts have a graph of their own.
        inputs, outputs: the graph's signature.
        kv_cache: None for an encoder.
        context_length: most tokens the model takes at once.
        vocabulary: number of token ids the graph knows (V).
        eos_token_ids: generation ends when one of these is chosen.
        labels: class names in the order of the logits.
        sentence: an embedder's; None where its source does not say how tokens are pooled.
        activation: the function that a reranker's score goes through.
        files: every regular file of the folder but the manifest itself and `evidence/`.
    """

    kind: Kind
    graphs: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    context_length: int
    vocabulary: int
    lineage: Lineage
    kv_cache: KVCache | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    labels: tuple[str, ...] | None = None
    sentence: Sentence | None = None
    activation: Activation | None = None
    files: Mapping[str, FileEntry] = field(default_factory=lambda: MappingProxyType({}))

    def to_bytes(self) -> bytes:
        """Return `manifest.json` as it stands on disk; there is one spelling for one content."""
        content = _plain(self)
        unsaid = {name for name in _NEWER if content[name] is None}
        return canonical_json({"format": FORMAT, **{key: content[key] for key in content.keys() - unsaid}})

    @property
    def described_kind(self) -> str:
        """The kind with its article, for messages."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    @cached_property
    def digest(self) -> str:
        """The artifact's identity: SHA-256 of the manifest's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def canonical_json(value: object) -> bytes:
    """Return `value` as JSON with sorted keys, an indent of one and a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def verify(folder: str | os.PathLike[str], digest: str | None = None) -> Manifest:
    """Check every file of the artifact against its manifest and return the manifest.

    Args:
        folder: the artifact.
        digest: the identity the caller expects (64 hexadecimal digits); None accepts any.

    Raises:
        DigestError: `digest` is not 64 hexadecimal digits.
        ArtifactError: at the first thing that is not as listed.
    """
    if digest is not None and not _SHA256.fullmatch(digest.lower()):
        raise DigestError(f"digest: got {digest!r}, expected 64 hexadecimal digits")
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"{root}: is not a folder; expected an artifact, a folder with {MANIFEST}")
    raw = _read_manifest(root)
    if digest is not None:
        _check_digest(root, raw, digest)
    manifest = _parse(raw, root / MANIFEST)
    found = dict(_files(root))
    _compare_names(root, set(found), set(manifest.files))
    for name, entry in sorted(manifest.files.items()):
        _check_file(found[name], entry)
    for name in manifest.graphs.values():
        _check_external_data(found[name], manifest.files)
    return manifest


def write_manifest(folder: str | os.PathLike[str], description: Manifest) -> Manifest:
    """Hash what lies in the folder, write `manifest.json` beside it and return the manifest written.

    Args:
        folder: the finished artifact; an older manifest in it is replaced.
        description: everything but `files`, which is filled in here.

    Raises:
        ArtifactError: for a file or a field that `verify` would refuse.
    """
    root = Path(folder)
    files = {name: FileEntry(_sha256(path), path.stat().st_size) for name, path in sorted(_files(root))}
    manifest = dataclasses.replace(description, files=MappingProxyType(files))
    raw = manifest.to_bytes()
    _parse(raw, root / MANIFEST)
    for name in manifest.graphs.values():
        _check_external_data(root / name, manifest.files)
    (root / MANIFEST).write_bytes(raw)
    return manifest


def is_allowed(name: str) -> bool:
    """Whether a file of this name may lie in an artifact: plain, relative, data only."""
    stem, dot, suffix = name.rpartition(".")
    allowed = _PLAIN.fullmatch(name) is not None and name != MANIFEST
    return allowed and ((stem != "" and dot + suffix in _SUFFIXES) or _LEGAL.fullmatch(name) is not None)


# ---- the folder


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file that the identity covers; raise at links, folders, devices and kinds of file not allowed."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        path, mode = root / entry.name, entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise ArtifactError(f"{path}: is a symbolic link; an artifact holds real files, copy the file itself")
        if entry.name == EVIDENCE and stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise ArtifactError(
                f"{path}: is not a regular file; only {EVIDENCE}/ may stand beside the files, remove it"
            )
        if entry.name == MANIFEST:
            continue
        if not is_allowed(entry.name):
            kinds = " ".join(_SUFFIXES)
            raise ArtifactError(f"{path}: is not data an artifact may hold; expected {kinds} or a licence; remove it")
        yield entry.name, path


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    try:
        status = path.lstat()
    except OSError:
        raise ArtifactError(f"{path}: is missing; {root} is not an artifact") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: is a link or no regular file; an artifact holds real files, copy the file itself")
    if status.st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path}: is too large, got {status.st_size} bytes, expected at most {MAX_MANIFEST_BYTES}")
    return path.read_bytes()


def _check_digest(root: Path, raw: bytes, wanted: str) -> None:
    got = hashlib.sha256(raw).hexdigest()
    if got != wanted.lower():
        raise ArtifactError(f"{root}: is another artifact, got digest {got}, expected {wanted.lower()}")


def _compare_names(root: Path, found: set[str], listed: set[str]) -> None:
    if missing := sorted(listed - found):
        raise ArtifactError(f"{root}: lacks {', '.join(missing)}, listed in {MANIFEST}; get the artifact again")
    if extra := sorted(found - listed):
        raise ArtifactError(f"{root}: holds {', '.join(extra)}, not listed in {MANIFEST}; remove what was added")


def _check_file(path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(f"{path}: was changed, got {size} bytes, expected {entry.bytes}; get the artifact again")
    if (got := _sha256(path)) != entry.sha256:
        raise ArtifactError(f"{path}: was changed, got sha256 {got}, expected {entry.sha256}; get the artifact again")


def _check_external_data(path: Path, listed: Mapping[str, FileEntry]) -> None:
    try:
        locations = external_locations(path.read_bytes())
    except MalformedGraph as error:
        raise ArtifactError(f"{path}: is not an ONNX graph ({error}); build the artifact again") from None
    for location in sorted(locations - set(listed)):
        raise ArtifactError(f"{path}: keeps weights in {location!r}, which is not a file of this artifact; do not load")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the manifest


def _plain(value: object) -> Any:
    """Return dataclasses, mappings and tuples as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _parse(raw: bytes, path: Path) -> Manifest:
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON ({error}); get the artifact again") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    number = content.get("format")
    if type(number) is int and number > FORMAT:
        raise ArtifactError(f"{path}: has format {number}, expected at most {FORMAT}; install a newer optimize-models")
    if type(number) is not int or number < 1:
        raise ArtifactError(f"{path}: format: got {number!r}, expected {FORMAT}")
    manifest = _manifest(_Reader(str(path), content))
    if manifest.to_bytes() != raw:
        raise ArtifactError(f"{path}: is not in canonical form (sorted keys, indent 1); it was edited, get it again")
    return manifest


@dataclass
class _Reader:
    """Takes typed fields out of one JSON object and names the field in every complaint."""

    where: str
    content: Any

    def __post_init__(self) -> None:
        if not isinstance(self.content, dict):
            raise ArtifactError(f"{self.where}: got {_short(self.content)}, expected an object")

    def keys(self, *names: str, optional: Sequence[str] = ()) -> None:
        """Refuse missing and unknown keys."""
        if missing := sorted(set(names) - set(self.content)):
            raise ArtifactError(f"{self.where}: lacks {', '.join(missing)}; get the artifact again")
        if unknown := sorted(set(self.content) - {*names, *optional}):
            raise ArtifactError(f"{self.where}: unknown key {unknown[0]!r}; install a newer optimize-models")

    def at(self, name: str) -> _Reader:
        return _Reader(f"{self.where}: {name}", self.content[name])

    def text(self, name: str) -> str:
        return cast(str, self._typed(name, str, "a string"))

    def text_or_none(self, name: str) -> str | None:
        return None if self.content[name] is None else self.text(name)

    def count(self, name: str, least: int = 1) -> int:
        value = cast(int, self._typed(name, int, "an integer"))
        if not least <= value < 1 << 62:
            self.refuse(name, f"an integer of at least {least}")
        return value

    def flag(self, name: str) -> bool:
        return cast(bool, self._typed(name, bool, "true or false"))

    def items(self, name: str) -> list[Any]:
        return cast("list[Any]", self._typed(name, list, "a list"))

    def refuse(self, name: str, expected: str) -> None:
        raise ArtifactError(f"{self.where}: {name}: got {_short(self.content[name])}, expected {expected}")

    def _typed(self, name: str, kind: type, expected: str) -> object:
        value = self.content[name]
        if type(value) is not kind:  # not isinstance: JSON's true is no integer
            self.refuse(name, expected)
        return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _manifest(read: _Reader) -> Manifest:
    names = {item.name for item in dataclasses.fields(Manifest)} - set(_NEWER)
    read.keys("format", *names, optional=_NEWER)
    if read.text("kind") not in KINDS:
        read.refuse("kind", " or ".join(KINDS))
    files = _file_entries(read.at("files"))
    vocabulary = read.count("vocabulary")
    manifest = Manifest(
        kind=cast(Kind, read.text("kind")),
        graphs=_graphs(read.at("graphs"), files),
        inputs=_tensors(read, "inputs"),
        outputs=_tensors(read, "outputs"),
        context_length=read.count("context_length"),
        vocabulary=vocabulary,
        lineage=_lineage(read.at("lineage")),
        kv_cache=None if read.content["kv_cache"] is None else _kv_cache(read.at("kv_cache")),
        eos_token_ids=_token_ids(read, "eos_token_ids", vocabulary),
        bos_token_id=None if read.content["bos_token_id"] is None else read.count("bos_token_id", 0),
        labels=_labels(read),
        sentence=_sentence(read.at("sentence")) if "sentence" in read.content else None,
        activation=_activation(read) if "activation" in read.content else None,
        files=files,
    )
    if (manifest.kind == "reranker") != (manifest.activation is not None):
        raise ArtifactError(f"{read.where}: activation: expected one for a reranker, and none for another kind")
    if manifest.sentence is not None and manifest.kind != "embedder":
        read.refuse("sentence", f"none for a {manifest.kind}")
    if (manifest.kind == "decoder") != (manifest.kv_cache is not None):
        read.refuse("kv_cache", f"{'an object' if manifest.kind == 'decoder' else 'null'} for a {manifest.kind}")
    return manifest


def _file_entries(read: _Reader) -> Mapping[str, FileEntry]:
    entries = {}
    for name in read.content:
        if not is_allowed(name):
            raise ArtifactError(f"{read.where}: {_short(name)} is not a plain name of a data file; do not load")
        entry = read.at(name)
        entry.keys("sha256", "bytes")
        if not _SHA256.fullmatch(entry.text("sha256")):
            entry.refuse("sha256", "64 hexadecimal digits")
        entries[name] = FileEntry(entry.text("sha256"), entry.count("bytes", 0))
    return MappingProxyType(entries)


def _graphs(read: _Reader, files: Mapping[str, FileEntry]) -> Mapping[str, str]:
    read.keys("model", optional=("prefill",))
    for role in read.content:
        if read.text(role) not in files or not read.text(role).endswith(".onnx"):
            read.refuse(role, "an .onnx file of this artifact")
    if read.content.get("prefill", PREFILL) != PREFILL:
        read.refuse("prefill", PREFILL)
    return MappingProxyType({role: read.text(role) for role in sorted(read.content)})


def _tensors(read: _Reader, name: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for position, item in enumerate(read.items(name)):
        one = _Reader(f"{read.where}: {name}[{position}]", item)
        one.keys("name", "dtype", "shape")
        if not all(type(axis) in (int, str) for axis in one.items("shape")):
            one.refuse("shape", "a list of integers and names")
        tensors.append(TensorSpec(one.text("name"), one.text("dtype"), tuple(one.items("shape"))))
    return tuple(tensors)


def _lineage(read: _Reader) -> Lineage:
    read.keys("base_model", "revision", "license")
    return Lineage(read.text("base_model"), read.text_or_none("revision"), read.text_or_none("license"))


def _kv_cache(read: _Reader) -> KVCache:
    read.keys("layers", "heads", "head_width", "dtype")
    return KVCache(read.count("layers"), read.count("heads"), read.count("head_width"), read.text("dtype"))


def _token_ids(read: _Reader, name: str, vocabulary: int) -> tuple[int, ...]:
    ids: Sequence[object] = read.items(name)
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        read.refuse(name, f"a list of integers from 0 to {vocabulary - 1}")
    return tuple(cast("Sequence[int]", ids))


def _labels(read: _Reader) -> tuple[str, ...] | None:
    if read.content["labels"] is None:
        return None
    if not all(type(label) is str for label in read.items("labels")):
        read.refuse("labels", "a list of strings")
    return tuple(read.items("labels"))


def _sentence(read: _Reader) -> Sentence:
    read.keys("pooling", "normalized", "lower_case", "prompts", "default_prompt")
    if not read.items("pooling") or not all(type(mode) is str for mode in read.items("pooling")):
        read.refuse("pooling", "a list of names")
    prompts = read.at("prompts")
    texts = {name: prompts.text(name) for name in prompts.content}
    default = read.text_or_none("default_prompt")
    if default is not None and default not in texts:
        read.refuse("default_prompt", "the name of a prompt")
    return Sentence(
        pooling=tuple(read.items("pooling")),
        normalized=read.flag("normalized"),
        lower_case=read.flag("lower_case"),
        prompts=MappingProxyType(texts),
        default_prompt=default,
    )


def _activation(read: _Reader) -> Activation:
    if read.text("activation") not in ACTIVATIONS:
        read.refuse("activation", " or ".join(ACTIVATIONS))
    return cast(Activation, read.text("activation"))
