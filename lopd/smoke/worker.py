"""One rank of the smoke run, started by torchrun: ``python -m lopd.smoke.worker JOB.json``. Rank 0
says a line for each thing that works.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional

from lopd.batching import build_microbatch, plan_step
from lopd.config import SyncSection
from lopd.errors import TrainingError
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.rank_errors import reporting_errors
from lopd.megatron.training.trainer import Trainer
from lopd.objective.lightning import Lightning
from lopd.records import Microbatch, Sample
from lopd.smoke.forms import FORMS, Form
from lopd.stages.sync import StudentWeights
from lopd.stages.training import SERVER_KEY
from sglang_rollout.requests.client import SGLangEngine

FIRST_TOKEN = 4  # ids below it are special


def say(line: str) -> None:
    """On rank 0 alone, with the mark that the parent looks for."""
    if parallel.rank() == 0:
        sys.stdout.write(f"smoke: {line}\n")
        sys.stdout.flush()


def run(form: Form, model: Path, url: str, folder: Path) -> None:
    collectives(form)
    objective = Lightning()
    trainer = Trainer(
        form.training,
        model_dir=model,
        init="checkpoint",
        init_std=0.02,
        seed=1,
        objective=objective,
        checkpoint_dir=None,
    )
    attention(form, trainer)
    samples = _samples(form)
    microbatches = _microbatches(form, samples)
    for _ in range(form.training.num_steps):
        result = trainer.train_step(microbatches)
        memory = result.metrics["peak_memory_gib"]
        say(
            f"step {result.step}: loss {result.loss:.3f}, {result.seconds:.1f} s, {result.tokens_per_s:,.0f} tokens/s, {memory:.1f} GiB"
        )
    engine = (
        SGLangEngine(url, os.environ[SERVER_KEY], form.server) if parallel.rank() == 0 else None
    )
    for transport in form.transports:
        trainer.train_step(
            microbatches
        )  # new weights each time: a transport that changes nothing must not find the former one's
        start = time.perf_counter()
        settings = SyncSection.model_validate({"transport": transport})
        weights = StudentWeights(
            trainer,
            samples,
            settings,
            engine,
            folder=folder / f"sync-{transport}",
            template=model,
            weights_file=None,
        )
        weights.push(f"smoke-{transport}")
        parallel.barrier()
        say(
            f"weights by {transport}: {time.perf_counter() - start:.1f} s, every tensor the same in the server"
        )


def collectives(form: Form) -> None:
    """Sums and exchanges over all ranks, and what they carry. TrainingError: a wrong sum."""
    ranks, rank, device = parallel.world_size(), parallel.rank(), parallel.device()
    values = torch.full((form.collective_elements,), float(rank + 1), device=device)
    seconds = _timed(lambda: dist.all_reduce(values))
    expected = ranks * (ranks + 1) / 2
    if not (values == expected).all():
        raise TrainingError(
            f"all-reduce over {ranks} ranks gave {values[0].item():g}",
            where="collectives",
            limit=f"{expected:g}",
        )
    gathered = [torch.empty(1, device=device) for _ in range(ranks)]
    dist.all_gather(gathered, torch.tensor([float(rank)], device=device))
    if [int(each) for each in gathered] != list(range(ranks)):
        raise TrainingError(
            f"all-gather gave {[int(each) for each in gathered]}",
            where="collectives",
            limit=f"0 to {ranks - 1}",
        )
    bandwidth = 2 * (ranks - 1) / ranks * values.nbytes / seconds / 1e9
    say(
        f"collectives: {dist.get_backend()}, {ranks} ranks, all-reduce of {values.nbytes / 2**20:.2f} MiB at {bandwidth:.1f} GB/s"
    )


def _timed(call: Any) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attention(form: Form, trainer: Trainer) -> None:
    """The model's attention over packed sequences of several lengths against torch's over each
    alone. TrainingError: they differ.
    """
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    core = next(
        module for name, module in trainer.module.named_modules() if name.endswith("core_attention")
    )
    config, dtype, device = (
        trainer.module.config,
        next(trainer.module.parameters()).dtype,
        parallel.device(),
    )
    tensor = parallel.tensor_size()
    lengths = [form.sequence_len, form.sequence_len // 2, 3]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(3)
    heads = (
        config.num_attention_heads // tensor,
        config.num_query_groups // tensor,
        config.num_query_groups // tensor,
    )
    query, key, value = (
        torch.randn(sum(lengths), count, config.kv_channels, generator=generator).to(device, dtype)
        for count in heads
    )
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    with torch.no_grad():
        found = core(
            query,
            key,
            value,
            None,
            attn_mask_type=AttnMaskType.padding_causal,
            attention_bias=None,
            packed_seq_params=packed,
        )
    expected = torch.cat(
        [
            _alone(*(each[start:stop].float() for each in (query, key, value)))
            for start, stop in itertools.pairwise(bounds.tolist())
        ]
    )
    difference = (found.reshape(expected.shape).float() - expected).abs().max().item()
    across = (
        (_alone(query.float(), key.float(), value.float()) - expected).abs().max().item()
    )  # as if all were one sequence
    assert across > 10 * form.attention_tolerance, (
        "this comparison would not notice attention across sequences"
    )
    if not difference <= form.attention_tolerance:
        where = f"attention ({type(core).__name__})"
        raise TrainingError(
            f"packed sequences differ by {difference:.1e} from each alone",
            where=where,
            limit=f"{form.attention_tolerance:g}",
        )
    say(
        f"attention: {type(core).__name__} over packed sequences, {difference:.0e} from torch's over each alone (across them: {across:.1f})"
    )


def _alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L, heads, head_dim] each, of one sequence; gives [L, heads, head_dim]."""
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[
        0
    ].transpose(0, 1)


