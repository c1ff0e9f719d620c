"""What a person sees while a recipe runs: one line per pass, and progress with an estimate in between.

On a terminal a line wider than it goes on below its own text; elsewhere it stays one line, for grep.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from optimizer.gate import Verdict
from optimizer.openings import Openings
from optimizer.record import Compared, Comparison, Judged, Rejected, Run, SizeVerdict, Step
from optimizer.speed import SpeedVerdict, Timing
from passes.base import Progress, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Style = Literal["live", "plain", "quiet"]
SHOW_AFTER_S = 1.0
AGAINST_SOURCE = ("flips", "kl")
_SEPARATOR = " | "
_SHARES = ("accuracy", "accuracy_norm", "f1", "flips", "cut", "truncated", "unparsable")
UNITS = {"perplexity": " %", "accuracy": " pt", "f1": " pt", "spearman": " pt", "flips": " %"}


class Reporter:
    """Writes lines to standard output and, on a terminal, a progress bar to standard error."""

    def __init__(self, style: Style) -> None:
        self.style = style

    def line(self, text: str) -> None:
        """Say one line."""
        if self.style != "quiet":
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Say one line that is no result, such as a stored entry that was damaged."""
        if self.style != "quiet":
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, work: str) -> Iterator[Progress]:
        """Yield what a pass reports to; the bar shows once the work has lasted a second, reports or not."""
        if self.style != "live":
            yield no_progress
            return
        with _bars() as bars:
            task = bars.add_task(work, total=None, what="")

            def report(done: int, total: int, what: str) -> None:
                bars.update(task, completed=done, total=total, what=what)

            yield report

    def step(self, number: int, total: int, step: Step, source: Step | None, width: int = 0) -> None:
        """Say what a pass did: scores with interval and verdict, changes, size, seconds."""
        for line in step_lines(number, total, step, source, width, self._columns()):
            self.line(line)

    def fallback(self, rejected: Rejected, number: int, total: int, words: str) -> None:
        """Say that a rung did not do, and which one follows."""
        self.line(f"    {rejected.step.name} gives way: {rejected.reason}; otherwise {number} of {total}: {words}")

    def end(self, run: Run) -> None:
        """Say how the run ended."""
        for line in end_lines(run):
            self.line(line)

    def _columns(self) -> int | None:
        """Return how wide a line may be, None for any width."""
        return shutil.get_terminal_size().columns if self.style == "live" or "COLUMNS" in os.environ else None


def step_lines(
    number: int, total: int, step: Step, source: Step | None, width: int = 0, columns: int | None = None
) -> list[str]:
    """Return what is said of one pass, or of the source when `number` is 0.

    Args:
        number: the pass's place in the chain, counted from 1.
        total: passes in the chain.
        step: the pass.
        source: the source's step; None for the source itself.
        width: of the longest name in the chain.
        columns: where lines are broken, between two findings; None for nowhere.
    """
    head = f"{number}/{total} {step.name:<{width}}  "
    if step.is_skipped:
        return [f"{head}skipped: {step.note}"]
    parts = [score_text(gate) for gate in step.gates]
    parts += _reported(step, source)
    parts += [f"{count:,} {what.replace('_', ' ')}" for what, count in (step.changes or {}).items() if count]
    parts += [f"{step.bytes / 1e6:.2f} MB", seconds_text(step)]
    note = [f"{' ' * len(head)}{step.note}"] if step.note else []
    return [*_broken(head, parts, columns), *note]


def seconds_text(step: Step) -> str:
    """Return how long pass and scoring took, or that they were found in the store."""
    is_source = step.changes is None
    made = [] if is_source else ["stored" if step.is_stored else f"{step.pass_s:.1f} s"]
    scored = [f"{step.score_s:.1f} s scoring"] if step.is_scored else []
    return " + ".join(made + scored) or ("stored" if step.scores else "not scored")


def answers_text(side: Compared) -> str:
    """Return where the answers of an artifact that is compared come from."""
    if side.answers == "scored":
        return f"{side.score_s:.1f} s scoring"
    return "from its evidence" if side.answers == "evidence" else side.answers


def comparison_lines(compared: Comparison) -> Iterator[str]:
    """Yield what is said of a comparison: the artifacts, each gate, what to be wary of, and how it ended."""
    for side in (*(each.reference for each in compared.against), compared.candidate):
        yield f"{side.role:<9}  {side.folder} | {side.digest[:12]} | {side.bytes / 1e6:.2f} MB | {answers_text(side)}"
    for each in compared.against:
        lines = ["the same artifact, byte for byte: no answer can differ"] if each.is_same else []
        lines += map(score_text, each.gates)
        lines += [size_text(each.size, each.reference.role)] if each.size else []
        lines += map(speed_text, each.speeds)
        lines += [timing_text(each.timing)] if each.timing else []
        head = f"against the {each.reference.role}"
        for number, line in enumerate(lines or ["no gate"]):
            yield f"{'' if number else head:<{len(head)}}  {line}"
        yield from _remarks(each.gates)
        yield from _speed_remarks(each.speeds)
    yield from compared.notes
    yield f"{compared.outcome.upper()}, {compared.seconds:.1f} s"


