"""How log lines look. Keys of an object are `kind`, `object` and `reason`, the same as in its Events.

The line of an order that has ended (docs/policy.md) has those of the order as well.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import msgspec

# Attributes that a record may carry beside its message, by `extra`.
OBJECT_KEYS = ("kind", "object", "reason")
ORDER_KEYS = ("outcome", "namespace", "names", "issuer", "account", "order")
KEYS = (*OBJECT_KEYS, *ORDER_KEYS)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; an exception with its traceback under `error`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: getattr(record, key) for key in KEYS if hasattr(record, key)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """For people: time, level, message, object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and the traceback of an exception below it."""
        time = datetime.fromtimestamp(record.created, UTC)
        words = [str(getattr(record, key)) for key in OBJECT_KEYS if hasattr(record, key)]
        words += [f"{key}={_text(getattr(record, key))}" for key in ORDER_KEYS if hasattr(record, key)]
        about = " ".join(words)
        line = f"{time:%H:%M:%S.%f} {record.levelname.lower():7} {record.getMessage()}" + (
            f"  [{about}]" if about else ""
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def configure(form: str, level: str) -> None:
    """Send all logs to stderr in that form (`json` or `text`), from that level on; libraries' from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if form == "text" else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("certbotk8s", "solvers"):
        logging.getLogger(name).setLevel(level.upper())
    # Its warnings of a try that failed are told in our words, and hold names of Python types.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
