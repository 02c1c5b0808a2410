"""lopd generate and lopd chat: a model is asked as the run asks it, and it answers with text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import pipeline
from lopd.config import SGLangSection, load_config
from lopd.errors import EngineError
from lopd.records import int32
from lopd.stages import conversation
from lopd.tasks.tokenizer import decode, load_tokenizer, stop_token_ids
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.live import stream_tokens
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.sglang.fake_server import KEY, STOP_ID, FakeServer
from tests.stand_ins import TINY_MODELS, Result, StandIns, command, write_project

PARAMS = SamplingParams(1.0, 1.0, -1, 0.0, 64, (STOP_ID,))
REQUEST = SamplingRequest("p", 0, int32([5, 6, 7]), 3)


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


class Asked:
    """A fake server for every model that is served, and what was served and asked."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        self.served: list[conversation.Speaker] = []
        self.settings: list[SGLangSection] = []
        self.ended = 0
        # Letters of the example's vocabulary, and its end token.
        self.answer = [*range(10, 16), stop_token_ids(TINY_MODELS / "student", tokenizer())[0]]
        fake.change = self.change

    def change(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "output_ids": self.answer}

    @contextlib.contextmanager
    def serve(
        self, speaker: conversation.Speaker, settings: SGLangSection, _: Path
    ) -> Iterator[SGLangEngine]:
        self.served.append(speaker)
        self.settings.append(settings)
        try:
            yield SGLangEngine(self.fake.url, KEY, settings)
        finally:
            self.ended += 1

    @property
    def prompts(self) -> list[str]:
        return [decode(tokenizer(), body["input_ids"]) for body in self.fake.paths("/generate")]


def tokenizer() -> Any:
    return load_tokenizer(TINY_MODELS / "student")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    with FakeServer() as fake:
        found = Asked(fake)
        monkeypatch.setattr(conversation, "served", found.serve)
        yield found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run is complete by stand-ins."""
    folder = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch:
        StandIns().install(patch)
        pipeline.run(load_config(write_project(folder)))
    return folder


def test_tokens_come_as_they_are_sampled_and_a_reader_may_leave() -> None:
    with FakeServer() as fake:
        engine = fake.engine()
        (whole,) = engine.generate([REQUEST], PARAMS)
        parts = [*stream_tokens(engine, REQUEST, PARAMS)]
        assert [len(part) for part in parts] == [1] * 4
        assert np.concatenate(parts).tolist() == whole.token_ids.tolist()
        assert not fake.paths("/abort_request")
        leaving = stream_tokens(engine, REQUEST, PARAMS)
        next(leaving)
        leaving.close()
        (abort,) = fake.paths("/abort_request")
        assert abort["rid"] == fake.paths("/generate")[-1]["rid"]
        fake.failures = [400]
        with pytest.raises(EngineError, match="refused with HTTP 400: as told"):
            next(stream_tokens(engine, REQUEST, PARAMS))
        fake.change = lambda answer: {
            **answer,
            "meta_info": {"finish_reason": {"type": "abort", "message": "for a test"}},
        }
        with pytest.raises(EngineError, match="aborted: for a test"):
            [*stream_tokens(engine, REQUEST, PARAMS)]


@pytest.mark.parametrize("place", ["run", "config.toml", "student"])
def test_the_answer_alone_goes_to_stdout(
    lopd: Callable[..., Result], project: Path, asked: Asked, place: str
) -> None:
    done = lopd("generate", project / place, "01+01=?", "--temperature", "0").succeeded()
    # Who only wants to look need not wait for a server. A bare model has no answers to look at.
    assert (f"need no start: lopd show {project / 'run'})" in done.err) == (place != "student")
    # Without its end token, and with nothing else.
    assert done.out == decode(tokenizer(), asked.answer[:-1]) + "\n"
    assert asked.prompts == ["<|im_start|>user\n01+01=?<|im_end|>\n<|im_start|>assistant\n"]
    expected = project / ("student" if place == "student" else "run/distill/model")
    assert [speaker.folder for speaker in asked.served] == [expected]
    (body,) = asked.fake.paths("/generate")
    assert body["sampling_params"]["temperature"] == 0
    assert set(body["sampling_params"]["stop_token_ids"]) == {asked.answer[-1]}
    # The run's number format and context, and the memory of one reader.
    if place != "student":
        assert (asked.settings[0].dtype, asked.settings[0].context_length) == ("float32", 128)
    assert (asked.settings[0].replicas, asked.settings[0].max_running_requests) == (1, 2)


def test_models_are_compared_with_one_template(
    lopd: Callable[..., Result], project: Path, asked: Asked, tmp_path: Path
) -> None:
    """The base student has its own template in its folder; the run asked it with the teacher's."""
    run = tmp_path / "run"
    shutil.copytree(project / "run", run)
    marked = (run / "sft/model/chat_template.jinja").read_text() + "{{ '0' }}"
    for stage in ("sft", "distill"):
        (run / stage / "model/chat_template.jinja").write_text(marked)
    models = [f"--compare={name}" for name in ("base", "teacher", project / "teacher")]
    done = lopd("generate", run, "01+01=?", *models, "sglang.mem_fraction=0.2").succeeded()
    assert [line for line in done.out.splitlines() if line.startswith("---")] == [
        f"--- {run}",
        "--- base",
        "--- teacher",
        f"--- {project / 'teacher'}",
    ]
    assert asked.ended == 4
    assert [speaker.folder.name for speaker in asked.served] == [
        "model", "student", "teacher", "teacher",
    ]  # fmt: skip
    # A folder outside of the run has its own template.
    assert [prompt.endswith("0") for prompt in asked.prompts] == [True, True, True, False]
    assert {settings.mem_fraction for settings in asked.settings} == {0.2}


