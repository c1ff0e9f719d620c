"""What a pass is: a frozen dataclass whose fields are its options, and four questions the driver asks it.

`requires` says whether the model can be taken, `estimate` what would happen, `run` does it, `ensures` proves it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from passes._quantized import QuantizedCache, QuantizedLayer


class PassError(Exception):
    """A pass cannot do its work on this model; the message says where, what and what to do."""


class Progress(Protocol):
    """Receives how far a pass has come."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that `done` of `total` units, each a `what`, are finished."""


def no_progress(done: int, total: int, what: str) -> None:
    """Ignore the report."""


@dataclass(frozen=True)
class Stage:
    """A point between two passes: the form a model has, and for graphs the operator set it speaks."""

    name: str
    dialect: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.dialect})" if self.dialect else self.name


TORCH = Stage("torch")
ONNX = Stage("onnx", "ort")

FUSION_TOLERANCE = 1e-5
"""Largest error of a rewritten graph over the range of its output; a fused kernel adds in another order (1e-6)."""


@dataclass(frozen=True)
class Model:
    """A handle on a model between two passes: files and configuration, never the weights in memory.

    Attributes:
        stage: the form of the files in `folder`.
        folder: at stage torch, safetensors files with `config.json` and, once quantized, `quantization.json`;
            at stage onnx, `model.onnx` and `model.onnx.data`. Never written to once the pass that made it is done.
        assets: folder with tokenizer, chat template, generation config and licence; usually the source's.
        config: the content of the model's `config.json`.
    """

    stage: Stage
    folder: Path
    assets: Path
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """All that a pass may use besides its own fields.

    `workdir` is an empty folder, or what a killed run of the same pass on the same input left there. `calibration` has,
    for each entry of the recipe's `data` that the pass names, token ids of texts: as many as its `samples`, each cut to
    its `context`.
    """

    workdir: Path
    source: Model
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    progress: Progress = no_progress
    calibration: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    """The new model and what was changed, such as `{"layers_quantized": 42}`.

    `note` is one line worth telling, such as why some places were left as they were.
    """

    model: Model
    changes: Mapping[str, int]
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a pass would do, from configuration and headers alone.

    Attributes:
        matches: number of places it would change.
        bytes: size of the model's files afterwards, the graph's with it.
        parameters: numbers that its weights stand for.
        peak_bytes: memory that the work takes besides what the process holds anyway.
        model: what it would leave, in outline: files that are right but for holes in the place of numbers.
        note: as in `PassResult`.
    """

    matches: int
    bytes: int
    parameters: int
    peak_bytes: int
    model: Model
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step of the pipeline. Fields are the keys a recipe may set; `__post_init__` checks their ranges.

    Attributes:
        loses: whether it may lose more than a budget allows, for a later pass to win back: pruning, for one.
        recovers: whether it wins back what a pass that `loses` has lost: training, for one.
    """

    reads: ClassVar[Stage]
    writes: ClassVar[Stage]
    loses: ClassVar[bool] = False
    recovers: ClassVar[bool] = False

    optional: bool = field(default=False, metadata={"help": "report a refusal and go on, instead of stopping"})

    @classmethod
    def name(cls) -> str:
        """Return the recipe key: the class name in snake case, which is also the file's name."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def admits(self, source: Model, ctx: Context) -> None:
        """Raise PassError when no model of this source's architecture can be taken; asked before any pass has run.

        `source` is at stage torch, whatever stage this pass reads. May take seconds, for the answer is kept.
        """

    def requires(self, model: Model) -> None:
        """Raise PassError when this model cannot be taken."""

    def estimate(self, model: Model, ctx: Context) -> Estimate | None:
        """Say what `run` would do, without reading weights; None when only the work itself can tell.

        `model` is what the passes before would leave, in outline; `ctx.workdir` takes what this one would.

        Raises:
            PassError: `run` would refuse the model.
        """
        return None

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Write the new model into `ctx.workdir`. A function of (model, fields, ctx); the input stays as it was."""
        raise NotImplementedError

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Raise PassError when `after` is not what this pass promises."""


@dataclass(frozen=True, kw_only=True)
class BlockPass(Pass):
    """A pass at stage torch that changes one part of the model at a time, and needs the memory of one.

    Attributes:
        is_layerwise: any layer it changes may be taken back by itself, for nothing else was changed on its account.
    """

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH
    is_layerwise: ClassVar[bool] = True

    def run_block(
        self, name: str, module: PreTrainedModel, ctx: Context
    ) -> Mapping[str, QuantizedLayer] | Mapping[str, QuantizedCache]:
        """Return module name -> its new form for the layers of part `name` (a block, or a module outside the blocks).

        Only the weights of that part are in memory, in the dtype they are stored in; all others are on the meta device.
        """
        raise NotImplementedError

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the parts, each written to a file of its own as it is done."""
        from passes._walk import run_blocks

        return run_blocks(self.run_block, model, ctx)


@dataclass(frozen=True, kw_only=True)
class GraphPass(Pass):
    """A pass that rewrites places of an ONNX graph, each on its own: a place that does not fit is left as it was."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX

    begins_at: ClassVar[tuple[str, ...]]

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Rewrite the place that begins at `node`, of an operator of `begins_at`; return a remark worth telling, or "".

        Raises:
            Refusal: (of `passes._match`) the place does not fit; nothing was changed.
        """
        raise NotImplementedError

    def requires(self, model: Model) -> None:
        """Refuse a model whose prompts have a graph of their own: it would be left as it was."""
        from passes._graph import PREFILL

        if (model.folder / PREFILL).exists():
            raise PassError(f"{self.name()}: prompts have a graph of their own already; put quantize_prefill after it")

    def admits(self, source: Model, ctx: Context) -> None:
        """Rewrite the graph of a shrunken twin, which shows what the model itself may hide."""
        from passes._twin import fusion_error

        error = fusion_error(self, source, ctx)
        if not error <= FUSION_TOLERANCE:
            raise PassError(
                f"{self.name()}: on a small twin of this architecture numbers moved by {error:.1e} of their range, "
                f"expected at most {FUSION_TOLERANCE:.0e}"
            )

    def estimate(self, model: Model, ctx: Context) -> Estimate | None:
        """Rewrite the outline."""
        from passes._outline import outline_rewritten

        return outline_rewritten(self, model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Rewrite every place that fits; refuse when none does."""
        from passes._match import run_rewrite

        return run_rewrite(self, model, ctx)

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that the numbers are kept, on random ids."""
        from passes._parity import graph_error

        error = graph_error(before, after, ctx)
        if not error <= FUSION_TOLERANCE:
            raise PassError(
                f"{self.name()}: numbers moved by {error:.1e} of their range, expected at most {FUSION_TOLERANCE:.0e}"
            )
