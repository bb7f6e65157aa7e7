"""Logs that carry stream and request ids, as text or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time

CONTEXT_FIELDS = ("client", "sequence", "version")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the context that is there, the trace if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in CONTEXT_FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message key=value …`; client names are quoted, so that none can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        context = [f"{name}={getattr(record, name)!r}" for name in CONTEXT_FIELDS if hasattr(record, name)]
        return " ".join([text, *context]) if not record.exc_info else text


def configure(*, level: str, as_json: bool) -> None:
    """Send everything to stderr; stdout is for the one line that says where the server listens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if as_json else TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
