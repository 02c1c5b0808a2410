"""SGLang with a small random Qwen3-MoE: sampling, scoring, weights between steps, co-location.

Variants: `seeded` samples as the recipes do (deterministic: a seed fixes a response) and syncs
weights by each transport; `free` samples without that, for the price of it; `colocation` lets the
server give its memory back and take it again, with a sync between.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmarks import weight_sync
from benchmarks.gpu.part import arguments
from benchmarks.gpu.sheet import Sheet

from lopd.config import SGLangSection, SyncSection
from lopd.errors import LopdError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import Colocation, build_receiver

FULL: dict[str, Any] = {"megabytes": 1_000, "dtype": "bfloat16", "hidden": 2_048, "width": 768}
FULL |= {"experts": 64, "requests": 512, "prompt": 128, "new_tokens": 256, "repeats": 3}
TINY: dict[str, Any] = {"megabytes": 3, "dtype": "float32", "hidden": 64, "width": 32}
TINY |= {"experts": 4, "requests": 8, "prompt": 8, "new_tokens": 12, "repeats": 1}
BUCKET_BYTES = 512 * 2**20
WITHOUT_FLASH = {"attention_backend": "triton", "sampling_backend": "pytorch"}
GIB = 2**30


def main() -> None:
    options = arguments(__doc__)
    sheet = Sheet(options.out, f"serving, {options.variant}", dry_run=options.dry_run)
    sizes = TINY if options.dry_run else FULL
    torch.set_num_threads(1 if options.dry_run else 8)
    with tempfile.TemporaryDirectory(prefix="lopd-gpu-") as scratch:
        folder = Path(scratch)
        shape = {name: sizes[name] for name in ("hidden", "width", "experts")}
        dtype = getattr(torch, sizes["dtype"])
        model = folder / "model"
        num_bytes = weight_sync.write_model(model, sizes["megabytes"], dtype, **shape)
        sheet.add("model", {"bytes": num_bytes, "dtype": sizes["dtype"], **shape})
        colocated = options.variant == "colocation"
        section = settings(sizes, options.variant, dry_run=options.dry_run)
        began = time.perf_counter()
        log = options.out.with_suffix(".server.log")
        log.unlink(missing_ok=True)
        with SGLangServer(model, section, log=log) as server:
            engine = SGLangEngine(server.url, server.api_key, section, server=server)
            backends = section.extra_args or {"backends": "SGLang's choice"}
            sheet.add("start", {"seconds": time.perf_counter() - began, **backends})
            if colocated:
                take_turns(sheet, engine, model, folder)
            else:
                sample_and_score(sheet, engine, sizes)
            if options.variant == "seeded":
                for transport in ("tensor", "distributed"):
                    sync(sheet, engine, model, folder / transport, transport, sizes["repeats"])
    sheet.done()


def settings(sizes: dict[str, Any], variant: str, *, dry_run: bool) -> SGLangSection:
    extra: dict[str, Any] = {}
    if not dry_run:
        extra = {} if has_flash() else dict(WITHOUT_FLASH)
        if variant == "colocation":
            extra["enable_memory_saver"] = True
    return SGLangSection(
        dtype=sizes["dtype"],
        context_length=sizes["prompt"] + sizes["new_tokens"],
        max_running_requests=min(256, sizes["requests"]),
        max_in_flight=sizes["requests"],
        max_total_tokens=4096 if dry_run else None,
        mem_fraction=0.3,
        deterministic=variant != "free",
        restarts=0,
        start_timeout_s=140,
        extra_args=extra,
    )


def has_flash() -> bool:
    """Whether SGLang's own attention and FlashInfer are there, which it takes by itself."""
    kernel = importlib.util.find_spec("sgl_kernel")
    if kernel is None or kernel.origin is None or importlib.util.find_spec("flashinfer") is None:
        return False
    return bool([*Path(kernel.origin).parent.glob("flash_ops*")])


# ---- sampling and scoring --------------------------------------------------------------------


def sample_and_score(sheet: Sheet, engine: SGLangEngine, sizes: dict[str, Any]) -> None:
    generator = np.random.default_rng(5)
    shape = (sizes["requests"], sizes["prompt"])
    prompts = generator.integers(4, weight_sync.VOCABULARY, shape).astype(np.int32)
    params = SamplingParams(1.0, 1.0, -1, 0.0, sizes["new_tokens"], ())

    def asked(number: int) -> list[SamplingRequest]:
        ids = [(f"p{index}", request_seed(1, f"p{index}", 0, "gpu")) for index in range(number)]
        return [SamplingRequest(name, 0, prompts[i], seed) for i, (name, seed) in enumerate(ids)]

    [*engine.generate(asked(2), params)]  # compiles what is compiled at the first request
    engine.flush_cache()
    began = time.perf_counter()
    responses = [*engine.generate(asked(sizes["requests"]), params)]
    seconds = time.perf_counter() - began
    tokens = sum(len(response.token_ids) for response in responses)
    figures = {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds}
    sheet.add("sampling", figures)
    wanted = [
        ScoreRequest(one.prompt_id, one.sample_index, one.prompt_ids, one.token_ids)
        for one in responses
    ]
    [*engine.score(wanted[:2])]
    engine.flush_cache()
    began = time.perf_counter()
    scores = {one.prompt_id: one.teacher_logprobs for one in engine.score(wanted)}
    seconds = time.perf_counter() - began
    scored = tokens + sum(len(response.prompt_ids) for response in responses)
    figures = {"tokens_per_s": scored / seconds, "tokens": scored, "seconds": seconds}
    sheet.add("scoring", figures)
    apart = [np.abs(scores[one.prompt_id] - one.sampling_logprobs) for one in responses]
    control = [
        np.abs(np.roll(scores[one.prompt_id], 1) - one.sampling_logprobs) for one in responses
    ]
    difference = {
        "mean": float(np.concatenate(apart).mean()),
        "largest": float(np.concatenate(apart).max()),
        "control": float(np.concatenate(control).mean()),
    }
    sheet.add("scored against sampled log-probabilities", difference)


