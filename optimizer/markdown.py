"""The report of a run or of a comparison, in Markdown: an artifact's `evidence/report.md`, and a CI step's summary.

It is made of the record alone, so one record gives one report. Whatever comes from data or from a recipe is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from optimizer.record import Compared, Comparison, Flips, Judged, Rejected, Run, SizeVerdict, Step
from optimizer.report import (
    AGAINST_SOURCE,
    answers_text,
    label,
    loss_texts,
    number_text,
    one_line,
    openings_text,
    remark_text,
    score_name,
    seconds_text,
    size_text,
    speed_text,
    timing_text,
)
from optimizer.speed import SpeedVerdict, Timing

_SPECIAL = re.compile(r"([\\`*\[\]<>|~&$@#]|(?<![^\W_])_|_(?![^\W_])|:(?=[\w/+-]))")
"""What begins markup, a link, a formula, an emoji or a mention; an underscore within a word does not."""
_EFFECTS = {"worse": "right → wrong", "better": "wrong → right", "other": "other"}
_NOTHING = "–"
_NO_GATE = "No gate judged any answer."


def report(record: Run | Comparison) -> str:
    """Return the whole report."""
    blocks = _run_blocks(record) if isinstance(record, Run) else _comparison_blocks(record)
    return "\n\n".join(blocks) + "\n"


# ---- of a run


def _run_blocks(run: Run) -> Iterator[str]:
    source, last = run.steps[0], run.steps[-1]
    yield f"# {escaped(run.name)}: {run.outcome.upper()}"
    if run.digest:
        yield f"digest `{run.digest}`"
    if run.stopped_after:
        yield f"Stopped after {escaped(run.stopped_after)}, as asked: no artifact was made."
    yield "## Verdicts"
    yield from _verdicts(run.verdicts, run.size, "source", "artifact")
    yield from _speeds(run.speeds, run.timing)
    yield from _list(map(escaped, map(openings_text, run.openings)))
    yield from _needs(run.verdicts, source.score_s + last.score_s)
    yield "## Chain"
    yield table(("", "pass", "what changed", "MB", "time"), _chain_rows(run.steps))
    yield from _list(f"{escaped(step.name)}: {escaped(step.note)}" for step in run.steps if step.note)
    yield from _planned(run.steps)
    yield from _gave_way(run.rejected)
    yield from _waterfall(run.steps)
    yield from _flips(run.flips, "source", "artifact")


def _chain_rows(steps: Sequence[Step]) -> Iterator[tuple[str, ...]]:
    for number, step in enumerate(steps):
        counts = ((count, what.replace("_", " ")) for what, count in (step.changes or {}).items() if count)
        changes = "skipped" if step.is_skipped else ", ".join(f"{count:,} {what}" for count, what in counts)
        yield str(number), escaped(step.name), escaped(changes), f"{step.bytes / 1e6:.2f}", seconds_text(step)


def _planned(steps: Sequence[Step]) -> Iterator[str]:
    """Yield what was planned beside what it came to."""
    rows = [
        (
            escaped(step.name),
            f"{step.planned.bytes / 1e6:.2f}",
            f"{step.bytes / 1e6:.2f}",
            f"{step.planned.peak_bytes / 1e6:,.0f}",
            f"{step.peak_bytes / 1e6:,.0f}" if step.peak_bytes else _NOTHING,
            f"{step.planned.pass_s + step.planned.score_s:.1f}",
            f"{step.pass_s + step.score_s:.1f}",
        )
        for step in steps
        if step.planned
    ]
    if rows:
        yield "## Plan and outcome"
        heads = ("pass", "planned MB", "MB", "planned peak MB", "peak MB", "planned s", "s")
        yield table(heads, rows)


def _gave_way(rejected: Sequence[Rejected]) -> Iterator[str]:
    """Yield what was tried before the chain that was kept."""
    if rejected:
        yield "## What gave way"
        rows = ((escaped(each.step.name), str(each.step.rung), escaped(each.reason)) for each in rejected)
        yield table(("pass", "rung", "reason"), rows)


def _waterfall(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a table for each gate: what every pass left of the score, and what it added to the loss."""
    gated: dict[tuple[str, str], list[tuple[Step, Judged]]] = {}
    for step in steps:
        for judged in step.gates:
            gated.setdefault((judged.evaluation, judged.judges), []).append((step, judged))
    if gated:
        yield "## Loss, pass by pass"
        yield "The loss counts against the source; *own share* is what the pass adds to it."
        if any(judged.part for found in gated.values() for _, judged in found):
            yield "*search* items choose between rungs: what they show of the chosen one flatters it and is no result."
    for found in gated.values():
        yield f"**{escaped(label(found[0][1]))}**"
        heads = ("pass", "score", "loss", "bounds", "own share", "of the budget", "verdict")
        yield table(heads, _waterfall_rows(found))
    others = [name for name in steps[-1].scores if tuple(name.split("/", 1)) not in gated]
    if others:
        yield "## Scores that no gate judges"
        rows = ((escaped(step.name), *(_score(step, name) for name in others)) for step in steps)
        yield table(("pass", *(escaped(score_name(name)) for name in others)), rows)


def _waterfall_rows(found: Sequence[tuple[Step, Judged]]) -> Iterator[tuple[str, ...]]:
    before = 0.0
    for step, judged in found:
        verdict = judged.verdict
        loss, bounds, _ = loss_texts(verdict)
        share, _, _ = loss_texts(replace(verdict, difference=verdict.difference - before))
        used = f"{100 * verdict.difference / verdict.limit:.0f} %" if verdict.limit > 0 else _NOTHING
        score = number_text(verdict.metric, verdict.candidate)
        yield escaped(step.name), score, loss, bounds, share, used, verdict.outcome.upper()
        before = verdict.difference


