"""What CI systems are told: JUnit XML, GitHub's files and annotations."""

import io
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_markdown import BASELINE, COMPARISON, OPEN, SIZE
from test_report import FASTER, PASSED, RUN, SOURCE, STEP

from optimizer.ci import Case, Outputs, annotation, cases, junit
from optimizer.cli import _explain
from optimizer.errors import CannotRun, CommandError, Mistake, RecipeError
from optimizer.gate import Outcome
from optimizer.github import command, error_commands
from optimizer.markdown import report
from optimizer.record import Against, Judged, Run

FAILED = replace(PASSED, outcome="fail", reason="shown to be worse", lower=0.03, upper=0.05)
BROKEN = replace(FAILED, candidate=math.nan, difference=math.nan, lower=math.nan, upper=math.nan)
SUITE = ("errors", "failures", "hostname", "id", "name", "package", "skipped", "tests", "time", "timestamp")
"""Attributes of a suite that the stricter schemas of the format ask for."""


def run(*verdicts: object, **changes: object) -> Run:
    gates = tuple(Judged("perplexity", verdict) for verdict in verdicts)  # type: ignore[arg-type]
    return replace(RUN, steps=(SOURCE, replace(STEP, gates=gates)), **changes)  # type: ignore[arg-type]


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


# ---- JUnit


def test_every_gate_that_decides_is_a_case() -> None:
    root = ElementTree.fromstring(junit(cases(run(PASSED, FAILED, size=SIZE)), 21.14))
    assert [case.get("name") for case in root.iter("testcase")] == ["perplexity", "perplexity", "size"]
    assert {case.get("classname") for case in root.iter("testcase")} == {"r"}


@pytest.mark.parametrize(
    ("verdict", "chosen", "child"),
    [
        (PASSED, None, ""),
        (FAILED, None, "failure"),
        (BROKEN, "pass", "failure"),
        (OPEN, None, "skipped"),
        (OPEN, "pass", "skipped"),
        (OPEN, "fail", "failure"),
    ],
)
def test_undecided_gate_is_skipped_or_fails_as_chosen(verdict: object, chosen: object, child: str) -> None:
    root = ElementTree.fromstring(junit(cases(run(verdict)), 1.0, chosen))  # type: ignore[arg-type]
    (case,) = root.iter("testcase")
    assert [element.tag for element in case] == [child] * bool(child)
    suite = root.find("testsuite")
    assert suite is not None
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {
        "tests": "1",
        "failures": str(int(child == "failure")),
        "errors": "0",
        "skipped": str(int(child == "skipped")),
    }


def test_case_tells_finding_reason_and_what_would_decide() -> None:
    (told,) = ElementTree.fromstring(junit(cases(run(OPEN)), 1.0)).iter("skipped")
    assert told.get("message") == (
        "perplexity 10.953 -> 11.049, +0.88 % [+0.52, +1.12] of 2.00 %: INCONCLUSIVE; "
        "not decided by 60 items; about 600 items would decide"
    )


def test_suite_has_the_attributes_that_schemas_of_the_format_ask_for() -> None:
    root = ElementTree.fromstring(junit(cases(COMPARISON), 3.0))
    assert root.tag == "testsuites"
    (suite,) = root
    assert sorted(suite.attrib) == sorted(SUITE)
    assert (suite.get("time"), suite.get("name")) == ("3.000", "new against the baseline")
    assert [element.tag for element in suite] == ["properties", "testcase", "testcase", "system-out", "system-err"]
    assert [sorted(case.attrib) for case in suite.iter("testcase")] == [["classname", "name", "time"]] * 2


def test_comparison_has_a_suite_for_each_artifact_it_is_judged_against() -> None:
    pinned = Against(replace(BASELINE, role="pinned", folder="original"), False, (Judged("p", FAILED),), None, ())
    root = ElementTree.fromstring(junit(cases(replace(COMPARISON, against=(*COMPARISON.against, pinned))), 1.0))
    assert [(suite.get("id"), suite.get("name")) for suite in root] == [
        ("0", "new against the baseline"),
        ("1", "new against the pinned"),
    ]


def test_speed_gate_is_a_case() -> None:
    slow = replace(FASTER, outcome="inconclusive", reason="not decided by 16 restarts")
    found = cases(run(PASSED, speeds=(FASTER, replace(slow, is_ratio=False))))
    assert [(case.name, case.outcome) for case in found[1:]] == [
        ("decode_tokens_per_s ratio", "pass"),
        ("decode_tokens_per_s", "inconclusive"),
    ]
    assert found[2].sentence.endswith("INCONCLUSIVE; not decided by 16 restarts")


