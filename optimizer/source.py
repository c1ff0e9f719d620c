"""Take a model from a folder or the Hub to stage torch, or refuse it in one line that says why.

Everything here is found out from configuration, tokenizer and safetensors headers, without torch; only
`check_finite` and `source_identity` read the weights, and the store remembers what they found.
Refused: weights as pickles, code that comes with the model, adapters, checkpoints that are already quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import CannotRun, CommandError
from optimizer.hub import HubId, fetch, file_names
from optimizer.store import Store, fingerprint, hash_file
from passes._safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsError,
    TensorEntry,
    read_header,
    read_into,
    tensor_index,
    weight_files,
)
from passes._sentence import sentence_files
from passes.base import TORCH, Model, Progress, no_progress

CONFIGURATION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
NOTICE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "license*", "notice*")
HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", *NOTICE_FILES)
PICKLE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_FLOATS = (*WEIGHT_DTYPES, "F64", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64")
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
_SCAN_BYTES = 1 << 20
_LICENSE_WORDS = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "permission is hereby granted, free of charge": "mit",
    "python software foundation license version 2": "psf-2.0",
    "gnu general public license version 3": "gpl-3.0",
    "redistributions in binary form must reproduce": "bsd",
}


@dataclass(frozen=True)
class Source:
    """A model as it came.

    Attributes:
        base_model: `org/name` for a model of the Hub or of its cache, else the folder's name.
        revision: the commit, None for a folder of one's own.
        license: as the model card or the licence file says; None when neither does.
    """

    model: Model
    base_model: str
    revision: str | None
    license: str | None

    @property
    def lineage(self) -> dict[str, str | None]:
        """Return what the artifact's manifest says of where it comes from."""
        return {"base_model": self.base_model, "revision": self.revision, "license": self.license}


def load_source(model: str, folder: Path | None = None, progress: Progress = no_progress) -> Source:
    """Return the model that `folder`, or a Hub id `org/name@revision`, names, once it is found fit to be lowered.

    Args:
        model: as the recipe writes it.
        folder: the folder it names, if it names one; else it is looked for at `model` and then on the Hub.
        progress: told how many bytes were fetched.

    Raises:
        CommandError: neither a folder nor a Hub id.
        CannotRun: the Hub does not give it, or the model is damaged or not supported.
    """
    if folder is None and Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
    if folder is None:
        hub_id = HubId.parse(model)
        if hub_id is None:
            raise CommandError(f"model: no such folder, got {model}, expected a folder or org/name@revision of the Hub")
        folder = _fetch(hub_id, progress)
    folder = folder.absolute()
    names = sorted(path.name for path in folder.iterdir())
    config = check_configuration(folder, names)
    check_weights(folder, names, config)
    base_model, revision = _origin(folder)
    return Source(Model(TORCH, folder, folder, config), base_model, revision, find_license(folder))


def check_configuration(folder: Path, names: list[str]) -> Mapping[str, Any]:
    """Return the content of `config.json`; `names` are the model's files.

    Raises:
        CannotRun: adapter, quantized, foreign code, or a tokenizer that is missing or does not fit.
    """
    if "adapter_config.json" in names:
        raise CannotRun(f"{folder}: an adapter, not a model (adapter_config.json); merge it into its base model first")
    if "config.json" not in names:
        raise CannotRun(f"{folder}: no config.json, expected a model in Hugging Face format")
    config = read_object(folder / "config.json")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", key) if isinstance(config[key], dict) else key
            raise CannotRun(f"{folder / 'config.json'}: already quantized ({method}); start from the original weights")
    if not isinstance(config.get("model_type"), str):
        raise CannotRun(f"{folder / 'config.json'}: no model_type, expected one that transformers knows, such as llama")
    code = [name for name in names if name.endswith(".py")]
    if config.get("auto_map") or code:
        _require_native(folder, config, "auto_map" if config.get("auto_map") else code[0])
    _check_tokenizer(folder, names, config)
    return config


def check_weights(folder: Path, names: list[str], config: Mapping[str, Any]) -> None:
    """Check headers, shards, dtypes and the embedding's height; reads no weight.

    Raises:
        CannotRun: pickles only, a damaged or missing file, another dtype, or an embedding unlike `vocab_size`.
    """
    if SINGLE_NAME not in names and INDEX_NAME not in names:
        raise CannotRun(_no_weights(folder, names))
    try:
        index = tensor_index(folder)
    except (SafetensorsError, OSError) as error:
        raise CannotRun(str(error)) from error
    rows = _vocabulary(config)
    for entry in index.values():
        is_weight = "weight" in entry.name.rpartition(".")[2] or entry.dtype in _FLOATS
        if is_weight and entry.dtype not in WEIGHT_DTYPES:
            raise CannotRun(
                f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}, expected {', '.join(WEIGHT_DTYPES)}; "
                "start from the original weights"
            )
        if rows is not None and entry.name.endswith(_EMBEDDINGS) and entry.shape[:1] != (rows,):
            raise CannotRun(
                f"{entry.file}: embedding {entry.name} has {entry.shape[0] if entry.shape else 0} rows, "
                f"expected vocab_size {rows} of config.json"
            )


def check_finite(source: Source, store: Store, progress: Progress = no_progress) -> None:
    """Read every weight once and refuse NaN and infinity; the store remembers the answer for each file.

    Raises:
        CannotRun: names the first tensor that has one.
    """
    files = weight_files(source.model.folder)
    for done, path in enumerate(files):
        progress(done, len(files), "weight files checked")
        bad = store.fact(path, "tensors not finite", lambda path: list(_not_finite(path)))
        if bad:
            more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
            raise CannotRun(f"{path}: NaN or infinity in tensor {bad[0]}{more}; fetch or train the model again")
    progress(len(files), len(files), "weight files checked")


