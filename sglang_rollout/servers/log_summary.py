"""The cause of a server's death, taken from its log."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from lopd.processes import last_lines

# lopd writes a line with this beginning before each start of a server.
START_LINE = "--- starting"
_ERROR_LINE = re.compile(
    r"^(?:\[[^]]*\] )?(?:[\w.]*(?:Error|Exception|Interrupt)\b: ?.*|.*\bOut of memory\b.*)"
)
# SGLang writes such a line after every few batches.
_BATCH_LINE = " batch, #"
_LINES_READ = 200
_LINE_LEN = 300


def log_summary(log: Path) -> str:
    """Return the last errors of the newest start in a server's log, or its last lines.

    Tracebacks and shutdown messages stand after the cause, so the end of the log alone is often of
    no use.
    """
    lines = last_lines(log, _LINES_READ)
    starts = [index for index, line in enumerate(lines) if line.startswith(START_LINE)]
    if starts:
        # Errors of an earlier start say nothing about this one.
        lines = lines[starts[-1] + 1 :] or ["(nothing)"]
    # The last batch is no cause of a death. It stays only where the log has nothing else.
    lines = [line for line in lines if _BATCH_LINE not in line] or lines[-1:]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    # Two errors, because the last one is often only a consequence of the one before.
    parts = [line[:_LINE_LEN] for line in (errors[-2:] or lines[-4:])]
    # On a full disk the log lacks the cause, because there was no room to write it.
    if shutil.disk_usage(log.parent).free == 0:
        parts.append("the disk of this log is full")
    return " | ".join(parts)
