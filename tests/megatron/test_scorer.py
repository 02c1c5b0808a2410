"""The scorer in Megatron-Core: log-probabilities and entropies of transformers, each response once
and in bounded chunks, errors of ranks where one waits.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd.artifacts import ArtifactWriter
from lopd.cache import write_responses
from lopd.cache.reader import CacheReader
from lopd.config import ForwardSection
from lopd.errors import ArtifactError, ConfigError, DataError, EngineError, LopdError
from lopd.megatron.scoring.scorer import AHEAD, CHUNK_MICROBATCHES, MegatronScorer
from lopd.records import Response, TeacherScores, token_hash
from lopd.stages.score_shards import score_into
from sglang_rollout.requests.scoring import ScoreRequest
from tests.limits import apart, within
from tests.models import write_qwen3_moe

LIMIT = 1e-5
MAX_TOKENS = 64
TENSOR = ForwardSection(
    parallel={"ranks": 2, "tensor": 2, "expert": 2},
    dtype="float32",
    max_tokens_per_microbatch=MAX_TOKENS,
    timeout_s=500,
)
DATA = ForwardSection(
    parallel={"ranks": 2, "expert": 2},
    dtype="float32",
    max_tokens_per_microbatch=MAX_TOKENS,
    timeout_s=500,
)


def requests_of(count: int, seed: int = 0) -> list[ScoreRequest]:
    """Of 2 to 60 tokens, uneven."""
    generator = np.random.default_rng(seed)
    sizes = [(int(generator.integers(1, 20)), int(generator.integers(1, 41))) for _ in range(count)]
    return [
        ScoreRequest(
            f"p{i}", i % 3, *(generator.integers(4, 512, size).astype(np.int32) for size in pair)
        )
        for i, pair in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("scored"))


def of_transformers(
    model: Path, requests: list[ScoreRequest], perturb: str = ""
) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """(log-probabilities, entropies) of each response, one sequence at a time. perturb: of this
    weight 0.1%.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result = {}
    with torch.no_grad():
        if perturb:
            dict(reference.named_parameters())[perturb].mul_(1.001)
        for request in requests:
            tokens = torch.as_tensor(
                np.concatenate([request.prompt_ids, request.token_ids]), dtype=torch.int64
            )
            logprobs = (
                reference(tokens[None]).logits[0].log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
            )
            chosen = logprobs.gather(1, tokens[len(request.prompt_ids) :, None])[:, 0]
            result[request.key] = (
                chosen,
                torch.distributions.Categorical(logits=logprobs).entropy(),
            )
    return result


