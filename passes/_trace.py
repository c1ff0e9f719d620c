"""Trace a torch-stage model into an ONNX graph without its weights being in memory.

Parameters are expanded scalars while the graph is traced: full shape, no memory. Afterwards every initializer reads
its tensor from the stage's files when, and only when, the graph is written.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from passes._attention import CacheShape, Route, Step, cache_shapes
from passes._attention import route as route_named
from passes._interrupts import interrupts_kept
from passes._kind import first_line
from passes._kv_cache import CHILD, watching
from passes._pooling import Pooling, encode, has_token_types, pooling_of
from passes._quantized import OPSET
from passes._skeleton import Skeleton
from passes.base import PassError

IR_VERSION = 11
_DYNAMIC = torch.export.Dim.DYNAMIC


def trace_decoder(skeleton: Skeleton, by: str, takes_batches: bool) -> ir.Model:
    """Return one graph for prefill, chunk and decode; `by` names the route of its attention.

    Raises:
        PassError: this family does not take that route.
    """
    module, shapes = skeleton.module, decoder_shapes(skeleton)
    route = route_named(by, shapes)
    batch, tokens = 2, 3
    widths = [(shape.heads, width) for shape in shapes for width in (shape.key_width, shape.value_width)]
    dtypes = [side for kept in cache_dtypes(module, len(shapes)) for side in (kept, kept)]
    past = [
        torch.zeros(batch, heads, 16, width, dtype=dtype) for (heads, width), dtype in zip(widths, dtypes, strict=True)
    ]
    arguments = (
        torch.zeros(batch, tokens, dtype=torch.int64),
        torch.full((batch,), tokens - 1, dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32),
        torch.arange(5),
        past,
    )
    axes: Any = (
        {0: _DYNAMIC, 1: _DYNAMIC},
        {0: _DYNAMIC},
        {},
        {0: _DYNAMIC},
        [{0: _DYNAMIC, 2: _DYNAMIC}] * len(past),
    )
    cache = [f"{layer}.{side}" for layer in range(len(shapes)) for side in ("key", "value")]
    inputs = ["input_ids", "seqlens_k", "total_sequence_length", "logits_positions", *(f"past.{x}" for x in cache)]
    with route.installed(module):
        graph = _Decoder(module, route)
        model = _trace(skeleton, graph, arguments, axes, inputs, ["logits", *(f"present.{x}" for x in cache)])
    rows = "batch" if takes_batches else "1"
    names = {"input_ids": [rows, "tokens"], "seqlens_k": [rows], "logits_positions": ["rows"]}
    for name, (heads, width) in zip(cache, widths, strict=True):
        names[f"past.{name}"] = names[f"present.{name}"] = [rows, str(heads), "capacity", str(width)]
    _name_axes(model, names | {"logits": ["rows", str(module.config.get_text_config().vocab_size)]})
    return model


def decoder_shapes(skeleton: Skeleton) -> list[CacheShape]:
    """Return what each layer keeps, its experts set to the one product per layer that a graph can hold.

    Raises:
        PassError: as `cache_shapes`.
    """
    module = skeleton.module
    if module._can_set_experts_implementation():
        module.set_experts_implementation("batched_mm")
    with weightless(module), _quiet(), torch.no_grad():
        return cache_shapes(module)


def attention_layers(skeleton: Skeleton) -> dict[str, CacheShape]:
    """Return module name -> what it keeps, of every attention layer, in the order in which they run.

    Raises:
        PassError: as `cache_shapes`; or attention does not go through transformers' interface.
    """
    names = {id(module): name for name, module in skeleton.module.named_modules()}
    layers: dict[str, CacheShape] = {}

    def see(layer: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        layers[names[id(layer)]] = CacheShape(key.shape[1], key.shape[3], value.shape[3])

    with watching(skeleton.module, see):
        kept = decoder_shapes(skeleton)
    if list(layers.values()) != kept:
        raise PassError(
            f"{len(layers)} of {len(kept)} attention layers of {type(skeleton.module).__name__} hand to transformers' "
            "attention interface what they keep"
        )
    return layers


def cache_dtypes(module: nn.Module, layers: int) -> list[torch.dtype]:
    """Return in what each layer of a decoder keeps its keys and values."""
    in_int8 = {child.layer_idx for child in module.modules() if hasattr(child, CHILD)}
    return [torch.int8 if layer in in_int8 else torch.float32 for layer in range(layers)]


def trace_encoder(skeleton: Skeleton) -> ir.Model:
    """Return the graph of an encoder with dynamic batch and sequence.

    Its output is `logits`, `sentence_embedding` where the folder says how tokens are pooled, or `last_hidden_state`.
    """
    ids = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.ones(2, 5, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    arguments = [ids, mask]
    if has_token_types(skeleton.module):
        names.append("token_type_ids")
        arguments.append(torch.zeros(2, 5, dtype=torch.int64))
    graph = _Encoder(skeleton.module, names, pooling_of(skeleton.assets, skeleton.config))
    shapes = ([{0: _DYNAMIC, 1: _DYNAMIC}] * len(names),)
    model = _trace(skeleton, graph, (arguments,), shapes, names, [graph.output])
    axes = {name: ["batch", "tokens"] for name in names}
    width = model.graph.outputs[0].shape
    assert width is not None
    axes[graph.output] = [*["batch", "tokens"][: len(width) - 1], str(width[-1])]
    _name_axes(model, axes)
    return model


class _Decoder(nn.Module):
    """A causal LM as the graph sees it: flat past in, logits of the named positions and flat present out."""

    def __init__(self, model: PreTrainedModel, route: Route) -> None:
        super().__init__()
        self.wrapped, self.route = model, route
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tokens = input_ids.shape[1]
        start = (seqlens_k.to(torch.int64) + 1 - tokens).clamp(min=0)
        positions = start[:, None] + torch.arange(tokens)[None]
        cache = self.route.begin(Step(positions, seqlens_k, total, past))
        head = self.wrapped.get_output_embeddings()
        rows = head.register_forward_pre_hook(
            lambda _, hidden: (hidden[0].flatten(0, 1).index_select(0, logits_positions)[None], *hidden[1:])
        )
        given = {"position_ids": positions} if self.takes_positions else {}
        with rows:
            out = self.wrapped(input_ids=input_ids, past_key_values=cache, use_cache=True, **given)
        return out.logits[0], self.route.present()


class _Encoder(nn.Module):
    """An encoder as the graph sees it: named integer inputs in, one tensor out."""

    def __init__(self, model: nn.Module, names: Sequence[str], pooling: Pooling | None) -> None:
        super().__init__()
        self.wrapped, self.names, self.pooling = model, names, pooling
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        self.output = "logits" if classifies else "sentence_embedding" if pooling else "last_hidden_state"

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return encode(self.wrapped, dict(zip(self.names, inputs, strict=True)), self.pooling)


def _trace(
    skeleton: Skeleton,
    graph: nn.Module,
    arguments: tuple[Any, ...],
    shapes: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> ir.Model:
    try:
        with weightless(skeleton.module):
            model = trace_module(graph, arguments, shapes, inputs, outputs)
    except Exception as error:  # whatever an architecture nobody has tried makes torch raise
        cause = error.__cause__ or error
        if isinstance(cause, PassError):  # a route's own refusal, which the exporter wraps
            raise cause from error
        architecture = type(skeleton.module).__name__
        raise PassError(f"export_onnx: torch cannot trace {architecture}: {first_line(cause)}") from error
    _bind_weights(model, skeleton)
    return model


def trace_module(
    module: nn.Module, arguments: tuple[Any, ...], shapes: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Return the graph of a module that runs on example arguments, each of them with its dynamic axes."""
    with interrupts_kept(), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    program.model.ir_version = IR_VERSION
    return program.model


