"""Formulas, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.errors import LoadError
from runtime.traffic.measure import Measured, Record, Work
from runtime.traffic.metrics import Cost, Quantiles, keeps, read_limits, summarize

# Sent late, at 1.5 s instead of 1: five tokens at 2, 2.25, 2.5, 2.75, 3 s.
LATE = Record(0, 1.0, 1.5, 3.1, (2.0, 2.25, 2.5, 2.75, 3.0), 10, 5, 5)
# Three tokens in two pieces, one fewer than asked.
SHORT = Record(1, 2.0, 2.0, 4.0, (2.5, 3.5), 20, 3, 4)
FAILED = Record(2, 2.0, 2.0, 2.1, (), None, 0, 4, "no")


def test_latencies_count_from_the_plan() -> None:
    assert (LATE.ttft_s, LATE.e2e_s, LATE.tpot_s) == (1.0, 2.0, 0.25)
    assert LATE.itl_s == (0.25, 0.25, 0.25, 0.25)
    assert (SHORT.ttft_s, SHORT.e2e_s, SHORT.tpot_s, SHORT.itl_s) == (0.5, 1.5, 0.5, (1.0,))
    assert replace(SHORT, arrivals_s=(2.5,), output_tokens=1).tpot_s is None


def test_quantiles_lie_between_values_in_proportion() -> None:
    found = Quantiles.of(range(101))
    assert found == Quantiles(50, 90, 99, 50, 100, 101)
    assert Quantiles.of([3.0, 1.0]) == Quantiles(2.0, 2.8, pytest.approx(2.98), 2.0, 3.0, 2)
    assert Quantiles.of([]) is None


def test_rates_leave_failures_out_and_count_the_whole_time() -> None:
    found = summarize(Measured([LATE, SHORT, FAILED], is_complete=True))
    assert (found.requests, found.errors, found.short, found.duration_s) == (3, 1, 1, 4.0)
    assert (found.input_tokens, found.output_tokens) == (30, 8)
    assert (found.requests_per_s, found.output_tokens_per_s, found.total_tokens_per_s) == (0.5, 2.0, 9.5)
    assert found.ttft_ms is not None and (found.ttft_ms.p50, found.ttft_ms.n) == (750, 2)
    assert found.tpot_ms is not None and (found.tpot_ms.most, found.tpot_ms.mean) == (500, 375)
    assert found.itl_ms is not None and (found.itl_ms.mean, found.itl_ms.n) == (400, 5)
    assert found.e2e_ms is not None and found.e2e_ms.most == 2000
    assert (found.goodput_per_s, found.busy_s, found.reserved, found.read_bytes_per_s) == (None, None, None, None)


def test_an_answer_is_good_when_it_keeps_every_limit() -> None:
    assert keeps(LATE, {"ttft_ms": 1000, "tpot_ms": 250, "e2e_ms": 2000})
    assert not any(keeps(LATE, {name: limit}) for name, limit in (("ttft_ms", 999), ("tpot_ms", 249), ("e2e_ms", 1999)))
    assert not keeps(FAILED, {"ttft_ms": 1e9})
    assert keeps(replace(SHORT, output_tokens=1), {"tpot_ms": 1})
    found = summarize(Measured([LATE, SHORT, FAILED]), {"ttft_ms": 600})
    assert found.goodput_per_s == 0.25  # one of three, in 4 s


def test_cost_is_split_by_the_targets_own_seconds_where_it_tells_them() -> None:
    work = Work(busy_s=2.0, prefill_s=0.5, decode_s=1.5)
    found = summarize(Measured([LATE, SHORT], work), dollars_per_hour=3600)  # a dollar per second
    assert found.input_share == 0.25
    assert found.reserved == Cost(1e6 * 4 * 0.25 / 30, 1e6 * 4 * 0.75 / 8)
    assert found.busy == Cost(1e6 * 2 * 0.25 / 30, 1e6 * 2 * 0.75 / 8)


def test_cost_is_split_by_what_clients_saw_where_it_does_not() -> None:
    found = summarize(Measured([LATE, SHORT, FAILED], Work(busy_s=2.0)), dollars_per_hour=3600)
    assert found.input_share == pytest.approx(1.5 / 3.5)
    assert found.busy is not None and found.busy.output == pytest.approx(1e6 * 2 * 2 / 3.5 / 8)
    assert summarize(Measured([LATE]), dollars_per_hour=1).busy is None


def test_unknown_prompt_lengths_stay_unknown() -> None:
    found = summarize(Measured([LATE, replace(SHORT, input_tokens=None)]), dollars_per_hour=1)
    assert (found.input_tokens, found.total_tokens_per_s) == (None, None)
    assert found.reserved is not None and found.reserved.input is None and found.reserved.output


def test_bytes_of_decodes_are_told_by_the_second() -> None:
    work = Work(2.0, 0.5, 1.5, decode_bytes=3000)
    assert summarize(Measured([LATE], work)).read_bytes_per_s == 2000


def test_work_is_told_since_a_moment() -> None:
    assert Work(5.0, 2.0, 3.0, 70).since(Work(1.0, 0.5, 0.5, 20)) == Work(4.0, 1.5, 2.5, 50)
    assert Work(5.0).since(Work(1.0)) == Work(4.0)


def test_nothing_measured_is_no_mistake() -> None:
    found = summarize(Measured(), {"ttft_ms": 1}, 1.0)
    assert (found.requests, found.requests_per_s, found.ttft_ms, found.reserved) == (0, 0.0, None, None)


def test_limits_are_read_one_by_one_or_together() -> None:
    assert read_limits(["ttft_ms:200 tpot_ms:50"]) == {"ttft_ms": 200, "tpot_ms": 50}
    assert read_limits(["ttft_ms:200,tpot_ms:50", "e2e_ms:1e3"]) == {"ttft_ms": 200, "tpot_ms": 50, "e2e_ms": 1000}


@pytest.mark.parametrize(
    "text", ["ttft:200", "ttft_ms", "ttft_ms:", "ttft_ms:0", "ttft_ms:x", "e2e_ms:nan", "e2e_ms:inf"]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match=r"--goodput: got '.*', expected one of ttft_ms, tpot_ms, e2e_ms"):
        read_limits([text])
