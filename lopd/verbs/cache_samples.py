"""Chooses responses of an artifact and finds the texts that a reader of them sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lopd.errors import DataError
from lopd.report.cache_view import ShownResponse

if TYPE_CHECKING:
    from collections.abc import Callable


def require_responses(folder: Path) -> None:
    """Refuse a folder that has no responses itself but contains artifacts that may have some.

    The error lists these artifacts."""
    from lopd.artifacts import MANIFEST, read_manifest

    # A user names the folder of a stage, and evaluate keeps one artifact for each model inside of
    # it.
    inner = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if (folder / MANIFEST).is_file():
        shards = read_manifest(folder).shards
        # A folder without any file yet is an artifact that is being made.
        if not inner and (not shards or any(one.name.endswith(".parquet") for one in shards)):
            return
    if inner:
        raise DataError(
            "holds no responses itself",
            where=str(folder),
            limit=f"one of its folders: {', '.join(inner):.400}",
            remedy=f"for example: lopd cache inspect {folder / inner[0]} --sample 3",
        )


def sample_of(folder: Path, count: int, seed: int, tokenizer: Path | None) -> list[ShownResponse]:
    """Return random responses with their texts, scores and verdicts."""
    import numpy as np

    from lopd.artifacts import read_manifest
    from lopd.cache import read_rows
    from lopd.tasks.tokenizer import decode, load_tokenizer, token_texts
    from lopd.tasks.tokenizer_folder import tokenizer_folder
    from lopd.tasks.verdict_files import read_verdicts

    # The manifest knows the number of rows. Counting would read the whole cache.
    rows = read_manifest(folder).rows
    chosen = set(np.random.default_rng(seed).choice(rows, min(count, rows), replace=False).tolist())
    source = tokenizer_folder(folder, tokenizer)
    # Without a tokenizer the ids themselves are shown.
    loaded = load_tokenizer(source) if source is not None else None
    verdicts = read_verdicts(folder)
    shown = []
    # read_rows goes through the cache once and in order, so a cache of any size can be shown.
    for index, (response, scores) in enumerate(read_rows(folder, without_sampling=True)):
        if index not in chosen:
            continue
        if loaded is None:
            prompt = " ".join(map(str, response.prompt_ids.tolist()))
            pieces = [f"{token} " for token in response.token_ids.tolist()]
        else:
            prompt = decode(loaded, response.prompt_ids)
            pieces = [*token_texts(loaded, response.token_ids.tolist())]
        verdict = verdicts.get(response.key)
        told = None if verdict is None else ("right" if verdict.right else "wrong")
        why = (
            [] if verdict is None else [verdict.reason, verdict.found and f"found {verdict.found}"]
        )
        told = told and ", ".join([told, *filter(None, why)])
        shown.append(ShownResponse(response, scores, prompt, pieces, told))
    return shown


def token_text(folder: Path, tokenizer: Path | None) -> Callable[[int], str]:
    """Return a function from a token id to its text, or to its number without a tokenizer."""
    from lopd.tasks.tokenizer import decode, load_tokenizer
    from lopd.tasks.tokenizer_folder import tokenizer_folder

    source = tokenizer_folder(folder, tokenizer)
    if source is None:
        return lambda token: f"{token} "
    loaded = load_tokenizer(source)
    return lambda token: decode(loaded, [token])
