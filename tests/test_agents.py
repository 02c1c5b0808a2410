"""rollout.environment: rollouts with a tool, through the pipeline with stand-ins, and what is
refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.cache.checks import check_cache
from lopd.cache.reader import CacheReader
from lopd.cache.transcript_import import import_transcripts
from lopd.checks.combinations import sampling_problems
from lopd.config import Config, load_config
from lopd.errors import LopdError
from lopd.objective import Distillation, StepDivergence
from lopd.records import Response, float32, int32
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import distillation_objective, load_samples
from lopd.tasks.environments import environment_identity
from lopd.tasks.tokenizer import decode, load_tokenizer
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.stand_ins import (
    ROOT,
    TINY_MODELS,
    Engine,
    Result,
    StandIns,
    command,
    contents,
    write_project,
    write_prompts,
)

TOOLS = ROOT / "examples" / "calculator" / "tools.py"
TO_SCORE = ("demonstrate", "sft", "rollout", "score")
END = 2
DIGITS = {character: number for number, character in enumerate("0123456789+-", start=8)}
DIGITS["="] = 21


def ids_of(text: str) -> list[int]:
    return [DIGITS[character] for character in text]


@dataclass
class Agent(Engine):
    """Writes a sum to a question and a number to the calculator."""

    requests: list[SamplingRequest] = field(default_factory=list)

    def turn(self, request: SamplingRequest, params: SamplingParams) -> Response:
        self.requests.append(request)
        value = request.seed % 90
        is_first = request.first_len is None
        text = f"{value:02d}+07=" if is_first else f"{value:02d}"
        tokens = int32([*ids_of(text), END])
        logprobs = float32(np.full(len(tokens), -0.5 if is_first else -0.6))
        return Response(*request.key, request.prompt_ids, tokens, logprobs, "stop", "stand-in")


@dataclass
class Project:
    folder: Path
    config: Path
    servers: StandIns

    def load(self, *overrides: str) -> Config:
        own = [f"rollout.environment={TOOLS}:calculator", "rollout.max_turns=3"]
        return load_config(self.config, [*own, *overrides])

    def run(self, *overrides: str, stages: tuple[str, ...] = TO_SCORE) -> Config:
        config = self.load(*overrides)
        pipeline.run(config, stages)
        return config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    servers = StandIns(engine=Agent()).install(monkeypatch)
    return Project(tmp_path, write_project(tmp_path), servers)


def responses_in(folder: Path) -> list[Response]:
    return [response for response, _ in CacheReader(folder).rows()]


def test_two_turns_with_a_calculator(project: Project) -> None:
    config = project.run()
    tokenizer = load_tokenizer(TINY_MODELS / "student")
    agent = project.servers.engine
    assert isinstance(agent, Agent)
    responses = responses_in(config.run.dir / "rollout")
    assert len(responses) == 24
    for response in responses:
        mask = response.loss_mask
        assert mask is not None
        first = decode(tokenizer, response.token_ids[:7])
        value = int(first[:2])
        between = decode(tokenizer, response.token_ids[~mask])
        assert between == (
            f"\n<|im_start|>user\n{value:02d}+07={value + 7}<|im_end|>\n<|im_start|>assistant\n"
        )
        second = decode(tokenizer, response.token_ids[mask][7:])
        assert second.endswith("<|im_end|>")
        assert len(response.token_ids[mask]) == 7 + 3
        assert not response.sampling_logprobs[~mask].any()
        assert (response.sampling_logprobs[mask] < 0).all()
        assert response.finish_reason == "stop"
    # The second turn was asked for behind exactly the ids of the first: one prefix.
    by_key: dict[Any, list[SamplingRequest]] = {}
    for request in agent.requests:
        by_key.setdefault(request.key, []).append(request)
    for response in responses:
        asked = [one for one in by_key[response.key] if one.first_len is not None]
        whole = [*response.prompt_ids.tolist(), *response.token_ids.tolist()]
        assert asked[-1].prompt_ids.tolist() == whole[: len(asked[-1].prompt_ids)]
    manifest = read_manifest(config.run.dir / "rollout")
    assert manifest.sampling["environment"] == "tools.py:calculator"
    assert manifest.sampling["max_turns"] == 3
    assert manifest.inputs["rollout.environment"] == environment_identity(
        Path(f"{TOOLS}:calculator")
    )
    assert not [*check_cache(config.run.dir / "score")[0]]


def test_the_training_learns_from_the_turns_alone(project: Project) -> None:
    config = project.run("distill.objective.step_divergence_cap=1.2")
    data = config.run.dir / "score"
    job = TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)
    for sample, response in zip(load_samples(job), responses_in(data), strict=True):
        assert response.loss_mask is not None
        prompt_len = len(response.prompt_ids)
        assert not sample.loss_mask[:prompt_len].any()
        np.testing.assert_array_equal(sample.loss_mask[prompt_len:], response.loss_mask)
    objective = distillation_objective(job)
    assert isinstance(objective, Distillation)
    assert objective.weightings == (StepDivergence(1.2),)


def test_a_killed_rollout_goes_on_and_gives_the_same_shards(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(project.run(stages=TO_SCORE[:3]).run.dir / "rollout", "*.parquet")
    folder = tmp_path_factory.mktemp("killed")
    killed = Project(folder, write_project(folder), StandIns(engine=Agent()).install(monkeypatch))
    killed.run(stages=("demonstrate", "sft"))
    agent = killed.servers.engine
    agent.fail_after = (agent.answered + 13, LopdError("killed"))
    with pytest.raises(LopdError, match="killed"):
        killed.run(stages=("rollout",))
    published = contents(folder / "run" / "rollout", "*.parquet")
    assert 0 < len(published) < len(whole)
    agent.fail_after = None
    killed.run(stages=("rollout",))
    assert contents(folder / "run" / "rollout", "*.parquet") == whole


def test_another_tool_makes_other_rollouts(project: Project) -> None:
    """By what the file says and not by where it is."""
    config = project.run(stages=TO_SCORE[:3])
    before = read_manifest(config.run.dir / "rollout").fingerprint
    moved = shutil.copy(TOOLS, project.folder / "tools.py")
    again = project.run(f"rollout.environment={moved}:calculator", stages=("rollout",))
    assert read_manifest(again.run.dir / "rollout").fingerprint == before
    changed = TOOLS.read_text().replace("{left}{sign}{right}={value}", "{value}")
    Path(moved).write_text(changed)
    again = project.run(f"rollout.environment={moved}:calculator", stages=("rollout",))
    assert read_manifest(again.run.dir / "rollout").fingerprint != before
    (response, *_) = responses_in(again.run.dir / "rollout")
    assert response.loss_mask is not None
    tokenizer = load_tokenizer(TINY_MODELS / "student")
    value = int(decode(tokenizer, response.token_ids[:2])) + 7
    between = decode(tokenizer, response.token_ids[~response.loss_mask])
    assert f"user\n{value}<|im_end|>" in between


def test_limits(project: Project) -> None:
    """Of turns and of tokens; 64 tokens hold both turns, and 23 do not hold the second."""
    changed = (
        TOOLS.read_text()
        .replace("or len(answers) > 1", "")
        .replace("_SUM.findall(answers[-1])", "_SUM.findall(answers[0])")
    )
    (project.folder / "endless.py").write_text(changed)
    endless = f"rollout.environment={project.folder / 'endless.py'}:calculator"
    config = project.run(endless, "rollout.max_turns=2", stages=TO_SCORE[:3])
    reasons = {one.finish_reason for one in responses_in(config.run.dir / "rollout")}
    assert reasons == {"abort"}
    config = project.run(endless, "rollout.max_new_tokens=23", stages=("rollout",))
    cut = responses_in(config.run.dir / "rollout")
    assert {one.finish_reason for one in cut} == {"length"}
    assert all(len(one.token_ids) == 7 for one in cut)


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.environment={}/absent.py:f"], "no such file: absent.py"),
        (["rollout.environment={}/tools.py"], "'tools.py' names no function"),
        (["rollout.environment={}/tools.py:absent"], "tools.py has no function 'absent'"),
        (["rollout.environment={}/broken.py:f"], "broken.py cannot be imported (ValueError: no)"),
        (["rollout.environment=absent_package.tools:f"], "absent_package.tools cannot be imported"),
        (["rollout.max_turns=3"], "rollout.max_turns has no effect without rollout.environment"),
        (["rollout.environment={}/tools.py:calculator", "rollout.max_turns=1"], "at least 2"),
    ],
)
def test_what_the_checks_refuse(
    project: Project, lopd: Callable[..., Result], overrides: list[str], expected: str
) -> None:
    shutil.copy(TOOLS, project.folder / "tools.py")
    (project.folder / "broken.py").write_text("raise ValueError('no')\n")
    own = [one.replace("{}", str(project.folder)) for one in overrides]
    line = lopd("rollout", project.config, *own).refused()
    assert expected in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["score.tokenizer=aligned", f"rollout.environment={TOOLS}:calculator"],
            'rollout.environment and score.tokenizer = "aligned" cannot be used together',
        ),
        (
            ["score.tokenizer=aligned", "rollout.responses=caches/rollouts"],
            'rollout.responses and score.tokenizer = "aligned" cannot be used together',
        ),
        (
            ["models.teachers.math=teacher", "rollout.responses=caches/rollouts"],
            "rollout.responses and models.teachers cannot be used together",
        ),
        (
            ["distill.cache=caches/one", "rollout.responses=caches/rollouts"],
            "rollout.responses and distill.cache cannot be used together",
        ),
        (["rollout.responses=caches/rollouts"], ""),
        ([f"rollout.environment={TOOLS}:calculator"], ""),
    ],
)
def test_what_does_not_go_together(project: Project, overrides: list[str], expected: str) -> None:
    """The last two are the control."""
    found = [str(one) for one in sampling_problems(load_config(project.config, overrides))]
    assert (not found) if not expected else any(expected in one for one in found)


def test_what_the_checks_say(project: Project, lopd: Callable[..., Result]) -> None:
    shown = lopd("check", project.config, f"rollout.environment={TOOLS}:calculator").succeeded()
    assert "tools.py:calculator replies between turns, at most 8 turns" in shown.out


ANSWERS = ("81+06=87", "87")


def transcripts(folder: Path, name: str, *, student: Path | None, rounds: int = 1) -> Path:
    """Rollouts of two turns as messages, imported. rounds: how often the first of them comes."""
    rows = [
        {
            "prompt_id": f"p{number}",
            "messages": [
                {"role": "user", "content": f"81+0{number % 9}=?"},
                *[
                    {"role": "assistant", "content": ANSWERS[0]},
                    {"role": "user", "content": "81+06=87"},
                ]
                * rounds,
                {"role": "assistant", "content": ANSWERS[1]},
            ],
        }
        for number in range(24)
    ]
    write_prompts(folder / "rows.jsonl", rows)
    out = folder / name
    import_transcripts(
        folder / "rows.jsonl", out, TINY_MODELS / "student", student=student, batch_rows=8
    )
    return out


def test_imported_rollouts_are_scored_and_learnt_from(project: Project) -> None:
    """The stand-in's "trained" student has the weights of its base."""
    given = transcripts(project.folder, "own", student=TINY_MODELS / "student")
    config = load_config(project.config, [f"rollout.responses={given}"])
    project.servers.served.clear()
    pipeline.run(config, TO_SCORE)
    assert project.servers.served == ["teacher", "teacher"], "nothing is sampled"
    assert read_manifest(config.run.dir / "rollout").extra["given"]["note"] == (
        "this student's responses"
    )
    data = config.run.dir / "score"
    assert not [*check_cache(data)[0]]
    assert "sampling_logprobs" not in CacheReader(data).columns
    job = TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)
    samples = load_samples(job)
    assert len(samples) == 24
    tokenizer = load_tokenizer(TINY_MODELS / "student")
    for sample in samples:
        assert sample.sampling_logprobs is None
        learnt = decode(tokenizer, sample.token_ids[sample.loss_mask])
        assert learnt == "".join(f"{answer}<|im_end|>" for answer in ANSWERS)
    pipeline.run(config, ("distill",))


