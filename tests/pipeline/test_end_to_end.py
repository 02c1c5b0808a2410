"""The example from one command: what stands on screen and on disk, and that the student has learnt
what it should.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest
from lopd.config import Config, load_config
from lopd.records import TeacherScores, token_hash
from lopd.tasks import get_task
from lopd.tasks.prompts import read_prompts
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.servers.server import SGLangServer
from tests.pipeline.conftest import NUM_STEPS, SECRET, SHORT, CompletedRun
from tests.pipeline.running import EXAMPLE, LOOPBACK, STAGES, lopd, metrics, tensorboard

pytestmark = pytest.mark.timeout(1800)  # whichever test is first makes the run

MODELS = ("base", "sft", "sft_longer", "distilled", "teacher")
# The largest accuracy at first, and the smallest at last.
MOST_AT_FIRST = 0.70
LEAST_AT_LAST = 0.90
# The smallest ratio of the reverse KL before distillation to that after it.
LEAST_RATIO = 10.0


@pytest.fixture(scope="module")
def summary(completed: CompletedRun) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((completed.folder / "summary.json").read_text())
    return loaded


# ---- the student learns ----


def test_the_student_learns_by_the_margin(summary: dict[str, Any]) -> None:
    accuracy = summary["accuracy"]
    reverse_kl = summary["reverse_kl"]
    assert accuracy["sft"] <= MOST_AT_FIRST
    assert accuracy["distilled"] >= LEAST_AT_LAST
    assert reverse_kl["distilled"] <= reverse_kl["sft"] / LEAST_RATIO
    assert accuracy["base"] < accuracy["sft"] < accuracy["distilled"] < accuracy["teacher"] + 0.03
    assert abs(reverse_kl["teacher"]) < 1e-4, "the teacher's distance to itself"


def test_the_curve_rises_from_sync_to_sync(completed: CompletedRun) -> None:
    rows = metrics(completed.folder, "distill", "eval")
    assert [row["step"] for row in rows] == [0, NUM_STEPS // 2, NUM_STEPS]
    assert rows[0]["accuracy"] <= MOST_AT_FIRST
    assert rows[-1]["accuracy"] >= LEAST_AT_LAST
    assert rows[1]["accuracy"] > rows[0]["accuracy"] + 0.1


def test_scores_of_other_tokens_teach_nothing(
    completed: CompletedRun, done_up_to: Callable[[str], Path]
) -> None:
    """The margin's control: the same values in the cache, each on another token. What it must not
    reach is the accuracy that the margin asks for.
    """
    run_dir = done_up_to("score")
    _shuffle_teacher_logprobs(run_dir / "score")
    lopd("distill", run_dir, [*SHORT, f"distill.sync_every={NUM_STEPS}"])
    accuracies = [row["accuracy"] for row in metrics(run_dir, "distill", "eval")]
    assert len(accuracies) == 2
    assert accuracies[0] == metrics(completed.folder, "distill", "eval")[0]["accuracy"], (
        "the same start"
    )
    assert accuracies[1] < accuracies[0] < MOST_AT_FIRST


def _shuffle_teacher_logprobs(folder: Path) -> None:
    former = read_manifest(folder)
    rows = list(cache.read_rows(folder, former))
    shuffled = np.concatenate([scores for _, scores in rows if scores is not None])
    np.random.default_rng(0).shuffle(shuffled)
    ends = np.cumsum([len(response.token_ids) for response, _ in rows])
    scores = [
        TeacherScores(
            response.prompt_id,
            response.sample_index,
            token_hash(response.prompt_ids, response.token_ids),
            values,
        )
        for (response, _), values in zip(rows, np.split(shuffled, ends[:-1]), strict=True)
    ]
    for path in folder.iterdir():
        path.unlink()
    writer = ArtifactWriter(
        folder,
        kind=former.kind,
        inputs=former.inputs,
        parents=former.parents,
        models=former.models,
        sampling=former.sampling,
        lineage=former.lineage,
    )
    writer.publish_shard(0, cache.to_table([response for response, _ in rows], scores))
    writer.finish(**former.extra)


# ---- on screen ----


def test_what_stands_on_screen(completed: CompletedRun) -> None:
    screen = completed.command.stdout
    assert completed.command.stderr == ""
    for stage in STAGES:
        assert re.search(rf"^{stage}: done in \d+\.\d s$", screen, re.MULTILINE), stage
    line = (
        r"^distill (\d)/8  loss \d+\.\d+  advantage [+-]\d\.\d+  reverse KL -?\d\.\d+  "
        r"grad norm \d+\.\d+  lr 2\.0e-04  tokens/s [\d,]+(?:  .+ left)?$"
    )
    assert re.findall(line, screen, re.MULTILINE) == [str(step) for step in range(1, NUM_STEPS + 1)]
    assert len(re.findall(r"^sft \d/4  loss", screen, re.MULTILINE)) == 4
    assert (
        len(
            re.findall(
                r"^distill step \d/8: synced weights, accuracy 0\.\d+ on 100 prompts(;|$)",
                screen,
                re.MULTILINE,
            )
        )
        == 3
    )
    for title, total in (
        ("demonstrations", "512"),
        ("rollouts", "1,280"),
        ("teacher log-probabilities", "1,280"),
    ):
        assert re.search(
            rf"^{title}: {total}/{total} responses, [\d,.]+/s, ", screen, re.MULTILINE
        ), title


def test_the_final_table_is_what_the_summary_says(
    completed: CompletedRun, summary: dict[str, Any]
) -> None:
    table = completed.command.stdout[
        completed.command.stdout.index("accuracy on held-out prompts") :
    ]
    for name, title in (
        ("sft", "SFT student"),
        ("distilled", "distilled student"),
        ("sft_longer", "SFT of equal compute"),
        ("teacher", "teacher"),
    ):
        assert re.search(rf"{title} +│ +{100 * summary['accuracy'][name]:.1f} ±", table), title
    for stage in summary["stages"]:
        assert re.search(rf"{stage['name']} +│ +done +│ +{stage['seconds']:.1f} ", table), stage


# ---- on disk ----


def test_summary(completed: CompletedRun, summary: dict[str, Any]) -> None:
    assert [(stage["name"], stage["status"]) for stage in summary["stages"]] == [
        (name, "done") for name in STAGES
    ]
    assert all(
        isinstance(stage["seconds"], float) and stage["seconds"] > 0 for stage in summary["stages"]
    )
    for quantity in ("accuracy", "reverse_kl"):
        assert set(summary[quantity]) == {*MODELS, "num_prompts", "samples_per_prompt"}
        assert all(
            isinstance(summary[quantity][name], float) and math.isfinite(summary[quantity][name])
            for name in MODELS
        )
        assert (summary[quantity]["num_prompts"], summary[quantity]["samples_per_prompt"]) == (
            250,
            1,
        )
    distill = summary["distill"]
    assert set(distill) == {"num_steps", "num_tokens", "first_loss", "last_loss", "weight_syncs"}
    assert (distill["num_steps"], distill["weight_syncs"]) == (NUM_STEPS, 2)
    assert distill["num_tokens"] == sum(
        row["processed_tokens"] for row in metrics(completed.folder, "distill")
    )
    assert distill["last_loss"] < distill["first_loss"] / 2
    assert set(summary["cache"]) == {"rows", "tokens", "bytes_per_token"}
    tokens = sum(
        len(response.token_ids) for response, _ in cache.read_rows(completed.folder / "score")
    )
    assert (summary["cache"]["rows"], summary["cache"]["tokens"]) == (1280, tokens)
    assert 4 < summary["cache"]["bytes_per_token"] <= 8.5
    sizes = cache.column_bytes(completed.folder / "score")
    assert sum(sizes.values()) - sizes["sampling_logprobs"] <= 5.2 * tokens, (
        "all but the sampling log-probabilities"
    )
    assert summary["teacher"]["consistent"] is True
    assert (
        distill["num_tokens"] <= summary["sft_longer"]["num_tokens"] < 1.1 * distill["num_tokens"]
    ), "equal compute"


def test_metrics_have_one_line_a_step(completed: CompletedRun) -> None:
    for stage, num_steps in (("sft", 4), ("distill", NUM_STEPS)):
        assert [row["step"] for row in metrics(completed.folder, stage)] == list(
            range(1, num_steps + 1)
        ), stage
    assert (
        len(metrics(completed.folder, "sft_longer"))
        == json.loads((completed.folder / "summary.json").read_text())["sft_longer"]["num_steps"]
    )


def test_tensorboard_shows_what_metrics_say(completed: CompletedRun) -> None:
    for stage in ("sft", "distill", "sft_longer"):
        expected = [
            (row["step"], pytest.approx(row["loss"], rel=1e-6))
            for row in metrics(completed.folder, stage)
        ]
        assert tensorboard(completed.folder, stage, "train/loss") == expected, stage


def test_every_stage_leaves_its_artifact_manifest_and_log(completed: CompletedRun) -> None:
    for stage in STAGES:
        folder = completed.folder / stage
        assert read_manifest(folder).complete, stage
        assert f"{stage}: done in" in (folder / "log.txt").read_text()
        assert json.loads((folder / "seconds.json").read_text())["seconds"] > 0
    assert (completed.folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(completed.folder.rglob("*.partial")), "nothing half written"
    assert not list((completed.folder / "distill" / "sync").glob("*")), (
        "weights of a sync are removed"
    )


@pytest.mark.parametrize(
    ("stage", "role"), [("demonstrate", "teacher"), ("rollout", "student"), ("score", "teacher")]
)
def test_manifests_say_how_the_servers_were_started_without_a_secret(
    completed: CompletedRun, stage: str, role: str
) -> None:
    model = {
        "teacher": load_config(EXAMPLE).models.teacher,
        "student": completed.folder / "sft" / "model",
    }[role]
    [server] = read_manifest(completed.folder / stage).extra["served"][role]["servers"]
    arguments = server["arguments"]
    assert (
        arguments["model_path"],
        arguments["dtype"],
        arguments["enable_deterministic_inference"],
    ) == (str(model), "float32", True)
    assert json.loads(arguments["hicache_storage_backend_extra_config"]) == {"token": "***"}
    assert server["num_restarts"] == 0
    assert "api_key" not in arguments


def test_a_secret_of_extra_args_stands_only_in_the_logs_of_servers_and_these_are_their_owners(
    completed: CompletedRun,
) -> None:
    """SGLang itself writes all its arguments there."""
    files = [path for path in completed.folder.rglob("*") if path.is_file()]
    telling = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert telling, "the servers got it"
    assert [
        path
        for path in telling
        if not path.name.startswith("sglang-")
        or path.suffix != ".log"
        or path.stat().st_mode & 0o077
    ] == []
    exported = json.loads((completed.folder / "export" / "model" / "lopd.json").read_text())[
        "config"
    ]
    assert json.loads(exported["sglang"]["extra_args"]["hicache_storage_backend_extra_config"]) == {
        "token": "***"
    }
    assert SECRET not in completed.command.stdout


@pytest.mark.parametrize("stage", ["sft", "distill"])
def test_the_file_of_the_ranks_is_their_owners(completed: CompletedRun, stage: str) -> None:
    """It has the configuration, options of the task among it, which may be needed to judge."""
    assert (completed.folder / stage / "job.json").stat().st_mode & 0o777 == 0o600


# ---- processes ----


def test_no_process_is_left_and_nothing_listened_but_on_loopback(completed: CompletedRun) -> None:
    assert completed.processes_left == []
    programs = " ".join(program for _, program in completed.listened)
    assert "sglang_rollout.servers.launch" in programs, "the servers were seen"
    assert "megatron.ranks.forking" in programs, "the trainer's store was seen"
    assert {
        (address, program) for address, program in completed.listened if address not in LOOPBACK
    } == set()


# ---- the exported model ----


@pytest.fixture
def exported(completed: CompletedRun) -> Iterator[tuple[Config, Path, SGLangEngine]]:
    config = load_config(EXAMPLE, [f"run.dir={completed.folder}", *SHORT])
    folder = completed.folder / "export" / "model"
    with SGLangServer(folder, config.sglang, log=completed.folder / "exported.log") as server:
        yield config, folder, SGLangEngine(server.url, server.api_key, config.sglang, server=server)


def test_transformers_and_sglang_answer_alike_with_the_exported_model(
    exported: tuple[Config, Path, SGLangEngine],
) -> None:
    from transformers import AutoModelForCausalLM

    config, folder, engine = exported
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = read_prompts(
        config.prompts.eval, get_task(config.task.name, config.task.options), need_answers=True
    )[:6]
    ids: list[NDArray[np.int32]] = render(
        prompts, load_tokenizer(folder), context_length=config.sglang.context_length
    )
    ends = stop_token_ids(folder, load_tokenizer(folder))
    greedy = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=1,
        min_p=0.0,
        max_new_tokens=64,
        stop_token_ids=tuple(ends),
    )
    requests = (
        SamplingRequest(prompt.prompt_id, 0, prompt_ids, seed=1)
        for prompt, prompt_ids in zip(prompts, ids, strict=True)
    )
    served = {
        response.prompt_id: response.token_ids.tolist()
        for response in engine.generate(requests, greedy)
    }
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        given = torch.from_numpy(prompt_ids).long()[None]  # [1, P]
        answer = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=list(ends),
            pad_token_id=0,
        )
        assert answer[0, given.shape[1] :].tolist() == served[prompt.prompt_id]
    assert len({tuple(answer) for answer in served.values()}) == 6, (
        "answers that tell prompts apart"
    )
