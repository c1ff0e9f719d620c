"""The torch stage in memory: what is read from which file, once, and what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import Workshop, save_model, tiny_module

from passes._safetensors import SINGLE_NAME, read_tensor, tensor_index, write_safetensors
from passes._skeleton import Skeleton, block_names, build_module
from passes.base import Model, PassError


def stored(model: Model) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in tensor_index(model.folder).items()}


def rewritten(model: Model, folder: Path, tensors: dict[str, torch.Tensor]) -> Model:
    """Return the model with other tensors in its file."""
    write_safetensors(folder / SINGLE_NAME, tensors)
    return replace(model, folder=folder)


def in_memory(skeleton: Skeleton) -> set[str]:
    """Return the names of the modules that hold a parameter or stored buffer off the meta device."""
    tensors = skeleton.module.state_dict(keep_vars=True)
    return {name.rpartition(".")[0] for name, tensor in tensors.items() if not tensor.is_meta}


def logits(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    with skeleton.loaded(""), torch.inference_mode():
        result: torch.Tensor = skeleton.module(input_ids=ids).logits
    return result


def test_no_weight_is_in_memory_until_it_is_asked_for(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    assert in_memory(skeleton) == set()
    with skeleton.loaded("model.layers.1.mlp"):
        assert in_memory(skeleton) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert in_memory(skeleton) == set()


def test_weights_are_given_back_when_the_work_on_them_fails(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    with pytest.raises(ZeroDivisionError), skeleton.loaded("model.norm"):
        raise ZeroDivisionError
    assert in_memory(skeleton) == set()


def test_blocks_and_what_lies_outside_them_make_up_the_model(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama-untied"))
    assert skeleton.blocks == ["model.layers.0", "model.layers.1"]
    assert skeleton.outside() == ["model.embed_tokens", "model.norm", "lm_head"]
    parts = [tensor for part in skeleton.outside() + skeleton.blocks for tensor in skeleton.tensors(part)]
    assert sorted(parts) == sorted(skeleton.entries)


def test_blocks_inside_blocks_are_no_blocks_of_their_own() -> None:
    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    outer = torch.nn.Module()
    outer.layers = torch.nn.ModuleList([torch.nn.Sequential(inner), torch.nn.Linear(1, 1)])
    assert block_names(outer) == ["layers.0", "layers.1"]


def test_a_tied_tensor_is_read_once_and_shared(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    with skeleton.loaded(*skeleton.outside()):
        embedding, head = skeleton.module.get_input_embeddings(), skeleton.module.get_output_embeddings()
        assert embedding.weight.data_ptr() == head.weight.data_ptr()


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_may_be_stored_under_either_name(workshop: Workshop, tmp_path: Path, kept: str) -> None:
    model, ids = workshop.model("llama"), torch.arange(9)[None]
    tensors = stored(model)
    (name,) = {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys()  # stored once
    tensors[kept] = tensors.pop(name)
    assert torch.equal(logits(Skeleton(rewritten(model, tmp_path, tensors)), ids), logits(Skeleton(model), ids))


@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen2", "bert"])
def test_a_loaded_skeleton_computes_what_transformers_computes(workshop: Workshop, name: str) -> None:
    ids = torch.arange(1, 10)[None]
    with torch.inference_mode():
        want = tiny_module(name)(input_ids=ids).logits
    assert torch.equal(logits(Skeleton(workshop.model(name)), ids), want)


def test_shards_are_read_as_one_file_is(workshop: Workshop, tmp_path: Path) -> None:
    sharded = save_model(tiny_module("llama"), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(9)[None]
    assert torch.equal(logits(Skeleton(sharded), ids), logits(Skeleton(workshop.model("llama")), ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_float_type_are_float32_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    module = tiny_module("llama").to(dtype)
    skeleton = Skeleton(save_model(module, tmp_path))
    with skeleton.loaded("model.layers.0"):
        weight = skeleton.module.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert weight.dtype == torch.float32
        assert torch.equal(weight, module.get_parameter("model.layers.0.mlp.up_proj.weight").float())


def test_a_missing_tensor_is_named_in_one_line(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    tensors = stored(model)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    with pytest.raises(PassError) as raised:
        Skeleton(rewritten(model, tmp_path, tensors))
    message = str(raised.value)
    assert "2 tensors that LlamaForCausalLM needs are not in the safetensors files" in message
    assert "first model.layers.1.mlp.up_proj.weight" in message
    assert "\n" not in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    tensors = stored(model)
    tensors["model.norm.weight"] = torch.ones(63)
    with pytest.raises(PassError) as raised:
        Skeleton(rewritten(model, tmp_path, tensors))
    assert str(raised.value).endswith("tensor model.norm.weight has shape [63], config.json asks for [64]")


def test_an_architecture_that_transformers_lacks_is_refused_by_name(workshop: Workshop) -> None:
    config = dict(workshop.model("llama").config)
    with pytest.raises(PassError, match=r"architecture LlamaForThinking \(llama\) is not in transformers"):
        build_module(config | {"architectures": ["LlamaForThinking"]}, "sdpa")
    with pytest.raises(PassError, match=r"no `architectures`; expected one class name"):
        build_module(json.loads('{"model_type": "llama"}'), "sdpa")
