"""How often the items that judge were opened for a source, over all runs that share a store.

Who edits a recipe until it passes has chosen by the items that judge: it cannot be forbidden, only shown. A model that
is judged again, as a second run of a recipe does, is no new opening. `optimize clean` leaves the ledger alone.
"""

from __future__ import annotations

import datetime
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = "openings"


@dataclass(frozen=True)
class Openings:
    """How often items were opened.

    Attributes:
        evaluation: whose items.
        count: different models judged by them.
        since: day of the first, ISO 8601; empty where it is not known.
        alpha: bound of the chance that any of so many passes wrongly passed.
    """

    evaluation: str
    count: int
    since: str
    alpha: float


def opened(root: Path, evaluation: str, items: str, candidate: str, alpha: float) -> Openings:
    """Note that `candidate` was judged by `items`; return how many different models were.

    Args:
        root: folder of the store.
        evaluation: as in `Openings`.
        items: names items and source.
        candidate: names the model.
        alpha: level at which each run judges.
    """
    folder = root / FOLDER / items
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), (folder / candidate).open("x", encoding="ascii") as file:
        file.write(datetime.datetime.now(datetime.UTC).date().isoformat())
    days = [path.read_text(encoding="ascii") for path in folder.iterdir()]
    return Openings(evaluation, len(days), min(filter(None, days), default=""), min(1.0, len(days) * alpha))