def differences(
    scores: list[TeacherScores], expected: dict[Any, tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    pairs = [(score, *expected[score.key]) for score in scores]
    found = [
        np.abs(score.teacher_logprobs - logprobs.numpy()).max() for score, logprobs, _ in pairs
    ]
    return [
        *map(float, found),
        *(
            float(np.abs(score.entropy - spread.numpy()).max())
            for score, _, spread in pairs
            if score.entropy is not None
        ),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DATA, id="data ranks"),
        pytest.param(TENSOR, id="tensor ranks", marks=pytest.mark.slow),
    ],
)
def test_scores_and_entropies_are_those_of_transformers(
    settings: ForwardSection, model: Path, tmp_path: Path
) -> None:
    """In three chunks and more, of which no more than a few wait; a second stream on the same
    ranks; and one weight a thousandth larger shows.
    """
    requests = requests_of(81)  # an odd number for two data ranks
    read: list[int] = []

    def counted() -> Iterator[ScoreRequest]:
        for index, request in enumerate(requests):
            read.append(index)
            yield request

    with MegatronScorer(model, settings, folder=tmp_path, entropy=True) as engine:
        stream = engine.score(counted())
        scores = [next(stream)]
        at_first = sum(
            len(requests[index].prompt_ids) + len(requests[index].token_ids) for index in read
        )
        scores += list(stream)
        again = list(engine.score(requests[:3]))
        with pytest.raises(DataError, match="prompt and response have 65 tokens"):
            list(
                engine.score(
                    [
                        dataclasses.replace(
                            requests[0],
                            prompt_ids=np.full(25, 5, np.int32),
                            token_ids=np.full(40, 5, np.int32),
                        )
                    ]
                )
            )
        with pytest.raises(DataError, match="0 prompt tokens"):
            list(engine.score([dataclasses.replace(requests[0], prompt_ids=np.zeros(0, np.int32))]))
        with pytest.raises(ConfigError, match="top_k = 5"):
            list(engine.score(requests, top_k=5))
        with pytest.raises(EngineError, match="token 1: the model gives the log-probability nan"):
            engine._scores(
                dataclasses.replace(requests[0], token_ids=np.full(2, 5, np.int32)),
                np.array([-1.0, np.nan]),
                None,
            )
    assert sorted(score.key for score in scores) == sorted(request.key for request in requests)
    assert {score.key: score.token_hash for score in scores} == {
        r.key: token_hash(r.prompt_ids, r.token_ids) for r in requests
    }
    budget = CHUNK_MICROBATCHES * MAX_TOKENS * settings.parallel.data
    assert at_first <= (AHEAD + 2) * budget, "requests are read ahead without bound"
    assert sum(len(r.prompt_ids) + len(r.token_ids) for r in requests) > 2 * budget
    expected = of_transformers(model, requests)
    within(max(differences(scores, expected)), LIMIT)
    within(max(differences(again, expected)), LIMIT, "again")
    perturbed = of_transformers(model, requests, "model.norm.weight")
    apart(max(differences(scores, perturbed)), 10 * LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron-teacher.log"]
    assert not list(Path(tempfile.gettempdir()).glob(f"lopd-megatron-*-{os.getpid()}-*")), (
        "what crossed is left behind"
    )


def test_what_stops_the_ranks_is_told_where_the_scores_are_awaited(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "no weights"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match="no such file"):  # noqa: SIM117
        with MegatronScorer(
            folder, ForwardSection(dtype="float32", timeout_s=500), folder=tmp_path
        ) as engine:
            list(engine.score(requests_of(2)))


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        LopdError,
        match=(
            "parallel of the teacher: "
            r"number of key-value heads \(2\) does not divide by tensor \(4\)"
        ),
    ):
        MegatronScorer(model, ForwardSection(parallel={"ranks": 4, "tensor": 4}), folder=tmp_path)


class Recording(MegatronScorer):
    """Of no ranks: says what it was asked for at a time."""

    def __init__(self) -> None:
        self.streams: list[list[str]] = []

    def score(self, requests: Iterable[Any], *, top_k: int = 0) -> Iterator[TeacherScores]:
        stream = list(requests)
        self.streams.append([request.prompt_id for request in stream])
        for one in stream:
            yield TeacherScores(
                one.prompt_id,
                one.sample_index,
                token_hash(one.prompt_ids, one.token_ids),
                np.full(len(one.token_ids), -1.0, np.float32),
            )


def test_what_a_response_is_packed_with_depends_on_its_shard_alone(tmp_path: Path) -> None:
    """Else the last bits of its scores depended on which shards a kill had left."""
    responses = [
        Response(
            f"p{i}", 0, *(np.full(2, 5, np.int32),) * 2, np.full(2, -0.5, np.float32), "stop", "v"
        )
        for i in range(6)
    ]
    rollouts = write_responses(
        tmp_path / "rollouts", responses, kind="rollouts", inputs={}, shard_size=2
    )
    engine: Any = Recording()
    writer = ArtifactWriter(tmp_path / "scores", kind="teacher_cache", inputs={})
    score_into(writer, engine, tmp_path / "rollouts", rollouts, title="scores")
    writer.finish()
    assert [sorted(stream) for stream in engine.streams] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4", "p5"],
    ]
    assert [response.prompt_id for response, _ in CacheReader(tmp_path / "scores").rows()] == [
        "p0",
        "p1",
        "p2",
        "p3",
        "p4",
        "p5",
    ]
