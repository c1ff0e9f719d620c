"""What a model answers, by the class that its `config.json` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from passes.base import PassError

Kind = Literal["decoder", "classifier", "embedder"]

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
    """Return "decoder" (next token), "classifier" (class of a text) or "embedder" (vectors).

    Raises:
        PassError: the class answers something else.
    """
    architecture = architecture_of(config)
    for ending, kind in _ENDINGS.items():
        if architecture.endswith(ending) and not config.get("is_encoder_decoder"):
            return kind
    raise PassError(
        f"config.json: {architecture} cannot be lowered; expected a ...ForCausalLM, a ...ForSequenceClassification or "
        "a bare encoder"
    )
