"""Scores for an audit.

They come from a Hugging Face model that this process runs in float32, or from columns of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.audit import Scores, distribution_scores, token_kind
from lopd.cache.columns import flat, loss_tokens
from lopd.errors import DataError
from lopd.records import Response
from lopd.tasks.tokenizer import decode, load_tokenizer

# The logits of a batch take this many tokens times the vocabulary times 8 bytes in float64.
_TOKENS_PER_BATCH = 8192


def score_with_model(
    folder: Path, responses: Sequence[Response], *, temperature: float, top_p: float
) -> Scores:
    """Compute the log-probability of every response token under a model, in one pass over all.

    Args:
        folder: A Hugging Face checkpoint.
        temperature: The temperature at which the log-probabilities are computed.
        top_p: The top-p to which the distribution is cut, in (0, 1].

    Raises:
        DataError: The model cannot be loaded, or its vocabulary is smaller than a token id.
    """
    import torch

    model = _load(folder)
    _check_vocabulary(folder, responses, int(model.config.get_text_config().vocab_size))
    found: list[Any] = [None] * len(responses)
    # Sorted by length, so that a batch needs little padding. `found` restores the order.
    for members in _batches(responses):
        sequences = [
            np.concatenate([responses[index].prompt_ids, responses[index].token_ids])
            for index in members
        ]
        width = max(len(sequence) for sequence in sequences)
        # Padded on the right: in a causal model no token attends to what comes after it, so no mask
        # is needed.
        ids = torch.zeros(len(members), width, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        # No gradient is needed, and this keeps no activations.
        with torch.inference_mode():
            # Position t predicts the token at t + 1, and the last position predicts nothing.
            logits = model(ids).logits[:, :-1]
            scores = distribution_scores(logits, ids[:, 1:], temperature=temperature, top_p=top_p)
        for row, index in enumerate(members):
            start = len(responses[index].prompt_ids) - 1
            part = slice(start, start + len(responses[index].token_ids))
            # The padding on the right is cut off with the prompt.
            found[index] = [column[row, part].numpy() for column in scores]
    logprobs, entropy, variance = (
        np.concatenate([columns[part] for columns in found]) for part in range(3)
    )
    # In the order of the responses, as the flat columns are.
    carries_loss = [_mask_of(response) for response in responses]
    lengths = np.array([mask.sum() for mask in carries_loss], dtype=np.int64)
    kinds = token_kinds(folder, responses)
    # What a tool or a template wrote was not drawn from any policy, so the test is not about it.
    sampled = np.concatenate(carries_loss)
    if kinds is not None:
        kinds = [kind for kind, is_sampled in zip(kinds, sampled, strict=True) if is_sampled]
    return Scores(logprobs[sampled], entropy[sampled], lengths, variance[sampled], kinds)


def _mask_of(response: Response) -> NDArray[np.bool_]:
    if response.loss_mask is None:
        return np.ones(len(response.token_ids), bool)
    return response.loss_mask


def _load(folder: Path) -> Any:
    """Load a Hugging Face model for inference. Raises DataError if it cannot be loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # transformers raises either error for a missing, damaged or unknown model.
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # From local files alone and without code from the checkpoint: an audit must not run what it
        # looks into.
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            # In 16 bits the rounding of log p would be as large as the drifts that are looked for.
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"the model cannot be loaded ({str(error).splitlines()[0]})",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint",
        ) from None
    # Without dropout.
    model.train(False)
    return model


def _check_vocabulary(folder: Path, responses: Sequence[Response], vocab_size: int) -> None:
    """Raise DataError if a token id is not in the vocabulary of the model."""
    # Without this check the embedding would fail with an index error that names no response.
    for response in responses:
        ids = np.concatenate([response.prompt_ids, response.token_ids])
        largest = int(ids.max(initial=0))
        if largest >= vocab_size:
            raise DataError(
                f"response {response.prompt_id}/{response.sample_index} has token id {largest}",
                where=str(folder),
                limit=f"at most {vocab_size - 1}: the vocabulary of the model has {vocab_size} "
                "tokens",
                remedy="give the model that belongs to these responses",
            )


def _batches(responses: Sequence[Response]) -> list[list[int]]:
    """Return the numbers of the responses in batches, the shortest sequences first."""
    widths = [len(response.prompt_ids) + len(response.token_ids) for response in responses]
    batches: list[list[int]] = []
    for index in sorted(range(len(responses)), key=widths.__getitem__):
        # The lengths ascend, so the newest sequence decides how wide its batch is.
        width = widths[index]
        if not batches or (len(batches[-1]) + 1) * width > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


def token_kinds(folder: Path, responses: Sequence[Response]) -> list[str] | None:
    """Return for every response token the kind of the token before it, by its text.

    Returns:
        One kind per token of all responses, or None if the folder has no tokenizer.
    """
    # Of the token before, because groups must not depend on the token that is drawn. See
    # lopd/audit/statistics.py.
    # The curve by kind is then left out. The verdict does not need it.
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    before = [np.concatenate([r.prompt_ids[-1:], r.token_ids[:-1]]) for r in responses]
    ids = np.concatenate(before)
    # Each id is decoded once. A corpus has millions of tokens and some ten thousand different ids.
    kinds = {int(token): token_kind(decode(tokenizer, [int(token)])) for token in np.unique(ids)}
    return [kinds[int(token)] for token in ids]


def score_from_columns(table: Any) -> Scores | None:
    """Return the scores of a cache's rows at temperature 1 and top-p 1.

    Returns:
        None if the table has no teacher_logprobs or no teacher_entropy.
    """
    # Only a cache that was scored with score.entropy has the second column.
    if not {"teacher_logprobs", "teacher_entropy"} <= set(table.column_names):
        return None
    logprobs, rows = flat(table, "teacher_logprobs")
    # As in score_with_model: only what a policy can have sampled is tested.
    sampled = loss_tokens(table)
    return Scores(
        logprobs[sampled].astype(np.float64),
        flat(table, "teacher_entropy")[0][sampled].astype(np.float64),
        np.bincount(rows[sampled], minlength=table.num_rows),
    )
