"""Scores for an audit: a Hugging Face model in float32 in this process, over responses that are
given; or columns of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.audit import Scores, distribution_scores, token_kind
from lopd.cache.columns import flat
from lopd.errors import DataError
from lopd.records import Response
from lopd.tasks.tokenizer import decode, load_tokenizer

_TOKENS_PER_BATCH = 8192


def score_with_model(
    folder: Path, responses: Sequence[Response], *, temperature: float, top_p: float
) -> Scores:
    """Every response token under the model, read with transformers in float32. Time: one forward
    pass of all sequences. DataError: no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be loaded ({str(error).splitlines()[0]})",
            where=str(folder),
            remedy="give a Hugging Face folder",
        ) from None
    model.train(False)
    _check_vocabulary(folder, responses, int(model.config.get_text_config().vocab_size))
    found: list[Any] = [None] * len(responses)
    order = sorted(
        range(len(responses)),
        key=lambda index: len(responses[index].prompt_ids) + len(responses[index].token_ids),
    )
    for members in _batches(order, responses):
        sequences = [
            np.concatenate([responses[index].prompt_ids, responses[index].token_ids]).astype(
                np.int64
            )
            for index in members
        ]
        width = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(
            len(members), width, dtype=torch.int64
        )  # padded on the right: no token attends to what comes after it
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
        with torch.inference_mode():
            logits = model(ids).logits[:, :-1]
            scores = distribution_scores(logits, ids[:, 1:], temperature=temperature, top_p=top_p)
        for row, index in enumerate(members):
            start = len(responses[index].prompt_ids) - 1
            part = slice(start, start + len(responses[index].token_ids))
            found[index] = [column[row, part].numpy() for column in scores]
    logprobs, entropy, variance = (
        np.concatenate([columns[part] for columns in found]) for part in range(3)
    )
    lengths = np.array([len(response.token_ids) for response in responses], dtype=np.int64)
    return Scores(logprobs, entropy, lengths, variance, token_kinds(folder, responses))


def _check_vocabulary(folder: Path, responses: Sequence[Response], vocab_size: int) -> None:
    for response in responses:
        largest = max(
            int(response.token_ids.max(initial=0)), int(response.prompt_ids.max(initial=0))
        )
        if largest >= vocab_size:
            limit = f"its vocabulary of {vocab_size}"
            raise DataError(
                f"response {response.prompt_id}/{response.sample_index} has token id {largest}",
                where=str(folder),
                limit=limit,
            )


def _batches(order: Sequence[int], responses: Sequence[Response]) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:  # ascending, so the newest is the widest
        width = len(responses[index].prompt_ids) + len(responses[index].token_ids)
        if not batches or (len(batches[-1]) + 1) * width > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


def token_kinds(folder: Path, responses: Sequence[Response]) -> list[str] | None:
    """For every response token the kind, by its text, of the token before it; None where the folder
    has no tokenizer.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    ids = np.concatenate(
        [
            np.concatenate([response.prompt_ids[-1:], response.token_ids[:-1]])
            for response in responses
        ]
    )
    kinds = {int(token): token_kind(decode(tokenizer, [int(token)])) for token in np.unique(ids)}
    return [kinds[int(token)] for token in ids]


def score_from_columns(table: Any) -> Scores | None:
    """teacher_logprobs and teacher_entropy of a cache's rows (temperature 1, top-p 1), where it has
    both.
    """
    if not {"teacher_logprobs", "teacher_entropy"} <= set(table.column_names):
        return None
    logprobs, rows = flat(table, "teacher_logprobs")
    return Scores(
        logprobs.astype(np.float64),
        flat(table, "teacher_entropy")[0].astype(np.float64),
        np.bincount(rows, minlength=table.num_rows),
    )