def _score(step: Step, name: str) -> str:
    return number_text(name.partition("/")[2], step.scores[name]) if name in step.scores else _NOTHING


# ---- of a comparison


def _comparison_blocks(compared: Comparison) -> Iterator[str]:
    candidate, references = compared.candidate, [each.reference for each in compared.against]
    yield f"# {escaped(candidate.folder)} against {escaped(references[0].folder)}: {compared.outcome.upper()}"
    yield table(("", "artifact", "digest", "MB", "answers"), map(_artifact_row, (*references, candidate)))
    yield f"Data, tasks and budgets: {escaped(compared.policy)}."
    yield from _list(map(escaped, compared.notes))
    for each in compared.against:
        yield f"## Against the {each.reference.role}"
        nothing = "The same artifact, byte for byte: no answer can differ." if each.is_same else _NO_GATE
        yield from _verdicts(each.gates, each.size, each.reference.role, "candidate", nothing)
        yield from _speeds(each.speeds, each.timing)
        yield from _needs(each.gates, each.reference.score_s + candidate.score_s)
        yield from _flips(each.flips, each.reference.role, "candidate")


def _artifact_row(side: Compared) -> tuple[str, ...]:
    return (side.role, escaped(side.folder), f"`{side.digest}`", f"{side.bytes / 1e6:.2f}", answers_text(side))


# ---- of both


def _verdicts(
    gates: Sequence[Judged], size: SizeVerdict | None, before: str, after: str, nothing: str = _NO_GATE
) -> Iterator[str]:
    """Yield the table of gates, what they remark, and the size."""
    if gates:
        heads = ("gate", before, after, "loss", "bounds", "budget", "items", "verdict")
        yield table(heads, map(_verdict_row, gates))
        yield f"Bounds are one-sided; a loss is *passed* at the level {_levels(gates)}."
        yield from _list(
            f"{escaped(label(judged))}: {escaped(remark)}" for judged in gates if (remark := remark_text(judged))
        )
    else:
        yield nothing
    if size:
        yield escaped(size_text(size, before))


def _speeds(speeds: Sequence[SpeedVerdict], timing: Timing | None) -> Iterator[str]:
    yield from _list(escaped(f"{speed_text(each)}; {each.reason}") for each in speeds)
    if timing:
        yield escaped(f"{timing_text(timing)}; {timing.processor}")


def _levels(gates: Sequence[Judged]) -> str:
    return " or ".join(f"{alpha:g}" for alpha in sorted({judged.verdict.alpha for judged in gates}))


def _verdict_row(judged: Judged) -> tuple[str, ...]:
    verdict = judged.verdict
    is_distance = verdict.metric in AGAINST_SOURCE
    before = _NOTHING if is_distance else number_text(verdict.metric, verdict.source)
    after = _NOTHING if is_distance else number_text(verdict.metric, verdict.candidate)
    loss, bounds, budget = loss_texts(verdict)
    outcome = f"**{verdict.outcome.upper()}**"
    return escaped(label(judged)), before, after, loss, bounds, budget, f"{verdict.n_items:,}", outcome


def _needs(gates: Sequence[Judged], seconds: float) -> Iterator[str]:
    """Yield what undecided gates need; `seconds` are those that scoring both models on all items took."""
    told = [_need(judged, seconds) for judged in gates if judged.verdict.items_needed]
    if told:
        yield "## What would decide"
        yield from _list(told)


def _need(judged: Judged, seconds: float) -> str:
    verdict = judged.verdict
    assert verdict.items_needed is not None
    more = max(0, verdict.items_needed - verdict.n_items)
    minutes = more / max(1, verdict.n_items) * seconds / 60
    time = f", about {max(0.1, minutes):,.1f} minutes more at this run's speed" if seconds else ""
    return f"{escaped(label(judged))}: about {verdict.items_needed:,} items in place of {verdict.n_items:,}{time}"


def _flips(flips: Sequence[Flips], before: str, after: str) -> Iterator[str]:
    found = [each for each in flips if each.changed]
    if found:
        yield "## Changed answers"
    for each in found:
        counts = f"{each.changed:,} of {each.answers:,} {each.unit} changed"
        yield f"**{escaped(each.evaluation)}**: {counts}{f'; {len(each.shown)} of them:' if each.shown else ''}"
        has_right = any(flip.expected is not None for flip in each.shown)
        heads = ("item", "input", before, after, *(("right", "effect") if has_right else ()))
        rows = (
            (
                str(flip.item),
                shown(flip.input),
                shown(flip.before),
                shown(flip.after),
                *((shown(flip.expected or ""), _EFFECTS[flip.effect]) if has_right else ()),
            )
            for flip in each.shown
        )
        if each.shown:
            yield table(heads, rows)


def _list(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines as one list, nothing where there are none."""
    told = "\n".join(f"- {line}" for line in lines)
    if told:
        yield told


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are escaped already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return text as one line that Markdown shows as it is."""
    marked = _SPECIAL.sub(r"\\\1", one_line(text)).replace("www.", "www\\.")
    return re.sub(r"^( *\d*)([-+.)])", r"\1\\\2", marked)  # what begins a list


def shown(text: str) -> str:
    """Return a text of the data for a cell: spaces at its ends are made visible, as is emptiness."""
    inner = text.strip(" ")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if not inner:
        return "␣" * len(text) or "*nothing*"
    return f"{'␣' * before}{escaped(inner)}{'␣' * after}"
