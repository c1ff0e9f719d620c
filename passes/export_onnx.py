"""Lower a torch-stage model to one ONNX graph, and prove the graph against torch.

Effect: decoders become one graph for prefill, chunk and decode over `com.microsoft::GroupQueryAttention` with a flat
    key/value cache, and logits at the flat positions a graph input names; encoders a graph with dynamic batch and
    length.
Source: transformers' attention interface and torch.export; operators as in onnxruntime's ContribOperators.md.
Changes: the form of everything; floating-point weights become float32.   Keeps: numbers, to 1e-4 of their range.
Cost: seconds to trace, by depth; memory of the largest tensor, then of the runtime that checks the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.base import ONNX, TORCH, Context, Estimate, Model, Pass, PassError, PassResult, Stage

TOLERANCE = 1e-4
"""Largest error over the range of the reference's logits. Float32 rounding in another order gives 1e-7 to 1e-6 here;
a 1 % error in the attention scale gives more than 1e-3 on the twin (tests/passes/test_export_onnx.py plants it)."""


@dataclass(frozen=True, kw_only=True)
class ExportOnnx(Pass):
    """Lower a torch-stage model to one ONNX graph, and prove the graph against torch."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def requires(self, model: Model) -> None:
        """Refuse architectures that are neither causal language models nor encoders, and pooling nobody knows."""
        from passes._sentence import require_sentence

        require_sentence(model.assets, model.config)

    def estimate(self, model: Model) -> Estimate:
        """Count the bytes of the graph's tensors: float32, and packed integers as they are."""
        from math import prod

        from passes._skeleton import Skeleton

        entries = Skeleton(model).entries.values()
        sizes = [entry.nbytes if entry.dtype in ("U8", "I8") else 4 * prod(entry.shape) for entry in entries]
        return Estimate(matches=1, bytes=sum(sizes), peak_bytes=2 * max(sizes))

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Trace, tidy and write the graph."""
        from passes._graph import save_graph
        from passes._lower import lower
        from passes._skeleton import Skeleton

        graph = lower(Skeleton(model))
        save_graph(graph, ctx.workdir)
        return PassResult(replace(model, stage=ONNX, folder=ctx.workdir), {"nodes": len(list(graph.graph))})

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Compare with torch on the model itself, and on a shrunken twin made to show what the model itself hides."""
        for what, error in _errors(before, after, ctx):
            if not error <= TOLERANCE:
                raise PassError(
                    f"{self.name()}: the graph of {what} differs from torch by {error:.1e} of the logits' range, "
                    f"expected at most {TOLERANCE:.0e}; this architecture is not lowered exactly"
                )


def _errors(before: Model, after: Model, ctx: Context) -> Iterator[tuple[str, float]]:
    """Yield what was compared with torch, and its error; the costly second one only if it is asked for."""
    from passes._parity import Probe, range_error
    from passes._skeleton import Skeleton
    from passes._twin import twin_error

    probe = Probe.random(before.config, ctx.seed)
    yield "the model", range_error(probe.graph(after.folder, ctx.threads), probe.walked(Skeleton(before)))
    yield "its twin", twin_error(before, ctx)
