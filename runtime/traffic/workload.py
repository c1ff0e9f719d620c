"""What is asked and when: prompts, lengths and arrivals, drawn from a seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from runtime.errors import LoadError

Form = Literal["ids", "text", "chat"]
KNOWN_IDS: Final = 1000
"""Ids that any real vocabulary has: prompts are drawn from these where nobody says how many there are."""
_TEXT: Final = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about"
)
_WORDS: Final = _TEXT.split()
"""Words that are one token in most vocabularies."""


@dataclass(frozen=True)
class Range:
    """Whole numbers from `least` to `most`, all as likely."""

    least: int
    most: int

    @classmethod
    def parse(cls, name: str, text: str) -> Range:
        """Read `32:128`, or `64` for that alone.

        Raises:
            LoadError: it is neither, or begins below 1.
        """
        found = re.fullmatch(r"([0-9]{1,7})(?::([0-9]{1,7}))?", text)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise LoadError(f"{name}: got {text[:40]!r}, expected 1 to 9999999, or LEAST:MOST such as 32:128")
        return cls(least, most)

    def draw(self, chance: random.Random) -> int:
        """Return one of them."""
        return chance.randint(self.least, self.most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or the messages of a conversation."""


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        number: counted from 0; those that warm up have -1, -2, ...
        prompt: a text, token ids or messages.
        max_tokens: the length that the answer is to have.
    """

    number: int
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Draws questions; each depends on the seed and its number alone, not on those asked before.

    Attributes:
        input_tokens: of drawn prompts; words instead, where prompts are texts.
        output_tokens: of the answers.
        seed: of everything drawn.
        form: token ids, text, or messages for the server's chat template.
        vocabulary: ids are drawn below this.
        prompts: given ones, asked in their order and again from the beginning; empty draws them.
    """

    input_tokens: Range
    output_tokens: Range
    seed: int = 0
    form: Form = "ids"
    vocabulary: int = KNOWN_IDS
    prompts: tuple[Prompt, ...] = ()

    def question(self, number: int) -> Question:
        """Return the question of this number."""
        chance = random.Random(f"question {self.seed} {number}")
        if self.prompts:
            prompt = self.prompts[number % len(self.prompts)]
        else:
            prompt = self._draw(chance)
        return Question(number, prompt, self.output_tokens.draw(chance))

    def _draw(self, chance: random.Random) -> Prompt:
        length = self.input_tokens.draw(chance)
        if self.form == "ids":
            return chance.choices(range(self.vocabulary), k=length)
        text = " ".join(chance.choices(_WORDS, k=length))
        return text if self.form == "text" else _conversation(text)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yield the seconds at which requests of a Poisson process arrive, `rate` a second, counted from its beginning."""
    chance, at = random.Random(f"arrivals {seed}"), 0.0
    while True:
        at += chance.expovariate(rate)
        yield at


def read_prompts(path: Path, is_chat: bool) -> tuple[Prompt, ...]:
    """Read prompts from JSON lines: `{"prompt": TEXT or IDS}` or `{"messages": [...]}`, other keys are left alone.

    Args:
        path: the file.
        is_chat: whether messages are asked for; a text becomes the message of a user then.

    Raises:
        LoadError: it cannot be read, is empty, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut texts at U+2028 and the like
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise LoadError(f"{path}: cannot be read, {reason.lower()}") from None
    prompts = [_read_line(f"{path}:{number}", line, is_chat) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise LoadError(f"{path}: is empty, expected a prompt in each line")
    return tuple(prompts)


def _read_line(place: str, line: str, is_chat: bool) -> Prompt:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise LoadError(f'{place}: is not JSON, expected {{"prompt": ...}} or {{"messages": [...]}}') from None
    key = next((name for name in ("messages", "prompt") if isinstance(found, dict) and found.get(name)), None)
    if key is None:
        raise LoadError(f'{place}: lacks a prompt, expected {{"prompt": ...}} or {{"messages": [...]}}')
    value = found[key]
    if key == "messages":
        if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise LoadError(f"{place}: messages: got {type(value).__name__}, expected a list of objects")
        if not is_chat:
            raise LoadError(f"{place}: got messages, expected a prompt; add --chat")
        return value
    if isinstance(value, str):
        return _conversation(value) if is_chat else value
    if is_chat or not (isinstance(value, list) and all(type(each) is int for each in value)):
        raise LoadError(f"{place}: prompt: expected a text{'' if is_chat else ' or a list of token ids'}")
    return value


def _conversation(text: str) -> Prompt:
    return [{"role": "user", "content": text}]
