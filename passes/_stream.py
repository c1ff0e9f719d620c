"""Which tensors have to turn for a model's residual stream to turn, and its answers not: found by trying it.

In every block, norms that only linear layers read are found as pairs (passes/_pairs.py). With those norms held still, a
linear layer whose output moves the block's by as much, at every token, writes to the stream. Then the block is run on a
turned stream: its norms have no gain, what reads them turns back, what writes turns. If its output is the turned one of
before, nothing else reads or writes. Embeddings, final norm and head are tried in the same way. No names and no list of
families: what was tried holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes._kind import kind_of
from passes._orthogonal import Turn
from passes._pairs import (
    Found,
    Pair,
    Trial,
    block_trial,
    find_in,
    on_every_block,
    output_width,
    relative_error,
    replaced,
)
from passes._skeleton import inside
from passes.base import PassError

if TYPE_CHECKING:
    from passes._skeleton import Skeleton

TOLERANCE = 1e-4
"""Error of a turned stream over its range: float32 products in another basis (1e-6); what does not turn is off by 1."""
HEAD_TOLERANCE = 1e-5
"""Error of a block whose values turn within their heads (1e-6); heads that attend alike may differ by little more."""
SHARE_TOLERANCE = 1e-3
"""Error of what a layer adds to the stream, which may itself be 1000 times as large, over the most that it adds."""


@dataclass(frozen=True)
class Turned:
    """How a linear layer or a table changes.

    Attributes:
        inputs, outputs: its features turn in blocks of so many; 0 for not at all.
        norm: whose gain its input features are multiplied by before they turn; "" for none.
    """

    inputs: int = 0
    outputs: int = 0
    norm: str = ""


@dataclass
class Stream:
    """A residual stream that can be turned.

    Attributes:
        width: its channels.
        layers: what reads it, what writes it, and layers between which values turn within their heads.
        norms: name -> what each norm that reads the stream adds to its stored gain.
        centred: some of these take the mean away, which has to stay.
    """

    width: int = 0
    layers: dict[str, Turned] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    centred: bool = False

    def turn(self, width: int, seed: int) -> Turn:
        """Return the rotation of blocks of so many channels."""
        return Turn(width, seed, centred=self.centred and width == self.width)

    def add(self, layer: str, **role: Any) -> None:
        """Note one more role of a layer."""
        self.layers[layer] = replace(self.layers.get(layer, Turned()), **role)

    def add_readers(self, trial: Trial, found: Found) -> list[Pair]:
        """Note the norms of the stream's width that only linear layers read; return them."""
        own = torch.arange(self.width)
        norms = [pair for pair in found.pairs if pair.gain_offset is not None and torch.equal(pair.channels, own)]
        for pair in norms:
            assert pair.gain_offset is not None
            self.norms[pair.source] = pair.gain_offset
            self.centred |= _is_centred(trial.modules[pair.source])
            for reader in pair.readers:
                self.add(reader, inputs=self.width, norm=pair.source)
        return norms


def find_stream(skeleton: Skeleton, ids: Sequence[int], seed: int) -> Stream:
    """Try every block, one in memory at a time, and what lies outside them, on one text.

    Raises:
        PassError: the stream cannot be turned; the message says where and why.
    """
    stream = Stream()
    ends: list[Any] = []  # what enters the first block [1, T, D], and what the last one returns

    def see(name: str, block: nn.Module, args: Any, options: Any, out: Any) -> None:
        states = _stream_in(args, options)
        if not ends:
            ends.append(states)
            stream.width = states.shape[-1]
        ends[1:] = [out]

        def run_turned(turn: Turn) -> Any:
            turned = turn(states).float()
            swapped = [turned if each is states else each for each in args]
            return block.forward(*swapped, **{k: turned if each is states else each for k, each in options.items()})

        _examine_block(name, block_trial(name, block, args, options), stream, seed, run_turned)

    on_every_block(skeleton, ids, see)
    with torch.no_grad(), skeleton.loaded(*skeleton.outside()):
        _examine_outside(skeleton, torch.tensor([list(ids[: ends[0].shape[1]])]), ends[0], ends[1], stream, seed)
    return stream