def test_same_artifact_is_a_case_that_passed() -> None:
    same = replace(COMPARISON, against=(Against(BASELINE, True, (), SIZE, ()),))
    assert [(case.name, case.outcome) for case in cases(same)] == [("identity", "pass"), ("size", "pass")]


@given(st.text(), st.text())
def test_any_name_and_text_is_well_formed(name: str, text: str) -> None:
    for outcome in ("pass", "fail", "inconclusive"):
        outcome: Outcome
        ElementTree.fromstring(junit([Case(name, text, outcome, text, name)], 0.0))


# ---- GitHub


def test_github_gets_summary_and_outputs_after_what_is_there(github: Path) -> None:
    (github / "GITHUB_OUTPUT").write_text("earlier=1\n")
    (github / "GITHUB_STEP_SUMMARY").write_text("before\n")
    assert Outputs().publish(run(PASSED), io.StringIO()) == 0
    assert (github / "GITHUB_OUTPUT").read_text() == f"earlier=1\nverdict=pass\ndigest={'ab' * 32}\n"
    assert (github / "GITHUB_STEP_SUMMARY").read_text() == "before\n" + report(run(PASSED))


@pytest.mark.parametrize(
    ("verdict", "chosen", "word", "code"),
    [(FAILED, None, "error", 1), (OPEN, None, "warning", 3), (OPEN, "pass", "warning", 0), (OPEN, "fail", "error", 1)],
)
def test_gate_that_did_not_pass_is_annotated(
    github: Path, verdict: object, chosen: object, word: str, code: int
) -> None:
    out = io.StringIO()
    assert Outputs(on_inconclusive=chosen).publish(run(verdict), out) == code  # type: ignore[arg-type]
    (line,) = out.getvalue().splitlines()
    assert line.startswith(f"::{word} title=r%3A perplexity::perplexity 10.953 -> 11.049, +0.88 %25 [")
    output = (github / "GITHUB_OUTPUT").read_text()
    assert output.startswith("verdict=fail" if verdict is FAILED else "verdict=inconclusive")


def test_gate_that_passed_is_annotated_only_for_a_warning(github: Path) -> None:
    assert annotation(cases(run(PASSED))[0], "pass") == ""
    flagged = replace(PASSED, flags=("few groups",), reason="shown; 30 effective documents (100 advised)")
    assert annotation(cases(run(flagged))[0], "pass").startswith("::warning title=")


def test_elsewhere_nothing_is_annotated() -> None:
    out = io.StringIO()
    assert Outputs().publish(run(FAILED), out) == 1
    assert out.getvalue() == ""


@given(st.text())
def test_annotation_is_one_line_whose_parts_can_be_told_apart(text: str) -> None:
    line = command("error", text, title=text)
    head, _, rest = line.removeprefix("::error title=").partition("::")
    assert len(line.split("\n")) == len(line.split("\r")) == 1
    assert not set(head) & {":", ","}
    for found in (head, rest):
        for code, sign in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            found = found.replace(code, sign)
        assert found == text


def test_mistakes_of_a_recipe_are_annotated_at_their_lines() -> None:
    error = RecipeError([Mistake("r.yaml", 3, 4, "wrong"), Mistake("--set x", 0, 0, "worse")])
    assert list(error_commands(str(error), error)) == [
        "::error file=r.yaml,line=3,col=4::wrong",
        "::error title=optimize::--set x: worse",
    ]


def test_what_stops_a_run_is_annotated(github: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _explain(CannotRun("no room: 9 %")) == 4
    assert capsys.readouterr() == ("::error title=optimize::no room: 9 %25\n", "no room: 9 %\n")


# ---- files


def test_files_hold_junit_and_report(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "j.xml", tmp_path / "r.md")
    outputs.prepare()
    outputs.publish(run(PASSED), io.StringIO())
    assert ElementTree.parse(tmp_path / "j.xml").getroot().tag == "testsuites"
    assert (tmp_path / "r.md").read_text() == report(run(PASSED))


def test_what_an_earlier_run_left_is_gone_when_this_one_fails(tmp_path: Path) -> None:
    (tmp_path / "j.xml").write_text("old")
    Outputs(tmp_path / "j.xml").prepare()
    assert not (tmp_path / "j.xml").exists()


@pytest.mark.parametrize("place", ["gone/j.xml", "."])
def test_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, place: str) -> None:
    with pytest.raises(CommandError, match=r"^--junit: .* cannot be written, "):
        Outputs(tmp_path / place).prepare()


def test_place_that_cannot_be_written_in_the_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "gone" / "output"))
    with pytest.raises(CannotRun, match="gone/output: cannot be written, no such file or directory"):
        Outputs().publish(run(PASSED), io.StringIO())