def score_text(judged: Judged) -> str:
    """Return one gate's finding: score before and after, loss with its bounds, budget, verdict."""
    verdict = judged.verdict
    loss, bounds, budget = loss_texts(verdict)
    after = f"{loss} {bounds} of {budget}: {verdict.outcome.upper()}"
    if verdict.metric in AGAINST_SOURCE:
        return f"{label(judged)} {after}"
    scores = [number_text(verdict.metric, value) for value in (verdict.source, verdict.candidate)]
    return f"{label(judged)} {scores[0]} -> {scores[1]}, {after}"


def loss_texts(verdict: Verdict) -> tuple[str, str, str]:
    """Return the loss, its bounds and the budget as a person reads them."""
    values = (verdict.difference, verdict.lower, verdict.upper)
    loss, lower, upper, limit = _losses(verdict.metric, verdict.limit, values)
    unit = UNITS.get(verdict.metric, "")
    return f"{loss}{unit}", f"[{lower}, {upper}]", f"{limit.removeprefix('+')}{unit}"


def remark_text(judged: Judged) -> str:
    """Return why a gate says what it says, what to be wary of, and what would decide; empty for a plain pass."""
    verdict = judged.verdict
    if verdict.outcome == "pass" and not verdict.flags:
        return ""
    more = f"; about {verdict.items_needed:,} items would decide" if verdict.items_needed else ""
    return f"{verdict.reason}{more}"


def label(judged: Judged) -> str:
    """Return what a gate judges: evaluation and metric, once where they are called the same."""
    names = [judged.part, judged.evaluation, judged.judges]
    return " ".join(dict.fromkeys(filter(None, names)))


def score_name(name: str) -> str:
    """Return what a score of a record is called: evaluation and metric, once where they are called the same."""
    evaluation, _, metric = name.partition("/")
    return metric if evaluation == metric else f"{evaluation} {metric}"


def number_text(metric: str, value: float) -> str:
    """Return a score as a person reads it."""
    if metric in _SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if metric in ("kl", "nats_per_byte", "spearman") else f"{value:.3f}"


def one_line(text: str) -> str:
    """Return text with line ends as an arrow, other white space as spaces, and what cannot be seen replaced."""
    line = text.replace("\r\n", "↵").replace("\n", "↵")
    return "".join(" " if each.isspace() else each if each.isprintable() else "\ufffd" for each in line)


def told_apart(values: Iterable[float], limit: float, least: int, spec: str = "") -> list[str]:
    """Return numbers and then their limit, with as many digits as show on which side of it each of them is.

    Args:
        values: what is compared with the limit.
        limit: the limit.
        least: digits after the point where that is enough.
        spec: what stands before the precision in a format, such as "+".
    """
    values = list(values)
    for digits in range(least, 10):
        texts = [f"{value:{spec}.{digits}f}" for value in (*values, limit)]
        if all(text != texts[-1] or value == limit for value, text in zip(values, texts, strict=False)):
            break
    return texts


def size_text(size: SizeVerdict, of: str = "source") -> str:
    """Return the finding of the size gate; `of` is what it is compared with."""
    share, limit = told_apart([100 * size.ratio], 100 * size.max_ratio, 1)
    return (
        f"size {size.bytes / 1e6:.2f} MB, {share} % of the {of}'s {size.source_bytes / 1e6:.2f} MB, "
        f"of at most {limit}: {size.outcome.upper()}"
    )


def speed_text(speed: SpeedVerdict) -> str:
    """Return the finding of a speed gate: before and after, ratio or number with its bounds, budget, verdict."""
    times = "x" if speed.is_ratio else ""
    digits = max(2 if speed.is_ratio else _digits(speed.estimate), -math.floor(math.log10(speed.limit)))
    estimate, lower, upper, limit = told_apart((speed.estimate, speed.lower, speed.upper), speed.limit, digits, ",")
    before = (
        "" if speed.reference is None else f"{_three_digits(speed.reference)} -> {_three_digits(speed.candidate)}, "
    )
    side = "least" if speed.metric.endswith("_per_s") else "most"
    return (
        f"{speed.metric} {before}{times}{estimate} [{lower}, {upper}] of at {side} {times}{limit}: "
        f"{speed.outcome.upper()}"
    )


def timing_text(timing: Timing) -> str:
    """Return under what conditions speed was measured."""
    generated = f", {timing.new_tokens} new" if timing.new_tokens else ""
    batch = f", batches of {timing.batch}" if timing.batch > 1 else ""
    return (
        f"speed: {timing.restarts} restarts of {timing.pairs} pairs, {timing.input_tokens} tokens{generated}{batch}, "
        f"{timing.threads} threads on {timing.cores} cores, load {timing.load_before:.1f} to {timing.load_after:.1f}, "
        f"{timing.seconds:.1f} s"
    )


def _three_digits(value: float) -> str:
    return f"{value:,.{_digits(value)}f}"


