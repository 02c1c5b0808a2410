"""Measures how often models answer the held-out prompts of a configuration right, greedily and when
they sample at temperature 1. One server answers for all models of one architecture.

    python examples/small_student/measure.py CONFIG OUT NAME=MODEL [NAME=MODEL ...]

writes OUT/NAME/{greedy,sampled}/ (the responses, as artifacts) and OUT/NAME.json. After a kill the
same command goes on. seeds.py calls it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, publish_json, remove_folder
from lopd.config import Config, load_config
from lopd.records import Manifest, Prompt
from lopd.stages.context import StageContext
from lopd.stages.evaluate_checkpoint import ANSWERS
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.serving import ModelServer
from lopd.tasks import Verifier, get_task
from lopd.tasks.tokenizer import load_tokenizer, response_text
from lopd.tasks.verdicts import Judged, judge_all

# top_k = 1 leaves the likeliest token alone, which is what greedy means.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
}


def measure(config: Config, models: dict[str, Path], out: Path) -> None:
    """Publish the figures of each model that has none yet.

    Args:
        config: The configuration, for its held-out prompts, its servers and its verifier.
        models: The Hugging Face folder of each model, by name.
        out: The folder of the results.
    """
    # The logs of the servers lie beside the results.
    run = config.run.model_copy(update={"dir": out})
    context = StageContext(
        config.model_copy(update={"run": run}), dataclasses.replace(ANSWERS, name="servers")
    )
    context.folder.mkdir(parents=True, exist_ok=True)
    prompts, prompt_ids = context.prompts("eval")
    with ModelServer(context) as server:
        for name, model in models.items():
            result = out / f"{name}.json"
            if is_measured(result, model):
                continue
            # Responses of an earlier model of this name, which was made from other settings.
            if result.exists():
                remove_folder(out / name)
                result.unlink()
            engine = server.use(model, version=name)
            figures: dict[str, Any] = {"model": identify_model(model).weights}
            for mode, changes in MODES.items():
                writer = answers_writer(context, out / name / mode, model, changes)
                sample_into(
                    writer,
                    engine,
                    prompts,
                    prompt_ids,
                    sampling_params(config.evaluate, [model], **changes),
                    samples_per_prompt=1,
                    seed=config.run.seed,
                    # Each model has draws of its own, so that errors of two models are independent.
                    purpose=f"{mode} {name}",
                    title=f"{mode} {name}",
                )
                figures[mode] = share_right(context, writer.folder, writer.finish(), prompts)
            publish_json(result, {**figures, "num_prompts": len(prompts)})


def is_measured(result: Path, model: Path) -> bool:
    """Return whether a file has the figures of this very model."""
    if not result.exists():
        return False
    weights: str = json.loads(result.read_text())["model"]
    return weights == identify_model(model).weights


def answers_writer(
    context: StageContext, folder: Path, model: Path, changes: dict[str, Any]
) -> ArtifactWriter:
    """Open the artifact of a model's responses to the held-out prompts.

    Args:
        context: Says the configuration.
        folder: The folder of the artifact.
        model: The model.
        changes: The sampling parameters, as in MODES.
    """
    inputs = {
        "model": identify_model(model).weights,
        "prompts.eval": context.config.prompts.eval.model_dump(mode="json"),
        "run.seed": context.config.run.seed,
        **changes,
    }
    return ArtifactWriter(
        folder,
        kind=ANSWERS.kind,
        inputs=inputs,
        models={"model": identify_model(model)},
        sampling=changes,
        shard_size=4096,
    )


def share_right(
    context: StageContext, folder: Path, manifest: Manifest, prompts: Sequence[Prompt]
) -> float:
    """Return the share of right responses, 0 to 1."""
    config = context.config
    task = get_task(config.task.name, config.task.options)
    assert isinstance(task, Verifier), "the example's task has a verifier"
    tokenizer = load_tokenizer(config.models.student)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}

    def to_judge() -> Iterator[Judged]:
        for response, _ in cache.read_rows(folder, manifest):
            text = response_text(tokenizer, response.token_ids, response.finish_reason)
            yield by_id[response.prompt_id], text, response.finish_reason

    verdicts = [verdict.right for verdict in judge_all(task, to_judge())]
    return sum(verdicts) / len(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()
    named = dict(model.split("=", 1) for model in options.models)
    models = {name: Path(folder).resolve() for name, folder in named.items()}
    measure(load_config(options.config), models, options.out.resolve())


if __name__ == "__main__":
    main()
