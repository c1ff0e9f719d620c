"""Turn the residual stream and the values of heads by random rotations, so that no channel stands out.

Effect: gains of norms move into the linear layers that read them; then what writes the residual stream is multiplied
    by a random orthogonal matrix, and what reads it by its inverse; so are values and what reads them, head by head.
    The model computes what it did, in a basis without outliers of weights and activations, and needs no new operator.
Source: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), section 4, without the rotations that would have to
    run beside the model. We differ: what turns is found by trying it (passes/_stream.py); where norms take the mean
    away, the rotation leaves the mean alone, so they stay what they are; a last norm's gain parts tied tables.
Changes: all that reads or writes the residual stream, in float32; tied embedding and head become two tables.
Keeps: the function, to 1e-5 of its range.
Cost: one read of the weights; memory of the largest block or table in float32; some 30 runs of each block on a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from passes.base import TORCH, Context, Estimate, Model, Pass, PassError, PassResult, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from passes._orthogonal import Turn
    from passes._skeleton import Skeleton
    from passes._stream import Stream

TOLERANCE = 1e-5
"""Error of the answers over their range: the same products in float32, in another basis (1e-6)."""
PROBE_TOKENS = 24
TIED = "tie_word_embeddings"


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Turn the residual stream and the values of heads by random rotations, so that no channel stands out."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH

    def admits(self, source: Model, ctx: Context) -> None:
        """Look for the stream of a small twin."""
        from tempfile import TemporaryDirectory

        from passes._twin import make_twin

        with TemporaryDirectory(prefix="optimize-twin-") as folder:
            self._stream(make_twin(source, Path(folder), ctx.seed), ctx.seed)

    def requires(self, model: Model) -> None:
        """Refuse models that are quantized already."""
        from passes._skeleton import Skeleton

        if Skeleton(model).specs:
            raise PassError(f"{self.name()}: the model is quantized already; put {self.name()} before it")

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count the linear layers; all tensors become float32, tied tables two."""
        from passes._outline import outline_float32, parameters_of, torch_bytes, walking_bytes
        from passes._pairs import is_linear
        from passes._skeleton import Skeleton

        after = _untied(outline_float32(model, ctx, outside=True))
        skeleton = Skeleton(after)
        return Estimate(
            matches=sum(is_linear(module) for module in skeleton.module.modules()),
            bytes=torch_bytes(after),
            parameters=parameters_of(skeleton.module),
            peak_bytes=walking_bytes(after),
            model=after,
        )

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Find what turns, then turn it, part by part."""
        from passes._skeleton import Skeleton
        from passes._walk import run_blocks

        skeleton = Skeleton(model)
        stream = self._stream(model, ctx.seed)
        result = run_blocks(partial(_turned_part, stream, skeleton), model, ctx)
        heads = sum(0 < layer.outputs != stream.width for layer in stream.layers.values())
        changes = {"layers_turned": len(stream.layers), "heads_turned": heads, "norms_folded": len(stream.norms)}
        return replace(result, model=_untied(result.model), changes=changes, note=_note(skeleton, stream))

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that the answers are kept."""
        from passes._parity import Probe, range_error
        from passes._skeleton import Skeleton

        probe = Probe.random(before.config, ctx.seed)
        error = range_error(probe.walked(Skeleton(after)), probe.walked(Skeleton(before)))
        if not error <= TOLERANCE:
            raise PassError(f"{self.name()}: answers moved by {error:.1e} of their range, expected {TOLERANCE:.0e}")

    def _stream(self, model: Model, seed: int) -> Stream:
        """Return the stream of a model, found on random ids.

        Raises:
            PassError: it cannot be turned.
        """
        import numpy as np

        from passes._kind import vocabulary_size
        from passes._skeleton import Skeleton
        from passes._stream import find_stream

        ids = np.random.default_rng(seed).integers(1, vocabulary_size(model.config), PROBE_TOKENS).tolist()
        try:
            return find_stream(Skeleton(model), ids, seed)
        except PassError as error:
            raise PassError(f"{self.name()}: {error}") from error


