"""Draft a commented recipe for a model after reading its `config.json` and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.catalogue import Catalogue
from optimizer.columns import Column, columns_of, form_of
from optimizer.errors import CannotRun, CommandError
from optimizer.quiet import quiet_libraries
from optimizer.schema import first_line, option_lines, written
from passes._kind import architecture_of, kind_of, typed_config
from passes.base import PassError, no_progress

LONGEST_CONTEXT = 1024


TEXT = Column(
    "text",
    ("text", "sentence", "sentence1", "content", "query", "question", "utterance", "review"),
    "key or column with the text",
)


@dataclass(frozen=True)
class Kind:
    """What is proposed for one kind of model: its chain with options, what it is scored on, and its budgets."""

    suffix: str
    chain: Mapping[str, Mapping[str, object]]
    data: tuple[Column, ...]
    evaluate: tuple[str, ...]
    gate: tuple[str, ...]


DECODER = Kind(
    suffix="int4",
    chain={
        "quantize_rtn": {"format": "int4", "group_size": 32},
        "export_onnx": {},
        "fuse_gqa": {},
        "fuse_norm": {},
    },
    data=(
        TEXT,
        Column("group", ("document", "group"), "key or column that ties texts of one document together", False),
    ),
    evaluate=(
        "perplexity: {task: perplexity, data: held_out, context: CONTEXT}",
        "agreement: {task: agreement, data: held_out, context: CONTEXT}",
    ),
    gate=(
        "perplexity: {max_increase: 2%}    # relative to the source's perplexity",
        "agreement: {max_flips: 10%}       # positions whose most likely next token changed; also max_kl",
        "size: {max_ratio: 0.5}            # artifact's weights / source's weights",
    ),
)
_ENCODER_GRAPH: Mapping[str, Mapping[str, object]] = {
    "export_onnx": {},
    "fuse_attention": {"optional": True},  # some families write attention in a form of their own
}
CLASSIFIER = Kind(
    suffix="int8",
    chain={"quantize_int8": {"embedding": "int8"}, **_ENCODER_GRAPH},
    data=(
        TEXT,
        Column(
            "label",
            ("label", "labels", "category", "intent", "class", "target", "sentiment", "topic"),
            "key or column with the label",
        ),
    ),
    evaluate=("accuracy: {task: classification, data: held_out, metric: accuracy, context: CONTEXT}",),
    gate=(
        "accuracy: {max_drop: 1pt}    # 1pt: one percentage point; 1%: one per cent of the source's accuracy",
        "size: {max_ratio: 0.8}       # artifact's weights / source's weights",
    ),
)
_SECOND = (
    Column("pair", ("sentence2", "text2", "document", "passage", "answer"), "key or column with a second text", False),
    Column(
        "score",
        ("score", "similarity_score", "similarity"),
        "key or column with how similar people find the two: then that is what is correlated with",
        False,
    ),
)
_SIMILARITY = "similarity: {task: similarity, data: held_out, context: CONTEXT}"
_SIMILARITY_GATE = "similarity: {max_drop: 0.5pt}    # of Spearman's rank correlation: 1pt is 0.01"
EMBEDDER = Kind(
    suffix="int8",
    chain={"quantize_rtn": {"format": "int8", "group_size": 32}, **_ENCODER_GRAPH},
    data=(replace(TEXT, hint=f"{TEXT.hint}; pairs are made of the texts if none are given"), *_SECOND),
    evaluate=(_SIMILARITY,),
    gate=(_SIMILARITY_GATE, "size: {max_ratio: 0.8}           # artifact's weights / source's weights"),
)
RERANKER = replace(
    EMBEDDER,
    data=(
        Column(
            "text",
            ("query", "question", *TEXT.names[:3]),
            "key or column with the first text, such as the query",
        ),
        *_SECOND,
    ),
)
KINDS: Mapping[str, Kind] = {
    "decoder": DECODER,
    "classifier": CLASSIFIER,
    "reranker": RERANKER,
    "embedder": EMBEDDER,
}


def draft(model: str, config: Mapping[str, Any], choices: Catalogue, *, device: str = "cpu", data: str = "") -> str:
    """Return a recipe for `model`; `data` is the held-out file, whose columns are looked up if it is there.

    Raises:
        CannotRun: no kind of recipe is known for the model's architecture.
        DataError: the file has no columns, or they cannot be read.
    """
    kind = _kind(model, config)
    context = min(LONGEST_CONTEXT, int(config.get("max_position_embeddings") or LONGEST_CONTEXT))
    file = data or "held_out.jsonl"
    present = columns_of(Path(file)) if Path(file).exists() else None
    lines = [
        "# yaml-language-server: $schema=recipe.schema.json",
        "# Editors complete and check this file once `optimize schema > recipe.schema.json` has been run beside it.",
        "# Goal: GOAL. Expected: SIZE, CHANGE [INTERVAL], DATE (fill in from the first run).",
        f"name: {recipe_name(model, kind.suffix)}",
        f"model: {json.dumps(model)}",
        f"target: {{device: {device}}}    # threads: all there are",
        "",
        "data:",
        "  held_out:               # texts the model was not trained on; 100 or more make the gate sharp",
        f"    {form_of(Path(file))}: {json.dumps(file)}",
        *(f"    {line}" for column in kind.data for line in column.lines(file, present)),
        "",
        "evaluate:",
        *(f"  {line.replace('CONTEXT', str(context))}" for line in kind.evaluate),
        "",
        "gate:",
        "  alpha: 0.05             # chance of passing a model that is over budget",
        *(f"  {line}" for line in kind.gate),
        "",
        "passes:                   # `optimize plan` tells whether they can take this model",
    ]
    for name, options in kind.chain.items():
        if name in choices.passes:
            lines += _pass_lines(name, choices.passes[name], options)
    return "\n".join(lines) + "\n"


def recipe_name(model: str, suffix: str) -> str:
    """Return the artifact's name for a folder or Hub id."""
    last = Path(model.split("@", maxsplit=1)[0]).resolve().name.lower()
    return f"{re.sub(r'[^a-z0-9._-]+', '-', last).strip('-._') or 'model'}-{suffix}"