def test_a_chat_remembers_and_ends_cleanly(
    lopd: Callable[..., Result],
    project: Path,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["01+01=?", "  ", "02+02=?", EOFError()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    done = lopd("chat", project / "run", "--model", "sft").succeeded()
    answer = decode(tokenizer(), asked.answer[:-1])
    assert done.out == f"{answer}\n{answer}\n\n"
    first, second = asked.prompts
    assert second == (
        f"{first}{answer}<|im_end|>\n<|im_start|>user\n02+02=?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked.ended == 1


def test_a_chat_with_two_models_at_once(
    lopd: Callable[..., Result],
    project: Path,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["01+01=?", "02+02=?", EOFError()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    other = str(project / "teacher")
    done = lopd("chat", project / "run", "--model", "sft", "--compare", other).succeeded()
    answer = decode(tokenizer(), asked.answer[:-1])
    assert done.out == f"--- sft\n{answer}\n--- {other}\n{answer}\n" * 2 + "\n"
    assert [speaker.folder.name for speaker in asked.served] == ["model", "teacher"]
    # Each model sees its own conversation: both were asked the second question after the first.
    assert ["01+01" in prompt for prompt in asked.prompts] == [True] * 4
    assert ["02+02" in prompt for prompt in asked.prompts] == [False, False, True, True]
    assert asked.ended == 2


def test_ctrl_c_at_the_second_model_is_forgotten_by_both(
    lopd: Callable[..., Result],
    project: Path,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["01+01=?", "02+02=?", KeyboardInterrupt()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    real = conversation.token_texts
    pressed = iter([False, True, False, False])

    def pressing(tokens_of: Any, ids: Any) -> Iterator[str]:
        pieces = real(tokens_of, ids)
        yield next(pieces)
        if next(pressed):
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(conversation, "token_texts", pressing)
    done = lopd("chat", project / "run", "--compare", "sft").succeeded()
    assert done.err.count("(interrupted)") == 1
    assert ["01+01" in prompt for prompt in asked.prompts] == [True, True, False, False]


def test_ctrl_c_ends_an_answer_and_then_the_chat(
    lopd: Callable[..., Result],
    project: Path,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["01+01=?", "02+02=?", KeyboardInterrupt()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    real = conversation.token_texts
    pressed = iter([True, False])

    def pressing(tokens_of: Any, ids: Any) -> Iterator[str]:
        pieces = real(tokens_of, ids)
        yield next(pieces)
        if next(pressed):
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(conversation, "token_texts", pressing)
    done = lopd("chat", project / "run").succeeded()
    assert "(interrupted)" in done.err
    # What was not read to its end is forgotten.
    assert "01+01" not in asked.prompts[1]
    assert asked.ended == 1


def test_an_answer_that_was_cut_is_said_to_be(
    lopd: Callable[..., Result], project: Path, asked: Asked
) -> None:
    asked.answer = asked.answer[:-1]
    done = lopd("generate", project / "run", "01+01=?", "--max-tokens", "6").succeeded()
    assert "cut off at the limit" in done.err
    assert asked.fake.paths("/generate")[0]["sampling_params"]["max_new_tokens"] == 6


def test_what_is_no_model_is_refused(
    lopd: Callable[..., Result], project: Path, asked: Asked, tmp_path: Path
) -> None:
    lopd("generate", tmp_path, "x").refused("no model 'distilled'", "Hugging Face folder")
    lopd("generate", project / "run", "x", "--model=best").refused("no model 'best'", "distilled")
    lopd("generate", project / "student", "x", "--model=sft").refused("a model of a run")
    (tmp_path / "sft").mkdir()
    shutil.copytree(project / "student", tmp_path / "sft/model")
    lopd("generate", tmp_path, "x").refused("--model sft")
    lopd("generate", project / "run", "x", "sglang.dtyp=1").refused("sglang.dtyp")
    assert not asked.served
    # A run directory has a config.json of its own, which is no model's.
    assert "sglang.dtype" in json.loads((project / "run/config.json").read_text())
