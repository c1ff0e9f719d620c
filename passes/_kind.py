"""What a model answers, by the class that its `config.json` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from passes.base import PassError

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
    for ending, kind in _ENDINGS.items():
        if architecture.endswith(ending) and not config.get("is_encoder_decoder"):
            return "reranker" if kind == "classifier" and _labels(config) == 1 else kind
    raise PassError(
        f"config.json: {architecture} cannot be lowered; expected a ...ForCausalLM, a ...ForSequenceClassification or "
        "a bare encoder"
    )


def _labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels; transformers means two where nothing is said."""
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels") or 2)
