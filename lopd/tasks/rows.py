"""Rows of JSONL, JSON and Parquet files, and values in their nested columns. Local files and
folders only; nothing is loaded into memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lopd.config.hub import remedy_for
from lopd.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".parquet", ".json")
_BATCH = 64  # Parquet rows decoded at a time: a row of reasoning data can be 100 KB
_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d+)\]")
MISSING = object()  # of ``value_at``: the row has no such value


class Row:
    """One row and where it stands. ``number`` counts lines of JSONL and rows of Parquet from 1."""

    __slots__ = ("file", "number", "values")

    def __init__(self, values: Any, file: Path, number: int) -> None:
        self.values, self.file, self.number = values, file, number

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's files of one kind (.jsonl, .parquet, .json), also in folders
    below it, sorted by path.

    DataError: nothing there, no such file in the folder, or files of several kinds, of which one
    set must be chosen.
    """
    if not path.is_dir():
        return [path]
    try:
        found = {
            suffix: sorted(
                file
                for file in path.rglob(f"*{suffix}")
                if file.is_file() and not _hidden(file, path)
            )
            for suffix in SUFFIXES
        }
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})",
            where=str(error.filename or path),
            remedy="give a folder that holds prompts alone",
        ) from None
    kinds = [suffix for suffix in (".jsonl", ".parquet") if found[suffix]] or [
        suffix for suffix in (".json",) if found[suffix]
    ]
    if not kinds:
        raise DataError(
            "no prompts in this folder",
            where=str(path),
            limit=f"files ending in {', '.join(SUFFIXES)}",
            remedy="give the file with the prompts",
        )
    if len(kinds) > 1:
        raise DataError(
            f"files of several kinds in this folder ({', '.join(kinds)})",
            where=str(path),
            remedy="give one file, or a folder with one kind",
        )
    return found[kinds[0]]


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def content_hash(path: Path) -> str | None:
    """sha256 of a file, or of a folder's prompt files with their names; None where there is none
    yet (reading it says so).
    """
    if path.is_file():
        about = path.stat()
        return _file_hash(path, about.st_size, about.st_mtime_ns)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(f"{file.relative_to(path)}\0{content_hash(file)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    """Kept for this process: every stage asks, and a data set may have 30 GB. size, changed_ns:
    another content is another question.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[Row]:
    """Every row, in order. columns: the top-level columns that are needed, where they exist
    (Parquet then reads no others); empty: all.

    DataError (with the file and the line): no such file, unreadable, not JSON, not Parquet, a row
    that is no object.
    """
    for file in files_of(path):
        yield from (
            _read_parquet(file, columns)
            if file.suffix == ".parquet"
            else _read_json(file)
            if file.suffix == ".json"
            else _read_jsonl(file)
        )


def _read_jsonl(file: Path) -> Iterator[Row]:
    try:
        with file.open(
            encoding="utf-8-sig", newline="\n"
        ) as handle:  # newline: a line ends at \n alone; JSON may hold other separators
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield Row(_parse(line, f"{file}:{number}"), file, number)
    except FileNotFoundError:
        raise _absent(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})",
            where=str(file),
            remedy="give a JSONL file in UTF-8, or a Parquet file",
        ) from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not valid JSON ({error})", where=where, remedy="one JSON object a line"
        ) from None


def _read_json(file: Path) -> Iterator[Row]:
    """A list of objects, or JSONL under the name .json, as some data sets have it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _absent(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(file), remedy="give JSON in UTF-8"
        ) from None
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    for number, values in enumerate(_parse(text, str(file)), start=1):
        yield Row(values, file, number)


def _read_parquet(file: Path, columns: Collection[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            chosen = [name for name in table.schema_arrow.names if not columns or name in columns]
            for batch in table.iter_batches(_BATCH, columns=chosen):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, file, number)
    except FileNotFoundError:
        raise _absent(file) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read as Parquet ({str(error).splitlines()[0]})",
            where=str(file),
            remedy="copy it again from where it came",
        ) from None


def _absent(file: Path) -> DataError:
    remedy = remedy_for(
        file,
        "give the path of a JSONL or Parquet file with prompts, or of a folder with such files",
    )
    return DataError("no such file", where=str(file), remedy=remedy)


# ---- nested columns
# -------------------------------------------------------------------------------------------------------------------------------


def parse_path(path: str, where: str) -> list[str | int]:
    """``reward_model.ground_truth`` and ``prompt[0].content`` as steps. ConfigError: not of this
    form.
    """
    steps: list[str | int] = []
    position = 0
    while position < len(path):
        if steps and path[position] == ".":
            position += 1
        match = _STEP.match(path, position)
        if match is None:
            break
        steps.append(match[1] if match[1] is not None else int(match[2]))
        position = match.end()
    if position < len(path) or not steps or path.endswith("."):
        raise ConfigError(
            f"{path!r:.80} is no path to a column",
            where=where,
            remedy="write for example answer, reward_model.ground_truth, prompt[0].content",
        )
    return steps


def value_at(values: Any, steps: list[str | int]) -> Any:
    """The value at the end of the steps, or MISSING. A JSON text on the way is read as JSON (some
    data sets nest it as text).
    """
    for step in steps:
        if isinstance(values, str) and values[:1] in "{[":
            try:
                values = json.loads(values)
            except ValueError:
                return MISSING
        if isinstance(step, int):
            if not isinstance(values, list) or not -len(values) <= step < len(values):
                return MISSING
            values = values[step]
        elif not isinstance(values, Mapping) or step not in values:
            return MISSING
        else:
            values = values[step]
    return values
