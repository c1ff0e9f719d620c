"""Who runs next: the scheduler against a cache of integers, and by example."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from runtime.errors import PromptError
from runtime.scheduler import CHUNKS, Copy, Decode, Move, Prefill, Row, Scheduler, Step

GARBAGE = -1  # what a dummy row writes
CHUNK = 4
COPIED = 6  # tokens copied at once


def scheduler(
    slots: int = 4,
    budget: int = 1000,
    granule: int = 1,
    copied: int = COPIED,
    even_rows: bool = False,
    chunks: int = 1,
) -> Scheduler:
    return Scheduler(
        slots=slots,
        budget=budget,
        granule=granule,
        chunk=lambda past: CHUNK,
        copied=copied,
        even_rows=even_rows,
        chunks=chunks,
    )


def run(subject: Scheduler) -> Step:
    step = subject.schedule()
    assert step is not None
    subject.ran(step)
    return step


def test_a_prompt_is_read_in_chunks_and_then_decoded() -> None:
    subject = scheduler()
    subject.add(7, prompt=300, new=3)
    assert [run(subject) for _ in range(4)] == [
        Prefill(7, slot=0, past=0, tokens=128, is_last=False),
        Prefill(7, slot=0, past=128, tokens=128, is_last=False),
        Prefill(7, slot=0, past=256, tokens=44, is_last=True),
        Decode(0, (Row(7, 300),)),
    ]


def test_while_others_decode_chunks_are_small_and_alternate_with_them() -> None:
    subject = scheduler()
    subject.add(0, prompt=2, new=50)
    run(subject)
    subject.add(1, prompt=9, new=50)
    assert [run(subject) for _ in range(6)] == [
        Decode(0, (Row(0, 2),)),
        Prefill(1, slot=1, past=0, tokens=4, is_last=False),
        Decode(0, (Row(0, 3),)),
        Prefill(1, slot=1, past=4, tokens=2, is_last=False),  # not 4: one token would be left
        Decode(0, (Row(0, 4),)),
        Prefill(1, slot=1, past=6, tokens=3, is_last=True),
    ]


@pytest.mark.parametrize(("prompts", "chunks"), [(1, 1), (3, 3), (6, CHUNKS)])
def test_each_prompt_that_is_read_has_a_chunk_between_two_tokens(prompts: int, chunks: int) -> None:
    subject = scheduler(slots=8, chunks=CHUNKS)
    subject.add(0, prompt=2, new=50)
    run(subject)
    for request in range(1, 1 + prompts):
        subject.add(request, prompt=99, new=1)
    while not isinstance(run(subject), Decode):
        pass
    for _ in range(3):
        assert all(isinstance(run(subject), Prefill) for _ in range(chunks))
        assert isinstance(run(subject), Decode)


def test_a_hole_writes_at_its_beginning_and_a_prompt_being_read_right_after_what_was_read() -> None:
    subject = scheduler(copied=2)
    for request in range(3):
        subject.add(request, prompt=3, new=50)
    for _ in range(5):
        run(subject)
    assert run(subject) == Decode(0, (Row(0, 5), Row(1, 4), Row(2, 3)))
    assert subject.remove(1) == 1
    assert run(subject) == Decode(0, (Row(0, 6), Row(None, 0), Row(2, 4)))
    subject.add(3, prompt=9, new=5)
    run(subject)
    assert run(subject) == Decode(0, (Row(0, 7), Row(None, 4), Row(2, 5)))


def test_the_highest_sequence_moves_into_the_lowest_hole_one_for_each_token() -> None:
    subject = scheduler(slots=5)
    for request in range(5):
        subject.add(request, prompt=1, new=50)
    for _ in range(10):
        run(subject)
    assert (subject.remove(0), subject.remove(2), subject.remove(3)) == (0, 2, 3)
    assert [run(subject) for _ in range(3)] == [
        Move(4, slot=2, source=4, tokens=2),
        Decode(1, (Row(1, 5), Row(4, 2))),
        Decode(1, (Row(1, 6), Row(4, 3))),
    ]
    assert subject.remove(4) == 2


def test_two_holes_take_two_moves_with_a_token_between() -> None:
    subject = scheduler(slots=5)
    for request in range(5):
        subject.add(request, prompt=1, new=50)
    for _ in range(10):
        run(subject)
    assert (subject.remove(1), subject.remove(2)) == (1, 2)
    assert [run(subject) for _ in range(4)] == [
        Move(4, slot=1, source=4, tokens=2),
        Decode(0, (Row(0, 6), Row(4, 2), Row(None, 0), Row(3, 3))),
        Move(3, slot=2, source=3, tokens=4),
        Decode(0, (Row(0, 7), Row(4, 3), Row(3, 4))),
    ]


def test_a_hole_is_not_left_to_requests_that_wait_for_a_copy() -> None:
    subject = scheduler(slots=5)
    for request in range(3):
        subject.add(request, prompt=1, new=50)
    for _ in range(6):
        run(subject)
    for request in (3, 4):
        subject.add(request, prompt=20, new=50, group=3)
    assert run(subject) == Prefill(3, slot=3, past=0, tokens=4, is_last=False)
    assert subject.remove(1) == 1
    assert run(subject) == Move(2, slot=1, source=2, tokens=2)


def test_a_hole_is_left_to_a_request_that_has_no_slot_yet() -> None:
    subject = scheduler(slots=3)
    for request in range(3):
        subject.add(request, prompt=1, new=50)
    for _ in range(5):
        run(subject)
    subject.add(3, prompt=1, new=50)
    assert subject.remove(1) == 1
    assert run(subject) == Decode(0, (Row(0, 3), Row(None, 0), Row(2, 1)))
    assert run(subject) == Prefill(3, slot=1, past=0, tokens=1, is_last=True)


def test_slots_below_and_above_the_live_ones_do_not_run() -> None:
    subject = scheduler()
    for request in range(3):
        subject.add(request, prompt=1, new=50)
    for _ in range(6):
        run(subject)
    assert (subject.remove(0), subject.remove(2)) == (0, 2)
    assert run(subject) == Decode(1, (Row(1, 3),))
    subject.add(3, prompt=9, new=5)
    run(subject)
    assert run(subject) == Decode(1, (Row(1, 4),))


def test_an_odd_number_of_rows_gets_a_dummy_where_it_must_be_even() -> None:
    subject = scheduler(slots=3, even_rows=True)
    for request in range(3):
        subject.add(request, prompt=1, new=50)
    assert [run(subject) for _ in range(6)][1::2] == [
        Decode(0, (Row(0, 1), Row(None, 0))),
        Decode(0, (Row(0, 2), Row(1, 1))),
        Decode(0, (Row(0, 3), Row(1, 2), Row(2, 1), Row(None, 0))),  # a slot more than there are
    ]
    assert (subject.remove(0), subject.remove(1)) == (0, 1)
    assert run(subject) == Decode(1, (Row(None, 0), Row(2, 2)))


def test_a_short_prompt_need_not_wait_for_a_long_one_nor_the_long_one_for_many_short() -> None:
    subject = scheduler(slots=8)
    subject.add(0, prompt=600, new=1)
    run(subject)
    for request in range(1, 8):
        subject.add(request, prompt=2, new=1)
    read = []
    while len(read) < 8:
        step = run(subject)
        if isinstance(step, Prefill):
            read.append(step.request)
    assert read == [0, 1, 0, 2, 0, 3, 0, 4]


def test_admission_is_in_order_and_by_what_is_reserved() -> None:
    subject = scheduler(budget=100, granule=10)
    subject.add(0, prompt=21, new=10)  # 40 with what rounding adds
    subject.add(1, prompt=60, new=10)
    subject.add(2, prompt=1, new=1)
    run(subject)
    assert subject.reserved == 40  # 1 does not fit, and 2, which would, does not overtake it
    assert subject.remove(0) == 0
    run(subject)
    assert subject.reserved == 80


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(PromptError, match=r"95 \+ 10 tokens .* need 110 of cache, expected at most 100; shorten"):
        scheduler(budget=100, granule=10).add(0, prompt=95, new=10)


def test_a_late_request_joins_in_the_next_step_that_reads_a_prompt() -> None:
    subject = scheduler()
    for request in range(3):
        subject.add(request, prompt=2, new=50)
    for _ in range(9):
        run(subject)
    subject.add(3, prompt=2, new=50)
    steps = [run(subject), run(subject), run(subject)]
    first = next(at for at, step in enumerate(steps) if isinstance(step, Prefill) and step.request == 3)
    assert first <= 1
    joined = steps[first + 1]
    assert isinstance(joined, Decode) and [row.request for row in joined.rows] == [0, 1, 2, 3]


def test_a_group_reads_its_prompt_once_and_copies_all_but_the_last_tokens() -> None:
    subject = scheduler()
    for request in range(3):
        subject.add(request, prompt=7, new=5, group=0)
    assert [run(subject) for _ in range(6)] == [
        Prefill(0, slot=0, past=0, tokens=7, is_last=True),
        Decode(0, (Row(0, 7),)),
        Copy(1, slot=1, source=0, past=0, tokens=4),
        Prefill(1, slot=1, past=4, tokens=3, is_last=True),
        Decode(0, (Row(0, 8), Row(1, 7))),
        Copy(2, slot=2, source=0, past=0, tokens=4),
    ]


def test_copies_are_cut_and_alternate_with_decodes_like_chunks() -> None:
    subject = scheduler()
    for request in range(2):
        subject.add(request, prompt=16, new=5, group=0)
    assert [run(subject) for _ in range(6)] == [
        Prefill(0, slot=0, past=0, tokens=16, is_last=True),
        Decode(0, (Row(0, 16),)),
        Copy(1, slot=1, source=0, past=0, tokens=6),
        Decode(0, (Row(0, 17),)),
        Copy(1, slot=1, source=0, past=6, tokens=6),
        Decode(0, (Row(0, 18),)),
    ]
    assert run(subject) == Copy(1, slot=1, source=0, past=12, tokens=2)
    assert run(subject) == Prefill(1, slot=1, past=14, tokens=2, is_last=True)


def test_a_group_whose_reader_is_gone_reads_on_from_what_was_copied() -> None:
    subject = scheduler()
    for request in range(2):
        subject.add(request, prompt=16, new=5, group=0)
    for _ in range(3):
        run(subject)
    assert subject.remove(0) == 0
    assert run(subject) == Prefill(1, slot=1, past=6, tokens=10, is_last=True)


def test_a_request_that_waits_can_be_removed() -> None:
    subject = scheduler(slots=1)
    subject.add(0, prompt=2, new=2)
    subject.add(1, prompt=2, new=2)
    run(subject)
    assert subject.remove(1) is None and subject.remove(0) == 0
    assert not subject.has_work and subject.schedule() is None


class Serving(RuleBasedStateMachine):
    """A scheduler beside a cache whose cells hold the number of the request that wrote them."""

    @initialize(
        slots=st.integers(1, 5),
        budget=st.integers(40, 150),
        granule=st.sampled_from([1, 8]),
        copied=st.sampled_from([COPIED, 20]),
        even_rows=st.booleans(),
        chunks=st.sampled_from([1, 2, CHUNKS]),
    )
    def begin(self, slots: int, budget: int, granule: int, copied: int, even_rows: bool, chunks: int) -> None:
        self.subject = scheduler(slots, budget, granule, copied, even_rows, chunks)
        self.chunks = chunks
        self.slots, self.budget, self.granule = slots, budget, granule
        self.copied, self.even_rows, self.moved_last = copied, even_rows, False
        self.cells: list[dict[int, int]] = [{} for _ in range(slots + slots % 2)]
        self.group: dict[int, int] = {}  # request -> the first of those that share its prompt
        self.asked: dict[int, tuple[int, int]] = {}  # request -> prompt, new: those not ended yet
        self.made: dict[int, int] = {}  # request -> tokens generated
        self.place: dict[int, int] = {}  # request -> its slot, from its first chunk on
        self.count = 0
        self.waited: dict[int, int] = {}  # request -> steps since it last ran, once admitted

    @rule(prompt=st.integers(1, 30), new=st.integers(1, 12), n=st.sampled_from([1, 1, 3]))
    def add(self, prompt: int, new: int, n: int) -> None:
        group = self.count if n > 1 else None
        for _ in range(n):
            try:
                self.subject.add(self.count, prompt, new, group)
            except PromptError:
                assert -(-(prompt + new) // self.granule) * self.granule > self.budget
            else:
                self.asked[self.count] = (prompt, new)
                self.group[self.count] = self.count if group is None else group
                self.count += 1

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.asked))))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        for request in self.advance():
            if data.draw(st.integers(0, 9)) == 0:  # a stop string, an EOS id
                self.end(request)

    def advance(self) -> list[int]:
        """Run a step on the cells; return the requests that got a token and go on."""
        step = self.subject.schedule()
        assert (step is not None) == self.subject.has_work == bool(self.asked)
        if step is None:
            return []
        self.require_fair_admission()
        got = self.run(step)
        self.subject.ran(step)
        for request in got:
            self.made[request] += 1
            if self.made[request] == self.asked[request][1]:
                self.end(request)
        return [request for request in got if request in self.asked]

    def run(self, step: Step) -> list[int]:
        if isinstance(step, Decode):
            return self.decode(step)
        if isinstance(step, Move):
            return self.move(step)
        self.take_place(step)
        self.require_own(step.slot, step.request, step.past)
        return self.read(step) if isinstance(step, Prefill) else self.copy(step)

    def take_place(self, step: Prefill | Copy) -> None:
        if step.request not in self.place:
            assert step.past == 0
            assert step.slot == min(set(range(self.slots)) - set(self.place.values()))
            self.place[step.request] = step.slot
        assert self.place[step.request] == step.slot

    def read(self, step: Prefill) -> list[int]:
        prompt, _ = self.asked[step.request]
        assert step.tokens > 1 or prompt == 1
        assert step.past % 2 == 0
        assert step.past >= self.copyable(step.request) or not self.holders(step.request)
        self.cells[step.slot] |= dict.fromkeys(range(step.past, step.past + step.tokens), step.request)
        assert step.is_last == (step.past + step.tokens == prompt)
        self.count_waits({step.request})
        if not step.is_last:
            return []
        self.made[step.request] = 0
        return [step.request]

    def copy(self, step: Copy) -> list[int]:
        """A copy ends within the prompt, so that at least two tokens are left to run, after an even number."""
        assert step.past + step.tokens <= self.copyable(step.request)
        assert step.tokens % 2 == 0 and 0 < step.tokens <= self.copied
        copied = [self.cells[step.source][at] for at in range(step.past, step.past + step.tokens)]
        assert {self.group[request] for request in copied} == {self.group[step.request]}
        self.cells[step.slot] |= dict.fromkeys(range(step.past, step.past + step.tokens), step.request)
        if step.tokens == self.copied:  # counts as a chunk
            self.count_waits({step.request})
        return []

    def move(self, step: Move) -> list[int]:
        """All of a sequence goes to a slot of nobody's, below its own and above another's that is decoded."""
        assert not self.moved_last and step.tokens <= self.copied
        assert self.place[step.request] == step.source and step.slot not in self.place.values()
        assert min(self.place[request] for request in self.made) < step.slot < step.source
        assert self.cells[step.source] == dict.fromkeys(range(step.tokens), step.request)
        self.place[step.request] = step.slot
        self.cells[step.slot], self.cells[step.source] = self.cells[step.source], {}
        self.moved_last = True
        return []

    def copyable(self, request: int) -> int:
        return max(self.asked[request][0] - 2, 0) // 2 * 2

    def holders(self, request: int) -> list[int]:
        """Others whose slots hold as much of this request's prompt as may be copied."""
        last = self.copyable(request) - 1
        alike = [other for other in self.place if other != request and self.group[other] == self.group[request]]
        return [other for other in alike if self.cells[self.place[other]].get(last) == other]

    def decode(self, step: Decode) -> list[int]:
        live = {row.request for row in step.rows if row.request is not None}
        assert live == set(self.made)  # all that are past their prompt, and nobody else
        dummies_at_ends = [step.rows[0].request, step.rows[-1].request].count(None)
        assert dummies_at_ends <= self.even_rows and not (self.even_rows and len(step.rows) % 2)
        for slot, row in enumerate(step.rows, step.first):
            if row.request is not None:
                assert self.place[row.request] == slot
                prompt, _ = self.asked[row.request]
                assert row.past == prompt + self.made[row.request] - 1
                self.require_own(slot, row.request, row.past)
            self.cells[slot][row.past] = GARBAGE if row.request is None else row.request
        self.require_no_hole(step)
        self.moved_last = False
        self.count_waits(live)
        return sorted(live)

    def require_own(self, slot: int, request: int, past: int) -> None:
        """All that a row reads was written for it: no dummy row's token, no earlier request's."""
        assert [self.cells[slot].get(at) for at in range(past)] == [request] * past

    def require_no_hole(self, step: Decode) -> None:
        """Only slots of prompts read now or next run as dummy rows, unless the highest sequence could not move yet."""
        slots = [self.place[request] for request in self.made]
        holes = set(range(min(slots), max(slots))) - set(self.place.values())
        highest = max(self.made, key=lambda request: self.place[request])
        is_long = self.asked[highest][0] + self.made[highest] - 1 > self.copied
        unplaced = {self.group[request] for request in set(self.admitted) - set(self.place)}
        unplaced -= {self.group[request] for request in set(self.place) - set(self.made)}  # they wait to copy those
        assert len(holes) <= len(unplaced) or is_long or self.moved_last

    def require_fair_admission(self) -> None:
        """Who came first is in, all who fit, and nobody else."""
        waiting = sorted(self.asked)[len(self.asked) - self.subject.waiting :]
        self.admitted = sorted(set(self.asked) - set(waiting))
        assert set(self.place) <= set(self.admitted)
        assert self.subject.reserved == sum(map(self.rounded, self.admitted)) <= self.budget
        if waiting and len(self.admitted) < self.slots:
            assert self.subject.reserved + self.rounded(waiting[0]) > self.budget

    def rounded(self, request: int) -> int:
        return -(-sum(self.asked[request]) // self.granule) * self.granule

    def count_waits(self, ran: set[int]) -> None:
        """A stream waits for a chunk of each prompt, up to a number; the oldest prompt for one other's and decodes."""
        for request in set(self.made) - ran:
            self.waited[request] = self.waited.get(request, 0) + 1
            assert self.waited[request] <= min(self.chunks, len(self.admitted) - 1)
        oldest = next((request for request in self.admitted if request not in self.made), None)
        if oldest is not None and oldest not in ran:
            self.waited[oldest] = self.waited.get(oldest, 0) + 1
            assert self.waited[oldest] <= 3
        for request in ran:
            self.waited[request] = 0

    def end(self, request: int) -> None:
        slot = self.subject.remove(request)
        assert slot == self.place.pop(request, None)
        self.asked.pop(request)
        self.made.pop(request, None)
        if slot is not None:
            self.cells[slot].clear()

    def teardown(self) -> None:
        """Every request ends, and leaves nothing behind."""
        left = sum(2 * prompt + new for prompt, new in self.asked.values()) + 1
        for _ in range(left):
            self.advance()
        assert not self.asked and not self.subject.has_work and self.subject.reserved == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