def gain_and_bias(norm: nn.Module, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a norm multiplies its channels by and what it adds to them, float32 [D] each."""
    gain, bias = norm.get_parameter("weight").float() + offset, getattr(norm, "bias", None)
    return gain, torch.zeros_like(gain) if bias is None else bias.float()


def plain_norm(norm: nn.Module, offset: float) -> dict[str, torch.Tensor]:
    """Return the parameters of a norm that multiplies by 1 and adds nothing."""
    values = {"weight": 1 - offset, "bias": 0.0}
    return {name: torch.full(old.shape, values[name]) for name, old in norm.named_parameters()}


def _examine_block(name: str, trial: Trial, stream: Stream, seed: int, run_turned: Callable[[Turn], Any]) -> None:
    """Add to `stream` what turns in one block, which `run_turned` runs on its stream turned."""
    found = Found()
    find_in(trial, found)
    norms = stream.add_readers(trial, found)
    writers = _writers(trial, norms, stream.width)
    turn = stream.turn(stream.width, seed)
    got = _out_turned(trial, norms, writers, turn, lambda: run_turned(turn))
    if not relative_error(got, turn(trial.out).float()) <= TOLERANCE:
        known = [pair.source for pair in norms]
        others = [n for n, norm in trial.norms.items() if n not in known and output_width(norm) == stream.width]
        reason = (
            f"{others[0]} is not read by linear layers alone" if others else "what reads or writes it is not linear"
        )
        raise PassError(f"{name}: its output does not turn with the residual stream: {reason}")
    for writer in writers:
        stream.add(writer, outputs=stream.width)
    for pair in found.pairs:
        width = _head_width(trial, pair, seed) if pair.gain_offset is None else 0
        if width:
            stream.add(pair.source, outputs=width)
            for reader in pair.readers:
                stream.add(reader, inputs=width)


def _writers(trial: Trial, norms: Sequence[Pair], width: int) -> list[str]:
    """Return the linear layers that add a multiple of their output, one for each token, to a block's output."""
    held: dict[str, torch.Tensor] = {}

    def hold(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda out: held.setdefault(name, out)

    still = {pair.source: hold(pair.source) for pair in norms}
    before, _ = trial.run(still, {})
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(before.shape, generator=generator) * before.std()  # [1, T, D]
    found = []
    for name, module in trial.linears.items():
        if output_width(module) == width:
            change = trial.run({**still, name: lambda out: out + added.reshape(out.shape)}, {})[0] - before
            share = (change * added).sum(-1, keepdim=True) / added.square().sum(-1, keepdim=True)
            if (change - share * added).abs().max() <= SHARE_TOLERANCE * change.abs().max():
                found.append(name)
    return found


def _head_width(trial: Trial, pair: Pair, seed: int) -> int:
    """Return the largest width in blocks of which a layer's output may turn if its readers turn back; 0 for none."""
    outputs, features = output_width(trial.modules[pair.source]), len(pair.channels)

    def turns(width: int) -> bool:
        blocks = pair.channels.unflatten(0, (-1, width))  # of the readers' features, each of one block of the source's
        starts = blocks[:, :1]
        if (starts % width).any() or not torch.equal(blocks, starts + torch.arange(width)):
            return False
        turn = Turn(width, seed)
        back = dict.fromkeys(pair.readers, lambda x: turn.back(x).float())
        out, _ = trial.run({pair.source: lambda y: turn(y).float()}, back)
        return relative_error(out, trial.out) <= HEAD_TOLERANCE

    widths = [width for width in range(outputs, 1, -1) if outputs % width == features % width == 0]
    if not widths or not turns(widths[-1]):  # what mixes no two neighbours mixes no more of them
        return 0
    return next(width for width in widths if turns(width))


def _examine_outside(
    skeleton: Skeleton, ids: torch.Tensor, first: torch.Tensor, last: Any, stream: Stream, seed: int
) -> None:
    """Add to `stream` embeddings, final norm and head.

    Args:
        skeleton: with what lies outside the blocks in memory.
        ids: int64 [1, T].
        first: the stream that enters the first block [1, T, D].
        last: what the last block returns.
    """
    options = {"use_cache": False} if kind_of(skeleton.config) == "decoder" else {}
    entered: list[torch.Tensor] = []

    def run(states: torch.Tensor) -> Any:
        """Run the model with blocks that return `states`."""
        entered.clear()

        def stand_in(*args: Any, **named: Any) -> Any:
            entered.append(_stream_in(args, named))
            return states if isinstance(last, torch.Tensor) else (states, *last[1:])

        with _stand_ins(skeleton, stand_in):
            return skeleton.module(input_ids=ids, **options)

    left = last if isinstance(last, torch.Tensor) else last[0]
    modules = {
        name: module
        for name, module in skeleton.module.named_modules()
        if not any(inside(name, block) for block in skeleton.blocks)
    }
    trial = Trial(modules, lambda: run(left))
    turn, found = stream.turn(stream.width, seed), Found()
    tables = [n for n, m in modules.items() if isinstance(m, nn.Embedding) and m.embedding_dim == stream.width]
    _out_turned(trial, [], tables, turn, lambda: run(left))
    if not relative_error(entered[0], turn(first).float()) <= TOLERANCE:
        raise PassError(
            f"{skeleton.blocks[0]}: what enters it does not turn with {' and '.join(tables) or 'any embedding'}: "
            "something else, such as a norm with a gain, lies between"
        )
    find_in(trial, found)
    norms = stream.add_readers(trial, found)
    turn = stream.turn(stream.width, seed)
    got = _out_turned(trial, norms, [], turn, lambda: run(turn(left).float()))
    if not relative_error(got, trial.out) <= TOLERANCE:
        raise PassError(
            "the model answers with the residual stream itself, or more than linear layers read its last norm"
        )
    for table in tables:
        stream.add(table, outputs=stream.width)


@contextmanager
def _stand_ins(skeleton: Skeleton, forward: Callable[..., Any]) -> Iterator[None]:
    """Have another function in the place of every block, none of whose weights are needed then."""
    blocks: list[Any] = [skeleton.module.get_submodule(name) for name in skeleton.blocks]
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


def _out_turned(
    trial: Trial, norms: Sequence[Pair], writers: Sequence[str], turn: Turn, forward: Callable[[], Any]
) -> torch.Tensor:
    """Return what `forward` returns where norms have no gain, what reads them turns back and what writes turns."""
    back: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    with ExitStack() as kept:
        for pair in norms:
            assert pair.gain_offset is not None
            norm = trial.modules[pair.source]
            gain, bias = gain_and_bias(norm, pair.gain_offset)
            kept.enter_context(replaced(norm, plain_norm(norm, pair.gain_offset)))
            back |= dict.fromkeys(pair.readers, partial(_turned_back, turn, gain, bias))
        return trial.run(dict.fromkeys(writers, lambda out: turn(out).float()), back, forward)[0]


def _turned_back(turn: Turn, gain: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return turn.back(x).float() * gain + bias


def _is_centred(norm: nn.Module) -> bool:
    """Return whether a norm takes the mean away."""
    x = torch.randn(4, output_width(norm), generator=torch.Generator().manual_seed(0))
    return torch.allclose(norm(x), norm(x + 1), rtol=0, atol=1e-4 * float(norm(x).abs().max()))


def _stream_in(args: Sequence[Any], options: Any) -> torch.Tensor:
    """Return the hidden states [B, T, D] among a block's arguments: the first of three axes."""
    given = (each for each in (*args, *options.values()) if isinstance(each, torch.Tensor) and each.ndim == 3)
    return next(given)
