"""The report: what it says, that one record gives one report, and that no text of the data becomes markup."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_report import FASTER, PASSED, RUN, SOURCE, STEP, TIMING

from optimizer.markdown import escaped, report, shown, table
from optimizer.openings import Openings
from optimizer.record import Against, Compared, Comparison, Flip, Flips, Judged, Rejected, SizeVerdict
from optimizer.report import one_line

OPEN = replace(PASSED, outcome="inconclusive", reason="not decided by 60 items", items_needed=600)
SIZE = SizeVerdict(4_150_000, 11_550_000, 0.4)
FLIP = Flip(7, "def f(x):\n    return `x`", " y", "", None, "other")
FLIPS = (Flips("agreement", 3, 90, "next tokens", (FLIP,)),)
BASELINE = Compared("baseline", "old", "ab" * 32, 4_000_000, {"accuracy/accuracy": 0.9}, "scored", 12.0)
CANDIDATE = Compared("candidate", "new", "cd" * 32, 2_000_000, {"accuracy/accuracy": 0.9}, "stored", 6.0)
COMPARISON = Comparison(
    "new/recipe.yaml",
    CANDIDATE,
    (Against(BASELINE, False, (Judged("perplexity", PASSED),), SizeVerdict(2, 4, 0.6), FLIPS),),
    ("size is only reported",),
    3.0,
)


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def seen(token: Token) -> str:
    """Return what a reader sees of an inline token, which must hold nothing but text."""
    assert {child.type for child in token.children or ()} <= {"text", "text_special"}
    return "".join(child.content for child in token.children or ())


def headings(text: str) -> list[str]:
    tokens = parsed(text)
    return [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]


def rows(text: str, head: str) -> list[list[str]]:
    """Return the cells below the table row that begins with `head`, as written."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_report_of_a_run_has_verdicts_chain_waterfall_and_flips() -> None:
    text = report(replace(RUN, size=SIZE, flips=FLIPS))
    assert headings(text) == ["r: PASS", "Verdicts", "Chain", "Loss, pass by pass", "Changed answers"]
    assert rows(text, "gate") == [
        ["perplexity", "10.953", "11.049", "+0.88 %", "[+0.52, +1.12]", "2.00 %", "60", "**PASS**"]
    ]
    assert "size 4.15 MB, 35.9 % of the source's 11.55 MB, of at most 40.0: PASS" in text
    assert rows(text, "")[1] == ["1", "quantize_rtn", "44 layers quantized", "4.15", "0.1 s + 2.4 s scoring"]
    assert rows(text, "item") == [["7", r"def f(x):↵    return \`x\`", "␣y", "*nothing*"]]
    assert "3 of 90 next tokens changed; 1 of them:" in text


def test_shares_of_the_passes_add_up_to_the_last_loss() -> None:
    later = replace(PASSED, difference=0.0123, lower=0.01, upper=0.015)
    again = replace(STEP, name="export_onnx", gates=(Judged("perplexity", later),))
    found = rows(report(replace(RUN, steps=(SOURCE, STEP, again))), "pass")
    assert [(row[0], row[2], row[4], row[5]) for row in found] == [
        ("quantize_rtn", "+0.88 %", "+0.88 %", "44 %"),
        ("export_onnx", "+1.23 %", "+0.35 %", "62 %"),
    ]


def test_score_that_no_gate_judges_is_in_the_report() -> None:
    text = report(replace(RUN, steps=(SOURCE, replace(STEP, gates=()))))
    assert "No gate judged any answer." in text
    assert rows(text, "pass") == [["source", "10.953"], ["quantize_rtn", "11.049"]]


def test_undecided_gate_says_how_many_items_and_minutes_would_decide() -> None:
    run = replace(RUN, steps=(replace(SOURCE, score_s=20.0), replace(STEP, score_s=10.0, gates=(Judged("p", OPEN),))))
    text = report(run)
    assert headings(text)[:3] == ["r: INCONCLUSIVE", "Verdicts", "What would decide"]
    # 540 items more at half a second each
    assert "- p perplexity: about 600 items in place of 60, about 4.5 minutes more at this run's speed" in text
    assert "- p perplexity: not decided by 60 items; about 600 items would decide" in text


def test_loss_that_is_no_number_is_told() -> None:
    broken = replace(PASSED, candidate=float("nan"), difference=float("nan"), outcome="fail", flags=("not a number",))
    assert "nan" in report(replace(RUN, steps=(SOURCE, replace(STEP, gates=(Judged("p", broken),)))))


