"""What sentence-transformers files say, and what of it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_files import write_json, write_modules, write_sentence_files

from passes._sentence import (
    SentenceSettings,
    context_length,
    require_sentence,
    score_activation,
    sentence_files,
    sentence_settings,
)
from passes.base import PassError

EMBEDDER = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
RERANKER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
CLASSIFIER = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "a", "1": "b"},
}


def test_without_modules_nothing_is_said(tmp_path: Path) -> None:
    assert sentence_settings(tmp_path, EMBEDDER) is None


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, ("lasttoken",)),
        ({}, ("mean",)),
        ({"pooling_mode": "weightedmean"}, ("weightedmean",)),
        ({"pooling_mode": ["max", "cls"]}, ("max", "cls")),
        ({"pooling_mode": "cls", "pooling_mode_max_tokens": True}, ("cls",)),
    ],
)
def test_older_booleans_and_the_newer_key_name_the_modes(
    tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]
) -> None:
    write_sentence_files(tmp_path, normalize=False, **config)
    assert sentence_settings(tmp_path, EMBEDDER) == SentenceSettings(modes)  # type: ignore[arg-type]


def test_newer_class_names_of_the_modules_are_known(tmp_path: Path) -> None:
    write_sentence_files(tmp_path)
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    content = [
        {"type": f"sentence_transformers.{kind}", "path": path}
        for kind, path in zip(kinds, ["", "1_Pooling"], strict=True)
    ]
    write_json(tmp_path / "modules.json", content)
    settings = sentence_settings(tmp_path, EMBEDDER)
    assert settings is not None and not settings.normalized


def test_every_setting_is_read_from_the_file_it_stands_in(tmp_path: Path) -> None:
    write_sentence_files(tmp_path, pooling_mode_cls_token=True)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": True})
    prompts = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    write_json(tmp_path / "config_sentence_transformers.json", prompts)
    expected = SentenceSettings(("cls",), True, 24, True, {"query": "find: "}, "query")
    assert sentence_settings(tmp_path, EMBEDDER) == expected
    assert sentence_files(tmp_path) == [
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ]


def test_settings_that_newer_versions_write_are_known(tmp_path: Path) -> None:
    write_sentence_files(tmp_path, embedding_dimension=8, pooling_mode="mean", include_prompt=True)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    newer = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    write_json(tmp_path / "sentence_bert_config.json", {**newer, "modality_config": {"text": text}})
    require_sentence(tmp_path, EMBEDDER)


def test_context_is_the_least_of_what_files_of_an_encoder_say(tmp_path: Path) -> None:
    assert context_length(tmp_path, EMBEDDER) == 512
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 1e30})
    assert context_length(tmp_path, EMBEDDER) == 512
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 384})
    assert context_length(tmp_path, EMBEDDER) == 384
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 0.5})
    assert context_length(tmp_path, EMBEDDER) == 512
    write_sentence_files(tmp_path)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 256})
    assert context_length(tmp_path, EMBEDDER) == 256
    assert context_length(tmp_path, {**EMBEDDER, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}) == 512


def modules(*kinds: str) -> Callable[[Path], None]:
    return lambda folder: write_modules(folder, kinds)


def file(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (modules("Transformer", "Pooling", "Dense"), "modules.json: got Dense, expected Transformer, Pooling"),
        (modules("Transformer", "Pooling", "my.Head"), "modules.json: got my.Head, expected"),
        (modules("Transformer"), "modules.json: got Transformer, expected Transformer, Pooling"),
        (file("modules.json", {}), "modules.json: got no list of modules"),
        (file("modules.json", [{"type": 3}]), "modules.json: got {'type': 3}, expected `type` and `path`"),
        (
            file("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "../x"}]),
            "modules.json: path: got '../x', expected a folder below",
        ),
        (lambda folder: (folder / "modules.json").write_text("["), "modules.json: is not JSON"),
        (lambda folder: (folder / "1_Pooling/config.json").unlink(), "1_Pooling/config.json: cannot be read"),
        (
            file("config_sentence_transformers.json", {"prompts": {"a": ""}, "default_prompt_name": ["a"]}),
            "default_prompt_name: got ['a'], expected one of a",
        ),
        (file("1_Pooling/config.json", []), "1_Pooling/config.json: got a JSON list, expected an object"),
        (file("1_Pooling/config.json", {"pooling_mode": "attention"}), "pooling_mode: got ['attention'], expected cls"),
        (file("1_Pooling/config.json", {"pooling_mode_magic": True}), "unknown key 'pooling_mode_magic'"),
        (file("1_Pooling/config.json", {"pooling_mode_cls_token": "yes"}), "got 'yes', expected true or false"),
        (file("1_Pooling/config.json", {"word_embedding_dimension": 9}), "got vectors of 9 numbers, expected 8"),
        (file("2_Normalize/config.json", {"module_input_name": "token_embeddings"}), "module_input_name: got 'token"),
        (file("sentence_bert_config.json", {"max_seq_length": 0}), "max_seq_length: got 0, expected a whole number"),
        (file("sentence_bert_config.json", {"query_length": 32}), "query_length: got 32, expected nothing"),
        (
            file("sentence_bert_config.json", {"modality_config": {"text": {"method": "get_text_features"}}}),
            "modality_config.text: got {'method': 'get_text_features'}, expected {'method': 'forward'",
        ),
        (file("config_sentence_transformers.json", {"prompts": ["x"]}), "prompts: got ['x'], expected texts by name"),
        (file("config_sentence_transformers.json", {"default_prompt_name": "q"}), "default_prompt_name: got 'q'"),
    ],
)
def test_what_cannot_be_lowered_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    write_sentence_files(tmp_path, pooling_mode_mean_tokens=True)
    require_sentence(tmp_path, EMBEDDER)
    damage(tmp_path)
    with pytest.raises(PassError, match=re.escape(reason)) as raised:
        require_sentence(tmp_path, EMBEDDER)
    assert "\n" not in str(raised.value)


def test_pooling_without_the_prompt_is_refused_only_where_there_is_one(tmp_path: Path) -> None:
    write_sentence_files(tmp_path, pooling_mode_mean_tokens=True, include_prompt=False)
    require_sentence(tmp_path, EMBEDDER)
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"query": "find: "}})
    with pytest.raises(PassError, match="include_prompt: got false"):
        require_sentence(tmp_path, EMBEDDER)


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "sigmoid"),
    ],
)
def test_the_score_of_a_reranker_goes_through_the_function_its_config_names(
    tmp_path: Path, config: dict[str, Any], activation: str
) -> None:
    assert score_activation(tmp_path, {**RERANKER, **config}) == activation
    assert score_activation(tmp_path, {**CLASSIFIER, **config}) is None


@pytest.mark.parametrize("name", ["torch.nn.modules.activation.Tanh", "mine.Sigmoid"])
def test_another_function_of_the_score_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PassError, match=f"activation of the score: got '{name}', expected torch's Sigmoid or Identity"):
        require_sentence(tmp_path, {**RERANKER, "sentence_transformers": {"activation_fn": name}})
