"""Files by which the scorer and its ranks exchange requests and answers.

All files lie in one folder, the spool:

    job.json                what the ranks do: model, settings, whether entropy is asked for
    in-000001.npz           the requests of chunk 1
    out-000001-0000.npz     the answers of data rank 0 to it
    end                     there will be no further chunk

They are plain arrays of numbers, without pickle. A file appears at once and complete.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from lopd.artifacts import publish_json
from lopd.config import ForwardSection

# Seconds between two looks for a file. Scoring a chunk takes seconds, so this does not count.
POLL_S = 0.02
END = "end"


def requests_path(spool: Path, number: int) -> Path:
    """Return the file of the requests of a chunk."""
    return spool / f"in-{number:06d}.npz"


def answers_path(spool: Path, number: int, data_rank: int) -> Path:
    """Return the file of one data rank's answers to a chunk."""
    return spool / f"out-{number:06d}-{data_rank:04d}.npz"


def write_numbers(path: Path, **arrays: Any) -> None:
    """Write arrays of numbers by name, as a file that appears at once and complete."""
    # In memory first: np.savez appends ".npz" to a name that ends differently, such as ".partial".
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: np.asarray(values) for name, values in arrays.items()}
    np.savez(buffer, **columns)
    # Readers wait for the name to appear, so the content must be complete before.
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    partial.rename(path)


def read_numbers(path: Path) -> dict[str, Any]:
    """Read the arrays of write_numbers."""
    # A chunk is read by another process. allow_pickle would let a file run code in it.
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_job(spool: Path, model: Path, settings: ForwardSection, *, entropy: bool) -> None:
    """Tell the ranks what they do."""
    section = settings.model_dump(mode="json")
    publish_json(spool / "job.json", {"model": str(model), "settings": section, "entropy": entropy})


def read_job(spool: Path) -> tuple[Path, ForwardSection, bool]:
    """Return the model, the settings, and whether entropy is asked for."""
    job = json.loads((spool / "job.json").read_text(encoding="utf-8"))
    return Path(job["model"]), ForwardSection.model_validate(job["settings"]), bool(job["entropy"])