def _bind_weights(model: ir.Model, skeleton: Skeleton) -> None:
    """Give every initializer its own name of the checkpoint and the file to read it from."""
    graph = model.graph
    known = skeleton.tensors("")
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix("wrapped.")
        if name in known:
            graph.initializers.pop(value.name)
            value.name = name
            value.const_value = lazy_tensor(skeleton, name)
            graph.initializers[name] = value
        elif value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)


def lazy_tensor(skeleton: Skeleton, name: str) -> ir.LazyTensor:
    """Return a tensor that is read, as float32 if it is floating point, each time it is looked at."""
    entry = skeleton.entries[skeleton.stored_name(name)]
    dtype = {"U8": ir.DataType.UINT8, "I8": ir.DataType.INT8}.get(entry.dtype, ir.DataType.FLOAT)

    def read() -> ir.TensorProtocol:
        return ir.Tensor(skeleton.read(name).numpy(), name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(entry.shape), name=name)


@contextmanager
def weightless(module: nn.Module) -> Iterator[None]:
    """Have expanded scalars in the place of tensors on the meta device; shared tensors stay shared."""
    stand_ins: dict[int, torch.Tensor] = {}
    places: list[tuple[dict[str, Any], str, Any]] = []
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for leaf, value in table.items():
                if value is not None and value.is_meta:
                    if id(value) not in stand_ins:
                        scalar = torch.zeros((), dtype=value.dtype).expand(value.shape)
                        is_parameter = isinstance(value, nn.Parameter)
                        stand_ins[id(value)] = nn.Parameter(scalar, requires_grad=False) if is_parameter else scalar
                    places.append((table, leaf, value))
                    table[leaf] = stand_ins[id(value)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for table, leaf, value in places:
            table[leaf] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks and dumps: what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _name_axes(model: ir.Model, axes: dict[str, list[str]]) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in axes:
            value.shape = ir.Shape([int(axis) if axis.isdigit() else axis for axis in axes[value.name]])
