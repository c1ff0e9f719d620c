"""Fetch a model of the Hub into the Hub's own cache, and say in one line why it cannot be had.

The token (HF_TOKEN, or what `hf auth login` stored) is read by huggingface_hub alone: it never passes through here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.errors import CannotRun
from passes.base import Progress

_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubId:
    """A model of the Hub: `org/name`, and the branch, tag or commit to take (None: the default branch)."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Read `org/name` or `org/name@revision`; None for any other text."""
        match = _ID.fullmatch(text)
        return cls(match["repository"], match["revision"]) if match else None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def fetch(model: HubId, patterns: Sequence[str], progress: Progress) -> Path:
    """Fetch the files that match `patterns`; return the snapshot's folder, whose name is the commit.

    Files already in the cache are not fetched again; without a network the cache answers alone.

    Raises:
        CannotRun: missing, gated or forbidden, no such revision, no network, or no room.
    """
    hub = _library()
    with _told(model):
        folder = hub.snapshot_download(
            model.repository,
            revision=model.revision,
            allow_patterns=list(patterns),
            library_name="optimize-models",
            tqdm_class=_progress_bar(progress),
        )
    return Path(folder)


def file_names(model: HubId) -> list[str]:
    """Return the names of all files of a model; errors as in `fetch`."""
    with _told(model):
        return list(_library().HfApi().list_repo_files(model.repository, revision=model.revision))


def _library() -> Any:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when the library is imported
    try:
        import huggingface_hub
    except ImportError as error:
        raise CannotRun("a model of the Hub needs huggingface_hub: pip install 'optimize-models[optimize]'") from error
    return huggingface_hub


@contextmanager
def _told(model: HubId) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _reason(error, model)
        if reason is None:
            raise
        raise CannotRun(f"model {model}: {reason}") from error


def _reason(error: BaseException, model: HubId) -> str | None:
    """Say in words why the Hub did not give a model, and what to do; None for an error that is not the Hub's."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    place = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    code = error.errno if isinstance(error, OSError) else None
    cases = (
        (
            isinstance(error, errors.GatedRepoError),
            f"gated; accept its terms at {place}/{model.repository} and set HF_TOKEN to a token of that account",
        ),
        (
            isinstance(error, errors.RevisionNotFoundError),
            f"no such revision, got {model.revision}, expected a branch, a tag or a commit",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError) or status == 404,
            f"not found at {place}, or private; check the name, or set HF_TOKEN to a token that may read it",
        ),
        (
            status in (401, 403),
            f"refused by {place} ({status}); set HF_TOKEN to a valid token that may read it",
        ),
        (status is not None, f"{place} answered {status}; try again later"),
        (isinstance(error, errors.HFValidationError), "not a name the Hub allows, expected org/name@revision"),
        (
            code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
            f"{os.strerror(code or 0)} in {constants.HF_HUB_CACHE}; set HF_HOME to a folder on a larger disk",
        ),
        (
            isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
            or type(error).__module__.startswith("httpx"),
            f"cannot reach {place}, and it is not complete in the local cache; check the network, or name a folder",
        ),
    )
    return next((words for applies, words in cases if applies), None)


def _progress_bar(progress: Progress) -> type:
    """Return a tqdm class that shows nothing and hands the bytes written so far to `progress`."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.counts_bytes = str(options.get("desc", "")).startswith("Reconstructing")
            super().__init__(*arguments, **{**options, "disable": True})
            self.total = options.get("total")

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.total:
                progress(int(self.n), int(self.total), "bytes fetched")

    return Bar
