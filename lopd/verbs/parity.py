"""``lopd parity``: do SGLang and Megatron-Core give the same log-probabilities for this run?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.errors import ArtifactError, ConfigError
from lopd.verbs.arguments import AsJson, Overrides

if TYPE_CHECKING:
    from lopd.audit.parity import Agreement
    from lopd.config import Config
    from lopd.records import Bools, Floats, Key, Response


def parity(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="TOML file of a run whose rollouts are done.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    # Both engines are compared token by token, so some ten thousand tokens show any error.
    responses: Annotated[
        int, typer.Option(min=1, help="Number of responses, chosen at random.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of responses.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the log-probabilities of SGLang and Megatron-Core on a run's rollouts.

    Reads the rollouts and the teacher cache in run.dir, and the two models. Writes nothing there.

    For the teacher, it compares the values of the cache with Megatron-Core on the ranks of
    score.forward. If the score stage has not run, an SGLang server gives the values. For the
    student, it compares the log-probabilities that the rollouts were sampled with, and a forward
    pass of the trainer with the layout and dtype of distill.
    """
    from lopd.config import load_config
    from lopd.report.parity_view import show_parity

    # No exit code depends on the result: which difference is too large depends on the dtype.
    found = compare(load_config(config, overrides or []), num_responses=responses, seed=seed)
    if as_json:
        typer.echo(json.dumps({name: result.as_dict() for name, result in found.items()}, indent=1))
    else:
        show_parity(found)


def compare(config: Config, *, num_responses: int, seed: int) -> dict[str, Agreement]:
    """Compare two sources of log-probabilities, for the teacher and for the student.

    Args:
        config: The configuration of a run whose rollouts are done.
        num_responses: Number of responses, chosen at random.
        seed: Seed for the choice of responses.

    Returns:
        One agreement for the teacher and one for the student. The key is a title.

    Raises:
        LopdError: There are no rollouts, or an engine does not start.
    """
    # The cache then has scores of several models, and one ScoreRequest goes to one of them.
    if config.models.teachers:
        raise ConfigError(
            "parity compares one teacher, but the configuration has several",
            where="models.teachers",
            remedy="compare each teacher alone: add models.teachers={} models.teacher=FOLDER",
        )
    if config.aligns_tokenizers:
        raise ConfigError(
            'parity compares scores of the same tokens, but with score.tokenizer = "aligned" the '
            "teacher has others",
            where="score.tokenizer",
            remedy="compare each model in a configuration of its own, as teacher and student",
        )
    # The same responses for all four sources, so that they can be compared token by token.
    rollouts, cached, engine = _sample(config, num_responses, seed)
    teacher = config.models.teacher
    with tempfile.TemporaryDirectory(prefix="lopd-parity-") as name:
        scratch = Path(name)
        # The cache stands for the engine that wrote it. Only the other engine has to compute.
        if cached is not None and engine == "sglang":
            by_sglang = cached
        else:
            by_sglang = _score_with_sglang(config, teacher, rollouts, scratch)
        if cached is not None and engine == "megatron":
            by_megatron = cached
        else:
            by_megatron = _score_with_megatron(
                teacher, config.score.forward, rollouts, scratch, "teacher"
            )
        # The model of the sft stage sampled the rollouts, and distill starts from it.
        student = config.run.dir / "sft" / "model"
        by_trainer = _score_with_megatron(
            student, _trainer_settings(config), rollouts, scratch, "student"
        )
    # The rollouts carry what SGLang gave while it sampled them. Nothing has to be computed for it.
    # Tokens without loss, such as those of a tool, have none: SGLang has not sampled them.
    masks = {one.key: one.loss_mask for one in rollouts}
    sampled = {one.key: _of_loss(one.sampling_logprobs, one.loss_mask) for one in rollouts}
    by_trainer = {key: _of_loss(values, masks[key]) for key, values in by_trainer.items()}
    return {
        "teacher: SGLang and Megatron-Core": _agreement(by_sglang, by_megatron),
        "student: rollout and trainer": _agreement(sampled, by_trainer),
    }


def _trainer_settings(config: Config) -> Any:
    """Return settings for a forward pass that computes as distill does."""
    from lopd.config import ForwardSection

    # The forward pass of distill is the one that computes the student's log-probabilities in
    # training.
    train = config.distill
    return ForwardSection(
        parallel=train.parallel,
        dtype=train.dtype,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        timeout_s=train.timeout_s,
        threads_per_rank=train.threads_per_rank,
    )


def _of_loss(logprobs: Floats, loss_mask: Bools | None) -> Floats:
    return logprobs if loss_mask is None else logprobs[loss_mask]


def _agreement(first: dict[Key, Floats], second: dict[Key, Floats]) -> Agreement:
    from lopd.audit.parity import agreement

    return agreement((key, values, second[key]) for key, values in first.items())


def _sample(
    config: Config, count: int, seed: int
) -> tuple[list[Response], dict[Key, Floats] | None, str]:
    """Choose rollouts at random, with the teacher's log-probabilities if the run has them.

    Returns:
        The rollouts. The teacher's log-probabilities by key, or None if the run's cache is not
        complete or belongs to other rollouts. The engine that computed them.
    """
    import numpy as np

    from lopd.artifacts import read_manifest
    from lopd.cache.reader import CacheReader

    # The rollouts are needed in any case. The cache has the same rows, with one column more.
    folder = config.run.dir / "rollout"
    manifest = read_manifest(folder)
    engine = "sglang"
    score_folder = config.run.dir / "score"
    if (score_folder / "manifest.json").is_file():
        scored = read_manifest(score_folder)
        # A cache of earlier rollouts has other responses. Its parents name the rollouts it has.
        if scored.complete and manifest.fingerprint in scored.parents.values():
            folder = score_folder
            engine = str(scored.inputs.get("score.engine", engine))
    reader = CacheReader(folder)
    if len(reader) == 0:
        raise ArtifactError(
            "the folder has no responses", where=str(folder), remedy="run the rollout stage first"
        )
    # A fixed seed, so that two calls compare the same responses.
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(reader), min(count, len(reader)), replace=False))
    # By index: of a large cache only the chosen rows are read.
    rows = reader.fetch(chosen)
    responses = [response for response, _ in rows]
    logprobs = {response.key: values for response, values in rows if values is not None}
    return responses, logprobs if len(logprobs) == len(rows) else None, engine


def _score_with_megatron(
    model: Path, settings: Any, rollouts: list[Response], scratch: Path, name: str
) -> dict[Key, Floats]:
    from lopd.megatron.scoring.scorer import MegatronScorer

    # The scorer computes log-probabilities of given tokens. It calls them the teacher's, whatever
    # the model is.
    with MegatronScorer(model, settings, folder=scratch, name=name) as engine:
        return {score.key: score.teacher_logprobs for score in engine.score(rollouts)}


def _score_with_sglang(
    config: Config, model: Path, rollouts: list[Response], scratch: Path
) -> dict[Key, Floats]:
    from sglang_rollout.requests.fleet import serve
    from sglang_rollout.requests.scoring import ScoreRequest

    def requests() -> Iterator[ScoreRequest]:
        # The server scores the very token ids that were sampled. No text is tokenised again.
        for response in rollouts:
            yield ScoreRequest(
                response.prompt_id, response.sample_index, response.prompt_ids, response.token_ids
            )

    # The server ends with the block, also after Ctrl-C. Its progress lines would mix with the
    # result.
    log = scratch / "sglang.log"
    with serve(model, config.sglang, log=log, name="teacher", tell=lambda line: None) as engine:
        return {score.key: score.teacher_logprobs for score in engine.score(requests())}
