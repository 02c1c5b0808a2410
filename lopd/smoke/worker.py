"""One rank of the smoke run: ``python -m lopd.smoke.worker JOB.json``, started by torchrun.

Rank 0 prints one line for each thing that works.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
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

# Random token ids are from FIRST_TOKEN on and below LAST_TOKEN. Ids below are special tokens, and
# the vocabulary of the small form ends at 512.
FIRST_TOKEN = 4
LAST_TOKEN = 500


def print_line(line: str) -> None:
    """Print a line on rank 0, with the mark by which the parent process knows it."""
    if parallel.rank() == 0:
        sys.stdout.write(f"smoke: {line}\n")
        sys.stdout.flush()


def run(form: Form, model: Path, url: str, folder: Path) -> None:
    """Try collectives, attention, training steps and weight syncs, in this order.

    Args:
        form: The form of the smoke run.
        model: The model folder.
        url: The address of the SGLang server.
        folder: The folder for files of the weight syncs.

    Raises:
        LopdError: The first thing that does not work.
    """
    # From the simplest to the most complex: if a collective is wrong, nothing after it says why.
    check_collectives(form)
    trainer = Trainer(
        form.training,
        model_dir=model,
        init="checkpoint",
        init_std=0.02,
        seed=1,
        objective=Lightning(),
        checkpoint_dir=None,
    )
    # Wrong attention gives a plausible loss, so it is compared before any step.
    check_attention(form, trainer)
    # Random text is enough: the machinery is tried here, and not what a model learns.
    samples = _random_samples(form)
    # The same batch in every step, so that the losses can be compared.
    microbatches = _microbatches_of_this_rank(form, samples)
    for _ in range(form.training.num_steps):
        result = trainer.train_step(microbatches)
        print_line(
            f"step {result.step}: loss {result.loss:.3f}, {result.seconds:.1f} s, "
            f"{result.tokens_per_s:,.0f} tokens/s, {result.metrics['peak_memory_gib']:.1f} GiB"
        )
    # Only rank 0 talks to the server.
    engine = None
    if parallel.rank() == 0:
        engine = SGLangEngine(url, os.environ[SERVER_KEY], form.server)
    for transport in form.transports:
        # New weights for each transport. Otherwise one that changes nothing would find the weights
        # of the transport before it, and pass.
        trainer.train_step(microbatches)
        start = time.perf_counter()
        # The very object that distill syncs with, made anew for each transport.
        weights = StudentWeights(
            trainer,
            samples,
            SyncSection.model_validate({"transport": transport}),
            engine,
            folder=folder / f"sync-{transport}",
            template=model,
            weights_file=None,
        )
        # push() compares every tensor with the server's before it returns.
        weights.push(f"smoke-{transport}")
        parallel.barrier()
        seconds = time.perf_counter() - start
        print_line(f"weights by {transport}: {seconds:.1f} s, every tensor the same in the server")


def check_collectives(form: Form) -> None:
    """Sum and exchange numbers over all ranks, and measure the bandwidth.

    Args:
        form: The form, which has the number of elements.

    Raises:
        TrainingError: A result is wrong.
    """
    ranks = parallel.world_size()
    rank = parallel.rank()
    device = parallel.device()
    # Each rank puts in another number, so a rank that is missing or counted twice changes the sum.
    values = torch.full((form.collective_elements,), float(rank + 1), device=device)
    # The first collective also opens the connections, which the time includes.
    seconds = _seconds_of(lambda: dist.all_reduce(values))
    # Rank i has put in i + 1. Float32 is exact for such small whole numbers.
    expected = ranks * (ranks + 1) / 2
    if not (values == expected).all():
        raise TrainingError(
            f"all-reduce over {ranks} ranks gave the wrong sum {values[0].item():g}",
            where="collectives",
            limit=f"exactly {expected:g}",
            remedy="check the GPUs, the driver and the NCCL settings of this machine",
        )
    # The order of ranks matters to every gather of shards, and a sum does not show it.
    gathered = [torch.empty(1, device=device) for _ in range(ranks)]
    dist.all_gather(gathered, torch.tensor([float(rank)], device=device))
    found = [int(each) for each in gathered]
    if found != list(range(ranks)):
        raise TrainingError(
            f"all-gather gave the wrong values {found}",
            where="collectives",
            limit=f"exactly 0 to {ranks - 1}, in this order",
            remedy="check the GPUs, the driver and the NCCL settings of this machine",
        )
    # A ring all-reduce sends each number 2 (n - 1) / n times from every rank. In GB/s.
    bandwidth = 2 * (ranks - 1) / ranks * values.nbytes / seconds / 1e9
    print_line(
        f"collectives: {dist.get_backend()}, {ranks} ranks, "
        f"all-reduce of {values.nbytes / 2**20:.2f} MiB at {bandwidth:.1f} GB/s"
    )


def _seconds_of(call: Callable[[], object]) -> float:
    """Return the time of a call, with the work that it gives to a GPU."""
    _wait_for_gpu()
    # A GPU works behind the calls. Without the two waits only the launches would be timed.
    start = time.perf_counter()
    call()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_attention(form: Form, trainer: Trainer) -> None:
    """Compare the model's attention over packed sequences with torch's over each one alone.

    Args:
        form: The form, which has the tolerance.
        trainer: The trainer with the model.

    Raises:
        TrainingError: They differ by more than the tolerance.
    """
    # The layers are alike, so the first one stands for all.
    core = next(
        module for name, module in trainer.module.named_modules() if name.endswith("core_attention")
    )
    config = trainer.module.config
    tensor = parallel.tensor_size()
    # A long sequence, a shorter one, and one that is shorter than any block of a kernel.
    lengths = [form.sequence_len, form.sequence_len // 2, 3]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=parallel.device())
    # Each tensor rank has its own share of the heads, and checks that share.
    queries = config.num_attention_heads // tensor
    groups = config.num_query_groups // tensor
    dtype = next(trainer.module.parameters()).dtype
    # On the CPU, so that the numbers are the same on every machine.
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(sum(lengths), heads, config.kv_channels, generator=generator).to(
            parallel.device(), dtype
        )
        for heads in (queries, groups, groups)
    )
    found = _packed_attention(core, query, key, value, bounds, max(lengths))
    # The reference is in float32, so that the difference is the error of the model's attention.
    reference = [each.float() for each in (query, key, value)]
    expected = torch.cat(
        [
            _attention_alone(*(each[start:stop] for each in reference))
            for start, stop in itertools.pairwise(bounds.tolist())
        ]
    )
    difference = (found.reshape(expected.shape).float() - expected).abs().max().item()
    # A control: attention over all tokens as if they were one sequence must be far off.
    across = (_attention_alone(*reference) - expected).abs().max().item()
    assert across > 10 * form.attention_tolerance, (
        "this comparison would not notice attention across sequences"
    )
    # Not `difference > tolerance`: a difference that is no number must fail too.
    if not difference <= form.attention_tolerance:
        raise TrainingError(
            f"the outputs for packed sequences differ by {difference:.1e} from those for "
            "each sequence alone",
            where=f"attention ({type(core).__name__})",
            limit=f"at most {form.attention_tolerance:g}",
            remedy="install the versions that docs/image.md names: a training with this attention "
            "would let sequences see each other",
        )
    print_line(
        f"attention: {type(core).__name__} over packed sequences, {difference:.0e} from torch's "
        f"over each alone (across them: {across:.1f})"
    )


def _packed_attention(
    core: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int
) -> Tensor:
    """Run Megatron-Core's attention over packed sequences.

    Args:
        core: The module.
        query: Tensor of shape [tokens, heads, head_dim].
        key: Tensor of shape [tokens, groups, head_dim].
        value: Tensor of shape [tokens, groups, head_dim].
        bounds: Int32 tensor with the start of each sequence, and the end of the last one.
        longest: Tokens of the longest sequence.
    """
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    # thd: the tokens of all sequences follow each other, without padding. The bounds tell them
    # apart.
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    with torch.no_grad():
        found: Tensor = core(
            query,
            key,
            value,
            None,
            # The mask that a packed microbatch has in training.
            attn_mask_type=AttnMaskType.padding_causal,
            attention_bias=None,
            packed_seq_params=packed,
        )
    return found


def _attention_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's causal attention over one sequence.

    Args:
        query: Tensor of shape [tokens, heads, head_dim].
        key: Tensor of shape [tokens, groups, head_dim].
        value: Tensor of shape [tokens, groups, head_dim].

    Returns:
        Tensor of shape [tokens, heads, head_dim].
    """
    # torch wants [1, heads, tokens, head_dim]. It repeats the groups for the heads itself.
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return found[0].transpose(0, 1)


