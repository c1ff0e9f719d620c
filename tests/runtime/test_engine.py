"""Many requests at once through the public door: each gets what it would get alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import runtime
from runtime.artifact import verify, write_manifest
from runtime.engine import Engine, Occupancy, Ticket
from runtime.errors import ArtifactError, PromptError, ServingError, SessionError
from runtime.generation import TextGenerator, run_prompt
from runtime.request import Answer, Completion, Prompt
from runtime.sampler import SamplingParams
from runtime.session import DecoderSession

SLOTS, CONTEXT = 4, 128
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, sides, heads, width, bytes of a number; memory comes in 64 tokens
HOT = SamplingParams(temperature=1.5, top_p=0.95, repetition_penalty=1.1, seed=7)
PROMPTS: list[Prompt] = [
    "def main():",
    "日本",
    "the quick brown fox " * 2,
    "x",
    [{"role": "user", "content": "hi"}],
    list(range(3, 60)),
    "",
]


class Poisoned(DecoderSession):
    """Leaves no numbers behind: what reads a free slot's cache gets NaN."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tokens_read = 0
        for slot in range(self.slots):
            self.free(slot)

    def run(self, ids: Any, *args: Any, **options: Any) -> NDArray[np.float32]:
        self.tokens_read += len(ids)
        return super().run(ids, *args, **options)

    def free(self, slot: int) -> None:
        super().free(slot)
        for array in self.cache.view(slot, 1).values():
            array[:] = np.nan


class PoisonedEngine(Engine):
    """Fills all of the cache that no sequence has written with NaN before each step: holes, what a dummy row wrote."""

    def step(self) -> list[Ticket]:
        places = [*self._scheduler._slots, None]
        for slot in range(self.session.cache.slots):
            place = places[slot]
            for array in self.session.cache.view(slot, 1).values():
                array[0, :, place.past if place else 0 :] = np.nan
        return super().step()


@pytest.fixture(scope="module")
def session(decoder_folder: Path) -> Poisoned:
    return Poisoned(decoder_folder / "model.onnx", capacity=CONTEXT, threads=1, slots=SLOTS)


@pytest.fixture
def engine(session: DecoderSession, generator: TextGenerator) -> Iterator[Engine]:
    """An engine with the smallest chunks: prompts of more than 4 tokens are read in several steps."""
    made = Engine(generator.manifest, session, generator.tokenizer, max_stall_ms=1e-6)
    yield made
    assert not made.has_work  # no test leaves a slot behind


def same(got: Completion, want: Completion) -> bool:
    """Whether two answers are equal but for their seconds.

    Equal tokens are owed by kernels that compute a row apart from its neighbours. Where they round differently, by 1e-6
    of logits that reach 13, a token changes only if two are as likely to 1e-6: none of these few hundred.
    """
    names = ("text", "token_ids", "prompt_tokens", "finish_reason")
    return all(getattr(got, name) == getattr(want, name) for name in names)