def read_config(model: str) -> Mapping[str, Any]:
    """Return the `config.json` of a folder or a Hub model.

    Raises:
        CommandError: it is neither.
        CannotRun: the file is not there, or no JSON object.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
    else:
        path = _from_hub(model)
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CannotRun(f"{path}: cannot be read, {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise CannotRun(f"{path}: is not JSON, {error}") from None
    if not isinstance(config, dict):
        raise CannotRun(f"{path}: got {type(config).__name__}, expected a JSON object")
    return config


def _from_hub(model: str) -> Path:
    from optimizer.hub import HubId, fetch

    name = HubId.parse(model)
    if name is None:
        raise CommandError(f"{model}: no such folder, expected a folder or org/name@revision of the Hub")
    return fetch(name, ["config.json"], no_progress) / "config.json"


def _kind(model: str, config: Mapping[str, Any]) -> Kind:
    try:
        kind = kind_of(config)
        _require_lowerable(kind, config)
    except PassError as refusal:
        raise CannotRun(f"{model}: {refusal}") from None
    return KINDS[kind]


def _require_lowerable(kind: str, config: Mapping[str, Any]) -> None:
    """Refuse what `config.json` alone shows that no chain lowers; the rest only a twin can tell, which `plan` makes.

    Raises:
        PassError: transformers does not take the configuration, or a layer keeps other state than keys and values.
    """
    try:
        from passes._attention import require_keys_and_values

        with quiet_libraries():
            typed = typed_config(config)
            if kind == "decoder":
                require_keys_and_values(architecture_of(config), typed)
    except PassError:
        raise
    except Exception:  # only what serves is installed, or the family says it in its modelling code
        return


def _pass_lines(name: str, kind: type, options: Mapping[str, object]) -> list[str]:
    lines = [f"  # {first_line(kind)}."]
    if not options:
        return [*lines, f"  - {name}"]
    lines.append(f"  - {name}:")
    for option, text in option_lines(kind).items():
        if option in options:
            lines.append(f"      {option}: {written(options[option])}    # {text}")
        elif option != "optional":
            lines.append(f"      # {option}: {text}")
    return lines


def write_new(text: str, path: Path | None) -> Path:
    """Write the recipe where there is nothing yet; NAME.yaml in the working folder unless told where.

    Raises:
        CommandError: the file exists.
    """
    name = next(line.removeprefix("name: ") for line in text.splitlines() if line.startswith("name: "))
    path = path or Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandError(f"{path}: exists already; name another file with --output") from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be written, {(error.strerror or str(error)).lower()}") from None
    return path
