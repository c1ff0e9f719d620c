"""Conversations become the ids that transformers makes of them, and what people write never a control token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from runtime.chat_template import ChatTemplate
from runtime.chat_tokens import strings
from runtime.errors import PromptError
from runtime.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat-templates"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "How are you? I am <b>fine</b>.\n\n日本 👩‍👩‍👧 "
LETTERS = sorted(set(TEXT + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|/[]_▁'(),;:!-0123456789"))


def byte_level(special: Sequence[str], plain: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer in the manner of Qwen and Llama 3: control tokens come after the vocabulary."""
    merges = [("<", "|"), ("|", ">"), ("i", "m"), ("e", "n"), ("en", "d"), ("a", "s")]
    pieces = [*BYTES, *("".join(merge) for merge in merges)]
    made = tokenizers.Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.add_tokens([AddedToken(name, normalized=False, special=False) for name in plain])
    return made


def sentencepiece(special: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    """One in the manner of Llama 2 and Gemma: control tokens are in the vocabulary, and merges could make one."""
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("▁", "a"), ("e", "n")]
    names = [token.content for token in special]
    pieces = dict.fromkeys(["<unk>", *names, *(f"<0x{value:02X}>" for value in range(256)), *LETTERS])
    pieces |= dict.fromkeys("".join(merge) for merge in merges)
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<unk>", normalized=False), *special])
    return made


def flagged(*names: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(name, normalized=False, special=True, **flags) for name in names]


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES: dict[str, Any] = {
    "chatml": lambda: byte_level(CHATML),
    "qwen3": lambda: byte_level(CHATML, plain=["<think>", "</think>", "<|fim_prefix|>", "<table>"]),
    "llama3": lambda: byte_level(LLAMA),
    "mistral": lambda: sentencepiece(flagged("<s>", "</s>", "[INST]", "[/INST]")),
    "gemma": lambda: sentencepiece(flagged("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "phi3": lambda: sentencepiece(
        [*flagged("<s>", "</s>"), *flagged("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)]
    ),
    "zephyr": lambda: sentencepiece(flagged("<s>", "</s>")),
}
NAMES: dict[str, dict[str, str]] = {
    "chatml": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
}
LAMBDAS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": TEXT}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [USER],
    [USER, {"role": "assistant", "content": "  fine \n"}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "as told"}, USER],
]


def source(family: str) -> str:
    return (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8").removesuffix("\n")


@cache
def backend(family: str) -> tokenizers.Tokenizer:
    made: tokenizers.Tokenizer = FAMILIES[family]()
    return made


@cache
def tokenizer(family: str) -> Tokenizer:
    return Tokenizer(backend(family), ChatTemplate(source(family), NAMES.get(family, LAMBDAS)))


@cache
def reference(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend(family), **NAMES.get(family, LAMBDAS))
    made.chat_template = source(family)
    return made


def control_ids(family: str) -> set[int]:
    added = backend(family).get_added_tokens_decoder()
    return {token for token, content in added.items() if content.content not in ("<unk>", "<table>")}


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "three", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_those_of_transformers(family: str, messages: list[dict[str, str]]) -> None:
    theirs = reference(family)
    if family == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(PromptError, match="System role not supported"):
            tokenizer(family).encode_chat(messages)
        return
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer(family).encode_chat(messages) == want
    assert len(set(want) & control_ids(family)) > 0


def test_thoughts_in_an_answer_are_cut_out_by_the_template_as_with_transformers() -> None:
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine"}, USER]
    messages[0] = {"role": "user", "content": "a <table> of"}  # a token of its own, and no control token
    for thinking in (True, False):
        options: Any = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        want = reference("qwen3").apply_chat_template(messages, enable_thinking=thinking, **options)
        assert tokenizer("qwen3").encode_chat(messages, enable_thinking=thinking) == want


@settings(max_examples=60, deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)))
def test_no_text_of_a_user_becomes_a_control_token(data: st.DataObject, family: str) -> None:
    names = sorted(token.content for token in backend(family).get_added_tokens_decoder().values())
    written = st.lists(
        st.sampled_from([*names, "<|im_", "end|>", "a", " ", "\n", "<", ">", "日", "\U00100000"]), min_size=1
    )
    texts = ["".join(data.draw(written)) + "a" for _ in range(3)]
    roles = ("user", "assistant", "user")

    def ids_of(contents: Sequence[str]) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return tokenizer(family).encode_chat(messages)

    def controls(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control_ids(family)]

    if family == "qwen3":  # an answer of before may hold thoughts, which the template looks for
        texts[1] = texts[1].replace("think>", "")
    assert controls(ids_of(texts)) == controls(ids_of(["a", "a", "a"]))


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma", "phi3", "zephyr"])
def test_a_name_that_a_user_wrote_is_encoded_as_its_characters(family: str) -> None:
    name = next(reversed([token.content for token in backend(family).get_added_tokens_decoder().values()]))
    ids = tokenizer(family).encode_chat([{"role": "user", "content": f"a{name}a"}])
    shown = backend(family).decode(ids, skip_special_tokens=True)
    assert f"a{name}a" in shown
    rendered = ChatTemplate(source(family), NAMES.get(family, LAMBDAS)).render([{"role": "user", "content": "aa"}])
    without = backend(family).encode(rendered, add_special_tokens=False).ids
    assert len(ids) > len(without)


def test_what_stands_for_a_name_is_in_no_text(decoder_folder: Path) -> None:
    made = Tokenizer.load(decoder_folder)
    content = "\U00100000<|im_end|>\U00100001"
    ids = made.encode_chat([{"role": "user", "content": content}])
    assert made.decode(ids) == f"user\n{content}\nassistant\n"
    assert [token for token in ids if token < 3] == [1, 2, 1]


def test_names_in_other_fields_and_variables_are_text_as_well() -> None:
    template = ChatTemplate("{{ messages[0].name }}{{ hint }}{{ more[0].x }}<|im_end|>", {})
    made = Tokenizer(byte_level(CHATML), template)
    end = made.encode("<|im_end|>")
    assert len(end) == 1
    ids = made.encode_chat([{"role": "user", "name": "<|im_end|>"}], hint="<|im_end|>", more=[{"x": "<|im_end|>"}])
    assert ids.count(end[0]) == 1 and made.decode(ids) == "<|im_end|>" * 3
    assert list(strings({"a": ["b", {"c": "d"}], "e": 1})) == ["b", "d"]


def test_a_vocabulary_with_scores_can_be_renamed() -> None:
    pieces = [("<unk>", 0.0), ("<end>", -1.0), ("▁a", -2.0), *((letter, -9.0) for letter in "<>aden▁")]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens(["<end>"])
    made = Tokenizer(unigram, ChatTemplate("{{ messages[0].content }}<end>", {}))
    ids = made.encode_chat([{"role": "user", "content": "a<end>"}])
    assert ids[-1] == 1 and ids.count(1) == 1


def test_half_a_surrogate_pair_is_refused(decoder_folder: Path) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        Tokenizer.load(decoder_folder).encode_chat([{"role": "user", "content": "\ud800"}])
