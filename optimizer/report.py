"""What a person sees while a recipe runs: one line per pass, and progress with an estimate in between."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from optimizer.run import Judged, Run, SizeVerdict, Step
from passes.base import Progress, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Style = Literal["live", "plain", "quiet"]
SHOW_AFTER_S = 1.0


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
        """Yield what a pass reports to; the bar shows once the work has lasted a second."""
        if self.style != "live":
            yield no_progress
            return
        with _bars() as bars:
            task = bars.add_task(work, total=None, visible=False)

            def report(done: int, total: int, what: str) -> None:
                visible = (bars.tasks[0].elapsed or 0) > SHOW_AFTER_S
                bars.update(task, completed=done, total=total, visible=visible, description=f"{work} ({what})")

            yield report

    def step(self, number: int, total: int, step: Step, before: Step | None) -> None:
        """Say what a pass did: changes, scores with interval and verdict, size, seconds."""
        self.line(step_line(number, total, step, before))
        if step.note and not step.is_skipped:
            self.line(f"      {step.note}")

    def end(self, run: Run) -> None:
        """Say how the run ended."""
        for line in end_lines(run):
            self.line(line)


def step_line(number: int, total: int, step: Step, before: Step | None) -> str:
    """Return the line of one pass, or of the source when `number` is 0."""
    head = f"{number}/{total} {step.name:<14}"
    if step.is_skipped:
        return f"{head} skipped: {step.note}"
    parts = [", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in (step.changes or {}).items() if count)]
    judged = {(gate.evaluation, gate.verdict.metric) for gate in step.gates}
    parts += [score_text(gate) for gate in step.gates]
    for name, score in step.scores.items():
        evaluation, _, metric = name.partition("/")
        if (evaluation, metric) not in judged and (before is None or metric not in ("flips", "kl")):
            was = before.scores.get(name) if before else None
            parts.append(f"{metric} {number_text(metric, score)}" if was is None else _change(metric, was, score))
    parts.append(f"{step.bytes / 1e6:.2f} MB")
    parts.append("stored" if step.is_stored else f"{step.pass_s:.1f} s")
    return f"{head} " + " | ".join(part for part in parts if part)


def score_text(judged: Judged) -> str:
    """Return one gate's finding: score before and after, loss with its upper bound, budget, verdict."""
    verdict = judged.verdict
    metric = verdict.metric
    scores = f"{metric} {number_text(metric, verdict.candidate)}"
    if metric not in ("flips", "kl"):
        scores = _change(metric, verdict.source, verdict.candidate)
    loss = "" if metric in ("flips", "kl") else f"{loss_text(metric, verdict.difference)} "
    interval = f"[{loss_text(metric, verdict.lower)}, {loss_text(metric, verdict.upper)}]"
    return f"{scores} {loss}{interval} of {loss_text(metric, verdict.limit)}: {verdict.outcome.upper()}"


def number_text(metric: str, value: float) -> str:
    """Return a score as a person reads it."""
    if metric in ("accuracy", "f1", "flips"):
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if metric == "kl" else f"{value:.3f}"


def loss_text(metric: str, value: float) -> str:
    """Return a loss in its budget's unit."""
    if metric in ("accuracy", "f1"):
        return f"{100 * value:+.2f} pt"
    if metric == "perplexity":
        return f"{100 * value:+.2f} %"
    return f"{100 * value:.2f} %" if metric == "flips" else f"{value:.4f}"


def size_text(size: SizeVerdict) -> str:
    """Return the finding of the size gate."""
    return (
        f"size {size.bytes / 1e6:.2f} MB, {size.ratio:.3f} of the source's {size.source_bytes / 1e6:.2f} MB, "
        f"of at most {size.max_ratio:g}: {size.outcome.upper()}"
    )


def end_lines(run: Run) -> Iterator[str]:
    """Yield the closing lines: undecided and failed gates with their reason, then what became of the artifact."""
    last = run.steps[-1]
    if run.size:
        yield size_text(run.size)
    for judged in last.gates:
        verdict = judged.verdict
        if verdict.outcome != "pass" or verdict.flags:
            more = f"; about {verdict.items_needed:,} items would decide" if verdict.items_needed else ""
            yield f"{judged.evaluation}: {verdict.metric}: {verdict.outcome}: {verdict.reason}{more}"
    if run.artifact:
        yield f"{run.artifact}  {run.digest}"
    elif run.stopped_after:
        yield f"stopped after {run.stopped_after}; no artifact"
    else:
        yield f"no artifact: {'a gate failed' if run.exit_code == 1 else 'a gate is undecided'} (--keep keeps one)"
    yield f"{run.seconds:.1f} s"


def _change(metric: str, before: float, after: float) -> str:
    return f"{metric} {number_text(metric, before)} -> {number_text(metric, after)}"


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
