"""From a traced graph to the artifact's graph: shared tensors once, weights in the layout the kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from passes._graph import extents, initializer, lazy, share_bytes, tidy
from passes._parity import GraphRunner, range_error
from passes._quantized import QuantizedLinear
from passes._skeleton import Skeleton, architecture_of
from passes._trace import trace_decoder, trace_encoder
from passes._walk import walk
from passes.base import Context, Model, PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLITS = (9, 5, 1, 1, 4, 1)
"""Prefill, chunk, decode, decode, chunk, decode."""

Kind = Literal["decoder", "classifier", "embedder"]


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Return what a model is lowered to, by the class its `config.json` names.

    Raises:
        PassError: it is neither a causal language model, a sequence classifier nor a bare encoder.
    """
    from transformers.models.auto import modeling_auto as auto

    architecture = architecture_of(config)
    if architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not config.get("is_encoder_decoder"):
        return "decoder"
    if architecture in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return "classifier"
    if architecture in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        raise PassError(
            f"export_onnx: {architecture} predicts masked words; expected a classifier or an embedding model"
        )
    if architecture in auto.MODEL_MAPPING_NAMES.values():
        return "embedder"
    raise PassError(
        f"export_onnx: cannot lower {architecture}; expected a ...ForCausalLM, a ...ForSequenceClassification or a "
        "bare encoder"
    )


def lower(skeleton: Skeleton) -> ir.Model:
    """Return the artifact's graph of a torch-stage model, its weights still on disk."""
    kind = kind_of(skeleton.module.config.to_dict() | {"architectures": [type(skeleton.module).__name__]})
    model = trace_decoder(skeleton) if kind == "decoder" else trace_encoder(skeleton)
    tidy(model)
    _merge_tied(model, skeleton)
    _flatten_tables(model)
    _transpose_weights(model)
    return model


def model_error(before: Model, after: Model, ctx: Context) -> float:
    """Return the error of the graph against the torch stage it was made from, on random ids."""
    skeleton = Skeleton(before)
    runner = GraphRunner(after.folder, ctx.threads)
    rng = np.random.default_rng(ctx.seed)
    vocabulary = skeleton.module.config.vocab_size
    if kind_of(before.config) == "decoder":
        ids = rng.integers(0, vocabulary, sum(SPLITS))
        _, want = next(walk(skeleton, [lambda module: decoder_reference(module, ids)]))
        return range_error(runner.decode(ids.tolist(), SPLITS), want)
    feed = encoder_inputs(rng, vocabulary)
    _, want = next(walk(skeleton, [lambda module: encoder_reference(module, feed)]))
    return range_error(real_tokens(runner.encode(feed), feed), real_tokens(want, feed))


def decoder_reference(module: PreTrainedModel, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return torch's logits [T, V] of one sequence in one pass, with float activations."""
    _use_exact_activations(module)
    logits = module(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
    result: np.ndarray[Any, Any] = logits.numpy()
    return result


def encoder_reference(module: PreTrainedModel, feed: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return torch's output for named inputs."""
    _use_exact_activations(module)
    tensors = {name: torch.tensor(value) for name, value in feed.items()}
    if getattr(module.config, "type_vocab_size", 0) < 2:
        tensors.pop("token_type_ids")
    out = module(**tensors)
    result: np.ndarray[Any, Any] = (out.logits if hasattr(out, "logits") else out.last_hidden_state).float().numpy()
    return result


def encoder_inputs(rng: np.random.Generator, vocabulary: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return three right-padded sequences of lengths 11, 7 and 1, the second half of each of token type 1."""
    lengths, width = np.array([11, 7, 1]), 11
    ids = rng.integers(0, vocabulary, (3, width))
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    types = ((np.arange(width) >= lengths[:, None] // 2) & (mask == 1)).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def real_tokens(out: np.ndarray[Any, Any], feed: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the numbers of real tokens alone: what stands at padding means nothing."""
    return out if out.ndim == 2 else out[feed["attention_mask"].astype(bool)]


def _use_exact_activations(module: PreTrainedModel) -> None:
    for child in module.modules():
        if isinstance(child, QuantizedLinear):
            child.exact_activations = True


def _merge_tied(model: ir.Model, skeleton: Skeleton) -> None:
    """Let every name of a tied tensor be one initializer."""
    initializers = model.graph.initializers
    for name in list(initializers):
        owner = skeleton.aliases(name)[0]
        if owner != name and owner in initializers:
            initializers[name].replace_all_uses_with(initializers[owner])
            del initializers[name]


def _flatten_tables(model: ir.Model) -> None:
    """Give GatherBlockQuantized its table as [V, bytes]: what a tied MatMulNBits reads as [V, blocks, bytes]."""
    for node in list(model.graph):
        if node.op_type != "GatherBlockQuantized":
            continue
        table = node.inputs[0]
        assert table is not None and table.name is not None and table.const_value is not None
        rows, blocks, width = extents(table.const_value)
        name = f"{table.name}.rows"
        view = share_bytes(model, name, table.name, (rows, blocks * width))
        node.replace_input_with(0, view)
        if not table.uses() and view.const_value is not None:
            view.const_value.metadata_props.clear()
            del model.graph.initializers[table.name]


def _transpose_weights(model: ir.Model) -> None:
    """Store what the graph would transpose at every load the way it is used."""
    initializers = model.graph.initializers
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.name not in initializers:
            continue
        if len(source.uses()) > 1:
            continue  # a tied table: stored once, transposed at load
        tensor, order = source.const_value, tuple(node.attributes.get_ints("perm"))
        assert tensor is not None and source.name is not None
        name = f"{source.name}.transposed"
        initializers[name] = initializer(_transposed(name, tensor, order))
        node.outputs[0].replace_all_uses_with(initializers[name])
        model.graph.remove(node, safe=True)
        del initializers[source.name]


def _transposed(name: str, tensor: ir.TensorProtocol, order: tuple[int, ...]) -> ir.TensorProtocol:
    shape = tuple(extents(tensor)[axis] for axis in order)
    return lazy(name, shape, tensor.dtype, lambda: tensor.numpy().transpose(order))
