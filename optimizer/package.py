"""Put the artifact together: written aside, verified by loading and answering, then renamed. Never half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from optimizer.errors import CannotRun, CommandError
from optimizer.evaluate.items import model_kind
from optimizer.source import CONFIGURATION_FILES, NOTICE_FILES, Source
from passes.base import Model
from runtime.artifact import (
    EVIDENCE,
    MANIFEST,
    KVCache,
    Lineage,
    Manifest,
    TensorSpec,
    is_allowed,
    verify,
    write_manifest,
)
from runtime.errors import ServingError

GRAPH = "model.onnx"
PROBE_TOKENS = 4


@dataclass(frozen=True)
class Contents:
    """What goes into an artifact besides the model: text of the recipe and lock, and evidence by relative name."""

    name: str
    recipe: str
    lock: bytes
    card: str


def write_artifact(folder: Path, source: Source, model: Model, contents: Contents, evidence: Path) -> Manifest:
    """Make `folder` the artifact of `model`; an older artifact there is replaced in one step.

    Args:
        folder: where it goes.
        source: where the model comes from.
        model: at the stage the runtime serves.
        contents: texts to put beside it.
        evidence: folder whose files become `evidence/`.

    Raises:
        CommandError: `folder` holds something that is no artifact.
        CannotRun: the artifact does not load or answer.
    """
    require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _copy_model(model, aside)
        _copy_assets(model.assets, aside)
        (aside / "recipe.yaml").write_text(contents.recipe, encoding="utf-8")
        (aside / "optimize.lock").write_bytes(contents.lock)
        (aside / "README.md").write_text(contents.card, encoding="utf-8")
        manifest = write_manifest(aside, _describe(source, model, aside))
        _prove(aside)
        shutil.copytree(evidence, aside / EVIDENCE)
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def is_current(folder: Path, digest: str) -> bool:
    """Return whether `folder` is the intact artifact of this identity already."""
    try:
        return verify(folder).digest == digest
    except ServingError:
        return False


def require_replaceable(folder: Path) -> None:
    """Refuse to write over a folder that is neither empty nor an artifact.

    Raises:
        CommandError: it is something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise CommandError(f"--output: {folder} holds files that are no artifact; name another folder or empty it")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--output: {folder} is a file; name a folder")


def model_card(name: str, source: Source, steps: Mapping[str, str]) -> str:
    """Return the artifact's README: where it comes from, what was done, how to use it."""
    front = "".join(
        f"{key}: {value}\n" for key, value in (("license", source.license), ("base_model", source.base_model)) if value
    )
    chain = "".join(f"- `{step}`: {what}\n" for step, what in steps.items())
    decoder = model_kind(source.model.config) == "decoder"
    use = 'optimize generate DIR --prompt "..."' if decoder else "optimize predict DIR < texts"
    return (
        f"---\n{front}---\n# {name}\n\nMade from {source.base_model}"
        f"{f' at {source.revision}' if source.revision else ''} by these passes:\n\n{chain}\n"
        f"`recipe.yaml` and `optimize.lock` say how, `evidence/` what was measured.\n\n"
        f"    optimize verify DIR\n    {use}\n"
    )


def _copy_model(model: Model, folder: Path) -> None:
    for name in (GRAPH, f"{GRAPH}.data"):
        shutil.copyfile(model.folder / name, folder / name)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_assets(assets: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and legal texts; links of a Hub cache become files."""
    notices = {path.name for pattern in NOTICE_FILES for path in assets.glob(pattern)}
    for name in {*CONFIGURATION_FILES, *notices} - {"config.json"}:
        if (assets / name).is_file() and is_allowed(name):
            shutil.copyfile(assets / name, folder / name)


def _describe(source: Source, model: Model, folder: Path) -> Manifest:
    config = model.config
    inputs, outputs = _signature(folder / GRAPH)
    labels = None
    kind = model_kind(config)
    if kind == "classifier":
        labels = tuple(label for _, label in sorted((int(i), str(label)) for i, label in config["id2label"].items()))
    return Manifest(
        kind=cast(Any, kind),
        graphs={"model": GRAPH},
        inputs=inputs,
        outputs=outputs,
        context_length=int(config["max_position_embeddings"]),
        vocabulary=int(config["vocab_size"]),
        lineage=Lineage(source.base_model, source.revision, source.license),
        kv_cache=_kv_cache(inputs),
        eos_token_ids=_eos_token_ids(folder, config) if kind == "decoder" else (),
        bos_token_id=config.get("bos_token_id") if kind == "decoder" else None,
        labels=labels,
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
    return KVCache(layers=len(past) // 2, heads=int(heads), head_width=int(width))


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return every id that ends a text, as the generation settings and the configuration name them."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text()) if generation.is_file() else {}
    for value in (settings.get("eos_token_id"), config.get("eos_token_id")):
        found |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return tuple(sorted(found))


def _prove(folder: Path) -> None:
    """Load the artifact as a user would and let it answer."""
    from runtime import load
    from runtime.generation import TextGenerator

    try:
        served = load(folder)
        if isinstance(served, TextGenerator):
            served.generate("a", max_tokens=PROBE_TOKENS)
        else:
            served.predict(["a"])
    except ServingError as error:
        raise CannotRun(f"the artifact does not answer: {error}") from None


def _swap(aside: Path, folder: Path) -> None:
    """Put `aside` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
