"""One line of JSON on standard error for each request and each event; never a word of a prompt or an answer."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any, Final

LOGGER: Final = "runtime.server"
_NOTES: Final = "optimize.notes"


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object; of an exception its type and where it was raised, not what it says."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        now = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {"time": now.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        line |= getattr(record, "fields", None) or {"event": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frames = traceback.extract_tb(error.__traceback__)
            line |= {
                "error": type(error).__name__,
                "at": [f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in frames],
            }
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up() -> None:
    """Send everything that this process logs to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(LOGGER).setLevel(logging.INFO)


def event(name: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with its fields; those that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    logging.getLogger(LOGGER).log(level, name, extra={"fields": {"event": name} | known})


def note(scope: MutableMapping[str, Any], **fields: object) -> None:
    """Add fields to the line that a request is logged with."""
    scope.setdefault(_NOTES, {}).update(fields)


def notes(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """Return the fields that were added."""
    found: dict[str, Any] = scope.get(_NOTES, {})
    return found


def exception(name: str, error: BaseException, **fields: object) -> None:
    """Log a bug: the type of the exception and where it was raised."""
    extra = {"fields": {"event": name} | fields}
    logging.getLogger(LOGGER).error(name, exc_info=error, extra=extra)
