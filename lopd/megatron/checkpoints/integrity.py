"""Whether the files of a checkpoint are the ones that were written.

trainer.json holds the size and the checksum of every file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.artifacts import fsync_folder, sha256_json
from lopd.megatron.checkpoints.writing import crc32, fsync_and_sum
from lopd.megatron.ranks import parallel

# Everything of a checkpoint that is no tensor: the step, the layout and the checksums.
ABOUT = "trainer.json"
# Files that name the rank that wrote them. Rank 0 wrote all others.
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp|rng-(\d+)\.json")


def read_about(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's trainer.json.

    Raises:
        ValueError: The file is not the one that was written.
    """
    about: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    if about.pop("sha256", None) != sha256_json(about):
        raise ValueError("checksum differs")
    return about


def sum_files(folder: Path, known: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Make every file of a new checkpoint durable, and read it back. Collective.

    Args:
        folder: The folder of the checkpoint.
        known: The checksums of files that this rank has read already.

    Returns:
        {name: [size in bytes, CRC-32]} of every file, on every rank.
    """
    # A CRC notices every single flipped bit, and all but one in four billion other changes. It is
    # three times faster than a cryptographic hash. A hash next to the files would not help against
    # somebody who wants to deceive either.
    mine = dict(known)
    for path in folder.iterdir():
        name = _RANK_FILE.fullmatch(path.name)
        writer = int(name[1] or name[2]) if name else 0
        # The rank that wrote a file sums it, so that all ranks share the work.
        if writer == parallel.rank() and path.name not in known:
            mine[path.name] = fsync_and_sum(path)
    # The names of files are content of the folder, which needs an fsync of its own.
    if parallel.rank() == 0:
        fsync_folder(folder)
    parts = parallel.gather_objects(mine)
    return {name: figures for part in parts for name, figures in part.items()}


def problem_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files ("file: ..."), or None. Collective.

    The answer is the same on every rank. Each rank reads its share of the files.
    """
    mine = None
    try:
        files = read_about(path)["files"]
        for name in sorted(files)[parallel.rank() :: parallel.world_size()]:
            mine = mine or _file_problem(path / name, *files[name])
    # trainer.json itself may be missing, cut, or changed in any way. Whatever is wrong with it, the
    # rank must reach the gather below, in which the others wait.
    except (OSError, ValueError, KeyError, TypeError) as error:
        mine = f"{ABOUT}: {error}"
    return next((problem for problem in parallel.gather_objects(mine) if problem is not None), None)


def _file_problem(path: Path, size: int, crc: int) -> str | None:
    if not path.is_file():
        return f"{path.name}: missing"
    # The size costs nothing to compare, and finds most damages before the file is read.
    if path.stat().st_size != size:
        return f"{path.name}: {path.stat().st_size} bytes instead of {size}"
    return None if crc32(path) == crc else f"{path.name}: checksum differs"
