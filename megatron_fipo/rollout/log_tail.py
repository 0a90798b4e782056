"""What an engine's log says about why it failed."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 1 << 16
_TAIL_LINES = 25
_LINE_CHARS = 300
_EXCEPTION = re.compile(r"^(?:\S+: )?(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b(?:: .+)?$")


def log_tail(path: Path, start: int = 0) -> str:
    """The end of an error message: the last exception in the log's tail, then its last lines. Starts with a newline or
    a full stop; says so if the log is missing or empty. `start`: where, in bytes, the log of this start begins."""
    if not path.exists():
        return f". Its log {path} does not exist."
    with path.open("rb") as log:
        log.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        text = log.read().decode(errors="replace")
    lines = [line[:_LINE_CHARS] for line in text.splitlines() if line.strip()]
    if not lines:
        return f". Its log {path} is empty."
    exceptions = [line.strip() for line in lines if _EXCEPTION.match(line)]
    cause = f"\nlast exception in its log: {exceptions[-1]}" if exceptions else ""
    return f"{cause}\nlast lines of {path}:\n" + "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
