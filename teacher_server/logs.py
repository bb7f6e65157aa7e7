"""Logs with the client and sequence they are about, as text or one JSON object a line."""

from __future__ import annotations

import json
import logging
import time

CONTEXT_FIELDS = ("client", "sequence", "version")


def _context(record: logging.LogRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in CONTEXT_FIELDS if hasattr(record, name)}


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the context that is there, the trace if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _context(record)
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message key=value …`; client names are quoted, so that no client can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        context = [] if record.exc_info else [f"{name}={value!r}" for name, value in _context(record).items()]
        return " ".join([super().format(record), *context])


def configure(*, level: str, as_json: bool) -> None:
    """Send everything to stderr; stdout is for the one line that says where the server listens."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
