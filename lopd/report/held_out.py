"""The first answers of each weight sync on disk, so that a reader sees what the figures are about.

``distill/held_out/step-000004.jsonl`` has a line for each answer, with the keys of the transcripts
of ``lopd evaluate --model``. Nothing depends on these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lopd.artifacts import publish_bytes

# How many answers of a sync are kept. A response may have 100,000 characters.
NUM_SHOWN = 16
_FOLDER = "held_out"


def write_transcripts(folder: Path, step: int, transcripts: Iterable[Mapping[str, Any]]) -> None:
    """Publish the answers after so many steps.

    Args:
        folder: The folder of the training.
        step: The number of steps.
        transcripts: prompt_id, sample_index, finish_reason, response_len, messages and response;
            with a verifier also right, reason and found.
    """
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in transcripts]
    # A prompt may hold half of a surrogate pair, which plain UTF-8 refuses.
    content = "".join(lines).encode("utf-8", errors="surrogatepass")
    publish_bytes(folder / _FOLDER / f"step-{step:06d}.jsonl", content)


def newest_transcripts(folder: Path) -> tuple[int, list[dict[str, Any]]] | None:
    """Return the step and the answers of the newest sync; None where there is none.

    Args:
        folder: The folder of the training.
    """
    files = sorted((folder / _FOLDER).glob("step-*.jsonl"))
    if not files:
        return None
    text = files[-1].read_text(encoding="utf-8", errors="surrogatepass")
    # Lines end with a line feed alone: splitlines() would also cut inside of JSON.
    rows = [json.loads(line) for line in text.rstrip("\n").split("\n") if line]
    return int(files[-1].stem.removeprefix("step-")), rows
