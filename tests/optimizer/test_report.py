import math
from dataclasses import replace

import pytest

from optimizer.gate import Verdict
from optimizer.record import Judged, Rejected, Run, SizeVerdict, Step
from optimizer.report import Reporter, end_lines, score_text, size_text, speed_text, step_lines, told_apart
from optimizer.speed import SpeedVerdict, Timing

PASSED = Verdict(
    metric="perplexity",
    outcome="pass",
    source=10.953,
    candidate=11.049,
    difference=0.0088,
    lower=0.0052,
    upper=0.0112,
    limit=0.02,
    alpha=0.05,
    n_items=60,
    n_effective=30.0,
    reason="shown to be within the budget",
    items_needed=None,
    mcnemar_p=None,
    flags=(),
)
SOURCE = Step("source", 11_550_000, {"perplexity/perplexity": 10.953}, is_scored=True, score_s=2.5)
STEP = Step(
    "quantize_rtn",
    4_150_000,
    {"perplexity/perplexity": 11.049},
    gates=(Judged("perplexity", PASSED),),
    changes={"layers_quantized": 44, "layers_left": 0},
    is_scored=True,
    pass_s=0.12,
    score_s=2.4,
)
RUN = Run("r", (SOURCE, STEP), None, "artifacts/r", "ab" * 32, None, 21.14)

FASTER = SpeedVerdict(
    metric="decode_tokens_per_s",
    outcome="pass",
    is_ratio=True,
    limit=1.4,
    reference=173.4,
    candidate=1259.2,
    estimate=1.502,
    lower=1.461,
    upper=1.548,
    alpha=0.05,
    restarts=8,
    by_restart=(1.5,) * 8,
    reason="shown to be within the budget",
)
TIMING = Timing(8, 8, 128, 32, 1, 2, 4, "a processor", 2600.0, None, 0.42, 1.61, 61.23)


def test_line_of_a_pass_has_scores_interval_verdict_changes_size_and_seconds() -> None:
    assert step_lines(1, 4, STEP, SOURCE, width=14) == [
        "1/4 quantize_rtn    perplexity 10.953 -> 11.049, +0.88 % [+0.52, +1.12] of 2.00 %: PASS | "
        "44 layers quantized | 4.15 MB | 0.1 s + 2.4 s scoring"
    ]


def test_line_of_the_source_has_its_scores_but_no_distance_to_itself() -> None:
    source = replace(SOURCE, scores={"perplexity/perplexity": 10.953, "agreement/flips": 0.0, "agreement/kl": 0.0})
    assert step_lines(0, 4, source, None) == ["0/4 source  perplexity 10.953 | 11.55 MB | 2.5 s scoring"]


def test_score_without_a_gate_is_reported_against_the_source() -> None:
    step = replace(STEP, gates=(), scores={"perplexity/perplexity": 11.049, "agreement/flips": 0.0565})
    assert "perplexity 10.953 -> 11.049 | agreement flips 5.65 % | 44 layers" in step_lines(1, 4, step, SOURCE)[0]


@pytest.mark.parametrize(
    ("is_stored", "is_scored", "text"),
    [
        (True, False, "stored"),
        (True, True, "stored + 2.4 s scoring"),
        (False, True, "0.1 s + 2.4 s scoring"),
        (False, False, "0.1 s"),
    ],
)
def test_seconds_say_what_was_done_now(is_stored: bool, is_scored: bool, text: str) -> None:
    step = replace(STEP, is_stored=is_stored, is_scored=is_scored)
    assert step_lines(1, 4, step, SOURCE)[0].endswith(f"4.15 MB | {text}")


def test_skipped_pass_says_why() -> None:
    step = replace(STEP, is_skipped=True, note="matched 0 of 6 blocks")
    assert step_lines(2, 4, step, SOURCE) == ["2/4 quantize_rtn  skipped: matched 0 of 6 blocks"]


def test_note_stands_below_the_line() -> None:
    assert step_lines(1, 4, replace(STEP, note="layer 0 left"), SOURCE)[1] == " " * 18 + "layer 0 left"


def test_wide_line_is_broken_between_findings() -> None:
    lines = step_lines(1, 4, STEP, SOURCE, columns=100)
    assert lines[1:] == [" " * 18 + "44 layers quantized | 4.15 MB | 0.1 s + 2.4 s scoring"]
    assert all(len(line) <= 100 for line in lines)


def test_finding_wider_than_the_terminal_is_not_lost() -> None:
    assert "PASS" in " ".join(step_lines(1, 4, STEP, SOURCE, columns=20))


def test_evaluation_of_another_name_than_its_metric_is_named() -> None:
    flips = replace(PASSED, metric="flips", difference=0.0565, lower=0.0485, upper=0.0622, limit=0.08)
    assert score_text(Judged("agreement", flips)) == "agreement flips 5.65 % [4.85, 6.22] of 8.00 %: PASS"
    kl = replace(PASSED, metric="kl", difference=0.0066, lower=0.0060, upper=0.0071, limit=0.05)
    assert score_text(Judged("agreement", kl)) == "agreement kl 0.0066 [0.0060, 0.0071] of 0.0500: PASS"
    drop = replace(PASSED, metric="accuracy", source=0.9, candidate=0.88, difference=0.02, lower=0.0, limit=0.05)
    assert score_text(Judged("accuracy", drop)).startswith("accuracy 90.00 % -> 88.00 %, +2.00 pt [+0.00, +1.12] of 5")


def test_bound_near_the_limit_has_enough_digits_to_tell_its_side() -> None:
    over = replace(PASSED, upper=0.0200004, outcome="inconclusive")
    assert "[+0.52000, +2.00004] of 2.00000 %: INCONCLUSIVE" in score_text(Judged("perplexity", over))


