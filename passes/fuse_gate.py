"""Join the gate and up projections of gated feed-forward layers into one matrix product.

Effect: two linear layers of the same input become one, whose output is split.
Source: Shazeer 2020, arXiv:2002.05202, section 2 (SwiGLU and its kin); joining is plain linear algebra.
Changes: nodes; gate and up weights are joined.   Keeps: numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseGate(GraphPass):
    """Join the gate and up projections of gated feed-forward layers into one matrix product."""

    begins_at: ClassVar[tuple[str, ...]] = ("Sigmoid", "Gelu", "Relu", "Tanh")

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one pair of linear layers."""
        import onnx_ir as ir

        from passes._match import Refusal, other, require, used_by
        from passes._pack import pack_linears

        gate, active = node.inputs[0], node.outputs[0]
        assert gate is not None and gate.name is not None
        if node.op_type == "Sigmoid":
            active = _silu(gate, active)
        up = other(used_by(active, "Mul"), active)
        producer = gate.producer()
        require(producer is None or producer.op_type != "Split", "joined already")
        require(gate.shape is not None and up.shape is not None, "the widths are not known")
        if gate.shape[-1] != up.shape[-1]:  # type: ignore[index]
            raise Refusal("gate and up differ in width")
        packed = pack_linears(graph, (gate, up), f"{gate.name}.gate_up")
        split = ir.node("Split", [packed], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        graph.graph.insert_after(packed.producer(), split)  # type: ignore[arg-type]
        gate.replace_all_uses_with(split.outputs[0])
        up.replace_all_uses_with(split.outputs[1])
        return ""


def _silu(gate: ir.Value, sigmoid: ir.Value) -> ir.Value:
    """Return gate * sigmoid(gate)."""
    from passes._match import other, require, used_by

    product = used_by(sigmoid, "Mul")
    require(other(product, sigmoid) is gate, "the sigmoid does not gate its own input")
    return product.outputs[0]
