"""What can stop a run, each with the exit code that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; FAIL means nothing but a regression."""

    PASS = 0
    FAIL = 1
    WRONG_INPUT = 2
    INCONCLUSIVE = 3
    CANNOT_RUN = 4
    BUG = 70
    INTERRUPTED = 130


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe or a command line.

    Attributes:
        file: the recipe as it was named, or the command-line option that holds the mistake.
        line: counted from 1; 0 where `file` has no lines.
        column: counted from 1.
        message: where in the recipe, what, got, expected.
    """

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.message}"


class OptimizeError(Exception):
    """A run ended for a reason the user can act on; the message is one line, or one per mistake."""

    exit_code = ExitCode.CANNOT_RUN


class RecipeError(OptimizeError):
    """The recipe or the command line is wrong."""

    exit_code = ExitCode.WRONG_INPUT

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))


class CommandError(OptimizeError):
    """A command was given something it cannot use: a file that is not there, an argument out of range."""

    exit_code = ExitCode.WRONG_INPUT


class CannotRun(OptimizeError):
    """The work cannot be done: memory, disk, a missing GPU or package, an unsupported model, a pass that refused."""

    exit_code = ExitCode.CANNOT_RUN
