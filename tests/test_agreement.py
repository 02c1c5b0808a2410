"""SGLang's log-probabilities of a response against the trainer's, float32, before and after a
weight sync: the same policy on both sides of the sync.

One real server and one real trainer (2 ranks, tensor=2, expert=2). The trainer scores the server's
own samples, takes two steps at a high rate, and its weights go into the running server through the
one export iterator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lopd import cache
from lopd.config import ParallelSection, SGLangSection, TrainSection
from lopd.records import Response, int32
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.limits import apart, within
from tests.megatron.launch import run_ranks
from tests.models import EOS_ID, VOCAB_SIZE, write_qwen3_moe

NUM_RESPONSES = 24
RESPONSE_LEN = 64
TOLERANCE = 1e-4
SETTINGS = SGLangSection(
    dtype="float32",
    context_length=256,
    max_running_requests=32,
    max_total_tokens=8192,
    mem_fraction=0.1,
)


def train_and_score(model: str, responses: str, exported: str) -> dict[str, list[list[float]]]:
    """On every rank: log-probabilities of the responses before and after two steps; the trained
    weights in ``exported``.
    """
    from lopd.batching import build_microbatch, make_sample
    from lopd.megatron.ranks import parallel
    from lopd.megatron.training.trainer import Trainer
    from lopd.megatron.weights.transfer import save_hf
    from lopd.objective import Supervised

    layout = ParallelSection(ranks=2, tensor=2, expert=2)
    settings = TrainSection(
        parallel=layout, num_steps=2, dtype="float32", optimizer={"lr": 5e-3, "weight_decay": 0.0}
    )  # type: ignore[arg-type]
    parallel.initialize(layout, seed=1, timeout_s=500)
    trainer = Trainer(
        settings,
        model_dir=Path(model),
        init="checkpoint",
        init_std=0.02,
        seed=1,
        objective=Supervised(),
        checkpoint_dir=None,
    )
    samples = [make_sample(response) for response, _ in cache.read_rows(Path(responses))]
    microbatch = build_microbatch(samples, pad_multiple=2)

    def scores() -> list[list[float]]:
        logprobs = trainer.logprobs(microbatch)
        starts = microbatch.cu_seqlens
        return [
            logprobs[int(starts[row]) : int(starts[row + 1])][
                list(np.flatnonzero(microbatch.loss_mask[starts[row] : starts[row + 1]]))
            ].tolist()
            for row in range(microbatch.num_sequences)
        ]

    before = scores()
    for _ in range(2):
        trainer.train_step([microbatch])
    after = scores()
    save_hf(trainer.export(), Path(exported), source=Path(model), shard_bytes=2**30)
    parallel.shutdown()
    return {"before": before, "after": after}


def largest_difference(left: list[Any], right: list[Any]) -> float:
    return max(
        float(np.abs(np.asarray(one) - np.asarray(other)).max())
        for one, other in zip(left, right, strict=True)
    )


def score_all(engine: SGLangEngine, responses: list[Response]) -> list[Any]:
    requests = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids, r.token_ids) for r in responses
    ]
    by_key = {score.key: score.teacher_logprobs for score in engine.score(requests)}
    return [by_key[response.key] for response in responses]


def test_server_and_trainer_agree_before_and_after_a_sync(tmp_path: Path) -> None:
    model = write_qwen3_moe(tmp_path / "model")
    rng = np.random.default_rng(5)
    requests = [
        SamplingRequest(f"p{index}", 0, int32(rng.integers(4, VOCAB_SIZE, 7 + index)), seed=index)
        for index in range(NUM_RESPONSES)
    ]
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        max_new_tokens=RESPONSE_LEN,
        stop_token_ids=(EOS_ID,),
    )
    with SGLangServer(model, SETTINGS, log=tmp_path / "server.log") as server:
        engine = SGLangEngine(server.url, server.api_key, SETTINGS, server=server)
        responses = sorted(
            engine.generate(requests, params), key=lambda response: response.prompt_id
        )
        assert sum(len(response.token_ids) for response in responses) >= 1000
        scored_before = score_all(engine, responses)
        cache.write_responses(tmp_path / "responses", responses, kind="rollouts", inputs={})
        trainer = run_ranks(
            train_and_score,
            2,
            model=str(model),
            responses=str(tmp_path / "responses"),
            exported=str(tmp_path / "trained"),
        )[0]

        sampled = [response.sampling_logprobs for response in responses]
        within(largest_difference(sampled, trainer["before"]), TOLERANCE, "sampled")
        within(largest_difference(scored_before, trainer["before"]), TOLERANCE, "before")

        update_weights_from_disk(engine, tmp_path / "trained", version="step-2")
        scored_after = score_all(engine, responses)
        within(largest_difference(scored_after, trainer["after"]), TOLERANCE, "after")
        again = sorted(engine.generate(requests, params), key=lambda response: response.prompt_id)
        assert {response.weight_version for response in again} == {"step-2"}

        # controls: the old weights do not agree with the new ones, nor a response with its
        # neighbour's shift
        apart(largest_difference(scored_before, trainer["after"]), 100 * TOLERANCE, "old")
        shifted = [np.roll(row, 1) for row in scored_after]
        apart(largest_difference(shifted, trainer["after"]), 100 * TOLERANCE, "shifted")
    figures = {
        "sampling before": largest_difference(
            [response.sampling_logprobs for response in responses], trainer["before"]
        ),
        "scoring before": largest_difference(scored_before, trainer["before"]),
        "scoring after the sync": largest_difference(scored_after, trainer["after"]),
    }
    print(f"tokens {sum(len(r.token_ids) for r in responses)}; max |d logprob|: {figures}")
