"""Sensitivity: which layers a pass hurts, and the same pass with these kept."""

from __future__ import annotations

import pytest

from optimizer.sensitivity import LayerDamage, Sensitivity, keep, kept_formats, kept_text
from passes._override import Override
from passes.base import PassError
from passes.export_onnx import ExportOnnx
from passes.quantize_awq import QuantizeAwq
from passes.quantize_gptq import QuantizeGptq
from passes.quantize_int8 import QuantizeInt8
from passes.quantize_rtn import QuantizeRtn

LAYERS = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_kept_layers_have_another_format_before_all_other_overrides() -> None:
    before = Override(layers="*.down_proj", format="int2")
    step = QuantizeRtn(group_size=64, overrides=(before,))
    kept = keep(step, LAYERS, "int8")
    assert kept == QuantizeRtn(group_size=64, overrides=(Override(layers=tuple(LAYERS), format="int8"), before))


def test_layers_kept_in_float_are_excluded_by_every_quantizer() -> None:
    assert keep(QuantizeRtn(exclude=("a",)), LAYERS, "float") == QuantizeRtn(exclude=("a", *LAYERS))
    assert keep(QuantizeInt8(), LAYERS, "float") == QuantizeInt8(exclude=tuple(LAYERS))


def test_keeping_no_layer_changes_nothing() -> None:
    assert keep(QuantizeRtn(), [], "int8") == QuantizeRtn()


def test_a_format_that_a_pass_does_not_know_is_refused() -> None:
    assert kept_formats(QuantizeRtn) == ("float", "int8", "int4", "int2", "nvfp4", "mxfp4", "fp8")
    with pytest.raises(PassError, match=r"quantize_rtn: got the format 'int3' .* one of float, int8, int4, int2"):
        keep(QuantizeRtn(), LAYERS, "int3")
    assert kept_formats(QuantizeInt8) == ("float",)
    with pytest.raises(PassError, match=r"quantize_int8: got the format 'int4' for layers to keep, expected float$"):
        keep(QuantizeInt8(), LAYERS, "int4")
    assert kept_formats(ExportOnnx) == ()
    with pytest.raises(PassError, match=r"export_onnx: got the format 'float' .* expected none: it treats all alike"):
        keep(ExportOnnx(), LAYERS, "float")
    assert kept_formats(QuantizeAwq) == ()  # what is folded into a norm is for all that read it
    assert kept_formats(QuantizeGptq) == kept_formats(QuantizeRtn)


def damaged(*formats: str) -> Sensitivity:
    """Return layers of these formats, the worst first, called a, b, c."""
    layers = tuple(
        LayerDamage((name,), format, 1.0, 0.1, 0.8, 1.2, 10) for name, format in zip("abc", formats, strict=False)
    )
    return Sensitivity("r", "quantize_rtn", 0, "2 texts", 2, 10, "KL", 1.0, layers)


def test_layers_that_have_the_format_already_are_not_among_the_worst() -> None:
    assert damaged("int4", "int8", "int4").worst(1, "int8") == ["a"]
    assert damaged("int4", "int8", "int4").worst(2, "int8") == ["a", "c"]
    assert damaged("int8", "int8", "int4").worst(2, "float") == ["a", "b"]
    with pytest.raises(PassError, match="quantize_rtn: keep: every layer is int8 already; name another format"):
        damaged("int8", "int8").worst(1, "int8")


def test_layers_that_are_kept_are_named_of_many_the_first_eight() -> None:
    assert kept_text(LAYERS, "int8") == f"kept in int8: {LAYERS[0]}, {LAYERS[1]}"
    assert kept_text("abcdefgh", "float") == "kept in float: a, b, c, d, e, f, g, h"
    assert kept_text("abcdefghij", "float") == "kept in float: a, b, c, d, e, f, g, h and 2 more"
