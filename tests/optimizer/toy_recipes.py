"""Small passes and a recipe that is right, for tests to change."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from optimizer.catalogue import Catalogue
from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.classification import Classification
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.similarity import Similarity
from passes.base import ONNX, TORCH, Context, Estimate, Model, Pass, PassError, Stage


@dataclass(frozen=True, kw_only=True)
class QuantizeToy(Pass):
    """Round weights."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH
    format: Literal["int8", "int4"] = field(default="int4", metadata={"help": "what weights become"})
    group_size: Literal[32, 64, "channel"] = 32
    ratio: float = field(default=0.5, metadata={"help": "share of layers", "gt": 0, "le": 1})
    symmetric: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format == "int8" and self.group_size == 64:
            raise ValueError("group_size: got 64, expected 32 or channel with int8")

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        return Estimate(7, 1_000_000, 500_000, 2_000_000, model)


@dataclass(frozen=True, kw_only=True)
class ExportToy(Pass):
    """Write a graph."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        return Estimate(1, 1_200_000, 500_000, 3_000_000, replace(model, stage=ONNX))


@dataclass(frozen=True, kw_only=True)
class FuseToy(Pass):
    """Fuse nodes."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX
    pattern: str = field(metadata={"help": "what to fuse"})

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        raise PassError("fuse_toy matched 0 of 2 blocks")


CHOICES = Catalogue(
    passes={"quantize_toy": QuantizeToy, "export_toy": ExportToy, "fuse_toy": FuseToy},
    tasks={
        "perplexity": Perplexity,
        "classification": Classification,
        "agreement": Agreement,
        "similarity": Similarity,
    },
)

RIGHT = """\
name: toy
model: org/model@main
target: {device: cpu, threads: 2}
data:
  held_out: {json: texts.jsonl, group: path}
evaluate:
  ppl: {task: perplexity, data: held_out, context: 512}
  same: {task: agreement, data: held_out}
gate:
  alpha: 0.1
  ppl: {max_increase: 1%}
  same: {max_flips: 8%, max_kl: 0.05}
  size: {max_ratio: 0.40}
passes:
  - quantize_toy: {format: int4}
  - export_toy
  - fuse_toy:
      pattern: gate
"""
