"""How far quantized layers are off, beside round-to-nearest: measured for every layer, whatever the method.

An error is a root mean square over that of the original: of the weight, |dW| / |W|, and of the layer's output on
calibration tokens, |X dW^T| / |X W^T|, the root of tr(dW H dW^T) / tr(W H W^T) with H = X^T X.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from passes._files import atomic_write
from passes._formats import SEARCH_ELEMENTS, WeightFormat, round_to_nearest, row_chunks, rows_of
from passes._quantized import LayerSpec, QuantizedLayer
from passes.base import PassError

FILE = "layer_errors.json"
NAMED = 3
"""Layers that a note lists by name."""
WORSE = 1.001
"""Times the error of round-to-nearest, above which a layer is: float32 sums leave 1e-6."""


@dataclass(frozen=True)
class LayerError:
    """How far one layer is off.

    Attributes:
        weight, output: root mean square errors over that of the original; `output` is None where no token was seen.
        weight_rtn, output_rtn: the same of the original rounded to nearest; None where nothing else was done.
        is_kept_rtn: the layer is rounded to nearest, because what the method made of it was further off.
    """

    weight: float
    output: float | None = None
    weight_rtn: float | None = None
    output_rtn: float | None = None
    is_kept_rtn: bool = False


def weight_error(weight: torch.Tensor, spec: LayerSpec, stored: Mapping[str, torch.Tensor]) -> LayerError:
    """Return the error of a weight [N, M] alone."""
    lost = total = 0.0
    for rows in row_chunks(len(weight), weight.shape[1], SEARCH_ELEMENTS):
        original = weight[rows].float()
        restored = spec.weight_format.load(rows_of(stored, rows), weight.shape[1])
        lost += float((restored - original).square().sum())
        total += float(original.square().sum())
    return LayerError(_relative(lost, total))


def judged(
    step: str,
    changed: Mapping[str, QuantizedLayer | torch.Tensor],
    original: Callable[[str], torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    *,
    one_by_one: bool = True,
) -> dict[str, QuantizedLayer | torch.Tensor]:
    """Return what a method made of a block with the errors of its layers; what is worse than RTN becomes that.

    Not so where layers are not meant to be judged one by one, because each makes up for others.

    `original(layer)` is a weight [N, M] in float32, `inputs` layer name -> [T, M] as they reach it in float.

    Raises:
        PassError: an error is not finite.
    """
    return {
        name: _judged(step, name, layer, original(name), inputs.get(name), one_by_one=one_by_one)
        if isinstance(layer, QuantizedLayer)
        else layer
        for name, layer in changed.items()
    }


def _judged(
    step: str, name: str, layer: QuantizedLayer, weight: torch.Tensor, x: torch.Tensor | None, *, one_by_one: bool
) -> QuantizedLayer:
    form = layer.spec.weight_format
    nearest = round_to_nearest(weight, form)
    own, plain = _deviation(layer, form, weight), form.load(nearest, weight.shape[1]) - weight
    error = LayerError(_ratio(own, weight), weight_rtn=_ratio(plain, weight))
    if x is not None:
        out = x @ weight.T
        error = replace(error, output=_ratio(x @ own.T, out), output_rtn=_ratio(x @ plain.T, out))
    for value in (error.weight, error.output or 0.0):
        if not value < torch.inf:
            raise PassError(f"{step}: {name}: its error is {value}; its weights or inputs hold NaN or infinity")
    if not one_by_one:
        is_nearest = all(torch.equal(each, layer.stored[leaf]) for leaf, each in nearest.items())
        return replace(layer, error=replace(error, is_kept_rtn=is_nearest))
    is_folded = layer.rows is not None or layer.columns is not None
    if is_folded or error.output is None or error.output_rtn is None or error.output <= WORSE * error.output_rtn:
        return replace(layer, error=error)
    kept = replace(error, weight=_ratio(plain, weight), output=error.output_rtn, is_kept_rtn=True)
    return QuantizedLayer(layer.spec, nearest, error=kept)


def _deviation(layer: QuantizedLayer, form: WeightFormat, weight: torch.Tensor) -> torch.Tensor:
    """Return how far a weight [N, M] is off, as if nothing had been folded into it."""
    restored = form.load(layer.stored, weight.shape[1])
    if layer.rows is not None:
        restored /= layer.rows[:, None]
    if layer.columns is not None:
        restored /= layer.columns
    return restored.sub_(weight)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    return _relative(float(part.square().sum()), float(whole.square().sum()))


def _relative(lost: float, total: float) -> float:
    """Return the root of a share; nothing of nothing is 0."""
    if lost == 0:
        return 0.0
    return float((lost / total) ** 0.5) if total else torch.inf


def add_errors(folder: Path, errors: Mapping[str, LayerError | None]) -> None:
    """Add the errors of some layers to `layer_errors.json` of a torch stage; those of None are not known."""
    new = {name: error for name, error in errors.items() if error is not None}
    if new:
        content = {name: asdict(error) for name, error in sorted((read_errors(folder) | new).items())}
        atomic_write(folder / FILE, (json.dumps(content, indent=1) + "\n").encode())


def read_errors(folder: Path) -> dict[str, LayerError]:
    """Return the errors of the layers that the last quantizer of a torch stage took; empty if none has told."""
    path = folder / FILE
    if not path.exists():
        return {}
    return {name: LayerError(**content) for name, content in json.loads(path.read_text()).items()}


def kept_rtn(errors: Mapping[str, LayerError]) -> list[str]:
    """Return the layers that are rounded to nearest because a method made them worse."""
    return [name for name, error in errors.items() if error.is_kept_rtn]


def errors_note(errors: Mapping[str, LayerError]) -> str:
    """Name the layer that is furthest off, those that were kept as RTN, and those that no token reached."""
    tried = {name: error.output for name, error in errors.items() if error.output is not None}
    judged_layers = [name for name, error in errors.items() if error.weight_rtn is not None]
    unseen = [name for name in judged_layers if name not in tried]
    notes = []
    if tried:
        worst = max(tried, key=lambda name: tried[name])
        notes.append(f"worst layer {worst}: output off by {tried[worst]:.1%}")
    if kept := kept_rtn(errors):
        notes.append(f"{_counted(kept)} rounded to nearest, which was closer")
    if unseen:
        notes.append(f"{_counted(unseen)} reached by no calibration token")
    return "; ".join(notes)


def _counted(names: list[str]) -> str:
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} layer{'' if len(names) == 1 else 's'} ({listed})"
