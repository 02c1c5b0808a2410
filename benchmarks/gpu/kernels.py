"""Log-probabilities at the sizes of a training step: time, memory and error of each kernel.

The dense form, our kernels `blocks` and `triton`, cut-cross-entropy and Liger: each runs in a
process of its own, so that one that fails leaves the others their device. Time and memory are
measured by benchmarks/logprob.py. The error is the largest difference from the dense form in
float32 of the same inputs, relative to the largest entry; its control is the error of the same
values with their labels moved by one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import Any

from benchmarks import logprob
from benchmarks.gpu.part import ROOT, arguments, last_line
from benchmarks.gpu.sheet import Sheet

FORMS = ("dense", "blocks", *logprob.NEED_CUDA)
FULL = {"tokens": 12_288, "vocab": 151_936, "hidden": 2_048, "dtype": "bfloat16"}
TINY = {"tokens": 96, "vocab": 1_000, "hidden": 32, "dtype": "bfloat16"}
ERROR_TOKENS = 1_024  # of the comparison with float32, whose logits of all tokens do not fit beside
PROMPT_SHARE = 8  # an eighth of the tokens has no gradient


def main() -> None:
    options = arguments(__doc__, form=True)
    if options.form:
        sys.stdout.write(json.dumps(measure(options.form, dry_run=options.dry_run)) + "\n")
        return
    sheet = Sheet(options.out, "kernels", dry_run=options.dry_run)
    sizes = TINY if options.dry_run else FULL
    sheet.add("sizes", {**sizes, "error_tokens": min(ERROR_TOKENS, sizes["tokens"])})
    dense: dict[str, float] = {}
    for form in FORMS:
        if reason := obstacle(form, dry_run=options.dry_run):
            sheet.lacks(form, reason)
            continue
        figures, reason = in_own_process(form, dry_run=options.dry_run)
        if reason:
            sheet.lacks(form, f"failed: {reason}")
            continue
        dense = dense or figures  # the first form is the dense one
        if form != "dense" and "seconds" in dense:
            figures["time_ratio"] = figures["seconds"] / dense["seconds"]
            figures["memory_ratio"] = figures["bytes"] / dense["bytes"]
        sheet.add(form, figures)
    sheet.done()


def obstacle(form: str, *, dry_run: bool) -> str:
    """Why this form cannot run here; empty where it can."""
    if form not in logprob.NEED_CUDA:
        return ""
    module, name = logprob.NEED_CUDA[form]
    if importlib.util.find_spec(module) is None:
        return f"needs the package {module}, which is not installed"
    return f"needs a GPU: {name} is written in Triton, which compiles for GPUs" if dry_run else ""


def in_own_process(form: str, *, dry_run: bool) -> tuple[dict[str, float], str]:
    """The figures of a form, or why there are none."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.kernels", "--form", form]
    command += ["--dry-run"] if dry_run else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}, last_line(done.stderr) or f"ended with code {done.returncode}"
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures, ""


def measure(form: str, *, dry_run: bool) -> dict[str, float]:
    sizes = TINY if dry_run else FULL
    device = "cpu" if dry_run else "cuda"
    options = argparse.Namespace(**sizes, device=device, block_mib=None, threads=None)
    way = getattr(logprob, form)
    cost = logprob.measure(options, way)
    kept = {key: cost[key] for key in ("seconds", "bytes")}
    return {**kept, **errors(way, options)}


def errors(way: Any, options: argparse.Namespace) -> dict[str, float]:
    """Of values and of both gradients; and of values whose labels are moved by one."""
    import torch

    generator = torch.Generator(options.device).manual_seed(1)
    tokens = min(ERROR_TOKENS, options.tokens)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=options.device)

    dtype = getattr(torch, options.dtype)
    hidden = normal(tokens, options.hidden).to(dtype)
    weight = (normal(options.vocab, options.hidden) * options.hidden**-0.5).to(dtype)
    labels = torch.randint(0, options.vocab, (tokens,), generator=generator, device=options.device)
    upstream = normal(tokens)
    upstream[: tokens // PROMPT_SHARE] = 0

    def run(form: Any, kind: Any, places: Any) -> dict[str, Any]:
        inputs = [one.to(kind, copy=True).requires_grad_() for one in (hidden, weight)]
        values = form(*inputs, places, options)
        (values.float() * upstream).sum().backward()
        gradients = [one.grad.float() for one in inputs]
        found = {"values": values.detach().float()}
        return {**found, "hidden_gradient": gradients[0], "weight_gradient": gradients[1]}

    expected = run(logprob.dense, torch.float32, labels)
    found = run(way, dtype, labels)
    moved = run(way, dtype, (labels + 1) % options.vocab)
    figures = {f"error_of_{name}": distance(found[name], expected[name]) for name in expected}
    return {**figures, "error_control": distance(moved["values"], expected["values"])}


def distance(found: Any, expected: Any) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).item())


if __name__ == "__main__":
    main()