def test_rollouts_of_others_are_refused(project: Project, lopd: Callable[..., Result]) -> None:
    unnamed = transcripts(project.folder, "unnamed", student=None)
    own = [f"rollout.responses={unnamed}"]
    pipeline.run(load_config(project.config, own), ("demonstrate", "sft"))
    lopd("rollout", project.config, *own).refused("it is not recorded which student wrote them")
    teacher = TINY_MODELS / "teacher"
    foreign = transcripts(project.folder, "foreign", student=teacher)
    lopd("rollout", project.config, f"rollout.responses={foreign}").refused(
        "another student wrote them"
    )
    allowed = [f"rollout.responses={foreign}", "rollout.allow_foreign_responses=true"]
    lopd("rollout", project.config, *allowed).succeeded()
    manifest = read_manifest(project.folder / "run" / "rollout")
    assert manifest.extra["given"]["note"].startswith("FOREIGN: another student wrote them")
    assert manifest.models["student"].path == str(teacher)
    demonstrations = project.folder / "run" / "demonstrate"
    lopd("rollout", project.config, f"rollout.responses={demonstrations}").refused(
        "is of kind demonstrations, but rollouts are needed"
    )
    lopd("rollout", project.config, "rollout.allow_foreign_responses=true").refused(
        "has no effect without rollout.responses"
    )
    long = transcripts(
        project.folder, "long", student=project.folder / "run" / "sft" / "model", rounds=6
    )
    lopd("rollout", project.config, f"rollout.responses={long}").refused(
        "a response has 174 tokens together with its prompt", "sglang.context_length = 128"
    )


