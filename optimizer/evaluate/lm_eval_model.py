"""A model of EleutherAI's lm-evaluation-harness that answers through a `Scorer`: imported only where lm-eval is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optimizer.errors import CannotRun
from optimizer.evaluate.choice import Continuation, LikelihoodTally, continuation_parts
from optimizer.evaluate.data import DataError
from optimizer.evaluate.generation import Prompt, Stop
from optimizer.evaluate.lm_eval import chat_text
from optimizer.evaluate.run import show
from optimizer.evaluate.scorers import Scorer
from optimizer.evaluate.text_reader import TextReader
from passes.base import Progress, no_progress

MAX_TOKENS = 256
"""Tokens of an answer where a task does not say, as in `HFLM.max_gen_toks`."""


class ScorerLM(LM):  # type: ignore[misc]
    """Answers lm-eval's requests as its own `HFLM` does: the same token ids, cut on the left in the same places.

    Attributes:
        broken: (task, document) of every request that the model answered with no number.
        cut: of every request whose beginning was cut.
    """

    def __init__(
        self, scorer: Scorer, reader: TextReader, context: int | None = None, progress: Progress = no_progress
    ) -> None:
        """Remember whom to ask.

        Args:
            scorer: the model.
            reader: how it reads text.
            context: most tokens of a request; the model's own limit if it is shorter.
            progress: told how many requests of one kind are done.
        """
        super().__init__()
        self.scorer, self.reader, self.progress = scorer, reader, progress
        self.longest = reader.longest(context)
        self.broken: set[tuple[str, int]] = set()
        self.cut: set[tuple[str, int]] = set()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return each continuation's sum of log-probabilities, and whether greedy decoding gives it."""
        pairs = self.reader.encode_pairs([request.args for request in requests])
        return self._likelihoods(pairs, requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return the sum of log-probabilities of each text, in windows of the model's whole context."""
        if self.longest is None or self.reader.prefix is None:
            raise CannotRun(
                "lm_eval: a whole text needs max_position_embeddings and a token to begin with; set `context`"
            )
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, ids in enumerate(self.reader.encode_whole([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(ids, self.reader.prefix, self.longest, context_len=1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = np.zeros(len(requests))
        found = self._likelihoods(pairs, [requests[owner] for owner in owners])
        np.add.at(sums, owners, [likelihood for likelihood, _ in found])
        return [float(value) for value in sums]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the greedy continuation of each context, up to what ends it."""
        texts: dict[int, str] = {}
        for indices, max_tokens, stop in self._by_settings(requests):
            items = [self._prompt(requests[index], max_tokens) for index in indices]
            for place, answer in self.scorer.generate(items, max_tokens, stop):
                texts[indices[place]] = stop.text(answer.ids)
                if not answer.is_finite:
                    self.broken.add(_document(requests[indices[place]]))
                self.progress(len(texts), len(requests), "answer")
        return [texts[index] for index in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's chat template writes it."""
        return chat_text(self.reader, chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Return what names the chat template in lm-eval's cache of requests, which is not used."""
        return "optimize"

    def _likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], requests: Sequence[Instance]
    ) -> list[tuple[float, bool]]:
        items = []
        for (context, targets), request in zip(pairs, requests, strict=True):
            if not targets or (self.longest is not None and len(targets) > self.longest):
                got = f"a continuation of {len(targets)} tokens"
                raise DataError(
                    f"lm_eval: {request.task_name}: document {request.doc_id}: got {got}, expected 1 to {self.longest}"
                )
            ids, is_cut = continuation_parts(context, targets, self.longest)
            if is_cut:
                self.cut.add(_document(request))
            items.append(Continuation(ids, "", targets=tuple(targets)))
        tally = LikelihoodTally(items)
        done, total = 0, sum(len(item.targets) for item in items)
        for count in show(items, self.scorer, [tally]):
            done += count
            self.progress(done, total, "token")
        self.broken |= {_document(requests[index]) for index in np.flatnonzero(np.isnan(tally.sums)).tolist()}
        return [(float(value), bool(same)) for value, same in zip(tally.sums, tally.is_greedy, strict=True)]

    def _by_settings(self, requests: Sequence[Instance]) -> list[tuple[list[int], int, Stop]]:
        """Group requests by how they are generated: (indices, most tokens, what ends an answer)."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings = dict(normalize_gen_kwargs(request.args[1], MAX_TOKENS))
            _require_greedy(request.task_name, settings)
            stops = (*handle_stop_sequences(settings.get("until"), eos=None), *self._ends())
            stops = tuple(text for text in stops if text)
            groups.setdefault((int(settings["max_gen_toks"]), stops), []).append(index)
        return [(indices, count, Stop(self.reader, stops)) for (count, stops), indices in groups.items()]

    def _ends(self) -> list[str]:
        """Return how the ids that end a text are written: lm-eval also ends an answer where a model spells one."""
        ids = sorted(self.reader.eos)
        return [self.reader.tokenizer.decode([number], skip_special_tokens=False) for number in ids]

    def _prompt(self, request: Instance, max_tokens: int) -> Prompt:
        room = None if self.longest is None else self.longest - max_tokens
        if room is not None and room < 1:
            got = f"answers of {max_tokens} tokens"
            raise CannotRun(
                f"lm_eval: {request.task_name}: got {got}, expected fewer than the context's {self.longest}"
            )
        (ids,) = self.reader.encode_whole([request.args[0]])
        if room is not None and len(ids) > room:
            self.cut.add(_document(request))
            ids = ids[-room:]
        return Prompt(tuple(ids), "")


def _document(request: Instance) -> tuple[str, int]:
    return request.task_name, request.doc_id


def _require_greedy(task: str, settings: Mapping[str, Any]) -> None:
    if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
        raise CannotRun(
            f"lm_eval: {task}: samples or searches its answers, expected greedy decoding; choose another task"
        )
