"""Writes demonstrations of register arithmetic, as an artifact that ``sft.demonstrations`` reads.

    cd examples/tiny_models
    python make_demonstrations.py careful OUT --tokenizer FOLDER --num 89600 --seed 11
        every step written out
    python make_demonstrations.py corrupted OUT --tokenizer FOLDER --num 19200 --seed 12
        errors in the steps, masked, and a consistent continuation
    python make_demonstrations.py mixture OUT --tokenizer FOLDER --num 5120 --seed 13 --skip 0.03
        careful, or, with probability --skip, no step and the answer at once
    python make_demonstrations.py notation OUT --tokenizer FOLDER --num 2560 --seed 16 --skip 0.03
        --semicolons 0.8
        as mixture, and a step ends with ";" with probability --semicolons, else with a line break

Sets with different seeds share no problem. They share none with the prompts of an example either,
if its seeds are others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.artifacts import MANIFEST, read_manifest, sha256_file
from lopd.cache import write_responses
from lopd.records import Response, float32, int32
from lopd.tasks.register_arithmetic import Problem, RegisterArithmetic
from lopd.tasks.register_responses import write_corrupted, write_response
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import load_tokenizer

# The place of a kind is part of its random numbers.
KINDS = ("careful", "corrupted", "mixture", "notation")
_CONTEXT_LENGTH = 256  # of the small models
_CHUNK = 4096  # responses tokenised at a time


def write_texts(
    kind: str, problems: Sequence[Problem], seed: int, skip: float, semicolons: float
) -> Iterator[tuple[str, NDArray[np.bool_] | None]]:
    """The response to each problem and its mask bool[characters]; None: every character is learnt
    from.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    for problem in problems:
        if kind == "corrupted":
            yield write_corrupted(problem, rng)
            continue
        is_skipped = kind != "careful" and rng.random() < skip
        text = write_response(problem, "skip" if is_skipped else "careful")
        yield (with_semicolons(text, semicolons, rng) if kind == "notation" else text), None


def with_semicolons(text: str, share: float, rng: np.random.Generator) -> str:
    """The response, in which each step ends with ";" with a probability of share, by itself.

    Both notations have one token there, so nothing else of the response moves.
    """
    first, *steps, last, answer = text.split("\n")
    ends = [";" if rng.random() < share else "\n" for _ in steps]
    written = "".join(f"{step}{end}" for step, end in zip(steps, ends, strict=True))
    return f"{first}\n{written}{last}\n{answer}"


def token_mask(
    characters: NDArray[np.bool_], offsets: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """The mask bool[R] of tokens: True where every character [start, end) of a token is learnt
    from.
    """
    return np.array([bool(characters[start:end].all()) for start, end in offsets])


def make_responses(
    kind: str, num: int, seed: int, skip: float, tokenizer: Any, *, semicolons: float = 0.0
) -> Iterator[Response]:
    """Demonstrations as records. Nobody sampled them: sampling_logprobs are 0, weight_version is
    "written".
    """
    task = RegisterArithmetic()
    problems = task.generate_problems(num, seed)
    written = write_texts(kind, problems, seed, skip, semicolons)
    for start in range(0, num, _CHUNK):
        prompts = [task.to_prompt(problem) for problem in problems[start : start + _CHUNK]]
        texts, masks = zip(*(next(written) for _ in prompts), strict=True)
        prompt_ids = render(prompts, tokenizer, context_length=_CONTEXT_LENGTH)
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=kind == "corrupted",
        )
        for row, (prompt, ids, mask) in enumerate(zip(prompts, prompt_ids, masks, strict=True)):
            token_ids = int32(encoded["input_ids"][row])
            yield Response(
                prompt_id=prompt.prompt_id,
                sample_index=0,
                prompt_ids=ids,
                token_ids=token_ids,
                sampling_logprobs=float32(np.zeros(len(token_ids))),
                finish_reason="stop",
                weight_version="written",
                loss_mask=None
                if mask is None
                else token_mask(mask, encoded["offset_mapping"][row]),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--skip", type=float, default=0.0)
    parser.add_argument("--semicolons", type=float, default=0.0)
    options = parser.parse_args()
    start = time.monotonic()
    inputs = {
        "maker": "examples/tiny_models/make_demonstrations.py",
        "kind": options.kind,
        "num": options.num,
        "seed": options.seed,
        "skip": options.skip,
        "tokenizer": sha256_file(options.tokenizer / "tokenizer.json"),
    }
    # Alone where it counts, so that sets of the other kinds keep their fingerprints.
    if options.kind == "notation":
        inputs["semicolons"] = options.semicolons
    if (options.out / MANIFEST).exists():
        found = read_manifest(options.out)
        if found.complete and found.inputs == inputs:
            print(f"{options.out}: {found.rows} demonstrations are there already")
            return
    responses = make_responses(
        options.kind,
        options.num,
        options.seed,
        options.skip,
        load_tokenizer(options.tokenizer),
        semicolons=options.semicolons,
    )
    manifest = write_responses(options.out, responses, kind="demonstrations", inputs=inputs)
    print(
        f"{options.out}: {manifest.rows} demonstrations ({options.kind}) "
        f"in {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