@pytest.mark.parametrize(
    ("tool", "template", "expected"),
    [
        ("raise ValueError('no tool here')", "", "the environment failed (ValueError: no tool"),
        ("return 87", "", "the environment returned 87, which is no message"),
        (
            "return {'role': 'user', 'content': '87'}",
            "{{ message['content'] if loop.last or message['role'] == 'user' else '' }}",
            "it writes the first 2 messages in another way when others follow",
        ),
    ],
)
def test_a_rollout_that_cannot_go_on_is_one_line(
    project: Project, lopd: Callable[..., Result], tool: str, template: str, expected: str
) -> None:
    """It names the response whose turn it was."""
    (project.folder / "own.py").write_text(f"def tool(messages):\n    {tool}\n")
    if template:
        for role in ("teacher", "student"):
            path = project.folder / role / "chat_template.jinja"
            changed = path.read_text().replace(
                "' + message['content'] + '", f"' }}}}{template}{{{{ '"
            )
            assert changed != path.read_text()
            path.write_text(changed)
    own = f"rollout.environment={project.folder / 'own.py'}:tool"
    pipeline.run(load_config(project.config, [own]), ("demonstrate", "sft"))
    lopd("rollout", project.config, own).refused("response ('reg-", expected)


def test_the_example(lopd: Callable[..., Result], tmp_path: Path) -> None:
    config = ROOT / "examples" / "calculator" / "calculator.toml"
    shown = lopd("check", config, f"run.dir={tmp_path}", "--json").succeeded()
    assert "tools.py:calculator" in json.dumps(json.loads(shown.out))
