"""A step of the trainer against a plain transformers loop, and two ranks against one.

    python -m benchmarks.training_step --json training_step.json
    python -m benchmarks.training_step --before CHECKOUT

All train the tiny mixture of experts of examples/ on the same responses, in float32, with one
thread a process. Each is a process of its own (two for the two ranks) that holds its model and
waits for an order, so steps alternate within one run, in changing order, and a busy machine slows
all of them. A ratio is the median over rounds of the ratio within a round.

The loop makes the same update: logits of padded batches, log-softmax, the advantage of Lightning
OPD, a clipped gradient norm, and torch's AdamW. Once it takes the responses as they come
("padded"), and once sorted by length ("sorted"). The gradient norm of the first step is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/tiny_models/student"
SETTINGS = {"lr": 1e-4, "weight_decay": 0.0}
# The share of the example's student that skips the steps, so responses have two lengths.
SKIPPED = 0.4
# Steps before the first that counts: memory is mapped, and Adam's moments are made.
WARM_UP = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default %(default)s)")
    parser.add_argument(
        "--responses", type=int, default=64, help="responses of a step (default %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        help="responses in one forward pass of the transformers loop (default %(default)s)",
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="another checkout, whose trainer is timed"
    )
    parser.add_argument("--no-ranks", action="store_true", help="leave out the two ranks")
    return parser.parse_args()


# ---- the process that gives the orders ----


class Side:
    """One or more processes that make a step together when they are told to."""

    def __init__(self, kind: str, work: Path, *, ranks: int = 1, checkout: Path = ROOT) -> None:
        """Start the processes.

        Args:
            kind: "trainer" or "transformers".
            work: The folder of the responses.
            ranks: The number of processes.
            checkout: The checkout whose trainer they import.
        """
        from lopd.megatron.ranks.forking import rank_environment
        from lopd.megatron.ranks.torchrun import open_store

        # The store of the ranks lives as long as this object.
        self._store = open_store()
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    str(Path(__file__).resolve()),
                    "--worker",
                    kind,
                    str(work),
                ],
                env={**environment, **rank_environment(rank, ranks, self._store.port)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def step(self, number: int, *, way: str = "") -> dict[str, float]:
        """Make one step and return seconds, processor seconds of all processes, tokens and norm."""
        order = json.dumps({"step": number, "way": way}) + "\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(order)
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a process of the benchmark has ended; its error is above")
            answers.append(json.loads(line))
        return {
            "seconds": max(answer["seconds"] for answer in answers),
            "processor_seconds": sum(answer["processor_seconds"] for answer in answers),
            "tokens": answers[0]["tokens"],
            "grad_norm": answers[0]["grad_norm"],
        }

    def close(self) -> None:
        """End the processes: they read orders until there are no more."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the figures."""
    write_responses(work, WARM_UP + options.rounds, options.responses, options.batch)
    sides: dict[str, tuple[Side, str]] = {}
    with contextlib.ExitStack() as stack:

        def start(kind: str, **place: Any) -> Side:
            side = Side(kind, work, **place)
            stack.callback(side.close)
            return side

        sides["one"] = (start("trainer"), "")
        for way in ("padded", "sorted"):
            sides[way] = (start("transformers"), way)
        if not options.no_ranks:
            sides["two"] = (start("trainer", ranks=2), "")
        if options.before is not None:
            checkout = options.before.resolve()
            sides["before"] = (start("trainer", checkout=checkout), "")
            if not options.no_ranks:
                sides["two_before"] = (start("trainer", ranks=2, checkout=checkout), "")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(WARM_UP + options.rounds):
            for name in sorted(sides, reverse=number % 2 == 1):
                side, way = sides[name]
                found[name].append(side.step(number, way=way))
    return figures_of(found)


