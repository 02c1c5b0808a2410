"""Rendered prompts that are kept beside the run, so that each question is rendered once.

A run renders the same prompts several times: its check counts tokens, demonstrate or rollout
samples, evaluate samples too, and the next command does all of it again. The token ids of a prompt
set are therefore kept in one file of the run directory.

An entry is found by a hash of the prompt's messages, and the file by a fingerprint of everything
else that decides the ids: the files of the tokenizer, the chat template, the knob ``thinking``, the
time that a template reads, and the versions of the libraries. So a changed prompt is rendered
again, and after a change of the template or the tokenizer all prompts are.

The checks write nothing. What they have rendered is held in memory until the run directory is
locked (``write_held``).
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts import publish_bytes, sha256_file, sha256_json
from lopd.records import Ints, Prompt
from lopd.tasks.chat_template import CLOCK
from lopd.tasks.light_tokenizer import FILES

# The folder in a run directory, with one file for each prompt set.
FOLDER = "prompts"
# Bytes of a key. Among a billion prompts no two have one key by chance.
_KEY_BYTES = 16
# The key of the fingerprint in the metadata of the file.
_FINGERPRINT = b"lopd.rendered"
# Libraries whose next version may render or cut a text in another way.
_LIBRARIES = ("jinja2", "tokenizers", "transformers")

# Token ids [P] by the key of the prompt.
TokenIds: TypeAlias = dict[bytes, Ints]


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the rendered prompts of a set are kept.

    Attributes:
        path: The file.
        can_write: Whether the file may be written. Otherwise what is new is held in memory.
    """

    path: Path
    can_write: bool


# What has been rendered and not written, by the file that it belongs to.
_HELD: dict[Path, tuple[str, TokenIds]] = {}


def kept_in(run_dir: Path, prompt_set: str, *, can_write: bool = False) -> Kept:
    """Return where a run keeps the rendered prompts of a set ("sft", "opd" or "eval")."""
    return Kept(run_dir / FOLDER / f"{prompt_set}.parquet", can_write)


def key_of(prompt: Prompt) -> bytes:
    """Return the key of a prompt: a hash of what a template can see of it."""
    # The order of the keys is kept, because a template can go through a message.
    text = json.dumps([dict(message) for message in prompt.messages])
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


def fingerprint_of(tokenizer: Any, thinking: bool, time: datetime.datetime | None) -> str:
    """Return a fingerprint of all that decides the token ids of given messages.

    It is "" where that is not known: the tokenizer comes from no folder, or its template reads the
    present time.
    """
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or ""))
    if not (folder / "tokenizer.json").is_file():
        return ""
    # Some checkpoints have several templates by name.
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    # The present time is another one at the next call, so nothing that is kept could be right then.
    if CLOCK in template and time is None:
        return ""
    return sha256_json(
        {
            "template": template,
            "thinking": thinking,
            "time": time.isoformat() if time is not None and CLOCK in template else None,
            "files": {
                name: sha256_file(folder / name) for name in FILES if (folder / name).is_file()
            },
            # A library's next version may cut a text in another way, with the same files.
            "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )


def read_kept(kept: Kept, fingerprint: str) -> TokenIds:
    """Return what is kept under this fingerprint; nothing where the file does not fit.

    A file that is missing, damaged or of another fingerprint has nothing: it saves time and proves
    nothing.
    """
    # What is held is newer than the file: the checks of this process have just rendered it.
    held_fingerprint, held = _HELD.get(kept.path, ("", {}))
    if held_fingerprint == fingerprint:
        return held
    try:
        # Damaged token ids would become prompts of the run, so the checksums of the pages count.
        with pq.ParquetFile(kept.path, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
                return {}
            table = file.read().combine_chunks()
        return _from_table(table)
    except (OSError, pa.ArrowException, KeyError):
        return {}


def is_written(kept: Kept) -> bool:
    """Return whether the file has what was kept last."""
    return kept.path not in _HELD and kept.path.exists()


def keep(kept: Kept, fingerprint: str, token_ids: TokenIds) -> None:
    """Keep the rendered prompts of a set in place of what was kept before.

    Raises:
        ArtifactError: The file may be written, but the disk is full, read-only or forbidden.
    """
    # Checks may run beside another command, which owns the run directory, so they only remember.
    if kept.can_write:
        _write(kept.path, fingerprint, token_ids)
        _HELD.pop(kept.path, None)
    else:
        _HELD[kept.path] = (fingerprint, token_ids)


def write_held(run_dir: Path) -> None:
    """Write what the checks of this process have rendered for a run, and give the memory back.

    Raises:
        ArtifactError: The disk is full, read-only or forbidden.
    """
    for path in [path for path in _HELD if path.parent == run_dir / FOLDER]:
        fingerprint, token_ids = _HELD.pop(path)
        _write(path, fingerprint, token_ids)


def _write(path: Path, fingerprint: str, token_ids: Mapping[bytes, Ints]) -> None:
    columns = list(token_ids.values())
    offsets = np.cumsum([0, *map(len, columns)], dtype=np.int64)
    flat = np.concatenate(columns) if columns else np.zeros(0, np.int32)
    # A large list: 300,000 long prompts have more tokens than 32 bits of offsets can count.
    ids = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    keys = pa.array(list(token_ids), pa.binary(_KEY_BYTES))
    table = pa.table({"key": keys, "token_ids": ids})
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_FINGERPRINT: fingerprint.encode()}),
        sink,
        compression="zstd",
        # The smallest and the largest key of a page help nobody: the whole file is always read.
        write_statistics=False,
        write_page_checksum=True,
        store_schema=True,
    )
    publish_bytes(path, sink.getvalue())


def _from_table(table: pa.Table) -> TokenIds:
    # A column without rows has no chunk whose buffers could be taken below.
    if not table.num_rows:
        return {}
    column = table.column("token_ids").chunk(0)
    offsets = column.offsets.to_numpy().tolist()
    # Views into one array. 300,000 arrays of their own would take much longer to make.
    flat = column.values.to_numpy()
    keys = table.column("key").to_pylist()
    ends = zip(keys, offsets[:-1], offsets[1:], strict=True)
    return {key: flat[start:stop] for key, start, stop in ends}
