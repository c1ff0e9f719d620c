"""How a folder says that its texts are read and its answers formed: sentence-transformers' own files.

Embedders: `modules.json` lists Transformer, Pooling and, maybe, Normalize; each has a `config.json` in a folder of its
own. Rerankers: `config.json` names the function that the score goes through. Anything else in those files would change
the numbers, and is refused with its name.
Source: sentence-transformers 5, modules Transformer, Pooling, Normalize, class CrossEncoder; the older `pooling_mode_*`
booleans and the newer `pooling_mode` are both read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from passes._kind import kind_of, position_limit
from passes.base import PassError

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Activation = Literal["sigmoid", "identity"]
MODES: tuple[Mode, ...] = get_args(Mode)
_BOOLEANS: Mapping[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which several of them are put side by side."""
_PLAIN: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config.text": {"method": "forward", "method_output_name": "last_hidden_state"},
    "processing_kwargs": None,
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
"""Settings of the Transformer module that change vectors, and the only values that can be lowered."""
_PACKAGE = "sentence_transformers."
_UNLIMITED = 1_000_000  # transformers writes 1e30 for "no limit"


@dataclass(frozen=True)
class SentenceSettings:
    """What the files of an embedder say.

    Attributes:
        pooling: how the vectors of a text's tokens become one; those of several modes stand side by side.
        normalized: whether that vector is scaled to length 1.
        max_tokens: most tokens of a text, special ones included; None leaves it to model and tokenizer.
        lower_case: whether texts are lower-cased before the tokenizer sees them.
        prompts: name -> what is put before a text.
        default_prompt: name of the prompt used when none is asked for.
    """

    pooling: tuple[Mode, ...]
    normalized: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def sentence_files(folder: Path) -> list[str]:
    """Return the names, relative to the folder, of the sentence-transformers files that are there."""
    names = [name for name in (MODULES, SETTINGS, PROMPTS) if (folder / name).is_file()]
    modules = _read_modules(folder) if MODULES in names else []
    inner = [f"{path}/config.json" for _, path in modules if path]
    return names + [name for name in inner if (folder / name).is_file()]


def sentence_settings(folder: Path, config: Mapping[str, Any]) -> SentenceSettings | None:
    """Return what the files of an embedder say; None for another kind of model, or without `modules.json`.

    Raises:
        PassError: a file is malformed, or asks for what cannot be lowered.
    """
    if kind_of(config) != "embedder" or not (folder / MODULES).is_file():
        return None
    modules = _read_modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        known = {"Transformer", "Pooling", "Normalize"}
        odd = next((kind for kind in kinds if kind not in known), ", ".join(kinds) or "nothing")
        raise PassError(f"{folder / MODULES}: got {odd}, expected Transformer, Pooling and at most Normalize after it")
    if modules[0][1]:
        raise PassError(f"{folder / MODULES}: Transformer lies in {modules[0][1]!r}, expected the folder itself")
    settings = _read(folder / SETTINGS)
    _require_plain(folder / SETTINGS, settings)
    prompts, default = _prompts(folder / PROMPTS)
    return SentenceSettings(
        pooling=_modes(folder / modules[1][1] / "config.json", has_prompts=any(prompts.values())),
        normalized=len(modules) > 2 and _is_plain_normalize(folder / modules[2][1] / "config.json"),
        max_tokens=_count(folder / SETTINGS, settings, "max_seq_length"),
        lower_case=_flag(folder / SETTINGS, settings, "do_lower_case"),
        prompts=prompts,
        default_prompt=default,
    )