def run_out(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("sampling", [SamplingParams(), HOT])
def test_answers_are_those_of_one_request_at_a_time(
    engine: Engine, generator: TextGenerator, sampling: SamplingParams
) -> None:
    options: Any = {"max_tokens": 24, "sampling": sampling, "ignore_eos": True}
    got = engine.generate(PROMPTS, **options)
    assert all(same(one, generator.generate(prompt, **options)) for one, prompt in zip(got, PROMPTS, strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_late_joins_cancels_and_reused_slots_change_no_answer(
    session: DecoderSession, generator: TextGenerator, data: st.DataObject
) -> None:
    memory = data.draw(st.sampled_from([None, 200 * session.cache.token_bytes]))
    engine = PoisonedEngine(generator.manifest, session, generator.tokenizer, kv_memory=memory, max_stall_ms=1e-6)
    asked: list[tuple[Ticket, Prompt, Any]] = []
    for _ in range(data.draw(st.integers(1, 10))):
        prompt = data.draw(st.sampled_from(PROMPTS))
        sampling = data.draw(st.sampled_from([SamplingParams(), HOT]))
        options = {"max_tokens": data.draw(st.integers(1, 12)), "ignore_eos": data.draw(st.booleans())}
        for ticket in engine.add_many(prompt, data.draw(st.sampled_from([1, 1, 3])), sampling=sampling, **options):
            asked.append((ticket, prompt, options | {"sampling": ticket.answer.request.sampling}))
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
        if data.draw(st.integers(0, 3)) == 0:
            data.draw(st.sampled_from(asked))[0].cancel()
    run_out(engine)
    for ticket, prompt, options in asked:
        want = generator.generate(prompt, **options)
        if ticket.answer.finish_reason is not None:
            assert same(ticket.completion, want)
        else:  # cancelled
            assert tuple(ticket.answer.ids) == want.token_ids[: len(ticket.answer.ids)]


@pytest.mark.parametrize("count", [1, 3, 4, 7, 58])  # tokens; of the first two none can be copied
def test_many_answers_to_one_prompt_are_those_of_as_many_requests(
    engine: Engine, generator: TextGenerator, count: int
) -> None:
    prompt = list(range(5, 5 + count))
    options: Any = {"max_tokens": 12, "ignore_eos": True}
    beside = engine.add("def main():", max_tokens=60, ignore_eos=True)
    tickets = engine.add_many(prompt, 2 * SLOTS, sampling=HOT, **options)
    run_out(engine)
    for index, ticket in enumerate(tickets):
        sampling = replace(HOT, seed=HOT.seed + index)
        assert same(ticket.completion, generator.generate(prompt, sampling=sampling, **options))
    assert same(beside.completion, generator.generate("def main():", max_tokens=60, ignore_eos=True))


def test_a_prompt_of_many_answers_is_read_once_and_copied_bit_for_bit(
    engine: Engine, session: Poisoned, generator: TextGenerator
) -> None:
    prompt = list(range(5, 64))  # 59 tokens: 56 are copied, and 3 read by each
    before = session.tokens_read
    tickets = engine.add_many(prompt, 3, max_tokens=60, ignore_eos=True)
    while not all(ticket.answer.ids for ticket in tickets):
        engine.step()
    assert session.tokens_read - before == 59 + 3 + 3
    generator.generate(prompt, max_tokens=1, ignore_eos=True)
    alone = generator.session.cache.view(0, 1)
    for name, array in session.cache.view(0, 3).items():
        assert all(np.array_equal(array[slot, :, :59], alone[name][0, :, :59]) for slot in range(3))
    for ticket in tickets:
        ticket.cancel()


def test_an_impossible_number_of_answers_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="n: got 0, expected at least 1 answer"):
        engine.add_many("x", 0)


def test_the_last_seed_is_followed_by_the_first(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1, seed=2**64 - 1)
    tickets = engine.add_many("x", 2, sampling=sampling)
    assert [ticket.answer.request.sampling.seed for ticket in tickets] == [2**64 - 1, 0]
    for ticket in tickets:
        ticket.cancel()


def test_reading_one_ticket_lets_the_others_go_on(engine: Engine, generator: TextGenerator) -> None:
    others = [engine.add(prompt, max_tokens=5, ignore_eos=True) for prompt in ("the", "日本")]
    ticket = engine.add("def main():", max_tokens=40, ignore_eos=True)
    pieces = list(ticket)
    assert "".join(pieces) == ticket.completion.text == generator.tokenizer.decode(ticket.completion.token_ids)
    assert len(pieces) > 10 and all(other.is_finished for other in others)
    assert "".join(others[1]) == others[1].completion.text  # pieces are kept until they are read


def test_pieces_can_be_taken_without_driving_the_engine(engine: Engine) -> None:
    ticket = engine.add(engine.read("日本", max_tokens=12, ignore_eos=True))
    assert ticket.take_pieces() == []
    engine.step()
    assert engine.has_work and not ticket.is_finished
    pieces = ticket.take_pieces()
    while engine.has_work:
        engine.step()
    pieces += ticket.take_pieces()
    assert ticket.take_pieces() == [] and len(pieces) == 12
    assert "".join(piece.text for piece in pieces) == ticket.completion.text
    assert sum((piece.token_ids for piece in pieces), ()) == ticket.completion.token_ids


def test_a_stop_string_ends_one_answer_and_frees_its_slot(engine: Engine, generator: TextGenerator) -> None:
    whole = generator.generate("the", max_tokens=40, ignore_eos=True).text
    stop = whole[20:26]
    stopped = engine.add("the", max_tokens=40, stop=[stop], ignore_eos=True)
    beside = engine.add("the", max_tokens=40, ignore_eos=True)
    assert "".join(stopped) == stopped.completion.text == whole[: whole.index(stop)]
    assert stopped.completion.finish_reason == "stop"
    assert not beside.is_finished
    assert "".join(beside) == whole


def test_a_completion_counts_and_times(engine: Engine) -> None:
    first, second = engine.generate(["the quick", "x"], max_tokens=5, ignore_eos=True)
    assert (len(first.token_ids), first.finish_reason) == (5, "length")
    assert 0 < first.ttft_s < 10 and 0 < second.ttft_s < 10
    assert first.decode_tokens_per_s is not None and first.decode_tokens_per_s > 0


def test_a_cancelled_request_says_so_and_the_waiting_one_takes_its_place(engine: Engine) -> None:
    running = [engine.add("the", max_tokens=60, ignore_eos=True) for _ in range(SLOTS)]
    late = engine.add("x", max_tokens=2, ignore_eos=True)
    for _ in range(2 * SLOTS):
        engine.step()
    assert not late.answer.ids
    running[1].cancel()
    assert list(late) and late.is_finished and not running[0].is_finished
    with pytest.raises(ServingError, match="request 1 was cancelled"):
        list(running[1])
    with pytest.raises(ServingError, match="not finished"):
        _ = running[0].completion
    late.cancel()
    assert late.completion.finish_reason == "length"  # it had ended before
    for ticket in running:
        ticket.cancel()


def test_a_request_that_waits_can_be_cancelled(engine: Engine) -> None:
    tickets = [engine.add("the", max_tokens=4, ignore_eos=True) for _ in range(SLOTS + 2)]
    tickets[-1].cancel()
    engine.step()
    tickets[-2].cancel()
    run_out(engine)
    assert [ticket.answer.finish_reason for ticket in tickets] == ["length"] * SLOTS + [None, None]


def test_memory_admits_fewer_than_there_are_slots(decoder_folder: Path) -> None:
    engine = Engine.load(decoder_folder, threads=1, slots=SLOTS, kv_memory=2 * 64 * TOKEN_BYTES)
    assert engine.session.cache.token_bytes == TOKEN_BYTES
    tickets = [engine.add("x", max_tokens=4, ignore_eos=True) for _ in range(3)]
    while not tickets[0].is_finished:
        engine.step()
    assert tickets[1].answer.ids and not tickets[2].answer.ids
    assert engine.occupancy == Occupancy(waiting=1, running=1, reserved_tokens=64, budget_tokens=128)
    run_out(engine)
    assert tickets[2].completion.token_ids == tickets[0].completion.token_ids


def test_what_memory_can_never_hold_is_refused_and_nothing_else_is_lost(decoder_folder: Path) -> None:
    engine = Engine.load(decoder_folder, threads=1, slots=SLOTS, kv_memory=64 * TOKEN_BYTES)
    with pytest.raises(
        PromptError, match=r"1 \+ 100 tokens of prompt and answer need 128 of cache, expected at most 64"
    ):
        engine.generate(["x", "x"], max_tokens=100)
    assert not engine.has_work
    with pytest.raises(PromptError, match="max_tokens: got 0"):
        engine.add("x", max_tokens=0)
    assert engine.generate(["x"], max_tokens=2, ignore_eos=True)[0].finish_reason == "length"


def test_a_row_that_is_no_numbers_fails_alone(engine: Engine, session: DecoderSession) -> None:
    sick, well = (engine.add("the", max_tokens=20, ignore_eos=True) for _ in range(2))
    while not well.answer.ids:
        engine.step()
    for array in session.cache.view(0, 1).values():
        array[:] = np.nan
    assert list(well) and well.completion.finish_reason == "length"
    with pytest.raises(SessionError, match="expected numbers; the model is broken"):
        list(sick)


def test_the_longest_prompt_and_answer_fill_the_context(engine: Engine, generator: TextGenerator) -> None:
    prompt = list(np.arange(100) % 280)
    (got,) = engine.generate([prompt], max_tokens=1000, ignore_eos=True)
    assert got.prompt_tokens + len(got.token_ids) == CONTEXT
    assert same(got, generator.generate(prompt, max_tokens=1000, ignore_eos=True))
    with pytest.raises(PromptError, match="got 128 tokens, expected fewer than the context of 128"):
        engine.add([5] * CONTEXT)
    with pytest.raises(PromptError, match="got token 288, expected ids from 0 to 287"):
        engine.add([5, 288])


def test_a_freed_slot_gives_its_memory_back(decoder_folder: Path) -> None:
    engine = Engine.load(decoder_folder, threads=1, slots=2)
    engine.generate(["the quick brown fox"], max_tokens=8, ignore_eos=True)
    assert not any(array.any() for array in engine.session.cache.view(0, 2).values())


def test_an_engine_without_work_burns_no_processor(decoder_folder: Path) -> None:
    # Three threads that wait awake for the next step, as onnxruntime's own do for 40 ms, take up to 0.12 s.
    engine = Engine.load(decoder_folder, threads=4)

    def burnt() -> float:
        engine.generate(["the"], max_tokens=2, ignore_eos=True)
        before = time.process_time()
        time.sleep(0.1)
        return time.process_time() - before

    assert min(burnt() for _ in range(3)) < 0.01


def test_load_takes_eight_slots_and_says_what_is_out_of_range(decoder_folder: Path, classifier_folder: Path) -> None:
    assert runtime.Engine.load(decoder_folder, threads=1).session.slots == 8
    for options, message in (
        ({"slots": 0}, "slots: got 0, expected at least 1"),
        ({"kv_memory": 1000}, "kv_memory: got 1000 bytes, expected at least 32768"),
        ({"max_stall_ms": 0}, "max_stall_ms: got 0"),
        ({"context": 129}, "context: got 129, expected 1 to 128"),
    ):
        with pytest.raises(ServingError, match=message):
            Engine.load(decoder_folder, threads=1, **options)
    with pytest.raises(ArtifactError, match="expected a decoder"):
        Engine.load(classifier_folder)


def test_a_graph_of_one_row_is_served_one_request_at_a_time(copied: Path, decoder_folder: Path) -> None:
    graph = copied / "model.onnx"
    # In the signature, the axis named B becomes a 1 (in a number's longer spelling, so that nothing moves).
    graph.write_bytes(graph.read_bytes().replace(b"\x12\x01B", b"\x08\x81\x00"))
    manifest = verify(decoder_folder)
    inputs = tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in manifest.inputs)
    write_manifest(copied, replace(manifest, inputs=inputs))
    with pytest.raises(SessionError, match="slots: got 2, expected 1; this graph runs one sequence at a time"):
        Engine.load(copied, threads=1, slots=2)
    engine = Engine.load(copied, threads=1)
    assert engine.session.slots == 1
    first, second = engine.generate(["the", "日本"], max_tokens=4, ignore_eos=True)
    assert len(first.token_ids) == len(second.token_ids) == 4


def test_a_request_may_be_read_by_another_thread_and_added_later(engine: Engine, generator: TextGenerator) -> None:
    with ThreadPoolExecutor() as pool:
        request = pool.submit(engine.read, "def main():", max_tokens=6, ignore_eos=True).result()
    ticket = engine.add(request)
    run_out(engine)
    assert same(ticket.completion, generator.generate("def main():", max_tokens=6, ignore_eos=True))
    with pytest.raises(PromptError, match="max_tokens: got it beside a request"):
        engine.add(request, max_tokens=3)


SCORED = "the quick brown fox jumps over the lazy dog"


def exact_logprobs(session: DecoderSession, ids: list[int]) -> list[float]:
    logits = session.run(ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [float(row[token]) for row, token in zip(logits, ids[1:], strict=False)]


def test_prompt_logprobs_are_those_of_the_model_and_the_same_in_small_chunks(
    engine: Engine, generator: TextGenerator
) -> None:
    options: Any = {"max_tokens": 3, "prompt_logprobs": 2, "logprobs": 0, "ignore_eos": True}
    alone = generator.generate(SCORED, **options).prompt_logprobs
    beside = engine.add("日本", max_tokens=20, ignore_eos=True)  # chunks of 4 while it waits
    ticket = engine.add(SCORED, **options)
    run_out(engine)
    assert beside.is_finished and ticket.completion.prompt_logprobs == alone
    assert alone is not None and alone[0] is None
    ids = generator.tokenizer.encode(SCORED)
    assert [each.token for each in alone if each] == ids[1:]
    got = [each.logprob for each in alone if each]
    assert np.allclose(got, exact_logprobs(generator.session, ids), rtol=0, atol=1e-6)  # exp in float32


@pytest.mark.parametrize("rows", [1, 6, 7, 10])
def test_prompt_logprobs_do_not_depend_on_how_many_logits_are_held_at_once(
    engine: Engine, generator: TextGenerator, rows: int
) -> None:
    request = engine.read(SCORED, prompt_logprobs=2)
    whole, cut = (Answer(request, generator.tokenizer) for _ in range(2))
    session, tokens = generator.session, len(request.ids)
    last = run_prompt(session, whole, 0, tokens).copy()
    assert np.array_equal(run_prompt(session, cut, 0, tokens, most_logits_bytes=rows * 4 * session.vocabulary), last)
    assert cut.prompt_logprobs == whole.prompt_logprobs and len(cut.prompt_logprobs) == tokens


def test_a_prompt_may_be_scored_without_a_token(engine: Engine, generator: TextGenerator) -> None:
    others = [engine.add("the", max_tokens=20, ignore_eos=True) for _ in range(SLOTS)]
    full = list(np.arange(CONTEXT) % 280)
    tickets = [engine.add(prompt, max_tokens=0, prompt_logprobs=0) for prompt in (SCORED, [5], full)]
    run_out(engine)
    assert all(other.completion.finish_reason == "length" for other in others)
    for ticket, prompt in zip(tickets, (SCORED, [5], full), strict=True):
        completion = ticket.completion
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (), "length")
        assert completion.prompt_tokens == len(completion.prompt_logprobs or ())
        assert completion.decode_tokens_per_s is None and completion.ttft_s > 0
        assert same(completion, generator.generate(prompt, max_tokens=0, prompt_logprobs=0))
    with pytest.raises(PromptError, match="got 129 tokens, expected at most the context of 128"):
        engine.add([*full, 5], max_tokens=0, prompt_logprobs=0)


def test_a_prompt_of_no_numbers_is_not_scored(engine: Engine, session: DecoderSession) -> None:
    beside = engine.add("the", max_tokens=20, ignore_eos=True)
    engine.step()
    ticket = engine.add(list(range(3, 30)), max_tokens=0, prompt_logprobs=1)
    while len(ticket.answer.prompt_logprobs) == 1:
        engine.step()
    for array in session.cache.view(1, 1).values():
        array[:] = np.nan
    with pytest.raises(SessionError, match="expected numbers"):
        list(ticket)
    run_out(engine)
    assert beside.completion.finish_reason == "length"


def test_logits_of_many_positions_are_given_back_with_the_slot(decoder_folder: Path) -> None:
    engine = Engine.load(decoder_folder, threads=1, slots=2)
    engine.generate(["the quick", "brown fox"], max_tokens=0, prompt_logprobs=0)
    assert not any(binding.rows > 1 for binding in engine.session._chunks.values())
