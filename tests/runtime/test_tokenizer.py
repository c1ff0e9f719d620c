"""Text to ids and back, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from runtime.errors import ArtifactError, PromptError
from runtime.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def byte_level(decoder_folder: Path) -> Tokenizer:
    return Tokenizer.load(decoder_folder)


def _llama_like() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: bytes written out as <0xE2>, a space at the start stripped."""
    texts = ["<s>", "▁", "▁the", "▁a", "a", "b", "é", "�", *(f"<0x{value:02X}>" for value in range(256))]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


LLAMA_LIKE = _llama_like()


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@given(st.text(max_size=60))
@example("日本語の文字 👩‍👩‍👧 naïve\u0000\ufffd!")
def test_text_survives_the_way_to_ids_and_back_piece_by_piece(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids) == text


@given(st.text(alphabet="日本語éя👩", min_size=1, max_size=20))
def test_no_piece_ends_within_a_character(byte_level: Tokenizer, text: str) -> None:
    assert REPLACEMENT not in "".join(pieces(byte_level, byte_level.encode(text)))


@given(st.lists(st.integers(0, 287), max_size=60))
def test_pieces_of_any_ids_join_to_the_full_text(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


ordinary = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7])
some_bytes = st.sampled_from([8 + value for value in (0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41, 0x0A)])


@given(st.lists(ordinary | some_bytes, max_size=40))
@example([8 + 0xE2, 8 + 0x82, 8 + 0xAC, 8 + 0xF0])  # a whole character turns invalid with the byte after it
@example([8 + 0xE2, 8 + 0x82, 0, 8 + 0xAC, 4])  # a special token does not end a run of bytes
@example([0, 1, 1, 2, 0, 2])
def test_pieces_join_to_the_full_text_with_bytes_written_out(ids: list[int]) -> None:
    assert "".join(pieces(LLAMA_LIKE, ids)) == LLAMA_LIKE.decode(ids)


def test_ordinary_text_is_not_held_back(byte_level: Tokenizer) -> None:
    assert all(pieces(byte_level, byte_level.encode("the quick brown fox"))[:-1])
    assert pieces(LLAMA_LIKE, [2, 3, 4]) == ["the", " a", "a", ""]


def test_an_invalid_byte_is_shown_as_soon_as_it_is_certain(byte_level: Tokenizer) -> None:
    continuation = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("©")  # byte 0xA9, without a beginning
    ids = [continuation] * 3 + byte_level.encode("a")
    assert pieces(byte_level, ids) == ["", REPLACEMENT, REPLACEMENT, REPLACEMENT + "a", ""]


def test_a_long_answer_costs_the_same_per_token(byte_level: Tokenizer) -> None:
    detokenizer = byte_level.detokenizer()
    for token in byte_level.encode("the lazy dog ") * 200:
        detokenizer.add(token)
    assert len(detokenizer._ids) < 10


def test_truncation_and_padding_in_the_file_are_switched_off(copied: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(copied / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(copied / "tokenizer.json"))
    ids = Tokenizer.load(copied).encode("the quick brown fox jumps")
    assert 3 < len(ids) < 50
    assert Tokenizer.load(copied, max_tokens=4).encode("the quick brown fox jumps") == ids[:4]


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode at character 1"):
        byte_level.encode("a\ud800")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_chat_is_encoded_with_its_special_tokens_once(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat([{"role": "user", "content": "hi"}])
    assert [token for token in ids if token < 3] == [1, 2, 1]
    assert byte_level.decode(ids) == "user\nhi\nassistant\n"


def test_a_chat_without_a_template_is_refused() -> None:
    assert not LLAMA_LIKE.has_chat_template
    with pytest.raises(PromptError, match="no chat template"):
        LLAMA_LIKE.encode_chat([{"role": "user", "content": "hi"}])
