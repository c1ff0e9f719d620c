"""Keep keys and values in 8 bits.

Effect: every attention layer rounds its keys (rotated) and values to int8, a scale for each channel of each key/value
    head, from the largest magnitude on calibration texts. A cache takes a quarter of the bytes, and one function
    computes tokens that are read and tokens that are written.
Source: Hooper et al. 2024, arXiv:2401.18079, sections 3.1 and 3.2, for keys by channel with ranges found beforehand. We
    differ: 8 bits; keys are rounded after rotation, and values by channel too, as onnxruntime's operator takes them.
Changes: adds two tensors [K, 1, E] float32 to each attention layer.   Keeps: all weights.
Cost: one forward pass over the calibration texts, one block in memory; one read and write of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from passes._quantizer import require_texts
from passes.base import BlockPass, Context, Estimate, Model, PassError, PassResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._quantized import CacheSpec, QuantizedCache
    from passes._skeleton import Skeleton

SCALES = "cache_scales.json"


@dataclass(frozen=True, kw_only=True)
class QuantizeKvCache(BlockPass):
    """Keep keys and values in 8 bits."""

    is_layerwise: ClassVar[bool] = False

    calibration: str = field(metadata={"help": "entry of `data` with texts that show the range", "names": "data"})
    samples: int = field(default=128, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "attention layers left in float, as glob patterns on names, such as '*.0.*'"}
    )

    def __post_init__(self) -> None:
        require_texts(self.samples, self.context)

    def admits(self, source: Model, ctx: Context) -> None:
        """Refuse architectures whose attention does not become the one operator that keeps int8."""
        from passes._kind import architecture_of
        from passes._twin import choose_lowering

        self.requires(source)
        way = choose_lowering(source, ctx)
        if way.route != "fused":
            raise PassError(
                f"{self.name()}: the attention of {architecture_of(source.config)} does not become "
                f"GroupQueryAttention, the operator that keeps int8: {way.note}"
            )

    def requires(self, model: Model) -> None:
        """Refuse encoders, a cache that is quantized already, and patterns that name nothing."""
        from passes._kind import architecture_of, kind_of
        from passes._select import require_patterns_match
        from passes._skeleton import Skeleton

        if kind_of(model.config) != "decoder":
            name = architecture_of(model.config)
            raise PassError(f"{self.name()}: {name} keeps no keys and values, expected a decoder; leave the pass out")
        skeleton = Skeleton(model)
        if skeleton.caches:
            raise PassError(f"{self.name()}: the cache is quantized already; quantize it once")
        require_patterns_match(self.name(), self.exclude, skeleton.module)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers, and bytes of a token's keys and values."""
        from passes._outline import outline_caches, parameters_of, torch_bytes, walking_bytes
        from passes._skeleton import Skeleton

        skeleton = Skeleton(model)
        specs = self._specs(skeleton)
        after = outline_caches(specs, model, ctx)
        return Estimate(
            matches=len(specs),
            bytes=torch_bytes(after),
            parameters=parameters_of(skeleton.module),
            peak_bytes=walking_bytes(model),
            model=after,
            note=_note_bytes(skeleton, specs),
        )

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Find the scales, then write them beside the weights, part by part."""
        from passes._calibrate import few_texts_note
        from passes._skeleton import Skeleton

        texts, skeleton = ctx.calibration[self.calibration], Skeleton(model)
        specs = self._specs(skeleton)
        path = ctx.workdir / SCALES
        if not path.exists():
            _write_scales(path, skeleton, specs, texts)
        result = super().run(model, ctx)
        notes = (_note_bytes(skeleton, specs), few_texts_note(texts))
        return replace(result, changes={"caches_quantized": len(specs)}, note="; ".join(filter(None, notes)))

    def run_block(self, name: str, module: PreTrainedModel, ctx: Context) -> Mapping[str, QuantizedCache]:
        """Return the caches of one part."""
        from passes._skeleton import inside

        return {cache: new for cache, new in _read_scales(ctx.workdir / SCALES).items() if inside(cache, name)}

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that the chosen layers, and no others, have a cache in int8, with finite scales above zero."""
        from passes._skeleton import Skeleton

        skeleton, chosen = Skeleton(after), self._specs(Skeleton(before))
        if skeleton.caches != chosen:
            raise PassError(f"{self.name()}: quantized {len(skeleton.caches)} caches, expected {len(chosen)}")
        for cache, spec in chosen.items():
            for leaf in spec.shapes():
                scales = skeleton.read(f"{cache}.{leaf}")
                if not (scales.isfinite() & (scales > 0)).all():
                    raise PassError(f"{self.name()}: {cache}: a {leaf} is not a number above zero")

    def _specs(self, skeleton: Skeleton) -> dict[str, CacheSpec]:
        """Return module name -> spec of the caches to quantize.

        Raises:
            PassError: all attention layers are excluded.
        """
        from passes._kv_cache import CHILD
        from passes._quantized import CacheSpec
        from passes._trace import attention_layers

        layers = attention_layers(skeleton)
        chosen = [name for name in layers if not any(fnmatchcase(name, pattern) for pattern in self.exclude)]
        if not chosen:
            raise PassError(f"{self.name()}: matched none of {len(layers)} attention layers: all are excluded")
        return {f"{name}.{CHILD}": CacheSpec(layers[name].heads, layers[name].key_width) for name in chosen}


def _note_bytes(skeleton: Skeleton, specs: Mapping[str, CacheSpec]) -> str:
    """Say what the keys and values of a token take."""
    from passes._trace import decoder_shapes

    before = sum(4 * shape.heads * (shape.key_width + shape.value_width) for shape in decoder_shapes(skeleton))
    after = before - sum(3 * 2 * spec.heads * spec.width for spec in specs.values())
    return f"keys and values take {after:,} bytes a token instead of {before:,}"


def _write_scales(
    path: Path, skeleton: Skeleton, specs: Mapping[str, CacheSpec], texts: Sequence[Sequence[int]]
) -> None:
    """Find scales and keep them, for a run that is killed before all parts are written."""
    from passes._files import atomic_write
    from passes._kv_cache import find_scales

    layers = [name.rpartition(".")[0] for name in specs]
    found = find_scales(skeleton, layers, texts)
    content = {
        name: {"spec": asdict(spec), **{side: scale.tolist() for side, scale in found[layer].items()}}
        for layer, (name, spec) in zip(layers, specs.items(), strict=True)
    }
    atomic_write(path, (json.dumps(content) + "\n").encode())


def _read_scales(path: Path) -> dict[str, QuantizedCache]:
    """Return module name -> what a cache becomes."""
    import torch

    from passes._quantized import CacheSpec, QuantizedCache

    return {
        name: QuantizedCache(
            CacheSpec(**each["spec"]), {f"{side}_scale": torch.tensor(each[side]) for side in ("key", "value")}
        )
        for name, each in json.loads(path.read_text()).items()
    }
