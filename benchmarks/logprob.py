"""Log-probabilities without the logits against the dense form: peak memory and time of one forward
and one backward pass.

    python benchmarks/logprob.py --json logprob.json
        on a CPU: 4,096 tokens, 151,936 vocabulary rows, hidden size 256, float32
    python benchmarks/logprob.py --device cuda --json logprob.json
        on a GPU: 12,288 tokens, hidden size 2,048, bfloat16

The dense form is torch's: logits = hidden @ weight.T, then cross entropy in float32. Each run is a
process of its own. Runs come in pairs, one of each form right after the other, in changing order,
so that a busy machine slows both; a ratio is the median of the pairs' ratios, and all of them are
printed. Memory is what a run adds to its inputs (VmHWM, reset before it; on a GPU the allocator's
peak), gradients included; of its pairs the worst counts. Time is the better of two passes after a
small one that warms up. processor_time_ratio is the same of processor time, which other work hardly
disturbs. The upstream gradient depends on the values and is zero for an eighth of the tokens, the
prompt.

On a GPU our Triton kernel is measured too, and cut-cross-entropy and Liger where they are
installed; what fails there is named and does not end the others. cut-cross-entropy leaves out small
entries of the gradient unless told not to, and with random weights nearly all are small, so it is
measured both ways.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT_SHARE = 8
RATIOS = {
    "time of blocks over time of dense": "time_ratios",
    "processor time of blocks over that of dense": "processor_time_ratios",
}
NEED_CUDA = {  # form: module, name
    "triton": ("triton", "our Triton kernel"),
    "cut_cross_entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "cut_cross_entropy_all": ("cut_cross_entropy", "cut-cross-entropy, all entries"),
    "liger_kernel": ("liger_kernel", "Liger"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the figures: memory_ratio, time_ratio, and what they were made of",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="default 4096, on a GPU 12288")
    parser.add_argument("--vocab", type=int, default=151_936, help="default 151936")
    parser.add_argument("--hidden", type=int, help="default 256, on a GPU 2048")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default float32, on a GPU bfloat16"
    )
    parser.add_argument("--pairs", type=int, default=3, help="runs of each form; default 3")
    parser.add_argument(
        "--block-mib",
        type=int,
        help="logits that ours holds at once; default: lopd.megatron.model.logprobs.BLOCK_BYTES",
    )
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    # This option is for the process that measures one form.
    parser.add_argument("--form", choices=("dense", "blocks", *NEED_CUDA), help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.tokens = options.tokens or (12_288 if gpu else 4_096)
    options.hidden = options.hidden or (2_048 if gpu else 256)
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    return options


def dense(hidden: Any, weight: Any, labels: Any, _: argparse.Namespace) -> Any:
    import torch

    return -torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).float(), labels, reduction="none"
    )


def blocks(hidden: Any, weight: Any, labels: Any, options: argparse.Namespace) -> Any:
    from lopd.megatron.model.logprobs import token_logprobs

    return token_logprobs(
        hidden,
        weight,
        labels,
        block_bytes=options.block_mib * 2**20 if options.block_mib else None,
        kernel="blocks",
    )[0]


def triton(hidden: Any, weight: Any, labels: Any, options: argparse.Namespace) -> Any:
    from lopd.megatron.model.logprobs import token_logprobs

    return token_logprobs(
        hidden,
        weight,
        labels,
        block_bytes=options.block_mib * 2**20 if options.block_mib else None,
        kernel="triton",
    )[0]


def cut_cross_entropy(hidden: Any, weight: Any, labels: Any, _: argparse.Namespace) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def cut_cross_entropy_all(hidden: Any, weight: Any, labels: Any, _: argparse.Namespace) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)


def liger_kernel(hidden: Any, weight: Any, labels: Any, _: argparse.Namespace) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")


def measure(options: argparse.Namespace, form: Callable[..., Any]) -> dict[str, float]:
    """Seconds, seconds of processor time and added bytes of a forward and a backward pass."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def inputs(tokens: int) -> tuple[Any, Any, Any]:
        # From one generator, so that every form gets the same numbers.
        where = {"generator": generator, "device": device}
        hidden = torch.randn(tokens, options.hidden, **where)
        weight = torch.randn(options.vocab, options.hidden, **where) * options.hidden**-0.5
        labels = torch.randint(0, options.vocab, (tokens,), **where)
        return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels

    def both_passes(hidden: Any, weight: Any, labels: Any) -> Any:
        hidden.grad = weight.grad = None
        logprobs = form(hidden, weight, labels, options)
        loss = torch.where(logprobs < -3, logprobs, logprobs.square())[
            len(logprobs) // PROMPT_SHARE :
        ]
        loss.sum().backward()
        return logprobs

    both_passes(*inputs(64))
    given = inputs(options.tokens)
    reset_peak(device)
    before = peak_bytes(device)
    seconds = []
    processor_seconds = []
    for _ in range(2):
        start = time.perf_counter()
        processor_start = time.process_time()
        logprobs = both_passes(*given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    figures = {
        "bytes": peak_bytes(device) - before,
        "seconds": min(seconds),
        "processor_seconds": min(processor_seconds),
    }
    hidden, weight, _ = given
    return {
        **figures,
        "logprobs": logprobs.double().sum().item(),
        "hidden": norm(hidden.grad),
        "weight": norm(weight.grad),
    }


def norm(tensor: Any) -> float:
    return float(tensor.float().norm().item())


def reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes the memory held now


def peak_bytes(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


class RunFailed(SystemExit):
    """A form's process ended with an error; ends the benchmark with the message unless caught."""


def in_own_process(form: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--form", form],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RunFailed(f"{form} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(options: argparse.Namespace) -> dict[str, Any]:
    forms = ["dense", "blocks"]
    absent = {}
    for form, (module, name) in NEED_CUDA.items():
        if options.device == "cpu":
            absent[form] = f"{name}: not measured, needs CUDA"
        elif importlib.util.find_spec(module) is None:
            absent[form] = f"{name}: not installed"
        else:
            forms.append(form)
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for pair in range(options.pairs):
        for form in forms if pair % 2 == 0 else reversed(forms):
            if form in absent:
                continue
            try:
                runs[form].append(in_own_process(form))
            except RunFailed as error:
                if form not in NEED_CUDA:
                    raise
                absent[form] = f"{NEED_CUDA[form][1]}: failed, {str(error).splitlines()[-1]}"
    forms = [form for form in forms if form not in absent]
    result: dict[str, Any] = {
        key: getattr(options, key) for key in ("device", "dtype", "tokens", "vocab", "hidden")
    }
    for form in forms:
        result[form] = {"bytes": max(run["bytes"] for run in runs[form])}
        result[form] |= {
            key: statistics.median(run[key] for run in runs[form])
            for key in ("seconds", "processor_seconds")
        }
        pairs = list(zip(runs[form], runs["dense"], strict=True))
        prefix = "" if form == "blocks" else f"{form}_"
        result[f"{prefix}memory_ratio"] = max(
            own["bytes"] / theirs["bytes"] for own, theirs in pairs
        )
        for name, key in (("time", "seconds"), ("processor_time", "processor_seconds")):
            ratios = [own[key] / theirs[key] for own, theirs in pairs]
            result |= {
                f"{prefix}{name}_ratio": statistics.median(ratios),
                f"{prefix}{name}_ratios": ratios,
            }
        keys = ("logprobs", "hidden", "weight")
        result[f"{prefix}difference"] = max(
            abs(own[key] - theirs[key]) / abs(theirs[key]) for own, theirs in pairs for key in keys
        )
    return {**result, "not_measured": list(absent.values())}


def table(figures: dict[str, Any]) -> str:
    lines = [
        (
            f"{figures['tokens']} tokens, vocabulary {figures['vocab']}, "
            f"hidden size {figures['hidden']}, {figures['dtype']}, {figures['device']}"
        )
    ]
    lines.append(
        f"{'':<20}{'memory':>12}{'of dense':>10}{'time':>12}{'of dense':>10}"
        f"{'processor':>12}{'of dense':>10}"
    )
    for form in ("dense", "blocks", *NEED_CUDA):
        if form in figures:
            prefix = "" if form == "blocks" else f"{form}_"
            memory = figures[form]["bytes"] / 2**20
            seconds = figures[form]["seconds"]
            processor = figures[form]["processor_seconds"]
            ratios = [
                figures[f"{prefix}{key}_ratio"] for key in ("memory", "time", "processor_time")
            ]
            lines.append(
                f"{form:<20}{memory:>8.0f} MiB{ratios[0]:>10.3f}{seconds:>10.3f} s"
                f"{ratios[1]:>10.2f}{processor:>10.3f} s{ratios[2]:>10.2f}"
            )
    lines += [
        f"{name} of the pairs: {', '.join(f'{ratio:.2f}' for ratio in figures[key])}"
        for name, key in RATIOS.items()
    ]
    return "\n".join(
        [
            *lines,
            f"sums and norms of the results differ by at most {figures['difference']:.1e} relative",
            *figures["not_measured"],
        ]
    )


def main() -> None:
    options = arguments()
    if options.form is not None:
        print(json.dumps(measure(options, globals()[options.form])))
        return
    figures = compare(options)
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
