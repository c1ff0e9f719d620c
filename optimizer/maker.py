"""Take a model through a pass, or find in the store what an earlier run made of it.

The key of a result covers all that decides it: the model it starts from, the pass's fields and code, the texts it is
shown, the versions of the libraries, seed and threads.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optimizer.costs import Work, extent, measured
from optimizer.evaluate.calibration import Calibration, load_calibration
from optimizer.evaluate.items import Item, items_hash
from optimizer.evaluate.text_reader import TextReader
from optimizer.examiner import weights_bytes
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.lock import machine, versions
from optimizer.recipe import Recipe
from optimizer.report import Reporter
from optimizer.store import Entry, Store
from passes.base import Context, Model, Pass, Stage, no_progress

SEED = 0


@dataclass
class Maker:
    """Makes models for one recipe.

    Attributes:
        source: the untouched model.
        reader: how all models read text.
        items: of each evaluation; none of them may be shown to a pass.
        calibration: of each pass, the token ids it is shown.
    """

    recipe: Recipe
    store: Store
    told: Reporter
    source: Model
    threads: int
    reader: TextReader
    items: Mapping[str, list[Item]]
    calibration: dict[Pass, Calibration] = field(default_factory=dict)

    def make(self, each: Pass, index: int, before: Model, key: str, what: str) -> tuple[Model, Entry]:
        """Take a model, named by its key, through a pass, or find in the store what an earlier run made of it."""
        shown = hashes(self.shown(each, index))
        key = fingerprint([key, pass_identity(each), shown, self.threads, SEED, versions(), machine()])
        self.admit(each)
        with self.told.progress(what) as progress:
            entry = self.store.get_or_build(key, lambda folder: self._run(each, index, before, folder, progress))
        return Model(Stage(**entry.meta["stage"]), entry.folder, before.assets, entry.meta["config"]), entry

    def admit(self, each: Pass) -> None:
        """Let a pass refuse the architecture before anything is done; the store remembers that it did not."""
        key = fingerprint(["admitted", self.source.config, pass_identity(each), SEED, versions(), machine()])

        def ask(folder: Path) -> Mapping[str, Any]:
            with self.told.progress(f"{each.name()}: trying the architecture"):
                each.admits(self.source, self._context(folder, no_progress, {}))
            return {}

        if type(each).admits is not Pass.admits:
            self.store.get_or_build(key, ask)

    def shown(self, each: Pass, index: int) -> Calibration:
        """Return the token ids that a pass is shown."""
        if each not in self.calibration:
            where = f"passes.{index}.{each.name()}"
            self.calibration[each] = load_calibration(each, where, self.recipe.data, self.reader, self.items)
        return self.calibration[each]

    def _run(self, each: Pass, index: int, before: Model, folder: Path, progress: Any) -> Mapping[str, Any]:
        """Run one pass into `folder`; return what the store is to remember of it."""
        import torch

        torch.set_num_threads(self.threads)
        torch.manual_seed(SEED)
        context = self._context(folder, progress, self.shown(each, index))
        is_new = not any(folder.iterdir())
        work = Work(each.name(), weights_bytes(before), *extent(self.source))
        with measured(self.store.root, work, self.threads, keep=is_new) as spent:
            each.requires(before)
            result = each.run(before, context)
            each.ensures(before, result.model, context)
        return {
            "stage": asdict(result.model.stage),
            "config": dict(result.model.config),
            "changes": dict(result.changes),
            "note": result.note,
            "seconds": spent.seconds,
            "peak_bytes": spent.peak_bytes,
        }

    def _context(self, folder: Path, progress: Any, calibration: Calibration) -> Context:
        device = self.recipe.target.device
        return Context(folder, self.source, device, self.threads, SEED, progress, calibration)


def hashes(calibration: Calibration) -> dict[str, str]:
    """Return entry of `data` -> hash of the token ids."""
    return {name: items_hash([Item(ids, "") for ids in texts], 0) for name, texts in sorted(calibration.items())}


def options_of(each: Pass) -> dict[str, Any]:
    """Return the fields of a pass that decide its result."""
    options = asdict(each)
    del options["optional"]
    return options


def pass_identity(each: Pass) -> dict[str, Any]:
    """Return what decides a pass's result besides its input: name, fields, and the code it runs."""
    module = importlib.import_module(type(each).__module__)
    return {"name": each.name(), "options": options_of(each), "code": source_fingerprint(module)}