def require_sentence(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse files that are malformed, are of another model, or ask for what cannot be lowered.

    Raises:
        PassError: names the file and what is wrong with it.
    """
    score_activation(folder, config)
    if sentence_settings(folder, config) is None:
        return
    path = folder / _read_modules(folder)[1][1] / "config.json"
    content = _read(path)
    width = content.get("embedding_dimension", content.get("word_embedding_dimension"))
    hidden = config.get("hidden_size", config.get("dim"))
    if width is not None and hidden is not None and width != hidden:
        raise PassError(f"{path}: got vectors of {width!r:.40} numbers, expected {hidden} as in config.json")


def score_activation(folder: Path, config: Mapping[str, Any]) -> Activation | None:
    """Return the function a reranker's score goes through; None for another kind of model.

    Raises:
        PassError: the files name another function, or modules after the transformer.
    """
    if kind_of(config) != "reranker":
        return None
    if (folder / MODULES).is_file():
        kinds = [kind for kind, _ in _read_modules(folder)]
        if kinds != ["Transformer"]:
            raise PassError(f"{folder / MODULES}: got {', '.join(kinds) or 'nothing'}, expected Transformer alone")
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or config.get("sbert_ce_default_activation_function") or "torch.nn.modules.activation.Sigmoid"
    name = str(named).rpartition(".")[2].lower()
    if not str(named).startswith("torch.") or name not in get_args(Activation):
        expected = "torch's Sigmoid or Identity"
        raise PassError(f"{folder / 'config.json'}: activation of the score: got {named!r}, expected {expected}")
    return "sigmoid" if name == "sigmoid" else "identity"


def context_length(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the most tokens that a model takes at once.

    A decoder's is that of its positions; an encoder's the least of its positions, its tokenizer's limit and what its
    sentence-transformers files say.

    Raises:
        PassError: as `sentence_settings`.
    """
    limits: list[Any] = []
    if kind_of(config) != "decoder":
        settings = sentence_settings(folder, config)
        limits += [_read(folder / "tokenizer_config.json").get("model_max_length")]
        limits += [settings.max_tokens if settings else None]
    return min([position_limit(config)[0], *(int(limit) for limit in limits if _is_limit(limit))])


def _is_limit(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < _UNLIMITED


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Return the class name and the folder of every module, in order."""
    path = folder / MODULES
    content = _json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise PassError(f"{path}: got no list of modules, expected one object for each")
    modules = []
    for entry in content:
        kind, place = entry.get("type"), entry.get("path", "")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise PassError(f"{path}: got {entry!r:.80}, expected `type` and `path` as texts")
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise PassError(f"{path}: path: got {place!r}, expected a folder below the model's own")
        modules.append((kind.rpartition(".")[2] if kind.startswith(_PACKAGE) else kind, place))
    return modules


def _modes(path: Path, *, has_prompts: bool) -> tuple[Mode, ...]:
    content = _read(path, must_exist=True)
    modes = content.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _BOOLEANS.items() if _flag(path, content, key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise PassError(f"{path}: pooling_mode: got {modes!r:.80}, expected {', '.join(MODES)}, or a list of them")
    unknown = [key for key in content if key.startswith("pooling_mode_") and key not in _BOOLEANS]
    if unknown:
        raise PassError(f"{path}: unknown key {unknown[0]!r}, expected {', '.join(_BOOLEANS)}")
    if has_prompts and content.get("include_prompt", True) is not True:
        raise PassError(f"{path}: include_prompt: got false, expected true; prompts are pooled with their text")
    return tuple(modes)


def _require_plain(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a Transformer module that reads texts, or answers, in a way of its own."""
    modalities = settings.get("modality_config")
    text = modalities.get("text") if isinstance(modalities, dict) else None
    found = {**settings, "modality_config.text": text}
    for key, plain in _PLAIN.items():
        if found.get(key) not in (None, {}, plain):
            raise PassError(f"{path}: {key}: got {found[key]!r:.60}, expected {plain or 'nothing'}")


def _is_plain_normalize(path: Path) -> Literal[True]:
    """Refuse a Normalize module that scales something else than the pooled vector."""
    content = _read(path)
    for key in ("module_input_name", "module_output_name"):
        if content.get(key) not in (None, "sentence_embedding"):
            raise PassError(f"{path}: {key}: got {content[key]!r}, expected sentence_embedding")
    return True


def _prompts(path: Path) -> tuple[Mapping[str, str], str | None]:
    content = _read(path)
    prompts, default = content.get("prompts") or {}, content.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise PassError(f"{path}: prompts: got {prompts!r:.80}, expected texts by name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise PassError(f"{path}: default_prompt_name: got {default!r}, expected one of {', '.join(prompts) or 'none'}")
    return prompts, default


def _count(path: Path, content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise PassError(f"{path}: {key}: got {value!r}, expected a whole number of at least 1, or null")
    return value


def _flag(path: Path, content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if value not in (True, False, None):
        raise PassError(f"{path}: {key}: got {value!r}, expected true or false")
    return bool(value)


def _read(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    """Return the object in a file, an empty one where there may be none and is none."""
    if not path.is_file() and not must_exist:
        return {}
    content = _json(path)
    if not isinstance(content, dict):
        raise PassError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise PassError(f"{path}: cannot be read, {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise PassError(f"{path}: is not JSON: {error}") from None
