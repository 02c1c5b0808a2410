"""Samples and scores many synthetic responses against a fake server and prints what that needed.

``python -m tests.sglang.client_memory COUNT FOLDER PROMPT_LEN``

Run as a process of its own, so that its peak memory is its own. Publishes into FOLDER with the
stages' own code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from lopd import cache  # noqa: F401 - its libraries belong to the memory before
from lopd.artifacts import ArtifactWriter, published_rows
from lopd.config import SGLangSection
from lopd.records import Ints, Prompt
from lopd.stages.sample_shards import sample_into
from lopd.stages.score_shards import score_into
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams
from tests.sglang.answers import STOP_ID, VOCAB_SIZE
from tests.sglang.quick_fake import quick_fake

PROMPTS = 100


class _Prompts(Sequence[Prompt]):
    """So many prompts, none of which is in memory."""

    def __len__(self) -> int:
        return PROMPTS

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        assert isinstance(index, int)
        return Prompt(
            prompt_id=f"p{index}",
            messages=({"role": "user", "content": "?"},),
            domain="test",
            answer=None,
        )


class _Ids(Sequence[Ints]):
    """Their ids, anew for whoever asks: a request that is held holds its own."""

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len

    def __len__(self) -> int:
        return PROMPTS

    @overload
    def __getitem__(self, index: int) -> Ints: ...
    @overload
    def __getitem__(self, index: slice) -> list[Ints]: ...
    def __getitem__(self, index: int | slice) -> Ints | list[Ints]:
        assert isinstance(index, int)
        return (4 + (index + np.arange(self._prompt_len)) % 400).astype(np.int32)


def peak_mb() -> float:
    """Of this process since it began; getrusage would also count its parent's, before the exec."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        / 1024
    )


def main(count: int, folder: Path, prompt_len: int) -> None:
    params = SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, max_new_tokens=8, stop_token_ids=(STOP_ID,)
    )
    settings = SGLangSection(max_in_flight=64, context_length=prompt_len + 8)
    figures = {"before_mb": peak_mb()}
    with quick_fake() as url:
        engine = SGLangEngine(url, "", settings, vocab_size=VOCAB_SIZE)
        writer = ArtifactWriter(folder / "rollouts", kind="rollouts", inputs={}, shard_size=256)
        sample_into(
            writer,
            engine,
            _Prompts(),
            _Ids(prompt_len),
            params,
            samples_per_prompt=count // PROMPTS,
            seed=1,
            purpose="test",
            title="sampling",
        )
        rollouts = writer.finish()
        figures |= {"sampled": rollouts.rows, "sampling_peak_mb": peak_mb()}
        scored = ArtifactWriter(folder / "scores", kind="teacher_cache", inputs={})
        score_into(scored, engine, folder / "rollouts", rollouts, title="scoring")
        scored.finish()
        figures |= {"scored": published_rows(folder / "scores"), "scoring_peak_mb": peak_mb()}
    sys.stderr.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
