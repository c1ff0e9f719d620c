"""Put the artifact together: written aside, verified by loading and answering, then renamed. Never half of one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from optimizer.errors import CannotRun, CommandError, OptimizeError
from optimizer.schema import written
from optimizer.source import CONFIGURATION_FILES, NOTICE_FILES, Source, eos_token_ids
from passes._kind import Kind, kind_of, vocabulary_size
from passes._sentence import context_length, score_activation, sentence_settings
from passes.base import Model
from runtime.artifact import (
    EVIDENCE,
    MANIFEST,
    KVCache,
    Lineage,
    Manifest,
    Sentence,
    TensorSpec,
    is_allowed,
    write_manifest,
)

GRAPH = "model.onnx"
PROBE_TOKENS = 4
USES: Mapping[Kind, str] = {
    "decoder": 'optimize generate DIR --prompt "..."',
    "classifier": "optimize predict DIR < texts",
    "reranker": 'optimize rerank DIR --query "..." < documents',
    "embedder": "optimize embed DIR < texts",
}
"""What a model card says of how the artifact is asked."""
DEFAULT_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}
"""What a config.json means that names no labels."""
MIXED = "mixed"
"""Dtype of a cache whose layers keep different ones; the graph's inputs say which."""
UNFINISHED, OLD = "unfinished", "old"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Contents:
    """What goes into an artifact besides the model.

    Attributes:
        recipe: becomes `recipe.yaml`.
        lock: becomes `optimize.lock`.
        card: becomes `README.md`.
        write_evidence: fills the folder `evidence/`.
    """

    recipe: str
    lock: bytes
    card: str
    write_evidence: Callable[[Path], None]


def write_artifact(folder: Path, source: Source, model: Model, contents: Contents) -> Manifest:
    """Make `folder` the artifact of `model`; an older artifact there is replaced.

    All is written beside it first. A kill between the two renames of the replacement leaves the older one under the
    hidden name that the next run removes, never a mixture.

    Args:
        folder: where it goes.
        source: where the model comes from.
        model: at the stage the runtime serves.
        contents: what to put beside it.

    Raises:
        CommandError: `folder` holds something that is no artifact, or cannot be written.
        CannotRun: the disk is full, or the artifact does not load or answer.
    """
    require_replaceable(folder)
    folder = folder.resolve()  # what a link points to is replaced, not the link
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            return _write(folder, source, model, contents)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def has_artifact(folder: Path) -> bool:
    """Return whether an artifact, damaged or not, lies in `folder`."""
    return _listed(folder) is not None


def require_replaceable(folder: Path) -> None:
    """Refuse a place that cannot be written, or holds anything that is not part of an artifact.

    Raises:
        CommandError: says what lies there.
    """
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CommandError(f"--output: {place} is a file, expected a folder; name another")
    if place == folder.resolve():
        _require_only_artifact(folder)
        place = place.parent
    try:  # asking for rights would miss file systems that are read-only
        with TemporaryDirectory(dir=place, prefix=f".{folder.name}."):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> OptimizeError:
    if error.errno in _FULL:
        advice = "free some space, or name another folder by --output"
        return CannotRun(f"{folder}: cannot write: {error.strerror}; {advice}")
    return CommandError(f"--output: {folder} cannot be written: {error.strerror}; name another folder")


