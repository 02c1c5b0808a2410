"""The headers of safetensors files: names, dtypes and shapes, without any weight.

A safetensors file begins with 8 bytes, the length of its header, and the header is JSON: for each
tensor its dtype, its shape, and where its bytes lie behind the header. Everything that can be wrong
with a file short of its values stands there. This module imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.errors import ArtifactError

# The bytes of one value.
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The bytes that hold the length of the header.
_LENGTH_BYTES = 8
# safetensors itself refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000
# How a file begins that git-lfs has left in the place of the real one.
_LFS_POINTER = b"version https://git-lfs"
_REMEDY = "copy the file again from its source"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file.

    Attributes:
        dtype: As safetensors writes it, for example "BF16".
        shape: The sizes of its dimensions.
        start: The place of its first byte in the file.
        stop: The place behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file by name, from its header alone.

    Raises:
        ArtifactError: There is no such file, or its header cannot be read, or the file is shorter
            or longer than its header says.
    """
    if not path.is_file():
        raise ArtifactError(
            "no such file",
            where=str(path),
            remedy="give the folder of a Hugging Face checkpoint with safetensors",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(_LENGTH_BYTES)
            length = int.from_bytes(begin, "little")
            # A length that the file does not have would ask for any amount of memory.
            is_sane = len(begin) == _LENGTH_BYTES and 0 < length <= _MAX_HEADER_BYTES
            content = file.read(length) if is_sane else begin + file.read(len(_LFS_POINTER))
    except OSError as error:
        raise _unreadable(path, error) from None
    # A clone without git-lfs has such files, small texts in the place of the weights.
    if content.startswith(_LFS_POINTER):
        raise _damaged(path, "it is a pointer of git-lfs and not the file itself")
    first = _LENGTH_BYTES + length
    if not is_sane or len(content) < length:
        raise _damaged(path, f"{size} bytes do not hold a header of safetensors")
    tensors = _parse(content, path, first)
    # The bytes of the tensors fill the rest of the file, one tensor behind the other.
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            raise _damaged(path, f"the bytes of {name} begin at {tensor.start}, not at {end}")
        end = tensor.stop
    if size != end:
        state = "truncated" if size < end else "too long"
        raise _damaged(path, f"{state}: it has {size} bytes, and its header speaks of {end}")
    return tensors


def _parse(content: bytes, path: Path, first: int) -> dict[str, TensorHeader]:
    try:
        # A name that occurs twice would hide a tensor.
        table = json.loads(content, object_pairs_hook=_without_repetition)
        table.pop("__metadata__", None)
        tensors = {name: _tensor(entry, first) for name, entry in table.items()}
    # What is not of the expected JSON types raises one of these.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from None
    for name, tensor in tensors.items():
        width = WIDTHS.get(tensor.dtype)
        wanted = None if width is None else math.prod(tensor.shape) * width
        found = tensor.stop - tensor.start
        # Dtypes of other widths are refused by whoever reads them, with a better message.
        if tensor.start < first or found < 0 or (wanted is not None and found != wanted):
            raise _damaged(path, f"{name} has {found} bytes, and its shape needs {wanted}")
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} occurs twice")
    return table


def _tensor(entry: Mapping[str, Any], first: int) -> TensorHeader:
    # The offsets of the file count from the end of its header.
    start, stop = entry["data_offsets"]
    return TensorHeader(
        dtype=str(entry["dtype"]),
        shape=tuple(int(length) for length in entry["shape"]),
        start=first + int(start),
        stop=first + int(stop),
    )


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"the file is damaged ({why})", where=str(path), remedy=_REMEDY)


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"the file cannot be read ({error})",
        where=str(path),
        remedy="give yourself permission to read it, or copy it again from its source",
    )


def read_rows(path: Path, tensor: TensorHeader, rows: range) -> list[bytes]:
    """Return the bytes of some rows of a matrix.

    Raises:
        ArtifactError: The file cannot be read.
    """
    # Rows of a matrix lie one behind the other, so one row is read without the others.
    row_bytes = (tensor.stop - tensor.start) // max(1, tensor.shape[0])
    found = []
    try:
        with path.open("rb") as file:
            for row in rows:
                file.seek(tensor.start + row * row_bytes)
                found.append(file.read(row_bytes))
    except OSError as error:
        raise _unreadable(path, error) from None
    return found
