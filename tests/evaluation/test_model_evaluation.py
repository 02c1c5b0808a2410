"""``lopd evaluate --model``: figures, files, going on after an error, judging anew; the server is a
stand-in that knows the answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import EngineError
from lopd.records import Response, float32, int32
from lopd.tasks.accuracy import pass_at
from lopd.tasks.register_arithmetic import Problem, RegisterArithmetic
from lopd.tasks.register_responses import write_response
from lopd.tasks.tokenizer import load_tokenizer
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.stand_ins import (
    TINY_MODELS,
    Engine,
    Lopd,
    StandIns,
    command,
    contents,
    write_project,
    write_prompts,
)

MODEL = TINY_MODELS / "teacher"
TASK = RegisterArithmetic(num_operations=2)
SAMPLES = 4
PROBLEMS = TASK.generate_problems(6, 3)


class Oracle(Engine):
    """Problem number i is answered rightly in its first i samples; the last sample of every problem
    is cut off.
    """

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        tokenizer = load_tokenizer(MODEL)
        by_id: dict[str, tuple[int, Problem]] = {
            TASK.to_prompt(problem).prompt_id: (number, problem)
            for number, problem in enumerate(PROBLEMS)
        }
        for request in requests:
            self._count()
            number, problem = by_id[request.prompt_id]
            text = write_response(problem, "careful")
            if request.sample_index >= number:
                text = text.replace(
                    f"\n{problem.answer}<", f"\n{(int(problem.answer) + 1) % 100:02d}<"
                )
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            cut_off = request.sample_index == SAMPLES - 1
            tokens = int32(tokens[:-1] if cut_off else tokens)
            ending: Any = "length" if cut_off else "stop"
            yield Response(
                request.prompt_id,
                request.sample_index,
                request.prompt_ids,
                tokens,
                float32([-0.1] * len(tokens)),
                ending,
                "oracle",
            )


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(engine=Oracle()).install(monkeypatch)


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [
        {
            "prompt_id": TASK.to_prompt(one).prompt_id,
            "messages": [dict(m) for m in TASK.to_prompt(one).messages],
            "answer": one.answer,
        }
        for one in PROBLEMS
    ]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    flags = [
        "evaluate",
        "--model",
        str(MODEL),
        "--task",
        "register_arithmetic",
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
    ]
    return [
        *flags,
        "--shard-size",
        "5",
        f"evaluate.samples_per_prompt={SAMPLES}",
        "evaluate.max_new_tokens=64",
        "sglang.dtype=float32",
    ]


def test_figures_and_files(
    lopd: Lopd, stand_ins: StandIns, arguments: list[str], tmp_path: Path
) -> None:
    shown = lopd(*arguments).succeeded().out
    out = tmp_path / "out"
    # The right samples of each problem. The fourth sample is cut off.
    counts = [0, 1, 2, 3, 3, 3]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean"] == pytest.approx(sum(counts) / 24)
    assert summary["pass_at"] == pytest.approx(
        {str(k): sum(pass_at(4, c, k) for c in counts) / 6 for k in (1, 2, 4)}
    )
    assert summary["truncated_share"] == pytest.approx(0.25)
    assert summary["reasons"] == {"wrong answer": 12}
    assert summary["sampling"]["temperature"] == 0.6
    assert f"avg@4  {100 * sum(counts) / 24:.1f}%" in shown
    assert "over 6 problems" in shown
    assert "cut off 25.0%" in shown
    problems = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    assert [line["num_right"] for line in problems] == counts
    assert [line["prompt_id"] for line in problems] == [
        TASK.to_prompt(one).prompt_id for one in PROBLEMS
    ]
    transcripts = [
        json.loads(line)
        for path in sorted((out / "transcripts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(transcripts) == 24
    assert transcripts[4]["response"] == write_response(PROBLEMS[1], "careful").removesuffix(
        "<|im_end|>"
    )
    assert transcripts[4]["messages"] == [{"role": "user", "content": f"{PROBLEMS[1].text}=?"}]
    assert summary["context_length"] == summary_context(out)
    assert stand_ins.served == ["model"]


def summary_context(out: Path) -> int:
    """The longest prompt and max_new_tokens, from the published shards."""
    from lopd import cache

    return max(len(response.prompt_ids) for response, _ in cache.read_rows(out / "answers")) + 64


def test_it_goes_on_where_it_was_stopped(
    lopd: Lopd, stand_ins: StandIns, arguments: list[str], tmp_path: Path
) -> None:
    """What an interrupted evaluation comes to is what an uninterrupted one comes to, and nothing is
    sampled twice.
    """
    lopd(*arguments, "run.dir=" + str(tmp_path / "whole")).succeeded()
    stand_ins.engine.answered = 0
    stand_ins.engine.fail_after = (12, EngineError("the server died"))
    lopd(*arguments).refused("the server died")
    assert len(list((tmp_path / "out/answers").glob("shard-*.parquet"))) == 2
    stand_ins.engine.fail_after = None
    stand_ins.engine.answered = 0
    lopd(*arguments).succeeded()
    assert stand_ins.engine.answered == 24 - 10
    both = [
        contents(tmp_path / name, "answers/*.parquet") | contents(tmp_path / name, "problems.jsonl")
        for name in ("whole", "out")
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 6


def test_another_verifier_judges_what_is_sampled(
    lopd: Lopd, stand_ins: StandIns, arguments: list[str], tmp_path: Path
) -> None:
    lopd(*arguments).succeeded()
    served = len(stand_ins.served)
    answers = contents(tmp_path / "out", "answers/*.parquet")
    plain = [
        *(argument.replace("register_arithmetic", "plain") for argument in arguments),
        "task.options={answer_in='last_line'}",
    ]
    lopd(*plain).succeeded()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["task"] == {"name": "plain", "options": {"answer_in": "last_line"}}
    assert summary["reasons"] == {"wrong answer": 6, "cut off": 6}, "another verifier, other words"
    assert contents(tmp_path / "out", "answers/*.parquet") == answers
    assert len(stand_ins.served) == served, "no server was started"


def test_other_sampling_into_the_same_folder_is_refused(
    lopd: Lopd, stand_ins: StandIns, arguments: list[str]
) -> None:
    lopd(*arguments).succeeded()
    lopd(*arguments, "evaluate.temperature=1.0").refused("made from other inputs")


def test_a_model_and_the_prompts_of_a_config(
    lopd: Lopd, stand_ins: StandIns, tmp_path: Path
) -> None:
    config = write_project(tmp_path / "project")
    stand_ins.engine = Engine()
    flags = (
        config,
        "evaluate.samples_per_prompt=2",
        "--model",
        "teacher",
        "--out",
        tmp_path / "out",
        "--json",
    )
    summary = json.loads(
        lopd("evaluate", *flags).succeeded().out.partition("\n{")[2].join(("{", ""))
    )
    assert summary["model"]["path"] == str(tmp_path / "project/teacher")
    assert (summary["num_problems"], summary["samples_per_problem"], summary["context_length"]) == (
        8,
        2,
        128,
    )
    assert summary["task"]["name"] == "register_arithmetic"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (
            (),
            ("missing argument 'CONFIG', or --model", "--model FOLDER --prompts FILE --out FOLDER"),
        ),
        (("x.toml", "--prompts", "p.jsonl"), ("--prompts can only be used with --model",)),
        (("--model", "m"), ("--out is missing",)),
        (("--model", "m", "--out", "o"), ("--prompts is missing",)),
        (("--model", "absent", "--out", "o", "--prompts", "p.jsonl"), ("absent", "no such folder")),
        (
            ("--model", str(MODEL), "--out", "o", "--prompts", "p.jsonl"),
            ("p.jsonl", "no such file"),
        ),
        (
            ("--model", str(MODEL), "--out", "o", "--prompts", "p.jsonl", "--preset", "paper"),
            ("--preset = 'paper'", "paper_math"),
        ),
        (
            ("--model", str(MODEL), "--out", "o", "--prompts", "p.jsonl", "--task", "maths"),
            ("unknown task 'maths'", "math"),
        ),
        (
            ("--model", str(MODEL), "--out", "o", "--prompts", "p.jsonl", "evaluate.topp=1"),
            ("unknown key evaluate.topp", "evaluate.top_p"),
        ),
    ],
    ids=lambda value: " ".join(value)[-40:] if value and isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line(
    lopd: Lopd,
    stand_ins: StandIns,
    arguments: tuple[str, ...],
    fragments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lopd("evaluate", *arguments).refused(*fragments)
    assert not stand_ins.started
