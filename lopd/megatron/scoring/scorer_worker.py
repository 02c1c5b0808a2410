"""One rank of lopd.megatron.scoring.scorer.

It is started as ``python -m lopd.megatron.scoring.scorer_worker SPOOL``. It reads chunks of
responses in order, scores its share, and writes answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd.batching import build_microbatch, plan_step
from lopd.megatron.model.build import build_model
from lopd.megatron.model.inference import score_microbatches
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.rank_errors import reporting_errors
from lopd.megatron.scoring.exchange import (
    END,
    POLL_S,
    answers_path,
    read_job,
    read_numbers,
    requests_path,
    write_numbers,
)
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.transfer import load_hf
from lopd.records import Sample


def run(spool: Path) -> None:
    """Score all chunks of a spool. Collective."""
    folder, settings, entropy = read_job(spool)
    # Any seed: scoring draws no numbers.
    parallel.initialize(settings.parallel, seed=0, timeout_s=settings.timeout_s)
    arch = read_architecture(folder)
    # Nothing is kept for a backward pass, so there is nothing to recompute and nothing to balance.
    model = build_model(
        arch, parallel=settings.parallel, dtype=settings.dtype, recompute="none", moe_aux_loss=0.0
    )
    load_hf(model, arch, folder)
    number = 1
    while (chunk := _next_chunk(spool, number)) is not None:
        answers = answer(
            model, chunk, max_tokens=settings.max_tokens_per_microbatch, entropy=entropy
        )
        # Ranks with the same data rank have the same answers. One of them writes.
        if parallel.reports_for_data_rank():
            write_numbers(answers_path(spool, number, parallel.data_rank()), **answers)
        number += 1
    # A rank that left its groups early would make a collective of the others fail.
    parallel.barrier()
    parallel.shutdown()


def _next_chunk(spool: Path, number: int) -> dict[str, Any] | None:
    """Wait for a chunk and return it, or return None if there will be none.

    Every rank comes to the same result, without asking the others.
    """
    path = requests_path(spool, number)
    while True:
        # Looked for before the chunk. The scorer writes the chunk first and the end after it. So a
        # rank that sees the end sees every chunk there is.
        ended = (spool / END).exists()
        if path.exists():
            return read_numbers(path)
        if ended:
            return None
        time.sleep(POLL_S)


def answer(model: Any, chunk: dict[str, Any], *, max_tokens: int, entropy: bool) -> dict[str, Any]:
    """Score this data rank's share of a chunk. Collective.

    Args:
        model: This rank's part of the model.
        chunk: The requests: tokens, prompt_lens and response_lens.
        max_tokens: The largest number of tokens of a microbatch.
        entropy: Whether entropies are computed.

    Returns:
        index: int64 [n], which responses were scored. lengths: the number of tokens of each.
        logprobs and entropy: float32, of one response after the other. entropy is empty if it was
        not asked for.
    """
    prompt_lens = chunk["prompt_lens"]
    lengths = prompt_lens + chunk["response_lens"]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    multiple = parallel.tensor_size()
    # Every rank computes the plan of the whole chunk. It is the same one, so none is exchanged.
    plan = plan_step(
        lengths, parallel.data_size(), max_tokens, multiple, context=parallel.context_size()
    )
    own = plan[parallel.data_rank()]

    # The mask says which values are wanted: those of the responses.
    def sample(index: int) -> Sample:
        tokens = chunk["tokens"][bounds[index] : bounds[index + 1]].astype(np.int32)
        return Sample(token_ids=tokens, loss_mask=np.arange(len(tokens)) >= prompt_lens[index])

    microbatches = [
        build_microbatch([sample(index) for index in members], multiple) for members in own
    ]
    scored = score_microbatches(model, microbatches, entropy=entropy)
    columns: dict[str, list[Any]] = {"logprobs": [], "entropy": []}
    for microbatch, pair in zip(microbatches, scored, strict=True):
        # The mask was shifted with the labels. It marks the positions that predict the tokens of
        # responses, in the order of the samples.
        chosen = torch.as_tensor(microbatch.loss_mask, device=parallel.device())
        # Without entropies their column is empty, and not missing: the file always has both.
        for column, values in zip(columns.values(), pair, strict=True):
            column.append(
                np.zeros(0, np.float32) if values is None else values[chosen].float().cpu().numpy()
            )
    # The values above come in the order of the plan, so the requests are named in that order.
    order = np.concatenate(own).astype(np.int64)
    return {
        "index": order,
        "lengths": chunk["response_lens"][order],
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    }


if __name__ == "__main__":
    with reporting_errors():
        run(Path(sys.argv[1]))