def _digits(value: float) -> int:
    """Return how many digits after the point give a positive number three in all."""
    return max(0, 2 - math.floor(math.log10(value)))


def end_lines(run: Run) -> Iterator[str]:
    """Yield the closing lines: size, gates with something to say, then what became of the artifact."""
    if run.size:
        yield size_text(run.size)
    for speed in run.speeds:
        yield speed_text(speed)
    if run.timing:
        yield timing_text(run.timing)
    for judged in run.certified:
        yield score_text(judged)
    yield from _remarks(run.verdicts)
    yield from _speed_remarks(run.speeds)
    yield from (openings_text(opening) for opening in run.openings if opening.count > 1)
    yield from outcome_text(run)
    if run.rejected:
        several = len(run.rejected) > 1
        yield f"{len(run.rejected)} rung{'s' * several} gave way{', the last' * several}: {run.rejected[-1].reason}"
    if run.artifact:
        yield f"artifact {run.artifact}"
        yield f"digest   {run.digest}"
    else:
        yield f"no artifact: {_why_none(run)}"
    yield f"{run.seconds:.1f} s"
    if run.earlier:
        yield f"careful: {run.earlier} is left from an earlier run, this one did not make it"


def outcome_text(run: Run) -> Iterator[str]:
    """Yield what was planned beside what it came to; nothing where a step was not planned."""
    planned = [step.planned for step in run.steps if step.planned]
    if len(planned) == len(run.steps):
        seconds = sum(each.pass_s + each.score_s for each in planned), sum(s.pass_s + s.score_s for s in run.steps)
        peaks = max(each.peak_bytes for each in planned) / 1e9, max(step.peak_bytes for step in run.steps) / 1e9
        memory = f", {peaks[0]:.2f} and {peaks[1]:.2f} GB of memory" if peaks[1] else ""
        yield (
            f"planned and made: {planned[-1].bytes / 1e6:.2f} and {run.steps[-1].bytes / 1e6:.2f} MB{memory}, "
            f"{seconds[0]:.0f} and {seconds[1]:.0f} s of passes and scoring"
        )


def openings_text(opening: Openings) -> str:
    """Return how often the items that judge were opened, and what that means for a pass."""
    if opening.count == 1:
        return f"{opening.evaluation}: no other model was judged by these items"
    return (
        f"{opening.evaluation}: {opening.count} different models were judged by these items since {opening.since}; "
        f"the chance that any of them passed wrongly is bounded by {opening.alpha:.0%} only"
    )


def _remarks(gates: Iterable[Judged]) -> Iterator[str]:
    for judged in gates:
        outcome = judged.verdict.outcome
        if remark := remark_text(judged):
            yield f"{label(judged)}: {'' if outcome == 'pass' else f'{outcome.upper()}, '}{remark}"


def _speed_remarks(speeds: Iterable[SpeedVerdict]) -> Iterator[str]:
    yield from (f"{each.metric}: {each.outcome.upper()}, {each.reason}" for each in speeds if each.outcome != "pass")


def _why_none(run: Run) -> str:
    if run.stopped_after:
        return f"stopped after {run.stopped_after}, as asked"
    finding = "a gate failed" if run.exit_code == 1 else "a gate is undecided"
    return f"{finding} (--keep makes one all the same)"


def _losses(metric: str, limit: float, values: Iterable[float]) -> list[str]:
    """Return losses and then the budget, in the budget's unit."""
    if metric not in UNITS:
        return told_apart(values, limit, 4)
    spec = "" if metric == "flips" else "+"
    return told_apart([100 * value for value in values], 100 * limit, 2, spec)


def _reported(step: Step, source: Step | None) -> Iterator[str]:
    """Yield the scores that no gate judges; what only compares with the source says nothing of the source.

    `nats_per_byte` is perplexity in another unit: a line need not say both, the record does.
    """
    judged = {(gate.evaluation, gate.judges) for gate in step.gates}
    for name, score in step.scores.items():
        evaluation, _, metric = name.partition("/")
        if (evaluation, metric) in judged or metric == "nats_per_byte" or (source is None and metric in AGAINST_SOURCE):
            continue
        before = None if source is None or metric in AGAINST_SOURCE else source.scores[name]
        change = "" if before is None else f"{number_text(metric, before)} -> "
        yield f"{score_name(name)} {change}{number_text(metric, score)}"


def _broken(head: str, parts: Iterable[str], columns: int | None) -> list[str]:
    """Return the parts in lines of at most `columns`, the later ones below the first one's text."""
    lines = [head]
    for part in parts:
        is_first = lines[-1] == head
        joined = lines[-1] + ("" if is_first else _SEPARATOR) + part
        if columns is None or is_first or len(joined) <= columns:
            lines[-1] = joined
        else:
            lines.append(" " * len(head) + part)
    return lines


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    class Late(RichProgress):
        """Shows nothing of work that is done within a second."""

        def get_renderables(self) -> Iterator[Any]:
            if any((task.elapsed or 0) > SHOW_AFTER_S for task in self.tasks):
                yield from super().get_renderables()

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Late(*columns, console=Console(stderr=True), transient=True)