# ---- weights ---------------------------------------------------------------------------------


def sync(
    sheet: Sheet, engine: SGLangEngine, model: Path, folder: Path, transport: str, repeats: int
) -> None:
    """Weights from this process, which stands for the trainer, into the server."""
    on_gpu = not sheet.dry_run
    way = {"tensor": "CUDA IPC", "distributed": "NCCL"} if on_gpu else {}
    name = f"weight sync, {way.get(transport, transport)}"
    if on_gpu and transport == "distributed" and torch.cuda.device_count() < 2:
        reason = "needs two GPUs: NCCL does not broadcast between two processes of one GPU"
        sheet.lacks(name, reason)
        return
    device = "cpu"
    if on_gpu:
        device = "cuda:1" if transport == "distributed" else "cuda:0"
        torch.cuda.set_device(device)
    named = tensors(model, device)
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
    seconds: dict[str, list[float]] = {"off": [], "tensors": []}
    try:
        for verify, found in seconds.items():
            section = SyncSection.model_validate({"transport": transport, "verify": verify})
            receiver = build_receiver(section, [engine], folder=folder, template_dir=model)
            for number in range(repeats + 1):
                version = f"{transport}-{verify}-{number}"
                found.append(
                    weight_sync.timed(
                        lambda to=receiver, new=version: weight_sync.sync(
                            to, new, named, BUCKET_BYTES
                        )
                    )
                )
    except (LopdError, RuntimeError) as error:
        sheet.lacks(name, f"failed: {str(error).splitlines()[0][:300]}")
        return
    plain = statistics.median(seconds["off"][1:])
    verified = statistics.median(seconds["tensors"][1:])
    figures = {"seconds": plain, "verified_seconds": verified, "bytes_per_s": size / plain}
    sheet.add(name, {**figures, "bytes": size})
    if not on_gpu:
        what = "CUDA IPC" if transport == "tensor" else "NCCL"
        sheet.lacks(f"weight sync, {what}", f"needs a GPU: this was {transport} on a CPU")


def tensors(model: Path, device: str) -> weight_sync.Named:
    from safetensors.torch import load_file

    found = load_file(model / "model.safetensors")
    return [(name, tensor.to(device)) for name, tensor in sorted(found.items())]


# ---- co-location -----------------------------------------------------------------------------


def take_turns(sheet: Sheet, engine: SGLangEngine, model: Path, folder: Path) -> None:
    """The order of calls of sync.colocate. The trainer is a stand-in that holds nothing."""
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    trainer = SimpleNamespace(offload_optimizer=nothing, offload_weights=nothing, reload=nothing)
    turns = Colocation([engine], barrier=nothing)
    free = [free_bytes(sheet)]
    release = weight_sync.timed(turns.to_trainer)
    free.append(free_bytes(sheet))
    turns.attach_trainer(trainer)
    section = SyncSection.model_validate({"transport": "tensor", "verify": "tensors"})
    receiver = build_receiver(section, [engine], folder=folder / "sync", template_dir=model)
    named = tensors(model, "cpu" if sheet.dry_run else "cuda:0")
    held = free_bytes(sheet)
    began = time.perf_counter()
    with turns.to_server():
        weight_sync.sync(receiver, "back", named, BUCKET_BYTES)
    seconds = time.perf_counter() - began
    free.append(free_bytes(sheet))
    answers = engine.health()
    assert answers, "the server does not answer after its turn began"
    figures: dict[str, Any] = {"release_seconds": release, "return_and_sync_seconds": seconds}
    if sheet.dry_run:
        sheet.lacks("memory given back", "needs a GPU: SGLang keeps its memory on a CPU")
    else:
        names = ("free_gib_before", "free_gib_released", "free_gib_after")
        figures |= {name: size / GIB for name, size in zip(names, free, strict=True)}
        figures["given_back_gib"] = (free[1] - free[0]) / GIB
        figures["own_gib"] = (free[1] - held) / GIB
    sheet.add("co-location", figures)


def free_bytes(sheet: Sheet) -> int:
    return 0 if sheet.dry_run else torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    main()