def _require_only_artifact(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    listed = _listed(folder)
    if names and listed is None:
        raise CommandError(f"--output: {folder} holds files that are no artifact; name another folder or empty it")
    if others := sorted(names - {MANIFEST, EVIDENCE, *(listed or ())}):
        raise CommandError(f"--output: {folder} holds {others[0]} beside an artifact; move it, or name another folder")


def _listed(folder: Path) -> set[str] | None:
    """Return the files that an artifact's manifest names, of any format; None where there is no such manifest."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return {str(name) for name in content["files"]} if type(content["format"]) is int else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keep other runs from replacing artifacts in `parent` meanwhile, where the file system has locks."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(folder: Path, source: Source, model: Model, contents: Contents) -> Manifest:
    aside, old = (folder.with_name(f".{folder.name}.{what}") for what in (UNFINISHED, OLD))
    for left_by_a_kill in (aside, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    try:
        aside.mkdir()
        _copy_model(model, aside)
        _copy_assets(model.assets, aside)
        (aside / "recipe.yaml").write_text(contents.recipe, encoding="utf-8")
        (aside / "optimize.lock").write_bytes(contents.lock)
        (aside / "README.md").write_text(contents.card, encoding="utf-8")
        manifest = write_manifest(aside, _describe(source, model, aside))
        _prove(aside, manifest.kind)
        (aside / EVIDENCE).mkdir()
        contents.write_evidence(aside / EVIDENCE)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    finally:
        for folder_aside in (aside, old):
            shutil.rmtree(folder_aside, ignore_errors=True)
    return manifest


def model_card(name: str, source: Source, steps: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the artifact's README: where it comes from, what was done (passes and their options), how to use it."""
    front = "".join(
        f"{key}: {value}\n" for key, value in (("license", source.license), ("base_model", source.base_model)) if value
    )
    chain = "".join(f"- `{step}`{': ' if options else ''}{_options_text(options)}\n" for step, options in steps)
    return (
        f"---\n{front}---\n# {name}\n\nMade from {source.base_model}"
        f"{f' at {source.revision}' if source.revision else ''} by these passes:\n\n{chain}\n"
        f"`recipe.yaml` and `optimize.lock` say how, `evidence/` what was measured.\n\n"
        f"    optimize verify DIR\n    {USES[kind_of(source.model.config)]}\n"
    )


def _options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {written(value)}" for name, value in options.items())


def _copy_model(model: Model, folder: Path) -> None:
    from passes._graph import graph_files

    for name in graph_files(model.folder):
        shutil.copyfile(model.folder / name, folder / name)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_assets(assets: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and legal texts; links of a Hub cache become files."""
    notices = {path.name for pattern in NOTICE_FILES for path in assets.glob(pattern)}
    for name in {*CONFIGURATION_FILES, *notices} - {"config.json"}:
        if (assets / name).is_file() and is_allowed(name):
            shutil.copyfile(assets / name, folder / name)


def _describe(source: Source, model: Model, folder: Path) -> Manifest:
    from passes._graph import graph_files

    config = model.config
    inputs, outputs = _signature(folder / GRAPH)
    labels = None
    kind = kind_of(config)
    if kind == "classifier":
        named = config.get("id2label") or DEFAULT_LABELS
        labels = tuple(label for _, label in sorted((int(index), str(label)) for index, label in named.items()))
    return Manifest(
        kind=cast(Any, kind),
        graphs={Path(name).stem: name for name in graph_files(folder) if name.endswith(".onnx")},
        inputs=inputs,
        outputs=outputs,
        context_length=context_length(model.assets, config),
        vocabulary=vocabulary_size(config),
        lineage=Lineage(source.base_model, source.revision, source.license),
        kv_cache=_kv_cache(inputs),
        eos_token_ids=eos_token_ids(folder, config) if kind == "decoder" else (),
        bos_token_id=config.get("bos_token_id") if kind == "decoder" else None,
        labels=labels,
        sentence=_sentence(model),
        activation=score_activation(model.assets, config),
    )


def _sentence(model: Model) -> Sentence | None:
    """Return what the manifest says of an embedder: how its graph pools, and how texts are read."""
    settings = sentence_settings(model.assets, model.config)
    if settings is None:
        return None
    return Sentence(
        pooling=settings.pooling,
        normalized=settings.normalized,
        lower_case=settings.lower_case,
        prompts=settings.prompts,
        default_prompt=settings.default_prompt,
    )


def _signature(graph: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    import onnx_ir as ir

    def spec(value: ir.Value) -> TensorSpec:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
        return TensorSpec(value.name, value.dtype.numpy().name, shape)

    model = ir.load(graph)
    return tuple(map(spec, model.graph.inputs)), tuple(map(spec, model.graph.outputs))


def _kv_cache(inputs: tuple[TensorSpec, ...]) -> KVCache | None:
    past = [spec for spec in inputs if spec.name.startswith("past.")]
    if not past:
        return None
    _, heads, _, width = past[0].shape
    dtypes = {spec.dtype for spec in past}
    dtype = dtypes.pop() if len(dtypes) == 1 else MIXED
    return KVCache(layers=len(past) // 2, heads=int(heads), head_width=int(width), dtype=dtype)


def _prove(folder: Path, kind: str) -> None:
    """Let the artifact answer as a user would: by the command line, in a process that has nothing else in memory."""
    questions = {
        "decoder": ["generate", str(folder), "--prompt", "a", "--max-tokens", str(PROBE_TOKENS)],
        "classifier": ["predict", str(folder)],
        "reranker": ["rerank", str(folder), "--query", "a"],
        "embedder": ["embed", str(folder)],
    }
    asked = [sys.executable, "-m", "optimizer.cli", *questions[kind]]
    done = subprocess.run(asked, input="a\n", capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CannotRun(f"the artifact does not answer: {reason}")
