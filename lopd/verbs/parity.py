"""``lopd parity``: do SGLang and Megatron-Core give the same log-probabilities for this run's
responses?
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from lopd.audit.parity import Agreement
    from lopd.config import Config
    from lopd.records import Floats, Key, Response


def parity(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="TOML file of a run whose rollouts are done.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides of knobs.", show_default=False),
    ] = None,
    responses: Annotated[int, typer.Option(min=1, help="Take so many at random.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of responses.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare log-probabilities of SGLang and Megatron-Core on the run's rollouts: of the teacher,
    and of the student that sampled them.

    Teacher: what the cache holds (or, where score has not run, an SGLang server) against
    Megatron-Core on score.forward's ranks. Student: the log-probabilities that the rollouts were
    sampled with against a forward pass of the trainer, at distill's layout and dtype. Writes
    nothing into the run.
    """
    from lopd.config import load_config
    from lopd.report.parity_view import show_parity

    found = compare(load_config(config, overrides or []), num_responses=responses, seed=seed)
    if as_json:
        typer.echo(json.dumps({name: result.as_dict() for name, result in found.items()}, indent=1))
    else:
        show_parity(found)


def compare(config: Config, *, num_responses: int, seed: int) -> dict[str, Agreement]:
    """{"teacher: ...": ..., "student: ...": ...} on a sample of the run's rollouts. LopdError: no
    rollouts, or an engine does not start.
    """
    from lopd.config import ForwardSection

    if config.models.teachers:
        raise ConfigError(
            "parity is of one teacher",
            where="models.teachers",
            remedy="compare each: models.teachers={} models.teacher=FOLDER",
        )
    rollouts, cached, engine = _sample(config, num_responses, seed)
    train = config.distill
    trainer = ForwardSection(
        parallel=train.parallel,
        dtype=train.dtype,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        timeout_s=train.timeout_s,
        threads_per_rank=train.threads_per_rank,
    )
    with tempfile.TemporaryDirectory(prefix="lopd-parity-") as name:
        work = Path(name)
        teacher = config.models.teacher
        served = (
            _by_sglang(config, teacher, rollouts, work)
            if cached is None or engine == "megatron"
            else cached
        )
        ranks = (
            cached
            if cached is not None and engine == "megatron"
            else _by_megatron(teacher, config.score.forward, rollouts, work, "teacher")
        )
        student = _by_megatron(config.run.dir / "sft" / "model", trainer, rollouts, work, "student")
    sampled = {response.key: response.sampling_logprobs for response in rollouts}
    return {
        "teacher: SGLang and Megatron-Core": _agreement(served, ranks),
        "student: rollout and trainer": _agreement(sampled, student),
    }


def _agreement(first: dict[Key, Floats], second: dict[Key, Floats]) -> Agreement:
    from lopd.audit.parity import agreement

    return agreement((key, values, second[key]) for key, values in first.items())


def _sample(
    config: Config, count: int, seed: int
) -> tuple[list[Response], dict[Key, Floats] | None, str]:
    """Rollouts; their teacher log-probabilities by the cache, where it is complete and of these
    rollouts; the engine that wrote it.
    """
    import numpy as np

    from lopd.artifacts import read_manifest
    from lopd.cache.reader import CacheReader

    folder = config.run.dir / "rollout"
    manifest = read_manifest(folder)
    engine = "sglang"
    scored = config.run.dir / "score"
    if (scored / "manifest.json").is_file():
        made = read_manifest(scored)
        if made.complete and manifest.fingerprint in made.parents.values():
            folder, engine = scored, str(made.inputs.get("score.engine", engine))
    reader = CacheReader(folder)
    if len(reader) == 0:
        raise ArtifactError("no responses", where=str(folder), remedy="run the rollout stage first")
    chosen = np.sort(
        np.random.default_rng(seed).choice(len(reader), min(count, len(reader)), replace=False)
    )
    rows = reader.fetch(chosen)
    responses = [response for response, _ in rows]
    scores = {response.key: logprobs for response, logprobs in rows if logprobs is not None}
    return responses, scores if len(scores) == len(rows) else None, engine


def _by_megatron(
    model: Path, settings: Any, rollouts: list[Response], work: Path, name: str
) -> dict[Key, Floats]:
    from lopd.megatron.scoring.scorer import MegatronScorer

    with MegatronScorer(model, settings, folder=work, name=name) as engine:
        return {score.key: score.teacher_logprobs for score in engine.score(rollouts)}


def _by_sglang(
    config: Config, model: Path, rollouts: list[Response], work: Path
) -> dict[Key, Floats]:
    from sglang_rollout.requests.fleet import serve
    from sglang_rollout.requests.scoring import ScoreRequest

    def requests() -> Iterator[ScoreRequest]:
        for response in rollouts:
            yield ScoreRequest(
                response.prompt_id, response.sample_index, response.prompt_ids, response.token_ids
            )

    with serve(
        model, config.sglang, log=work / "sglang.log", name="teacher", tell=lambda line: None
    ) as engine:
        return {score.key: score.teacher_logprobs for score in engine.score(requests())}
