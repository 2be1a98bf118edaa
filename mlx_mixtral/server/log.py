"""One line for each request, of what it cost; never of what it said."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

__all__ = ["LOG_FORMATS", "RequestLog", "RequestNotes"]

LOG_FORMATS = ("text", "json", "none")


@dataclass
class RequestNotes:
    """What is known of a request at its end. ``path`` is the route's, "" for none: a request's own words are not logged."""

    request_id: str
    method: str
    path: str = ""
    status: int | None = None
    outcome: str = ""
    """"disconnected", an error's code, or nothing."""
    adapter: str | None = None
    is_stream: bool = False
    rows: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    first_token_s: float | None = None
    queued_s: float | None = None


class RequestLog:
    """Writes to ``file``, stderr when None.

    Args:
        kind: "text", "json", or "none" for nothing but problems.
    """

    def __init__(self, kind: str, file: IO[str] | None = None) -> None:
        self._kind, self._file = kind, file

    def request(self, notes: RequestNotes, took_s: float) -> None:
        """The line of a request that is over."""
        facts: dict[str, Any] = {
            "status": notes.status or 499,
            "method": notes.method,
            "path": notes.path or "-",
            "seconds": round(took_s, 3),
            "adapter": notes.adapter,
            "stream": notes.is_stream or None,
            "rows": notes.rows if notes.rows > 1 else None,
            "prompt": notes.prompt_tokens,
            "cached": notes.cached_tokens or None,
            "generated": notes.generated_tokens,
            "queued_seconds": None if notes.queued_s is None else round(notes.queued_s, 3),
            "first_token_seconds": None if notes.first_token_s is None else round(notes.first_token_s, 3),
            "outcome": notes.outcome or None,
            "id": notes.request_id,
        }
        self._write(facts)

    def problem(self, text: str, error: BaseException | None = None) -> None:
        """Something that should not have happened; of an error the place in the code, not its message."""
        place = ""
        trace = None if error is None else error.__traceback__
        while trace is not None:
            place = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
            trace = trace.tb_next
        self._write({"problem": " ".join(text.split())[:300], "at": place or None}, always=True)

    def _write(self, facts: dict[str, Any], *, always: bool = False) -> None:
        if self._kind == "none" and not always:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in facts.items() if value is not None}
        if self._kind == "json":
            line = json.dumps({"time": now} | known, ensure_ascii=True)
        else:
            shown = [f"{known.pop(name)}" for name in ("status", "method", "path") if name in known]
            line = " ".join([now, *shown, *(f"{name}={value}" for name, value in known.items())])
        file = self._file or sys.stderr
        try:
            file.write(line + "\n")
            file.flush()
        except (OSError, ValueError):
            self._kind = "none"  # nobody reads it any more
