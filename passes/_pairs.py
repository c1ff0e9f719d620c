"""Which layer's output channels can be scaled so that the layers that read them undo it: found by trying it.

Each norm and linear layer of a block is taken in turn: its output is multiplied by a factor per channel, all factors
different. A linear layer whose input turns up multiplied by those factors reads it, channel by channel, whatever lies
between (a product with a gate, attention, heads that are repeated). When these readers divide the factors out again and
the block's output is what it was, nothing else reads it. No names and no list of families: what was tried holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes._walk import walk_over

if TYPE_CHECKING:
    from passes._skeleton import Skeleton

Functions = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
TOLERANCE = 1e-5
"""Error of a block's output over its range: factors go through float32 products and divisions (1e-6)."""
PROBE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer, and all the layers that read its output.

    Attributes:
        source: a norm or a linear layer.
        gain_offset: what a norm adds to its stored gain, 0 or 1 (Gemma); None for a linear layer.
        readers: linear layers.
        channels: int64 [M], which channel of the source each input feature of the readers is.
    """

    source: str
    gain_offset: float | None
    readers: tuple[str, ...]
    channels: torch.Tensor


@dataclass
class Found:
    """The pairs of a model; and linear layer -> why its input cannot be scaled."""

    pairs: list[Pair] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)


def find_pairs(skeleton: Skeleton, ids: Sequence[int]) -> Found:
    """Try every norm and linear layer inside the blocks, on one text, one block in memory at a time."""
    found = Found()

    def see(name: str, block: nn.Module, args: Any, options: Any, _: Any) -> None:
        find_in(block_trial(name, block, args, options), found)

    on_every_block(skeleton, ids, see)
    return found


def on_every_block(
    skeleton: Skeleton, ids: Sequence[int], see: Callable[[str, nn.Module, Any, Any, Any], None]
) -> None:
    """Call `see` with name, block, arguments and output of each block on a few tokens, one block in memory."""

    def enter(name: str) -> Callable[..., None]:
        return lambda block, args, options, out: see(name, block, args, options, out)

    with ExitStack() as hooks:
        for name in skeleton.blocks:
            block = skeleton.module.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(enter(name), with_kwargs=True))
        walk_over(skeleton, [ids[:PROBE_TOKENS]])


def block_trial(name: str, block: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> Trial:
    """Return a trial of a block, its layers by their full names."""
    children = {f"{name}.{child}": module for child, module in block.named_modules()}
    return Trial(children, lambda: block.forward(*args, **options))


def pairs_of_block(name: str, block: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    """Try every norm and linear layer of one block, whose weights are in memory, on one batch."""
    found = Found()
    find_in(block_trial(name, block, args, options), found)
    return found


def fold(
    pair: Pair, scales: torch.Tensor, layer: Callable[[str], nn.Module], new: MutableMapping[str, torch.Tensor]
) -> None:
    """Divide the output of a pair's source by `scales` per channel, and multiply the weights of its readers by them.

    Args:
        pair: none of its scales has been folded in yet.
        scales: float32, one for each channel of the source.
        layer: gives a layer by its name.
        new: tensor name -> values in float32 that replace those of a layer; what changes is put there. What is there
            already, of a pair that shares a layer with this one, is changed further.
    """

    def now(tensor: str) -> torch.Tensor:
        module, _, leaf = tensor.rpartition(".")
        return new[tensor] if tensor in new else layer(module).get_parameter(leaf).float()

    factors = scales[pair.channels]
    for reader in pair.readers:
        is_last = input_axis(layer(reader)) == 1
        new[f"{reader}.weight"] = now(f"{reader}.weight") * (factors if is_last else factors[:, None])
    source, name = layer(pair.source), f"{pair.source}.weight"
    if pair.gain_offset is not None:
        scaled = scaled_norm(source, pair.gain_offset, 1 / scales)
        new.update({f"{pair.source}.{leaf}": value for leaf, value in scaled.items()})
        return
    new[name] = now(name) / (scales[:, None] if input_axis(source) == 1 else scales)
    if getattr(source, "bias", None) is not None:
        new[f"{pair.source}.bias"] = now(f"{pair.source}.bias") / scales


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a linear layer's weight that its input features lie on: GPT-2 stores weights transposed."""
    return 1 if isinstance(layer, nn.Linear) else 0


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, in either layout."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