def _samples(form: Form) -> list[Sample]:
    """Random responses, the same on every rank."""
    generator = np.random.default_rng(7)
    samples = []
    for _ in range(form.num_sequences):
        length = int(generator.integers(form.sequence_len // 2, form.sequence_len))
        mask = np.arange(length) >= length // 4
        teacher, sampling = (-5 * generator.random(length, dtype=np.float32) for _ in range(2))
        samples.append(
            Sample(
                generator.integers(FIRST_TOKEN, 500, length).astype(np.int32),
                mask,
                sampling,
                teacher,
            )
        )
    return samples


def _microbatches(form: Form, samples: Sequence[Sample]) -> list[Microbatch]:
    """This data rank's part."""
    tensor = parallel.tensor_size()
    plan = plan_step(
        [len(sample) for sample in samples],
        parallel.data_size(),
        form.training.max_tokens_per_microbatch,
        tensor,
    )
    return [
        build_microbatch([samples[index] for index in members], tensor)
        for members in plan[parallel.data_rank()]
    ]


def _start_shared_memory() -> None:
    """Starts torch's helper for named shared memory, which the transport ``tensor`` uses on a CPU,
    without our stderr.

    It lives as long as the server has that memory mapped, longer than this rank. With our stderr it
    would hold the pipe whose end run_ranks waits for.
    """
    if torch.cuda.is_available():
        return
    multiprocessing: Any = torch.multiprocessing
    before, stderr = multiprocessing.get_sharing_strategy(), os.dup(2)
    multiprocessing.set_sharing_strategy("file_system")
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            torch.UntypedStorage._new_shared(1, device="cpu")  # type: ignore[no-untyped-call]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        multiprocessing.set_sharing_strategy(before)


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text(encoding="utf-8"))
    form = FORMS[job["form"]]
    _start_shared_memory()
    with reporting_errors():
        parallel.initialize(form.training.parallel, seed=1, timeout_s=form.training.timeout_s)
        run(form, Path(job["model"]), job["url"], Path(job["folder"]))
        parallel.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