def test_bound_at_the_limit_needs_no_digits() -> None:
    assert told_apart([2.0, 1.5], 2.0, 2) == ["2.00", "1.50", "2.00"]


def test_score_that_is_no_number_is_told() -> None:
    broken = replace(PASSED, candidate=math.nan, difference=math.nan, lower=math.nan, upper=math.inf, outcome="fail")
    assert score_text(Judged("perplexity", broken)).endswith("-> nan, +nan % [+nan, +inf] of 2.00 %: FAIL")


def test_size_tells_its_share_and_its_side_of_the_limit() -> None:
    near = SizeVerdict(4_000_100, 10_000_000, 0.4)
    assert size_text(near) == "size 4.00 MB, 40.001 % of the source's 10.00 MB, of at most 40.000: FAIL"
    assert size_text(replace(near, bytes=3_840_000)).endswith("38.4 % of the source's 10.00 MB, of at most 40.0: PASS")


def test_end_names_artifact_and_identity() -> None:
    assert list(end_lines(RUN)) == ["artifact artifacts/r", f"digest   {'ab' * 32}", "21.1 s"]


def test_end_tells_warnings_of_a_gate_that_passed() -> None:
    flagged = replace(PASSED, flags=("few groups",), reason="shown; 30 effective documents (100 advised)")
    run = replace(RUN, steps=(replace(STEP, gates=(Judged("perplexity", flagged),)),))
    assert next(end_lines(run)) == "perplexity: shown; 30 effective documents (100 advised)"


def test_end_of_an_undecided_run_says_how_many_items_would_decide() -> None:
    open_ = replace(PASSED, outcome="inconclusive", reason="not decided by 60 items", items_needed=1234)
    run = replace(RUN, steps=(replace(STEP, gates=(Judged("perplexity", open_),)),), artifact=None)
    assert list(end_lines(run))[:2] == [
        "perplexity: INCONCLUSIVE, not decided by 60 items; about 1,234 items would decide",
        "no artifact: a gate is undecided (--keep makes one all the same)",
    ]


def test_end_warns_last_of_an_artifact_that_this_run_did_not_make() -> None:
    run = replace(RUN, artifact=None, stopped_after="quantize_rtn", earlier="artifacts/r")
    assert list(end_lines(run)) == [
        "no artifact: stopped after quantize_rtn, as asked",
        "21.1 s",
        "careful: artifacts/r is left from an earlier run, this one did not make it",
    ]


def test_quiet_reporter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("quiet")
    reporter.step(1, 4, STEP, SOURCE)
    reporter.warn("damaged")
    reporter.end(RUN)
    assert capsys.readouterr() == ("", "")


def test_plain_reporter_keeps_results_and_warnings_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    reporter = Reporter("plain")
    with reporter.progress("work") as report:
        report(1, 2, "parts")
    reporter.step(1, 4, STEP, SOURCE)
    reporter.warn("damaged")
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err) == (1, "damaged\n")


def test_line_of_a_speed_has_both_rates_ratio_interval_budget_and_verdict() -> None:
    assert speed_text(FASTER) == ("decode_tokens_per_s 173 -> 1,259, x1.50 [1.46, 1.55] of at least x1.40: PASS")


def test_line_of_a_time_says_at_most_and_an_absolute_one_has_no_reference() -> None:
    time = replace(FASTER, metric="latency_ms", is_ratio=False, limit=20.0, reference=None, estimate=12.34)
    time = replace(time, lower=11.92, upper=20.04, outcome="inconclusive")
    assert speed_text(time) == "latency_ms 12.34 [11.92, 20.04] of at most 20.00: INCONCLUSIVE"
    rate = replace(time, metric="texts_per_s", limit=900.0, estimate=1234.5, lower=1200.1, upper=1300.9)
    assert speed_text(rate) == "texts_per_s 1,234 [1,200, 1,301] of at least 900: INCONCLUSIVE"


def test_speed_near_its_budget_has_the_digits_that_show_the_side() -> None:
    assert "x1.4020 [1.3999, 1.5480] of at least x1.4000" in speed_text(replace(FASTER, estimate=1.402, lower=1.3999))
    assert "x1.502 [1.461, 1.548] of at least x0.001" in speed_text(replace(FASTER, limit=0.001))


def test_end_tells_speeds_their_conditions_and_why_one_did_not_pass() -> None:
    undecided = replace(FASTER, metric="ttft_ms", outcome="inconclusive", reason="not decided by 16 restarts")
    lines = list(end_lines(replace(RUN, artifact=None, speeds=(FASTER, undecided), timing=TIMING)))
    assert lines == [
        speed_text(FASTER),
        speed_text(undecided),
        "speed: 8 restarts of 8 pairs, 128 tokens, 32 new, 2 threads on 4 cores, load 0.4 to 1.6, 61.2 s",
        "ttft_ms: INCONCLUSIVE, not decided by 16 restarts",
        "no artifact: a gate is undecided (--keep makes one all the same)",
        "21.1 s",
    ]


def test_conditions_of_an_encoder_name_its_batch() -> None:
    lines = list(end_lines(replace(RUN, speeds=(FASTER,), timing=replace(TIMING, new_tokens=0, batch=8))))
    assert "speed: 8 restarts of 8 pairs, 128 tokens, batches of 8, 2 threads" in lines[1]


def test_rungs_that_gave_way_are_counted_and_the_last_one_has_its_reason() -> None:
    first = Rejected(0, STEP, "search perplexity: the loss seen is above the budget")
    assert "1 rung gave way: search perplexity: the loss seen is above the budget" in end_lines(
        replace(RUN, rejected=(first,))
    )
    second = replace(first, reason="the model is too large")
    assert "2 rungs gave way, the last: the model is too large" in end_lines(replace(RUN, rejected=(first, second)))