class Trial:
    """Code that can be run again as it was just run, with functions put on outputs and inputs of its layers.

    Attributes:
        modules: name -> module, all that a function can be put on the output of.
        linears, norms: those of them.
        out: what the code returns, the first of it if it is several.
        inputs: of every linear layer [T, M].
    """

    def __init__(self, modules: Mapping[str, nn.Module], forward: Callable[[], Any]) -> None:
        self.modules, self._forward = modules, forward
        self.linears = {name: module for name, module in modules.items() if is_linear(module)}
        self.norms = {name: module for name, module in modules.items() if _is_norm(module)}
        self.out, self.inputs = self.run({}, {})

    def run(
        self, leaving: Functions, entering: Functions, forward: Callable[[], Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the code returns, and the input of every linear layer before its function.

        Args:
            leaving: module -> function of its output.
            entering: linear layer -> function of its input.
            forward: runs in the place of the code.
        """
        inputs: dict[str, torch.Tensor] = {}

        def enter(name: str) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                inputs[name] = args[0].flatten(0, -2)
                return (entering[name](args[0]), *args[1:]) if name in entering else args

            return hook

        def leave(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda _, __, out: change(out)

        with ExitStack() as hooks:
            for name, module in self.linears.items():
                hooks.enter_context(module.register_forward_pre_hook(enter(name)))
            for name, change in leaving.items():
                hooks.enter_context(self.modules[name].register_forward_hook(leave(change)))
            out = (forward or self._forward)()
        return (out if isinstance(out, torch.Tensor) else out[0]), inputs


def find_in(trial: Trial, found: Found) -> None:
    """Try every norm and linear layer of a trial."""
    for source in (*trial.norms, *trial.linears):
        _examine(trial, source, found)
    read = {reader for pair in found.pairs for reader in pair.readers}
    for linear in trial.linears:
        if linear in read:
            found.refusals.pop(linear, None)
        else:
            found.refusals.setdefault(linear, "no norm or linear layer of its block reaches it channel by channel")


def _examine(trial: Trial, source: str, found: Found) -> None:
    module = trial.modules[source]
    factors = torch.linspace(0.5, 2, output_width(module))
    _, inputs = trial.run({source: lambda out: out * factors}, {})
    tried = {name: _channels(x, inputs[name], factors) for name, x in trial.inputs.items() if name in inputs}
    maps = {name: channels for name, channels in tried.items() if channels is not None}
    if not maps:
        return
    offset = None if source in trial.linears else _gain_offset(module)
    reason = _refusal(trial, source, offset, factors, maps)
    if reason:
        found.refusals |= dict.fromkeys(maps, reason)
    else:
        found.pairs.append(Pair(source, offset, tuple(maps), next(iter(maps.values()))))


def _refusal(
    trial: Trial, source: str, offset: float | None, factors: torch.Tensor, maps: Mapping[str, torch.Tensor]
) -> str:
    """Return why a layer that is read by those of `maps` cannot be scaled, "" if it can."""
    first = next(iter(maps.values()))
    if not all(torch.equal(channels, first) for channels in maps.values()):
        return f"{source} reaches {' and '.join(maps)} in different orders"
    out, _ = trial.run({source: lambda out: out * factors}, dict.fromkeys(maps, lambda x: x / factors[first]))
    if not relative_error(out, trial.out) <= TOLERANCE:
        return f"{source} is read by more than linear layers, such as a residual"
    if source in trial.norms and offset is None:
        return f"the gain of {source} is neither its weight nor one more"
    return ""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference over the range of `want`."""
    return float((got - want).abs().max() / (want.max() - want.min()).clamp(min=1e-30))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a leaf with a gain per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1 and not list(module.children())


def output_width(module: nn.Module) -> int:
    """Return the number of channels a norm or linear layer puts out."""
    weight = module.get_parameter("weight")
    return weight.shape[1 - input_axis(module)] if is_linear(module) else weight.shape[0]


def _channels(before: torch.Tensor, after: torch.Tensor, factors: torch.Tensor) -> torch.Tensor | None:
    """Return which factor each feature of [T, M] was multiplied by; None unless each was, at every token, by one.

    A feature that is zero at all tokens tells nothing: it is taken to be in its own place if all others are.
    """
    if before.shape != after.shape or torch.equal(before, after):
        return None
    energy = before.square().sum(0)
    live = energy > 0
    ratio = torch.where(live, (before * after).sum(0) / energy.clamp(min=1e-30), 1.0)
    if not ((after - ratio * before).abs().amax(0) <= 1e-4 * before.abs().amax(0)).all():
        return None
    channels = ((ratio - 0.5) / 1.5 * (len(factors) - 1)).round().long().clamp(0, len(factors) - 1)
    spacing = 1.5 / max(1, len(factors) - 1)
    if not ((ratio - factors[channels]).abs() <= spacing / 4)[live].all():
        return None
    own = torch.arange(len(channels))
    if len(channels) == len(factors) and torch.equal(channels[live], own[live]):
        return own
    return channels if live.all() else None


def _gain_offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its stored gain: found by scaling that and looking at what comes out.

    None where it is neither 0 nor 1, or where the norm reads more than one tensor, such as a gate.
    """
    weight = norm.get_parameter("weight")
    factors = torch.linspace(0.5, 2, len(weight))
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    try:
        want = norm(x) * factors
    except (TypeError, AttributeError):  # its other tensors have no default, or None
        return None
    for offset in (0.0, 1.0):
        with replaced(norm, scaled_norm(norm, offset, factors)):
            got = norm(x)
        if torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max())):
            return offset
    return None


def scaled_norm(norm: nn.Module, offset: float, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the parameters of a norm whose output is multiplied by a factor per channel."""
    own = {name: parameter.float() for name, parameter in norm.named_parameters()}
    new = {"weight": (own["weight"] + offset) * factors - offset}
    return new | ({"bias": own["bias"] * factors} if "bias" in own else {})


@contextmanager
def replaced(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have other values for some parameters of a module."""
    kept = dict(module._parameters)
    module._parameters |= {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    try:
        yield
    finally:
        module._parameters |= kept
