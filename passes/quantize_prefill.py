"""Let prompts run through INT8 matrix products, and keep the low-bit weights for the tokens that are generated.

Effect: the artifact has a second graph, `prefill.onnx`, over the same weights. In it every matrix product inside the
    blocks multiplies 8-bit integers: weights with one scale per output feature, made of the packed ones while the graph
    is loaded, and activations with one scale per token. The runtime takes it for prompts, whatever their length.
Source: the two phases of a request bound by arithmetic and by memory, Pope et al. 2022, arXiv:2211.05102, section 2;
    row-wise scales as in LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 3.1, without its outliers.
Changes: numbers of prompts, by another rounding of the same weights.   Keeps: generated tokens; the weights on disk.
Cost: one read of the weights; while serving, memory of one more byte for each weight inside the blocks, and its head's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from passes.base import ONNX, Context, Estimate, Model, Pass, PassError, PassResult, Stage

TOLERANCE = 0.05
"""Error of a prompt's logits over their range, activations exact: 8 bits per row lose 0.4 % of the largest weight."""


@dataclass(frozen=True, kw_only=True)
class QuantizePrefill(Pass):
    """Let prompts run through INT8 matrix products, and keep the low-bit weights for what is generated."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX

    def requires(self, model: Model) -> None:
        """Refuse encoders, which have one phase, and a graph that has a second one already."""
        from passes._graph import PREFILL
        from passes._kind import kind_of

        if kind_of(model.config) != "decoder":
            raise PassError(f"{self.name()}: the model is no decoder and generates nothing; use quantize_int8 instead")
        if (model.folder / PREFILL).exists():
            raise PassError(f"{self.name()}: prompts have a graph of their own already; name the pass once")

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Rewrite the outline."""
        from passes._outline import outline_rewritten

        self.requires(model)
        return outline_rewritten(self, model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Write the graph of prompts beside the other."""
        from passes._prefill import write_prefill

        matched = write_prefill(model.folder, ctx.workdir, ctx.progress)
        if not matched:
            raise PassError(f"{self.name()}: matched 0 products; quantize weights to int8 or int4 before it")
        return PassResult(replace(model, folder=ctx.workdir), {"matched": matched})

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check, on random ids, that a prompt is answered as before but for the rounding of weights."""
        from passes._graph import PREFILL
        from passes._parity import Probe, range_error

        probe = Probe.random(before.config, ctx.seed)
        want = probe.graph(before.folder, ctx.threads)
        error = range_error(probe.graph(after.folder, ctx.threads, PREFILL), want)
        if not error <= TOLERANCE:
            raise PassError(f"{self.name()}: logits moved by {error:.1e} of their range, expected {TOLERANCE:.0e}")