def test_skipped_pass_and_its_reason_are_told() -> None:
    skipped = replace(STEP, is_skipped=True, note="matched 0 of 6 | blocks")
    text = report(replace(RUN, steps=(SOURCE, skipped)))
    assert rows(text, "")[1][2] == "skipped"
    assert r"- quantize_rtn: matched 0 of 6 \| blocks" in text


def test_run_that_was_stopped_or_evaluates_nothing_has_a_report() -> None:
    text = report(replace(RUN, steps=(replace(SOURCE, scores={}),), stopped_after="p", artifact=None, digest=None))
    assert "Stopped after p, as asked" in text
    assert headings(text) == ["r: PASS", "Verdicts", "Chain"]


def test_rungs_openings_and_search_items_are_told() -> None:
    search, certified = (Judged("perplexity", PASSED, part=part) for part in ("search", "certify"))
    text = report(
        replace(
            RUN,
            steps=(SOURCE, replace(STEP, gates=(search,), rung=1)),
            rejected=(Rejected(0, STEP, "perplexity: the loss seen is above the budget"),),
            certified=(certified,),
            openings=(Openings("perplexity", 3, "2026-11-01", 0.15),),
        )
    )
    assert rows(text, "gate")[0][0] == "certify perplexity"
    assert "3 different models were judged by these items since 2026-11-01" in text
    assert rows(text, "pass")[0] == ["quantize_rtn", "0", "perplexity: the loss seen is above the budget"]
    assert "**search perplexity**" in text
    assert "is no result" in text


def test_one_record_gives_one_report() -> None:
    assert report(replace(RUN, flips=FLIPS)) == report(replace(RUN, flips=FLIPS))


def test_report_of_a_comparison_names_both_artifacts_and_what_is_against_what() -> None:
    text = report(COMPARISON)
    assert headings(text) == ["new against old: PASS", "Against the baseline", "Changed answers"]
    assert rows(text, "")[0] == ["baseline", "old", f"`{'ab' * 32}`", "4.00", "12.0 s scoring"]
    assert rows(text, "")[1][-1] == "stored"
    assert "50.0 % of the baseline's 0.00 MB" in text
    assert "- size is only reported" in text


def test_speeds_are_told_of_runs_and_comparisons() -> None:
    against = replace(COMPARISON.against[0], speeds=(FASTER,), timing=TIMING)
    for text in (
        report(replace(RUN, speeds=(FASTER,), timing=TIMING)),
        report(replace(COMPARISON, against=(against,))),
    ):
        assert r"- decode_tokens_per_s 173 -\> 1,259, x1.50 \[1.46, 1.55\] of at least x1.40: PASS; shown to be" in text
        assert "load 0.4 to 1.6, 61.2 s; a processor" in text


def test_same_artifact_needs_no_answers() -> None:
    same = replace(COMPARISON, against=(Against(BASELINE, True, (), None, ()),))
    text = report(same)
    assert (same.outcome, "byte for byte" in text, "No gate judged" in text) == ("pass", True, False)


@given(st.text(max_size=60) | st.text("\\`*_[]()<>|~&$:@#!+-.=1a \n\t", max_size=30))
@example("| <b>&amp; [x](http://y.z) `code` :smile: $e$ @all __a__ ~~b~~ \\")
@example("a\\|b")
@example("<script>alert(1)</script>")
@example("1. one")
@example("- one")
@example("__init__\n\n# head")
def test_no_text_becomes_markup(text: str) -> None:
    for written in (table(("a", "b"), [(escaped(text), "end")]), f"- {escaped(text)}", f"# {escaped(text)}"):
        tokens = parsed(written)
        inline = [token for token in tokens if token.type == "inline"]
        expected = " ".join(one_line(text).split())
        told = [" ".join(seen(token).split()) for token in inline]
        assert expected in told or (expected == "" and set(told) <= {"", "a", "b", "end"})
        assert len(inline) <= (4 if written.startswith("|") else 1)
        assert not any(token.type in ("html_block", "code_block", "fence", "hr") for token in tokens)


@pytest.mark.parametrize(
    ("text", "cell"),
    [("", "*nothing*"), ("  ", "␣␣"), (" a ", "␣a␣"), ("\n    ", "↵␣␣␣␣"), ("a\u2028b\x07", "a b\ufffd")],
)
def test_ends_and_emptiness_of_a_text_are_visible(text: str, cell: str) -> None:
    assert shown(text) == cell
