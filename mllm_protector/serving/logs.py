"""Logs as lines of JSON on the standard error, the same for fronts and the model worker.

No line holds a text of a client or a model: messages of other libraries are left out, because they may quote
one, and of an exception only its type and place are told.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from mllm_protector.serving.exchange import CURRENT

TRUSTED = ("mllm_protector", "uvicorn", "__main__")
"""Loggers whose messages were read and quote nothing; ``__main__`` is the model worker."""

LEFT_OUT = "a message of a library, left out because it may quote a text"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with the id of the request under way and the ``fields`` of ``extra``."""

    def __init__(self, process: str) -> None:
        """``process`` is a name for the process."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        trusted = record.name.partition(".")[0] in TRUSTED
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage().strip() if trusted else LEFT_OUT,
        }
        if not trusted:
            line["logger"] = record.name
            line["place"] = f"{record.module}:{record.lineno}"
        if exchange := CURRENT.get():
            line["request_id"] = exchange.id
        line |= getattr(record, "fields", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["error"] = f"{type(error).__name__} at {place(error)}"
        return json.dumps(line)


def configure(process: str) -> None:
    """Write all logs of this process so, from ``info`` on; ``process`` is a name for it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx", "uvicorn"):  # a line for each request, and for each step of the start
        logging.getLogger(chatty).setLevel(logging.WARNING)


def place(error: BaseException) -> str:
    """Where an exception was raised; its own words may quote an answer."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