def _turned_part(
    stream: Stream, skeleton: Skeleton, part: str, module: PreTrainedModel, ctx: Context
) -> dict[str, torch.Tensor]:
    """Return tensor name -> new values of what turns in one part."""
    from passes._skeleton import inside

    new: dict[str, torch.Tensor] = {}
    for norm, offset in stream.norms.items():
        if inside(norm, part):
            values = _without_gain(norm, module.get_submodule(norm), offset, stream.turn(stream.width, ctx.seed))
            new |= {f"{norm}.{leaf}": value for leaf, value in values.items()}
    for layer in stream.layers:
        if inside(layer, part):
            values = _turned(layer, module.get_submodule(layer), stream, skeleton, ctx.seed)
            new |= {f"{layer}.{leaf}": value for leaf, value in values.items()}
    return new


def _without_gain(name: str, norm: nn.Module, offset: float, turn: Turn) -> dict[str, torch.Tensor]:
    """Return the parameters of a norm whose readers take its gain: its bias, divided by the gain, turns.

    Raises:
        PassError: it adds something to a channel that it multiplies by zero.
    """
    import torch

    from passes._stream import gain_and_bias, plain_norm

    new, (gain, bias) = plain_norm(norm, offset), gain_and_bias(norm, offset)
    if ((gain == 0) & (bias != 0)).any():
        raise PassError(f"rotate: {name} multiplies a channel by zero and adds to it, so its bias cannot turn")
    if "bias" in new:
        new["bias"] = turn(torch.where(bias == 0, 0.0, bias / gain)).float()
    return new


def _turned(name: str, layer: nn.Module, stream: Stream, skeleton: Skeleton, seed: int) -> dict[str, torch.Tensor]:
    """Return weight and bias of a linear layer or a table; a tied table that is not in memory is read."""
    from passes._pairs import input_axis, is_linear

    roles, weight = stream.layers[name], layer.get_parameter("weight").data
    weight = skeleton.read(f"{name}.weight") if weight.is_meta else weight
    axis = input_axis(layer) if is_linear(layer) else 0  # a table's rows are tokens, its columns what it writes
    new = {}
    if roles.inputs:
        gain = skeleton.read(f"{roles.norm}.weight") + stream.norms[roles.norm] if roles.norm else 1.0
        turn = stream.turn(roles.inputs, seed)
        weight = _along(axis, weight, lambda rows: turn(rows * gain))
    if roles.outputs:
        turn = stream.turn(roles.outputs, seed)
        weight = _along(1 - axis, weight, turn)
        if getattr(layer, "bias", None) is not None:
            new["bias"] = turn(layer.get_parameter("bias")).float()
    return {"weight": weight, **new}


def _along(axis: int, weight: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a matrix whose rows (axis 1) or columns (axis 0) are changed, float32, some of them at a time."""
    import torch

    from passes._formats import row_chunks

    rows = weight if axis == 1 else weight.t()
    new = torch.empty(rows.shape)
    for chunk in row_chunks(*rows.shape):
        new[chunk] = change(rows[chunk].double())
    return (new if axis == 1 else new.t()).contiguous()


def _untied(model: Model) -> Model:
    """Return the model with a table of its own for embedding and head, as its files have them."""
    nested = {key: {**value, TIED: False} for key, value in model.config.items() if key == "text_config"}
    return replace(model, config={**model.config, **nested, TIED: False})


def _note(skeleton: Skeleton, stream: Stream) -> str:
    """Say what a table more costs, where one was tied."""
    tied = [layer for layer in stream.layers if f"{layer}.weight" in skeleton.ties]
    if not tied:
        return ""
    size = 4 * skeleton.module.get_parameter(f"{tied[0]}.weight").numel()
    return f"{' and '.join(tied)} are two tables now, {size / 1e6:.1f} MB more: the last norm's gain is in one of them"
