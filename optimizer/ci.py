"""What a run or a comparison tells CI systems: JUnit XML, and GitHub's step summary, outputs and annotations."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO
from xml.etree import ElementTree

from optimizer.errors import CannotRun, CommandError, ExitCode
from optimizer.github import command, is_github
from optimizer.markdown import report
from optimizer.record import EXIT_CODES, Comparison, Judged, Outcome, Run, SizeVerdict
from optimizer.report import label, one_line, remark_text, score_text, size_text, speed_text
from optimizer.speed import SpeedVerdict

OnInconclusive = Literal["fail", "pass"]


@dataclass(frozen=True)
class Case:
    """One gate.

    Attributes:
        suite: what is judged against what.
        name: of the gate; unique in its suite.
        text: the finding: scores, loss, bounds, budget, verdict.
        remark: why, what to be wary of, what would decide; often empty.
    """

    suite: str
    name: str
    outcome: Outcome
    text: str
    remark: str = ""

    @property
    def sentence(self) -> str:
        """Return all there is to say in one line."""
        return f"{self.text}; {self.remark}" if self.remark else self.text


@dataclass(frozen=True)
class Outputs:
    """Where findings go besides the screen.

    Attributes:
        junit: file for JUnit XML.
        report: file for the Markdown report.
        on_inconclusive: what an undecided gate counts as; None for neither.
    """

    junit: Path | None = None
    report: Path | None = None
    on_inconclusive: OnInconclusive | None = None

    def prepare(self) -> None:
        """Remove what an earlier run left, so that nobody reads it as this one's.

        Raises:
            CommandError: a file cannot be written.
        """
        for option, path in (("--junit", self.junit), ("--report", self.report)):
            if path is None:
                continue
            try:
                path.unlink(missing_ok=True)
                path.touch()
                path.unlink()
            except OSError as error:
                raise CommandError(f"{option}: {path} cannot be written, {_reason(error)}") from None

    def publish(self, record: Run | Comparison, annotations: TextIO) -> ExitCode:
        """Write the files, tell GitHub where that is who runs this, and return the exit code.

        Args:
            record: what is told.
            annotations: where GitHub's workflow commands go.

        Raises:
            CannotRun: a file cannot be written.
        """
        found = cases(record)
        if self.junit:
            _write(self.junit, junit(found, record.seconds, self.on_inconclusive), "w")
        if self.report:
            _write(self.report, report(record), "w")
        _tell_github(record)
        if is_github():
            for line in filter(None, (annotation(case, self._counted(case.outcome)) for case in found)):
                print(line, file=annotations, flush=True)
        return EXIT_CODES[self._counted(record.outcome)]

    def _counted(self, outcome: Outcome) -> Outcome:
        return self.on_inconclusive if outcome == "inconclusive" and self.on_inconclusive else outcome


def cases(record: Run | Comparison) -> list[Case]:
    """Return the gates that decide the exit code: those on the last model of a run, or on the candidate."""
    if isinstance(record, Run):
        return list(_cases(record.name, record.verdicts, record.size, record.speeds, "source"))
    found = []
    for each in record.against:
        suite = f"{record.candidate.folder} against the {each.reference.role}"
        if each.is_same:
            found.append(Case(suite, "identity", "pass", "the same artifact, byte for byte: no answer can differ"))
        found += _cases(suite, each.gates, each.size, each.speeds, each.reference.role)
    return found


def _cases(
    suite: str, gates: Sequence[Judged], size: SizeVerdict | None, speeds: Sequence[SpeedVerdict], of: str
) -> Iterator[Case]:
    for judged in gates:
        yield Case(suite, label(judged), judged.verdict.outcome, score_text(judged), remark_text(judged))
    if size:
        yield Case(suite, "size", size.outcome, size_text(size, of))
    for speed in speeds:
        name = f"{speed.metric} ratio" if speed.is_ratio else speed.metric
        yield Case(suite, name, speed.outcome, speed_text(speed), "" if speed.outcome == "pass" else speed.reason)


# ---- JUnit


def junit(found: Sequence[Case], seconds: float, on_inconclusive: OnInconclusive | None = None) -> str:
    """Return JUnit XML: a suite for each thing that is judged against another, a case for each gate.

    A gate that failed is a failure; an undecided one is skipped, or a failure where that is what it counts as.
    """
    suites: dict[str, list[Case]] = {}
    for case in found:
        suites.setdefault(case.suite, []).append(case)
    root = ElementTree.Element("testsuites")
    for number, (name, inside) in enumerate(suites.items()):
        root.append(_suite(number, name, inside, seconds if number == 0 else 0.0, on_inconclusive))
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _suite(
    number: int, name: str, inside: Sequence[Case], seconds: float, on_inconclusive: OnInconclusive | None
) -> ElementTree.Element:
    """Return a suite with all that the schemas of the format ask for: Ant's, and those of Jenkins."""
    suite = ElementTree.Element("testsuite")
    ElementTree.SubElement(suite, "properties")
    for case in inside:
        element = ElementTree.SubElement(
            suite, "testcase", classname=one_line(name), name=one_line(case.name), time="0"
        )
        sentence = one_line(case.sentence)
        if case.outcome == "fail" or (case.outcome == "inconclusive" and on_inconclusive == "fail"):
            ElementTree.SubElement(element, "failure", type=case.outcome, message=sentence).text = sentence
        elif case.outcome == "inconclusive":
            ElementTree.SubElement(element, "skipped", message=sentence)
    ElementTree.SubElement(suite, "system-out").text = "\n".join(one_line(case.sentence) for case in inside)
    ElementTree.SubElement(suite, "system-err")
    counts = {kind: str(len(suite.findall(f"testcase/{kind}"))) for kind in ("failure", "skipped")}
    suite.attrib |= {
        "id": str(number),
        "package": "optimize",
        "name": one_line(name),
        "hostname": platform.node() or "localhost",
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "tests": str(len(inside)),
        "failures": counts["failure"],
        "errors": "0",
        "skipped": counts["skipped"],
        "time": f"{seconds:.3f}",
    }
    return suite


# ---- GitHub


def annotation(case: Case, counted: Outcome) -> str:
    """Return the workflow command that shows a gate beside the change; empty for one that passed without a remark."""
    if counted == "pass" and case.outcome != "inconclusive" and not case.remark:
        return ""
    return command("error" if counted == "fail" else "warning", case.sentence, title=f"{case.suite}: {case.name}")


def _tell_github(record: Run | Comparison) -> None:
    """Append to the files that GitHub names."""
    digest = record.digest if isinstance(record, Run) else record.candidate.digest
    outputs = f"verdict={record.outcome}\ndigest={digest or ''}\n"
    for variable, text in (("GITHUB_STEP_SUMMARY", report(record)), ("GITHUB_OUTPUT", outputs)):
        if named := os.environ.get(variable):
            _write(Path(named), text, "a")


def _write(path: Path, text: str, mode: Literal["w", "a"]) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CannotRun(f"{path}: cannot be written, {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