def figures_of(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the ratios and medians.

    Args:
        found: For each side the answers of all steps, the warm-up's included.
    """
    timed = {name: steps[WARM_UP:] for name, steps in found.items()}
    # For each ratio the side that should be slower and the one that should be quicker.
    pairs = {
        "versus_transformers": ("sorted", "one"),
        "versus_transformers_padded": ("padded", "one"),
        "versus_before": ("before", "one"),
        "two_ranks_versus_one": ("one", "two"),
        "two_ranks_versus_one_before": ("before", "two_before"),
        "two_ranks_versus_before": ("two_before", "two"),
    }
    figures: dict[str, Any] = {}
    for key, (slow, quick) in pairs.items():
        if slow not in timed or quick not in timed:
            continue
        both = (timed[slow], timed[quick])
        figures[key] = median_ratio(*both, "seconds")
        # What other work on the machine hardly touches: processor time, and the quickest steps.
        # For two ranks it is the work of both, so it says what is done twice.
        figures[f"{key}_processor"] = median_ratio(*both, "processor_seconds")
        quickest = [min(step["processor_seconds"] for step in steps) for steps in both]
        figures[f"{key}_quickest_processor"] = quickest[0] / quickest[1]
    for measure in ("seconds", "processor_seconds"):
        figures[f"{measure}_of"] = {
            name: statistics.median(step[measure] for step in steps)
            for name, steps in timed.items()
        }
    figures["tokens_of_a_step"] = statistics.median(step["tokens"] for step in timed["one"])
    # The first step of all sides has the same weights and the same responses.
    norms = [steps[0]["grad_norm"] for steps in found.values()]
    figures["grad_norm_difference"] = max(norms) / min(norms) - 1
    return figures


def median_ratio(slow: Sequence[Any], quick: Sequence[Any], measure: str) -> float:
    """Return the median over rounds of the ratio within a round."""
    pairs = zip(slow, quick, strict=True)
    return statistics.median(one[measure] / other[measure] for one, other in pairs)


def write_responses(work: Path, num_steps: int, count: int, batch: int) -> None:
    """Write what every side reads: the responses of each step, with a teacher's scores.

    Args:
        work: The folder.
        num_steps: The number of steps.
        count: The responses of a step.
        batch: The responses in one forward pass of the transformers loop.
    """
    from lopd.tasks.register_arithmetic import RegisterArithmetic
    from lopd.tasks.register_responses import write_response
    from lopd.tasks.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(MODEL)
    generator = np.random.default_rng(0)
    steps = []
    problems = iter(RegisterArithmetic().generate_problems(num_steps * count, seed=5))
    for _ in range(num_steps):
        step = []
        for _ in range(count):
            problem = next(problems)
            style = "skip" if generator.random() < SKIPPED else "careful"
            asked = [{"role": "user", "content": f"{problem.text}=?"}]
            text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer.encode(text, add_special_tokens=False)
            response = tokenizer.encode(write_response(problem, style), add_special_tokens=False)
            scores = -generator.random(len(prompt) + len(response))
            step.append(
                {
                    "tokens": [*prompt, *response],
                    "prompt_len": len(prompt),
                    "teacher": scores.tolist(),
                }
            )
        steps.append(step)
    (work / "responses.json").write_text(json.dumps({"steps": steps, "batch": batch}))


# ---- the processes that make the steps ----


def work_for(kind: str, work: Path) -> None:
    """Read orders from stdin and answer each on stdout, until there are no more."""
    # What a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads((work / "responses.json").read_text())
    make = trainer_steps() if kind == "trainer" else transformers_steps(given["batch"])
    next(make)
    for line in sys.stdin:
        order = json.loads(line)
        responses = given["steps"][order["step"]]
        # Only the step is timed, not the reading of its responses: sides read in other forms.
        answer = make.send((responses, order["way"]))
        answer["tokens"] = sum(len(response["tokens"]) for response in responses)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Without the end of the ranks' process group, which may be too late for one of them.
    os._exit(0)


class Timer:
    """Seconds and processor seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._processor = time.process_time()

    def answer(self, grad_norm: float) -> dict[str, float]:
        """Return the times together with the gradient norm of the step."""
        return {
            "seconds": time.perf_counter() - self._start,
            "processor_seconds": time.process_time() - self._processor,
            "grad_norm": grad_norm,
        }


def trainer_steps() -> Iterator[Any]:
    """Make each step that is sent with the trainer of lopd. Two ranks have TP2 EP2."""
    from lopd.batching import build_microbatch, plan_step
    from lopd.config import ParallelSection, TrainSection
    from lopd.megatron.ranks import parallel
    from lopd.megatron.training.trainer import Trainer
    from lopd.objective import Lightning
    from lopd.records import Sample

    ranks = int(os.environ["WORLD_SIZE"])
    settings = TrainSection(
        parallel=ParallelSection(ranks=ranks, tensor=ranks, expert=ranks),
        num_steps=10_000,
        dtype="float32",
        max_tokens_per_microbatch=8192,
        optimizer=SETTINGS,
    )
    parallel.initialize(settings.parallel, seed=1, timeout_s=600)
    trainer = Trainer(
        settings,
        model_dir=MODEL,
        init="checkpoint",
        init_std=0.02,
        seed=1,
        objective=Lightning(),
        checkpoint_dir=None,
    )

    def sample(response: Any) -> Sample:
        scores = np.asarray(response["teacher"], np.float32)
        tokens = np.asarray(response["tokens"], np.int32)
        return Sample(tokens, np.arange(len(tokens)) >= response["prompt_len"], scores, scores)

    answer = None
    while True:
        responses, _ = yield answer
        samples = [sample(response) for response in responses]
        parallel.barrier()
        timer = Timer()
        lengths = [len(one) for one in samples]
        [plan] = plan_step(lengths, 1, settings.max_tokens_per_microbatch, ranks)
        batches = [build_microbatch([samples[index] for index in part], ranks) for part in plan]
        metrics = trainer.train_step(batches)
        answer = timer.answer(metrics.grad_norm)


def transformers_steps(batch: int) -> Iterator[Any]:
    """Make each step that is sent with a plain loop over padded batches."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), **SETTINGS)
    answer = None
    while True:
        responses, way = yield answer
        timer = Timer()
        if way == "sorted":
            responses = sorted(responses, key=lambda response: len(response["tokens"]))
        optimizer.zero_grad()
        for first in range(0, len(responses), batch):
            loss_of(model, responses[first : first + batch], len(responses)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer = timer.answer(norm.item())


def loss_of(model: Any, responses: Sequence[Any], count: int) -> Any:
    """Return the loss of Lightning OPD of some responses: the mean over `count` responses.

    Args:
        model: The model of transformers.
        responses: The responses of one forward pass.
        count: The number of responses of the step.
    """
    import torch

    longest = max(len(response["tokens"]) for response in responses)
    shape = (len(responses), longest)
    tokens = torch.zeros(shape, dtype=torch.int64)
    attended = torch.zeros(shape, dtype=torch.int64)
    teacher = torch.zeros(shape)
    weights = torch.zeros(shape)
    for row, response in enumerate(responses):
        length = len(response["tokens"])
        tokens[row, :length] = torch.tensor(response["tokens"])
        attended[row, :length] = 1
        teacher[row, :length] = torch.tensor(response["teacher"])
        # The mean over the tokens of a response, then over responses.
        share = 1 / (length - response["prompt_len"]) / count
        weights[row, response["prompt_len"] : length] = share
    logits = model(input_ids=tokens, attention_mask=attended, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    advantages = (teacher[:, 1:] - logprobs.detach()).clamp(-10, 10)
    return -(weights[:, 1:] * advantages * logprobs).sum()


# ---- the table ----


def table(figures: dict[str, Any]) -> str:
    """Return the figures for reading."""
    lines = [f"{'':<32}{'wall':>8}{'processor':>12}{'quickest':>12}"]
    for key in figures:
        if f"{key}_processor" in figures:
            values = [figures[f"{key}{end}"] for end in ("", "_processor", "_quickest_processor")]
            lines.append(f"{key:<32}{values[0]:>8.2f}{values[1]:>12.2f}{values[2]:>12.2f}")
    for name, seconds in figures["seconds_of"].items():
        processor = figures["processor_seconds_of"][name]
        lines.append(f"{'s of a step: ' + name:<32}{seconds:>8.3f}{processor:>12.3f}")
    lines.append(
        f"gradient norms of the first step differ by {figures['grad_norm_difference']:.1e}"
    )
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--worker":
        work_for(sys.argv[2], Path(sys.argv[3]))
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="lopd-training-step-") as work:
        figures = run(options, Path(work))
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
