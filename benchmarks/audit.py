"""How often ``lopd audit`` is right: draws of fresh responses by the true teacher, and by other
models as accurate as it.

    python benchmarks/audit.py --foreign runs/tiny_moe/distill/model --draws 100 --json audit.json

With ``--draws 20 --first 40`` the draws from number 40 on are added to the file.

Every draw has prompts and random numbers of its own, so that draws are independent (draws out of
one pool are not: they share its luck). Responses are sampled with transformers in this process, at
temperature 1, and scored by the teacher. Right is ``consistent`` for the teacher and
``inconsistent`` for the others; ``cannot tell`` is right for nobody. The default number of
responses is what the tolerance needs (the audit says how many: tokens_needed).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd.audit import Scores, audit, distribution_scores
from lopd.tasks import get_task
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import decode, load_tokenizer, stop_token_ids

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "examples/tiny_models/teacher"
# In nats per token.
TOLERANCE = 0.003
# About 50,000 tokens. On average 44,000 would be enough.
RESPONSES = 960
LONGEST = 64
BATCH = 480


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@torch.inference_mode()
def sample(
    model: Any, prompts: torch.Tensor, ends: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens [N, T] and the model's own scores of them, each [N, T] (log p, entropy, variance), at
    temperature 1; T: until all have ended.
    """
    inputs = prompts
    past = None
    steps = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(LONGEST):
        out = model(inputs, past_key_values=past, use_cache=True)
        logits = out.logits[:, -1]
        past = out.past_key_values
        inputs = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        steps.append(
            (inputs[:, 0], *distribution_scores(logits, inputs[:, 0], temperature=1.0, top_p=1.0))
        )
        done |= torch.isin(inputs[:, 0], torch.tensor(ends))
        if bool(done.all()):
            break
    tokens, *scores = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    return tokens, scores


@torch.inference_mode()
def score(teacher: Any, prompts: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    logits = teacher(torch.cat([prompts, tokens], 1)).logits[:, prompts.shape[1] - 1 : -1]
    return list(distribution_scores(logits, tokens, temperature=1.0, top_p=1.0))


def draw(model: Any, teacher: Any | None, number: int, responses: int) -> tuple[Scores, float]:
    """The number-th draw: the teacher's scores of so many fresh responses of the model (teacher
    None: they are its own), and the share that is right.
    """
    task = get_task("register_arithmetic", {})
    tokenizer = load_tokenizer(TEACHER)
    problems = task.generate_prompts(responses, 20 + number % 200)  # 1 to 9 are the example's own
    ends = stop_token_ids(TEACHER, tokenizer)
    prompts = torch.from_numpy(
        np.stack(render(problems, tokenizer, context_length=256)).astype(np.int64)
    )
    generator = torch.Generator().manual_seed(1000 + number)
    parts: list[list[np.ndarray]] = [[], [], []]
    lengths = []
    right = 0
    for start in range(0, responses, BATCH):
        given = prompts[start : start + BATCH]
        tokens, scores = sample(model, given, ends, generator)
        scores = scores if teacher is None else score(teacher, given, tokens)
        for row, line in enumerate(tokens.numpy()):
            ended = np.isin(line, ends)
            length = int(np.argmax(ended)) + 1 if ended.any() else len(line)
            lengths.append(length)
            right += task.verify(
                problems[start + row],
                decode(tokenizer, line[:length]),
                "stop" if ended.any() else "length",
            )
            for part, column in zip(parts, scores, strict=True):
                part.append(column[row, :length].numpy())
    logprobs, entropy, variance = (np.concatenate(part) for part in parts)
    return Scores(logprobs, entropy, np.array(lengths, dtype=np.int64), variance), right / responses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--foreign",
        type=Path,
        action="append",
        default=[],
        help="Hugging Face folder of another model; may be given several times",
    )
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--responses", type=int, default=RESPONSES, help="of a draw")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="nats per token")
    parser.add_argument("--skip-teacher", action="store_true", help="only the foreign models")
    parser.add_argument("--json", type=Path, help="add the draws to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, list[dict[str, Any]]] = (
        json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    )
    teacher = load(TEACHER)
    for name, folder in [
        *([] if given.skip_teacher else [("teacher", None)]),
        *((str(folder), folder) for folder in given.foreign),
    ]:
        model = teacher if folder is None else load(folder)
        began = time.monotonic()
        for number in range(given.first, given.first + given.draws):
            scores, accuracy = draw(
                model, None if folder is None else teacher, number, given.responses
            )
            result = audit(scores, tolerance=given.tolerance)
            row = {
                "draw": number,
                "verdict": result.verdict,
                "z": result.z,
                "mean": result.mean,
                "tokens": result.tokens,
                "needed": result.tokens_needed,
            }
            done.setdefault(name, []).append({**row, "accuracy": accuracy})
        sys.stderr.write(f"{name}: {given.draws} draws in {time.monotonic() - began:.0f} s\n")
    if given.json:
        given.json.write_text(json.dumps(done, indent=1) + "\n")
    print_table(done)


def print_table(done: dict[str, list[dict[str, Any]]]) -> None:
    """One line for each model, over all its draws."""
    print(
        "| responses by | draws | accuracy, % | tokens of a draw | mean drift, nats per token "
        "| consistent | inconsistent | cannot tell |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in done.items():
        verdicts = Counter(row["verdict"] for row in rows)
        mean = {
            key: float(np.mean([row[key] for row in rows]))
            for key in ("accuracy", "tokens", "mean")
        }
        counts = " | ".join(
            str(verdicts[verdict]) for verdict in ("consistent", "inconsistent", "cannot tell")
        )
        print(
            f"| {name} | {len(rows)} | {100 * mean['accuracy']:.1f} | {mean['tokens']:,.0f} "
            f"| {mean['mean']:+.5f} | {counts} |"
        )


if __name__ == "__main__":
    main()
