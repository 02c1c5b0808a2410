"""Reads rows of JSONL, JSON and Parquet files, and values in their nested columns.

It reads local files and folders only. No file is loaded into memory as a whole, except .json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lopd.artifacts import sha256_file
from lopd.artifacts.file_hashes import HASHES
from lopd.config.hub import absent
from lopd.errors import ConfigError, DataError, LopdError

SUFFIXES = (".jsonl", ".parquet", ".json")
# Parquet rows that are decoded at a time. A row of reasoning data can have 100 KB.
_BATCH = 64
# One step of a path: a name, or an index in brackets.
_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d+)\]")
# The result of value_at if the row has no such value. None would be a value of the row.
MISSING = object()


class Row:
    """One row and its place.

    Attributes:
        values: The row, usually a dict.
        file: The file of the row.
        number: The number of the line (JSONL) or of the row (Parquet), from 1.
    """

    __slots__ = ("file", "number", "values")

    def __init__(self, values: Any, file: Path, number: int) -> None:
        self.values = values
        self.file = file
        self.number = number

    @property
    def where(self) -> str:
        """The place of the row, for messages."""
        return f"{self.file}:{self.number}"


def files_of(path: Path) -> list[Path]:
    """Return the file itself, or a folder's files of one kind, sorted by path.

    The kinds are .jsonl, .parquet and .json. Files in folders below count too.

    Raises:
        DataError: The path or its files do not exist, or the folder holds several kinds.
    """
    if not path.is_dir():
        return [path]
    try:
        found: dict[str, list[Path]] = {}
        for suffix in SUFFIXES:
            files = path.rglob(f"*{suffix}")
            # Sorted, because a file system lists files in an order of its own, which decides the
            # order of prompts.
            found[suffix] = sorted(file for file in files if _is_data(file, path))
    except OSError as error:
        # A folder inside may be forbidden, or a file of the kernel's that cannot be listed.
        raise DataError(
            f"cannot be read ({error.strerror})",
            where=str(error.filename or path),
            remedy="give a folder that holds only files of prompts",
        ) from None
    # Beside data there are often .json files about it (dataset_info.json), so .json counts only if
    # it is alone.
    kinds = [suffix for suffix in (".jsonl", ".parquet") if found[suffix]]
    kinds = kinds or [suffix for suffix in (".json",) if found[suffix]]
    if not kinds:
        raise DataError(
            "this folder has no file of prompts",
            where=str(path),
            limit=f"only files whose name ends in {', '.join(SUFFIXES)}",
            remedy="give the path of the file with the prompts",
        )
    # Often the same data twice, in two forms.
    if len(kinds) > 1:
        raise DataError(
            f"this folder has files of several kinds ({', '.join(kinds)})",
            where=str(path),
            remedy="give one file, or a folder with files of one kind",
        )
    return found[kinds[0]]


def _is_data(file: Path, root: Path) -> bool:
    # Downloads keep metadata and partial files in folders like .cache.
    is_hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not is_hidden


def content_hash(path: Path) -> str | None:
    """Return the sha256 of a file, or of a folder's prompt files with their names.

    Returns:
        None if the path does not exist yet. Reading it will say so.
    """
    if path.is_file():
        # Remembered from command to command: a data set may have 30 GB.
        return sha256_file(path)
    if not path.is_dir():
        return None
    # The names count, because the order of the files decides the order of the prompts.
    digest = hashlib.sha256()
    files = files_of(path)
    for file, of_file in zip(files, HASHES.sha256_all(files), strict=True):
        digest.update(f"{file.relative_to(path)}\0{of_file}\n".encode())
    return digest.hexdigest()


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield every row, in order.

    Args:
        path: A file or a folder.
        columns: The top-level columns that are needed, if they exist. Parquet then reads no others.
            Empty means all.

    Raises:
        DataError: The file is missing or unreadable, or a row is not JSON. The message has the file
            and the line.
    """
    # File by file, in the order of their names: it decides the order of the prompts.
    for file in files_of(path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file, columns)
        elif file.suffix == ".json":
            yield from _read_json(file)
        else:
            yield from _read_jsonl(file)


def _read_jsonl(file: Path) -> Iterator[Row]:
    try:
        # A line ends at \n alone: text in JSON may hold other separators of lines.
        with file.open(encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                # Many files end with an empty line.
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
        # A RecursionError means thousands of nested brackets.
        raise DataError(
            f"the line is not valid JSON ({error})",
            where=where,
            remedy="write one JSON object per line",
        ) from None


def _read_json(file: Path) -> Iterator[Row]:
    """Yield the rows of a .json file: a list of objects, or JSONL under that name."""
    try:
        # JSON has no rows that could be read one by one.
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _absent(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(file), remedy="give a JSON file in UTF-8"
        ) from None
    # A line of JSONL is an object, so such a text begins with a brace.
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    for number, values in enumerate(_parse(text, str(file)), start=1):
        yield Row(values, file, number)


def _read_parquet(file: Path, columns: Collection[str]) -> Iterator[Row]:
    # Imported here, because pyarrow takes long and most runs read JSONL.
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            # Columns that the file lacks are no mistake here: a format names alternatives.
            chosen = [name for name in table.schema_arrow.names if not columns or name in columns]
            # In order, and only one batch in memory.
            for batch in table.iter_batches(_BATCH, columns=chosen):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, file, number)
    except FileNotFoundError:
        raise _absent(file) from None
    except (pa.ArrowException, OSError) as error:
        # Arrow's messages have many lines, of which the first says what is wrong.
        raise DataError(
            f"cannot be read as Parquet ({str(error).splitlines()[0]})",
            where=str(file),
            remedy="copy the file again from its source",
        ) from None


def _absent(file: Path) -> LopdError:
    return absent(
        file,
        "no such file",
        otherwise="give the path of a JSONL or Parquet file with prompts, or of a folder with such "
        "files",
        kind=DataError,
    )


def parse_path(path: str, where: str) -> list[str | int]:
    """Return ``reward_model.ground_truth`` or ``prompt[0].content`` as steps.

    Args:
        path: Names with dots between them, and indices in brackets.
        where: The key that holds the path, for a message.

    Raises:
        ConfigError: The path does not have this form.
    """
    steps: list[str | int] = []
    position = 0
    while position < len(path):
        # A dot stands between two names, and not before the first one.
        if steps and path[position] == ".":
            position += 1
        match = _STEP.match(path, position)
        if match is None:
            break
        steps.append(match[1] if match[1] is not None else int(match[2]))
        position = match.end()
    # The loop stops early at a character that no step begins with.
    if position < len(path) or not steps or path.endswith("."):
        raise ConfigError(
            f"{path!r:.80} is not a path to a column",
            where=where,
            remedy="write for example answer, reward_model.ground_truth, prompt[0].content",
        )
    return steps


def value_at(values: Any, steps: list[str | int]) -> Any:
    """Return the value at the end of the steps, or MISSING.

    JSON text on the way is read as JSON, because some data sets nest their columns as text.
    """
    for step in steps:
        # Only text that begins like JSON, so that most columns are not parsed. "" is in every text,
        # and then json.loads fails.
        if isinstance(values, str) and values[:1] in "{[":
            try:
                values = json.loads(values)
            except ValueError:
                return MISSING
        # A path that does not fit a row is no mistake: the row has no such value.
        if isinstance(step, int):
            # A negative index counts from the end, as in Python.
            if not isinstance(values, list) or not -len(values) <= step < len(values):
                return MISSING
            values = values[step]
        elif not isinstance(values, Mapping) or step not in values:
            return MISSING
        else:
            values = values[step]
    return values
