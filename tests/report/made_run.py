"""A run by stand-ins whose answers, scores and verdicts differ, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import pipeline
from lopd.config import load_config
from lopd.records import Response, TeacherScores, float32, int32, token_hash
from lopd.report.metrics import METRICS
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from tests.stand_ins import Engine, StandIns, write_project

NUM_PROMPTS = 8


class Speaker(Engine):
    """Answers with tokens and log-probabilities of its own; every third answer is cut off.

    The models answer alike to the last of eight prompts alone.
    """

    calls = 0

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        self.calls += 1
        for number, request in enumerate(requests):
            alike = number == NUM_PROMPTS - 1
            rng = np.random.default_rng([request.seed, 0 if alike else self.calls])
            tokens = rng.integers(4, 24, 12)
            cut = number % 3 == 2
            if not cut:
                tokens = np.append(tokens, params.stop_token_ids[0])
            yield Response(
                request.prompt_id,
                request.sample_index,
                request.prompt_ids,
                int32(tokens),
                float32(-rng.exponential(0.5, len(tokens))),
                "length" if cut else "stop",
                "stand-in",
            )

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        for request in requests:
            rng = np.random.default_rng(int(request.token_ids.sum()))
            yield TeacherScores(
                request.prompt_id,
                request.sample_index,
                token_hash(request.prompt_ids, request.token_ids),
                float32(-rng.exponential(2.0, len(request.token_ids))),
            )


def make_run(folder: Path, *overrides: str) -> Path:
    """A whole run; answer i of the SFT student is right for even i, of the distilled one for i < 4.

    Returns:
        The run directory.
    """
    with pytest.MonkeyPatch.context() as patch:
        StandIns(engine=Speaker()).install(patch)
        # The answers are then samples of the policy, and the teacher scores the answers themselves.
        sampling = ("evaluate.temperature=1.0", "evaluate.top_p=1.0")
        pipeline.run(load_config(write_project(folder), [*sampling, *overrides]))
    run = folder / "run"
    _judge(run / "evaluate/verdicts-sft.jsonl", [index % 2 == 0 for index in range(NUM_PROMPTS)])
    _judge(run / "evaluate/verdicts-distilled.jsonl", [index < 4 for index in range(NUM_PROMPTS)])
    with (run / METRICS).open("a") as metrics:
        for step, accuracy in ((0, 0.5), (2, 0.75)):
            interval = [accuracy - 0.2, accuracy + 0.2]
            figures = {
                "accuracy": accuracy,
                "accuracy_interval": interval,
                "num_prompts": NUM_PROMPTS,
                "response_len": 12.5,
            }
            line = {"kind": "eval", "stage": "distill", "step": step, **figures}
            metrics.write(json.dumps(line) + "\n")
    return run


def _judge(path: Path, right: list[bool]) -> None:
    """Rewrite verdicts, in the order of the file, which is that of the prompts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(right), "one answer to each prompt"
    lines = [
        json.dumps({**row, "right": value, "reason": "" if value else "wrong answer"})
        for row, value in zip(rows, right, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")


def prompts_of(data: dict[str, Any], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A set of prompts of the first run of a page, and its prompts."""
    found = next(one for one in data["runs"][0]["sets"] if one["name"] == name)
    return found, found["prompts"]
