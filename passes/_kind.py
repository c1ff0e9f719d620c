"""What a `config.json` says of a model: what it answers, how large it is, how far it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Kind = Literal["decoder", "classifier", "reranker", "embedder"]

_ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "decoder",
    "LMHeadModel": "decoder",
    "ForSequenceClassification": "classifier",
    "Model": "embedder",
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the model class a `config.json` names.

    Raises:
        PassError: it names none.
    """
    architectures = config.get("architectures") or []
    if not architectures:
        raise PassError("config.json: no `architectures`; expected one class name, such as ['LlamaForCausalLM']")
    return str(architectures[0])


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Return "decoder" (next token), "classifier" (class of a text), "reranker" (score of two texts) or "embedder".

    Raises:
        PassError: the class answers something else.
    """
    architecture = architecture_of(config)
    if config.get("is_encoder_decoder"):
        raise PassError(f"config.json: {architecture} is an encoder-decoder, which cannot be lowered yet")
    for ending, kind in _ENDINGS.items():
        if architecture.endswith(ending):
            return "reranker" if kind == "classifier" and _labels(config) == 1 else kind
    raise PassError(
        f"config.json: {architecture} cannot be lowered; expected a ...ForCausalLM, a ...ForSequenceClassification or "
        "a bare encoder"
    )


def _labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels; transformers means two where nothing is said."""
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels") or 2)


SWITCHING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the length of the sequence."""
DEFAULT_CONTEXT = 2048
"""Context of a family that has no limit of its own, such as one with ALiBi; as long as those were trained on."""


def typed_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the transformers configuration object of a `config.json`.

    Raises:
        PassError: the installed transformers does not know the model type, or refuses the values.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise PassError(
            f"config.json: model_type {config.get('model_type')} is not in transformers {transformers.__version__}; "
            "a newer release may have it"
        )
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # transformers checks a configuration by what happens to go wrong
        raise PassError(f"config.json: transformers refuses it: {first_line(error)}") from error


def require_sizes(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that leaves open what tokenizer and artifact must agree with.

    Raises:
        PassError: names the first key that is missing or no size.
    """
    architecture_of(config)
    for key in filter(None, (_own_name(config, name) for name in ("vocab_size", "max_position_embeddings"))):
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise PassError(f"config.json: {key}: got {value!r}, expected a whole number of at least 1")


def _own_name(config: Mapping[str, Any], name: str) -> str | None:
    """Return what the model's family calls a size, None where it knows no such thing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    own = name if family is None else family.attribute_map.get(name, name)
    return own if family is None or own in family().to_dict() else None


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return the number of token ids."""
    return int(typed_config(config).get_text_config().vocab_size)


def position_limit(config: Mapping[str, Any]) -> tuple[int, str]:
    """Return the most tokens of a sequence, and why they are fewer than the model's own limit, or "".

    A rotary embedding that switches with the length ends where it would switch: keys in the cache were turned by the
    angles of before, so past that point the numbers depend on how a text was cut, in transformers too. A table of
    positions that begins behind its padding row holds that many fewer.
    """
    typed = typed_config(config).get_text_config()
    own = getattr(typed, "max_position_embeddings", None)
    if not isinstance(own, int) or own < 1:
        return DEFAULT_CONTEXT, f"no limit of its own: {DEFAULT_CONTEXT} tokens"
    for rope in _ropes(getattr(typed, "rope_parameters", None) or {}):
        end = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") in SWITCHING_ROPES and end and int(end) < own:
            return int(end), f"{rope['rope_type']} rotary embedding: the context ends at {end}, where its angles switch"
    unused = 0 if kind_of(config) == "decoder" else _rows_before_the_first_position(typed, own)
    return own - unused, f"{unused} rows of its position table stand for no position" if unused else ""


def _rows_before_the_first_position(typed: PreTrainedConfig, rows: int) -> int:
    """Return how many rows of an encoder's position table come before that of its first token (RoBERTa: 2)."""
    from torch import device, nn
    from transformers import AutoModel

    try:
        with device("meta"):
            module = AutoModel.from_config(typed)
    except Exception as error:  # transformers checks a configuration by what happens to go wrong
        raise PassError(f"config.json: transformers cannot build a model from it: {first_line(error)}") from error
    tables = [
        child
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding) and "position" in name and child.num_embeddings == rows
    ]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def _ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of every rotary embedding: one, or one per kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, Mapping)]


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
