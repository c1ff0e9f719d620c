"""What the records of a load come to: latencies, rates, goodput, cost, share of the memory's bandwidth.

Source of the names: vLLM's `vllm bench serve`. We differ: the latency of an open loop counts from the planned arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from runtime.errors import LoadError
from runtime.traffic.measure import Measured, Record, Work

LIMITS: Final = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Quantiles:
    """Of n values: p50, p90 and p99 (between two values in proportion), mean and largest."""

    p50: float
    p90: float
    p99: float
    mean: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles | None:
        """Summarize values; None where there are none."""
        array = np.array(list(values), np.float64)
        if not array.size:
            return None
        p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
        return cls(p50, p90, p99, float(array.mean()), float(array.max()), array.size)


@dataclass(frozen=True)
class Cost:
    """Dollars per million tokens; None where there are no tokens of that kind.

    Attributes:
        input: of prompts.
        output: of answers.
    """

    input: float | None
    output: float | None


@dataclass(frozen=True)
class Summary:
    """The numbers of a load. Failed requests count as errors and in nothing else.

    Attributes:
        requests: that ended, the failed ones too.
        errors: that failed.
        short: answers with fewer tokens than asked.
        duration_s: from the beginning of the load to the end of its last request.
        input_tokens: of all prompts; None where the target did not say.
        output_tokens: of all answers.
        ttft_ms: from the planned moment to the first piece.
        tpot_ms: (E2E - TTFT) / (n - 1) of each answer of n > 1 tokens.
        itl_ms: between one piece and the next, of all answers together.
        e2e_ms: from the planned moment to the last piece.
        requests_per_s: answered, over `duration_s`.
        output_tokens_per_s: over `duration_s`.
        total_tokens_per_s: input and output.
        goodput_per_s: answers per second that kept every limit; None without limits.
        busy_s: in which the target computed; None where it did not say.
        input_share: of the cost, that prompts take.
        reserved: cost of the whole duration; None without a price.
        busy: cost of `busy_s`.
        read_bytes_per_s: weights and cache that decode steps read, over their seconds; None where it is not known.
    """

    requests: int
    errors: int
    short: int
    duration_s: float
    input_tokens: int | None
    output_tokens: int
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    itl_ms: Quantiles | None
    e2e_ms: Quantiles | None
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    goodput_per_s: float | None
    busy_s: float | None
    input_share: float | None
    reserved: Cost | None
    busy: Cost | None
    read_bytes_per_s: float | None


def read_limits(texts: Sequence[str]) -> dict[str, float]:
    """Read limits such as `ttft_ms:200`, one or several in a text, commas or spaces between.

    Raises:
        LoadError: another name, or no number above 0.
    """
    limits = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, value = text.partition(":")
        number = _number(value)
        if name not in LIMITS or number is None or not 0 < number < float("inf"):
            raise LoadError(
                f"--goodput: got {text!r}, expected one of {', '.join(LIMITS)} and milliseconds: ttft_ms:200"
            )
        limits[name] = number
    return limits


def summarize(
    measured: Measured, limits: Mapping[str, float] | None = None, dollars_per_hour: float | None = None
) -> Summary:
    """Return the numbers of a load, whole or interrupted.

    Args:
        measured: its records and what the target did.
        limits: milliseconds that a good answer keeps, by name in `LIMITS`.
        dollars_per_hour: what the machine costs.
    """
    records, duration, work = measured.records, measured.duration_s, measured.work
    answered = [record for record in records if record.error is None]
    spoken = [record for record in answered if record.arrivals_s]
    inputs = [record.input_tokens for record in answered]
    input_tokens = sum(each for each in inputs if each is not None) if None not in inputs else None
    output_tokens = sum(record.output_tokens for record in answered)
    share = input_share(spoken, work)
    costs = [
        _cost(dollars_per_hour, seconds, share, input_tokens, output_tokens)
        for seconds in (duration, work.busy_s if work else None)
    ]
    good = sum(keeps(record, limits) for record in answered) if limits else 0
    return Summary(
        requests=len(records),
        errors=len(records) - len(answered),
        short=sum(record.output_tokens < record.asked_tokens for record in answered),
        duration_s=duration,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ttft_ms=Quantiles.of(1e3 * record.ttft_s for record in spoken),
        tpot_ms=Quantiles.of(1e3 * record.tpot_s for record in spoken if record.tpot_s is not None),
        itl_ms=Quantiles.of(1e3 * gap for record in spoken for gap in record.itl_s),
        e2e_ms=Quantiles.of(1e3 * record.e2e_s for record in spoken),
        requests_per_s=_rate(len(answered), duration),
        output_tokens_per_s=_rate(output_tokens, duration),
        total_tokens_per_s=None if input_tokens is None else _rate(input_tokens + output_tokens, duration),
        goodput_per_s=_rate(good, duration) if limits else None,
        busy_s=work.busy_s if work else None,
        input_share=share,
        reserved=costs[0],
        busy=costs[1],
        read_bytes_per_s=_read_rate(work),
    )


def keeps(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether an answer kept every limit; one without a second token has no TPOT and keeps that."""
    if record.error is not None or not record.arrivals_s:
        return False
    seconds = {"ttft_ms": record.ttft_s, "tpot_ms": record.tpot_s or 0.0, "e2e_ms": record.e2e_s}
    return all(1e3 * seconds[name] <= limit for name, limit in limits.items())


def input_share(spoken: Sequence[Record], work: Work | None) -> float | None:
    """Return the share of the cost that prompts take.

    By what the target says of its seconds, prefill / (prefill + decode); else by what its clients saw of them,
    sum of TTFT / sum of E2E, which counts waiting as a prompt's.
    """
    if work is not None and work.prefill_s is not None and work.decode_s is not None:
        parts = work.prefill_s, work.prefill_s + work.decode_s
    else:
        parts = sum(record.ttft_s for record in spoken), sum(record.e2e_s for record in spoken)
    return parts[0] / parts[1] if parts[1] > 0 else None


def _cost(
    dollars_per_hour: float | None, seconds: float | None, share: float | None, inputs: int | None, outputs: int
) -> Cost | None:
    if dollars_per_hour is None or seconds is None or share is None:
        return None
    dollars = dollars_per_hour * seconds / 3600
    return Cost(
        input=1e6 * dollars * share / inputs if inputs else None,
        output=1e6 * dollars * (1 - share) / outputs if outputs else None,
    )


def _read_rate(work: Work | None) -> float | None:
    if work is None or work.decode_bytes is None or not work.decode_s:
        return None
    return work.decode_bytes / work.decode_s


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
