"""Lower a torch-stage model to one ONNX graph, and prove the graph against torch.

Effect: decoders become one graph for prefill, chunk and decode over `com.microsoft::GroupQueryAttention` with a flat
    key/value cache, and logits at the flat positions a graph input names; encoders a graph with dynamic batch and
    length.
Source: transformers' attention interface and torch.export; operators as in onnxruntime's ContribOperators.md.
Changes: the form of everything; floating-point weights become float32.   Keeps: numbers, to 1e-4 of their range.
Cost: seconds to trace, by depth; memory of the largest tensor, then of the runtime that checks the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from passes.base import ONNX, TORCH, Context, Estimate, Model, Pass, PassError, PassResult, Stage

if TYPE_CHECKING:
    from passes._twin import Lowering

CACHE_SHARE = 0.5
"""Of what rounding to int8 caches does, that graph and torch may differ by: keys that differ by 1e-7 may fall on either
side of a half, which one in thousands does; a wrong scale does more than all of the rounding."""


@dataclass(frozen=True, kw_only=True)
class ExportOnnx(Pass):
    """Lower a torch-stage model to one ONNX graph, and prove the graph against torch."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def requires(self, model: Model) -> None:
        """Refuse architectures that are neither causal language models nor encoders, and pooling nobody knows."""
        from passes._sentence import require_sentence

        require_sentence(model.assets, model.config)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Lower the model without its weights, or a shallow one where it is deep."""
        from passes._outline import outline_graph, part_bytes, walking_bytes
        from passes._skeleton import Skeleton
        from passes._twin import choose_lowering

        way = choose_lowering(model, ctx)

        def lower(shallow: Model, folder: Path) -> None:
            _lower(shallow, way, folder)

        peak_bytes = walking_bytes(model) + 2 * max(part_bytes(Skeleton(model)))
        return replace(outline_graph(model, ctx, lower), peak_bytes=peak_bytes)

    def admits(self, source: Model, ctx: Context) -> None:
        """Lower a shrunken twin, made to show what the model itself hides, and compare it with torch."""
        from passes._twin import choose_lowering

        choose_lowering(source, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Trace, tidy and write the graph, in the way that is exact on the twin."""
        from passes._kind import position_limit
        from passes._twin import choose_lowering

        way = choose_lowering(model, ctx)
        nodes = _lower(model, way, ctx.workdir)
        _, cut = position_limit(model.config)
        note = "; ".join(filter(None, [f"{way.route} attention: {way.note}" if way.note else "", cut]))
        return PassResult(replace(model, stage=ONNX, folder=ctx.workdir), {"nodes": nodes}, note)

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Compare with torch on the model itself."""
        from passes._parity import Probe
        from passes._skeleton import Skeleton
        from passes._twin import TOLERANCE

        skeleton, probe = Skeleton(before), Probe.random(before.config, ctx.seed)
        want = probe.walked(skeleton)
        self._require(probe.error(probe.graph(after.folder, ctx.threads), want), TOLERANCE)
        if skeleton.caches:
            rounding = replace(probe, rounds_cache=True)
            rounded = rounding.walked(skeleton)
            limit = max(TOLERANCE, CACHE_SHARE * probe.error(want, rounded))
            self._require(rounding.error(rounding.graph(after.folder, ctx.threads), rounded), limit)

    def _require(self, error: float, tolerance: float) -> None:
        if not error <= tolerance:
            raise PassError(
                f"{self.name()}: the graph of the model differs from torch by {error:.1e} of the logits' range, "
                f"expected at most {tolerance:.0e}; this architecture is not lowered exactly"
            )


def _lower(model: Model, way: Lowering, folder: Path) -> int:
    """Write the graph of a torch stage; return how many nodes it has."""
    from passes._attention import attention_of
    from passes._graph import save_graph
    from passes._lower import lower
    from passes._skeleton import Skeleton

    graph = lower(Skeleton(model, attention_of(way.route)), way.route, way.takes_batches)
    save_graph(graph, folder)
    return len(list(graph.graph))
