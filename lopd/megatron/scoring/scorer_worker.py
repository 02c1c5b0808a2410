"""One rank of lopd.megatron.scoring.scorer: ``python -m lopd.megatron.scoring.scorer_worker
SPOOL``. Reads chunks of responses in order, scores its share, writes answers.
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
from lopd.megatron.scoring.scorer import END, POLL_S, read_job, read_numbers, write_numbers
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.transfer import load_hf
from lopd.records import Sample


def run(spool: Path) -> None:
    folder, settings, entropy = read_job(spool)
    parallel.initialize(settings.parallel, seed=0, timeout_s=settings.timeout_s)
    arch = read_architecture(folder)
    model = build_model(
        arch, parallel=settings.parallel, dtype=settings.dtype, recompute="none", moe_aux_loss=0.0
    )
    load_hf(model, arch, folder)
    number = 1
    while (chunk := _next(spool, number)) is not None:
        answers = answer(
            model, chunk, max_tokens=settings.max_tokens_per_microbatch, entropy=entropy
        )
        if parallel.reports_for_data_rank():
            write_numbers(spool / f"out-{number:06d}-{parallel.data_rank():04d}.npz", **answers)
        number += 1
    parallel.barrier()
    parallel.shutdown()


def _next(spool: Path, number: int) -> dict[str, Any] | None:
    """The chunk of this number, once it is there; None: there will be none. Every rank comes to the
    same answer.
    """
    path = spool / f"in-{number:06d}.npz"
    while True:
        ended = (spool / END).exists()  # before the chunk, which is written before it
        if path.exists():
            return read_numbers(path)
        if ended:
            return None
        time.sleep(POLL_S)


def answer(model: Any, chunk: dict[str, Any], *, max_tokens: int, entropy: bool) -> dict[str, Any]:
    """This data rank's share: index int64 [n] of its responses, their lengths, and their
    log-probabilities (and entropies), one after the other.
    """
    prompt_lens, lengths = chunk["prompt_lens"], chunk["prompt_lens"] + chunk["response_lens"]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    multiple = parallel.tensor_size()
    plan = plan_step(
        lengths, parallel.data_size(), max_tokens, multiple, context=parallel.context_size()
    )[parallel.data_rank()]

    def sample(index: int) -> Sample:
        tokens = chunk["tokens"][bounds[index] : bounds[index + 1]].astype(np.int32)
        return Sample(token_ids=tokens, loss_mask=np.arange(len(tokens)) >= prompt_lens[index])

    microbatches = [
        build_microbatch([sample(index) for index in members], multiple) for members in plan
    ]
    scored = score_microbatches(model, microbatches, entropy=entropy)
    columns: dict[str, list[Any]] = {"logprobs": [], "entropy": []}
    for microbatch, pair in zip(microbatches, scored, strict=True):
        chosen = torch.as_tensor(
            microbatch.loss_mask, device=parallel.device()
        )  # the places that predict a response's tokens, in order
        for column, values in zip(columns.values(), pair, strict=True):
            column.append(
                np.zeros(0, np.float32) if values is None else values[chosen].float().cpu().numpy()
            )
    order = np.concatenate(plan).astype(np.int64)
    return {
        "index": order,
        "lengths": chunk["response_lens"][order],
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    }


if __name__ == "__main__":
    with reporting_errors():
        run(Path(sys.argv[1]))
