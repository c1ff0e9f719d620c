"""Generation through the public door."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import load
from runtime.artifact import KVCache, verify, write_manifest
from runtime.errors import ArtifactError, PromptError, ServingError
from runtime.generation import TextGenerator
from runtime.pace import prefill_chunks
from runtime.request import StopStrings
from runtime.sampler import SamplingParams


def continuation(generator: TextGenerator, prompt: str, count: int) -> list[int]:
    """Greedy ids by one whole forward pass per token: slow and obvious."""
    ids = generator.tokenizer.encode(prompt)
    for _ in range(count):
        ids.append(int(generator.session.run(ids)[-1].argmax()))
    return ids[-count:]


def test_greedy_generation_equals_whole_forward_passes(generator: TextGenerator) -> None:
    completion = generator.generate("def main():", max_tokens=40, ignore_eos=True)
    assert list(completion.token_ids) == continuation(generator, "def main():", 40)


def test_the_pieces_join_to_the_text_and_the_text_to_the_ids(generator: TextGenerator) -> None:
    stream = generator.stream("日本", max_tokens=60, ignore_eos=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text == generator.tokenizer.decode(stream.completion.token_ids)
    assert len(pieces) > 10


def test_a_completion_counts_and_times(generator: TextGenerator) -> None:
    completion = generator.generate("the quick", max_tokens=5, ignore_eos=True)
    assert completion.prompt_tokens == len(generator.tokenizer.encode("the quick"))
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    assert 0 < completion.ttft_s < 10
    assert completion.decode_tokens_per_s is not None and completion.decode_tokens_per_s > 0
    assert generator.generate("the quick", max_tokens=1).decode_tokens_per_s is None


def test_an_eos_id_ends_the_answer_and_is_no_part_of_it(generator: TextGenerator) -> None:
    endless = generator.generate("x", max_tokens=30, ignore_eos=True)
    eos = endless.token_ids[20]
    manifest = dataclasses.replace(generator.manifest, eos_token_ids=(eos,))
    shortened = TextGenerator(manifest, generator.session, generator.tokenizer)
    completion = shortened.generate("x", max_tokens=30)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == endless.token_ids[: endless.token_ids.index(eos)]


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(generator: TextGenerator) -> None:
    whole = generator.generate("the", max_tokens=60, ignore_eos=True).text
    stop = whole[20:26]
    stream = generator.stream("the", max_tokens=60, ignore_eos=True, stop=["never there", stop])
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text == whole[: whole.index(stop)]
    assert stream.completion.finish_reason == "stop"
    assert len(stream.completion.token_ids) < 60


def test_the_same_seed_repeats_and_another_does_not(generator: TextGenerator) -> None:
    def run(seed: int) -> tuple[int, ...]:
        params = SamplingParams(temperature=2, top_p=0.95, repetition_penalty=1.1, seed=seed)
        return generator.generate("the", max_tokens=20, sampling=params, ignore_eos=True).token_ids

    assert run(1) == run(1) != run(2)


def test_the_repetition_penalty_sees_prompt_and_answer(generator: TextGenerator) -> None:
    prompt = "".join(map(chr, range(32, 127)))  # a third of the vocabulary
    params = SamplingParams(repetition_penalty=100)
    completion = generator.generate(prompt, max_tokens=30, sampling=params, ignore_eos=True)
    assert len(set(completion.token_ids)) == len(completion.token_ids) >= 20
    assert not set(completion.token_ids) & set(generator.tokenizer.encode(prompt))


def test_text_held_back_for_a_stop_string_that_never_comes_is_shown_at_the_end(generator: TextGenerator) -> None:
    whole = generator.generate("the", max_tokens=30, ignore_eos=True).text
    stop = whole[-3:] + "never there"
    completion = generator.generate("the", max_tokens=30, ignore_eos=True, stop=[stop])
    assert (completion.text, completion.finish_reason) == (whole, "length")


def test_the_answer_ends_with_the_context(decoder_folder: Path) -> None:
    small = TextGenerator.load(decoder_folder, threads=1, context=16)
    completion = small.generate("abcdefgh", max_tokens=1000, ignore_eos=True)
    assert completion.prompt_tokens + len(completion.token_ids) == 16
    assert completion.finish_reason == "length"


def test_a_prompt_that_fills_the_context_is_refused(decoder_folder: Path) -> None:
    small = TextGenerator.load(decoder_folder, threads=1, context=16)
    with pytest.raises(PromptError, match="got 16 tokens, expected fewer than the context of 16"):
        small.generate("k" * 16)
    assert small.generate("k" * 15, ignore_eos=True).finish_reason == "length"


def test_a_long_prompt_runs_in_chunks_and_none_of_one_token(decoder_folder: Path) -> None:
    assert list(prefill_chunks(300)) == [128, 128, 44]
    assert list(prefill_chunks(129)) == [126, 3]
    assert list(prefill_chunks(257)) == [128, 126, 3]
    assert list(prefill_chunks(1)) == [1]


@given(st.integers(1, 2000), st.integers(2, 100).map(lambda half: 2 * half))
def test_chunks_cover_the_prompt_and_all_but_the_last_are_even(tokens: int, size: int) -> None:
    chunks = list(prefill_chunks(tokens, size))
    assert sum(chunks) == tokens and max(chunks) <= size
    assert 1 not in chunks or tokens == 1
    assert not any(chunk % 2 for chunk in chunks[:-1])


def test_an_empty_prompt_begins_with_the_bos_token(generator: TextGenerator) -> None:
    assert generator.generate("", max_tokens=1, ignore_eos=True).prompt_tokens == 1


def test_messages_go_through_the_chat_template(generator: TextGenerator) -> None:
    messages = [{"role": "user", "content": "hi"}]
    completion = generator.generate(messages, max_tokens=3, ignore_eos=True)
    assert completion.prompt_tokens == len(generator.tokenizer.encode_chat(messages))


def test_of_two_streams_the_older_stops_with_an_error(generator: TextGenerator) -> None:
    older = generator.stream("the", max_tokens=30, ignore_eos=True)
    next(older)
    younger = generator.stream("日本", max_tokens=30, ignore_eos=True)
    with pytest.raises(ServingError, match="a later call has taken the cache over"):
        list(older)
    assert "".join(younger) == generator.generate("日本", max_tokens=30, ignore_eos=True).text


def test_an_unfinished_stream_has_no_completion_yet(generator: TextGenerator) -> None:
    stream = generator.stream("the", max_tokens=30, ignore_eos=True)
    next(stream)
    with pytest.raises(ServingError, match="not finished"):
        _ = stream.completion


def test_arguments_out_of_range_are_refused_before_anything_runs(
    generator: TextGenerator, decoder_folder: Path
) -> None:
    with pytest.raises(PromptError, match="max_tokens: got 0"):
        generator.stream("the", max_tokens=0)
    with pytest.raises(PromptError, match="stop: got"):
        generator.stream("the", stop=[""])
    with pytest.raises(PromptError, match="stop: got"):
        generator.stream("the", stop="abc")
    with pytest.raises(PromptError, match="context: got 129, expected 1 to 128"):
        TextGenerator.load(decoder_folder, context=129)


def test_load_gives_what_the_manifest_says(decoder_folder: Path) -> None:
    assert isinstance(load(decoder_folder, threads=1), TextGenerator)
    with pytest.raises(ArtifactError, match="is another artifact"):
        load(decoder_folder, digest="0" * 64)


def test_a_graph_that_does_not_fit_its_manifest_is_refused(copied: Path) -> None:
    write_manifest(copied, dataclasses.replace(verify(copied), kv_cache=KVCache(3, 2, 16)))
    with pytest.raises(ArtifactError, match="expected \\(3, 2, 16, 288\\)"):
        load(copied, threads=1)


def test_a_generator_keeps_no_state_between_calls(generator: TextGenerator) -> None:
    first = generator.generate("the", max_tokens=20, ignore_eos=True)
    generator.generate("日本語の" * 5, max_tokens=20, ignore_eos=True)
    assert generator.generate("the", max_tokens=20, ignore_eos=True).token_ids == first.token_ids


@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    cutter = StopStrings(stops)
    text = "".join(pieces)
    shown = "".join([*(cutter.add(piece) for piece in pieces), cutter.finish()])
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text and cutter.found is None
    else:
        assert cutter.found in stops
        assert text.startswith(shown + str(cutter.found))
        assert not any(stop in shown for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(["\n\n", "END"])
    assert [cutter.add(piece) for piece in ("a\n", "b E", "N", "d E", "ND!", "more")] == [
        "a",
        "\nb ",
        "",
        "ENd ",
        "",
        "",
    ]
    assert (cutter.found, cutter.finish()) == ("END", "")


def test_logits_of_a_whole_document_come_in_chunks(generator: TextGenerator) -> None:
    ids = np.arange(100) % 280
    rows = np.concatenate([generator.session.run(ids[at : at + 40], at).copy() for at in range(0, 100, 40)])
    assert rows.shape == (100, 288)


def test_a_stop_id_ends_the_answer_and_is_told(generator: TextGenerator) -> None:
    whole = generator.generate("x", max_tokens=30, ignore_eos=True)
    stop = whole.token_ids[20]
    first = whole.token_ids.index(stop)
    completion = generator.generate("x", max_tokens=30, ignore_eos=True, stop_token_ids=[stop])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == whole.token_ids[:first]
    assert generator.generate("x", max_tokens=first, ignore_eos=True, stop_token_ids=[stop]).stop_reason is None


def test_min_tokens_forbids_ends_until_then(generator: TextGenerator) -> None:
    whole = generator.generate("x", max_tokens=30, ignore_eos=True)
    stop, text = whole.token_ids[3], whole.text[2:4]
    for options in ({"stop_token_ids": [stop]}, {"stop": [text]}):
        early = generator.generate("x", max_tokens=30, ignore_eos=True, **options)
        late = generator.generate("x", max_tokens=30, ignore_eos=True, min_tokens=12, **options)
        assert len(early.token_ids) < 12 <= len(late.token_ids)
        assert stop not in late.token_ids[:12] or "stop" in options
        assert late.finish_reason == "length" or late.stop_reason in (stop, text)
    manifest = dataclasses.replace(generator.manifest, eos_token_ids=(whole.token_ids[0],))
    other = TextGenerator(manifest, generator.session, generator.tokenizer)
    assert other.generate("x", max_tokens=5).token_ids == ()
    assert len(other.generate("x", max_tokens=5, min_tokens=5).token_ids) == 5


def test_logprobs_line_up_with_the_tokens_also_where_a_stop_string_cuts_the_text(generator: TextGenerator) -> None:
    whole = generator.generate("the", max_tokens=30, ignore_eos=True, logprobs=2)
    cut = generator.generate("the", max_tokens=30, ignore_eos=True, logprobs=2, stop=[whole.text[10:13]])
    assert cut.stop_reason == whole.text[10:13] and whole.logprobs and cut.logprobs
    assert [each.token for each in cut.logprobs] == list(cut.token_ids)
    assert cut.logprobs == whole.logprobs[: len(cut.logprobs)]
    for each in cut.logprobs:  # greedy: the likeliest is the one
        assert each.top[0] == (each.token, each.logprob) and each.top[1][1] <= each.logprob <= 0
    assert generator.generate("the", max_tokens=3).logprobs is None


def test_logprobs_are_of_the_model_before_any_penalty(generator: TextGenerator) -> None:
    params = SamplingParams(temperature=0.5, presence_penalty=2, logit_bias=((9, 50.0),))
    (biased,) = generator.generate("the", max_tokens=1, logprobs=0, sampling=params, ignore_eos=True).logprobs or ()
    row = generator.session.run(generator.tokenizer.encode("the"))[-1].astype(np.float64)
    assert biased.token == 9 and biased.top == ()
    assert abs(biased.logprob - (row[9] - np.log(np.exp(row).sum()))) < 1e-6  # exp in float32 rounds by 1e-7


def test_options_out_of_range_are_named(generator: TextGenerator) -> None:
    for options, message in (
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: got 5, expected 0 to max_tokens, which is 4"),
        ({"logprobs": 21}, "logprobs: got 21, expected 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: got -1, expected 0 to 20"),
        ({"stop_token_ids": [288]}, "stop_token_ids: got token 288, expected ids from 0 to 287"),
        ({"sampling": SamplingParams(logit_bias=((300, 1.0),))}, "logit_bias: got token 300"),
    ):
        with pytest.raises(PromptError, match=message):
            generator.stream("the", **options)