def source_identity(source: Source, store: Store) -> str:
    """Return the hash of all that decides what the model computes: weights, configuration, tokenizer.

    Files are hashed again only when path, inode, size or times differ from those the store remembers.
    """
    folder = source.model.folder
    names = [name for name in CONFIGURATION_FILES if (folder / name).is_file()] + sentence_files(folder)
    names += [path.name for path in weight_files(folder)]
    return fingerprint({name: store.fact(folder / name, "sha256", hash_file) for name in names})


def find_license(folder: Path) -> str | None:
    """Return the licence's short name: from the model card's front matter, else by the words of the licence file."""
    card = _front_matter(folder / "README.md")
    for key in ("license_name", "license") if card.get("license") == "other" else ("license",):
        value = card.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return value
    for path in notice_files(folder):
        if path.name.lower().startswith("licen"):
            text = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
            return next((name for words, name in _LICENSE_WORDS.items() if words in text), f"see {path.name}")
    return None


def notice_files(folder: Path) -> list[Path]:
    """Return the licence and notice files of a model, which its artifact must carry."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in NOTICE_FILES)
    )


def _fetch(model: HubId, progress: Progress) -> Path:
    """Fetch configuration and tokenizer, refuse what they already show, then fetch the weights of the same commit."""
    folder = fetch(model, HUB_FILES, no_progress)
    names = [path.name for path in folder.iterdir()]
    check_configuration(folder, names)
    pinned = HubId(model.repository, folder.name)
    shards = read_object(folder / INDEX_NAME).get("weight_map") if INDEX_NAME in names else None
    files = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    fetch(pinned, [SINGLE_NAME, *sorted(files)], progress)
    if INDEX_NAME not in names and not (folder / SINGLE_NAME).exists():
        raise CannotRun(_no_weights(Path(str(model)), file_names(pinned)))
    return folder


def _no_weights(folder: Path, names: list[str]) -> str:
    pickles = [name for name in names if any(fnmatchcase(name, pattern) for pattern in PICKLE_FILES)]
    if pickles:
        return f"{folder}: weights as pickle ({pickles[0]}), which can run code; convert them to safetensors first"
    others = [name for name in names if name.endswith((".gguf", ".safetensors", ".h5", ".msgpack", ".onnx"))]
    found = f", got {others[0]}" if others else ""
    return f"{folder}: no weights{found}, expected {SINGLE_NAME} or {INDEX_NAME} with its shards"


def _require_native(folder: Path, config: Mapping[str, Any], sign: str) -> None:
    """Refuse a model whose code comes with it; one that transformers has classes for runs on those instead."""
    try:
        import transformers
    except ImportError as error:
        raise CannotRun("a source model needs transformers: pip install 'optimize-models[optimize]'") from error
    unknown = [name for name in config.get("architectures") or () if not hasattr(transformers, name)]
    if config["model_type"] not in transformers.CONFIG_MAPPING or unknown:
        missing = unknown[0] if unknown else config["model_type"]
        raise CannotRun(
            f"{folder}: remote code ({sign}): transformers has no class of its own for {missing}, "
            "and code that comes with a model is never run"
        )


def _check_tokenizer(folder: Path, names: list[str], config: Mapping[str, Any]) -> None:
    if "tokenizer.json" not in names:
        raise CannotRun(
            f"{folder}: no tokenizer.json; write it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    path, vocabulary = folder / "tokenizer.json", _vocabulary(config)
    tokenizer = read_object(path)
    try:
        tokens = tokenizer["model"]["vocab"]
        last = max(tokens.values(), default=-1) if isinstance(tokens, dict) else len(tokens) - 1
        last = max([last, *(token["id"] for token in tokenizer.get("added_tokens") or ())])
    except (KeyError, TypeError, AttributeError):
        raise CannotRun(f"{path}: no vocabulary in it, expected the format of the tokenizers library") from None
    if last < 0:
        raise CannotRun(f"{path}: the vocabulary is empty")
    if vocabulary is not None and last >= vocabulary:
        raise CannotRun(
            f"{path}: does not fit the model: its largest token id is {last}, expected below vocab_size {vocabulary}; "
            "take the tokenizer that belongs to these weights"
        )


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def _not_finite(path: Path) -> Iterator[str]:
    for entry in read_header(path).values():
        if entry.dtype in _EXPONENTS and not _is_finite(entry):
            yield entry.name


def _is_finite(entry: TensorEntry) -> bool:
    """Whether no value has all bits of its exponent set, which is what NaN and infinity are."""
    kind, mask = _EXPONENTS[entry.dtype]
    for start in range(0, entry.nbytes, _SCAN_BYTES):
        piece = np.empty(min(_SCAN_BYTES, entry.nbytes - start), np.uint8)
        read_into(entry, piece.data, start)
        if (piece.view(kind) & kind(mask)).max() == mask:
            return False
    return True


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; raise CannotRun where it is no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CannotRun(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CannotRun(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def _front_matter(path: Path) -> Mapping[str, Any]:
    """Return the YAML that opens a model card; empty when there is none that can be read."""
    import yaml

    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    opening, _, rest = text.partition("\n")
    if opening.strip() != "---":
        return {}
    try:
        value = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _origin(folder: Path) -> tuple[str, str | None]:
    """Return model and revision; a snapshot in the Hub's cache lies at models--ORG--NAME/snapshots/COMMIT."""
    place = folder.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1), place.name
    return place.name, None


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return every id that ends a text, as the generation settings and the configuration name them."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    settings = read_object(generation) if generation.is_file() else {}
    for value in (settings.get("eos_token_id"), config.get("eos_token_id")):
        found |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return tuple(sorted(found))
