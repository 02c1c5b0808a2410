"""How the error of a rank reaches the process that started the ranks.

A rank that ends with a LopdError writes it into a file. The parent reads the file and raises the
same error. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lopd import errors
from lopd.errors import EXIT_CODE, LopdError, TrainingError
from lopd.megatron.ranks.heartbeats import start_heartbeat
from lopd.megatron.ranks.lost_nodes import COLLECTIVE, RESUMES, lost_peer_address
from lopd.megatron.ranks.nodes import NODE

# Environment variable of a rank: the file for the LopdError that ends the rank, as JSON.
ERROR_FILE = "LOPD_ERROR_FILE"


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Give signs of life while the block runs, and report the error that ends it to the parent.

    A LopdError, and a collective that fails because other ranks are missing, end the process with
    one line on stderr and exit code 2, without a traceback. If several ranks report an error, the
    first report counts. Every other error leaves the block as it is.
    """
    heartbeat = start_heartbeat()
    try:
        yield
    except LopdError as error:
        _report(error)
    except RuntimeError as error:
        # On one machine a closed connection means that a rank has died. torchrun reports that
        # better, so the address of a peer matters only where there are several machines.
        peer = lost_peer_address(error) if NODE in os.environ else None
        if peer is None and not _is_timeout(error):
            raise
        _report(_missing_ranks_error(error, peer))
    # Only a block that ended well comes to this line. If the file stayed, the parent would take a
    # rank that still cleans up for a silent one.
    if heartbeat is not None:
        heartbeat.unlink(missing_ok=True)


def _missing_ranks_error(error: RuntimeError, peer: str | None) -> TrainingError:
    event = "waited too long for the other ranks"
    if peer is not None:
        event = f"lost its connection to {peer}"
    # The first line of gloo's text names the operation. The rest is a trace.
    first_line = str(error).strip().splitlines()[0][:200]
    return TrainingError(
        f"rank {os.environ.get('RANK')} {event} ({first_line})",
        where=COLLECTIVE,
        limit="timeout_s" if peer is None else "",
        remedy=f"read in the log what the other ranks did; {RESUMES}",
    )


def _is_timeout(error: RuntimeError) -> bool:
    # gloo and the store raise a plain RuntimeError at a timeout. Only its text tells it from
    # others. NCCL needs no test here: its watchdog ends the process itself.
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _report(error: LopdError) -> NoReturn:
    """Write the error for the parent and end this process."""
    path = os.environ.get(ERROR_FILE)
    # Nobody started this rank with run_ranks, so nobody reads a report.
    if path is None:
        raise error
    fields = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "limit": error.limit,
        "remedy": error.remedy,
    }
    # Mode "x" lets only the first rank write. The errors of the other ranks mostly follow from it.
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as handle:
        json.dump(fields, handle)
    # The log shows every rank's error, also those that came too late for the file.
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    # A normal exit would wait for collectives that the other ranks never join.
    os._exit(EXIT_CODE)


def read_report(error_file: Path) -> LopdError | None:
    """Return the error that a rank reported, with its own type, or None if there is no report."""
    try:
        fields = json.loads(error_file.read_text(encoding="utf-8"))
    # No rank reported an error, or a rank was killed while it wrote the file.
    except (FileNotFoundError, ValueError):
        return None
    kind = getattr(errors, fields.pop("type"), None)
    # The type may be a class of another package that this process does not know.
    if not (isinstance(kind, type) and issubclass(kind, LopdError)):
        kind = TrainingError
    return kind(fields.pop("what"), **fields)