def _random_samples(form: Form) -> list[Sample]:
    """Return random responses. A fixed seed makes them the same on every rank."""
    generator = np.random.default_rng(7)
    samples = []
    for _ in range(form.num_sequences):
        # Different lengths, so that packing has something to do.
        length = int(generator.integers(form.sequence_len // 2, form.sequence_len))
        # The first quarter is the prompt, which carries no loss.
        mask = np.arange(length) >= length // 4
        # Log-probabilities between -5 and 0.
        teacher, sampling = (-5 * generator.random(length, dtype=np.float32) for _ in range(2))
        token_ids = generator.integers(FIRST_TOKEN, LAST_TOKEN, length).astype(np.int32)
        samples.append(Sample(token_ids, mask, sampling, teacher))
    return samples


def _microbatches_of_this_rank(form: Form, samples: Sequence[Sample]) -> list[Microbatch]:
    """Return the microbatches of this data-parallel rank."""
    tensor = parallel.tensor_size()
    # The same plan on every rank, made from the lengths alone. Each rank takes its own part.
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
    """Start torch's helper for named shared memory without our stderr.

    The transport ``tensor`` uses such memory on a CPU. The helper lives as long as the server has
    the memory mapped, which is longer than this rank lives. With our stderr it would hold the pipe
    open whose end run_ranks waits for.
    """
    if torch.cuda.is_available():
        return
    multiprocessing: Any = torch.multiprocessing
    strategy = multiprocessing.get_sharing_strategy()
    # The helper inherits what is open when it starts, so descriptor 2 itself is exchanged for a
    # moment.
    stderr = os.dup(2)
    multiprocessing.set_sharing_strategy("file_system")
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            # The first shared storage starts the helper, which inherits this stderr.
            torch.UntypedStorage._new_shared(1, device="cpu")  # type: ignore[no-untyped-call]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        multiprocessing.set_sharing_strategy(strategy)


def main(job_file: Path) -> None:
    """Run one rank.

    Args:
        job_file: JSON file with the form, the model folder, the server's address and a folder.
    """
    job = json.loads(job_file.read_text(encoding="utf-8"))
    form = FORMS[job["form"]]
    # Before any other thread or library uses shared memory.
    _start_shared_memory()
    with reporting_errors():
        # An error in a rank becomes one line in the parent (reporting_errors).
        parallel.initialize(form.training.parallel, seed=1, timeout_s=form.training.timeout_s)
        run(form, Path(job["model"]), job["url"], Path(job["folder"]))
        parallel.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
