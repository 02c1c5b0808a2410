"""A server that comes back with the weights of its first start, because the newest were in no
folder: nobody learns from it or counts it, and the newest are sent again. The stages' own code, in
one process; fake servers.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from lopd.artifacts import publish_json, read_manifest
from lopd.cache import read_rows
from lopd.config import Config, load_config
from lopd.errors import EngineError
from lopd.records import Sample
from lopd.stages import distill
from lopd.stages.context import StageContext
from lopd.stages.held_out import HeldOutEvaluation
from lopd.stages.refresh_record import LOST
from lopd.stages.refresh_requester import RefreshRequester
from lopd.stages.refresh_service import RefreshService
from lopd.stages.student import StudentServer
from lopd.stages.sync import MAX_SENDS
from lopd.stages.training import SERVER_KEY, StudentAddresses, TrainingJob
from sglang_rollout.requests.fleet import fleet_of
from tests.sglang.fake_server import KEY
from tests.sglang.weight_syncing import UpdatedFake
from tests.stand_ins import scored_project

SETTINGS = (
    "distill={num_steps=4, batch_size=4, sync_every=2, sync_num_prompts=6}",
    "distill.refresh.every=2",
    "sync.verify=off",
)


class Forgetful(UpdatedFake):
    """After so many responses of an update it is another process, with the first weights: losses,
    one entry for each time.
    """

    def __init__(self, *losses: int) -> None:
        super().__init__()
        self.losses = list(losses)
        self.num_answers = 0
        self.answered: list[str] = []  # versions

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path.startswith("/update_weights"):
            self.num_answers = 0
        # The request that scores a response afterwards has no seed and does not count.
        if path == "/generate" and "sampling_seed" in body["sampling_params"]:
            self.num_answers += 1
            if (
                self.losses
                and self.weight_version != "default"
                and self.num_answers > self.losses[0]
            ):
                self.losses.pop(0)
                self.weight_version = "default"
            self.answered.append(self.weight_version)
        return super()._answer(path, body)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project done up to score by stand-ins, which continue to serve the teacher."""
    with scored_project(tmp_path_factory.mktemp("lost"), config_of) as folder:
        yield folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.toml", [*SETTINGS, *overrides])


def job_of(project: Path, folder: Path, *overrides: str) -> TrainingJob:
    model = project / "run" / "sft" / "model"
    return TrainingJob(
        "distill",
        config_of(project, *overrides),
        folder,
        project / "run" / "score",
        model,
        "checkpoint",
        4,
        17,
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_refresh_asks_again(
    replicas: int, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the servers loses the weights after three responses, and once more after two. The
    other side of the request is the real RefreshService.
    """
    project = shutil.copytree(scored, tmp_path / "project")
    monkeypatch.setattr("lopd.megatron.ranks.parallel.barrier", lambda: None)
    context = StageContext(config_of(project), distill.STAGE)
    context.writer()
    fakes = [Forgetful(3, 2), Forgetful()][:replicas]
    pushed: list[tuple[int, bool]] = []

    class Server:
        shares_gpus = False

        def push(self, step: int, *, again: bool = False) -> None:
            pushed.append((step, again))
            for fake in fakes:
                fake.weight_version = f"step-{step}"
                fake.num_answers = 0

        def free_gpus(self) -> None: ...

        def gpus_to_trainer(self) -> None: ...

    class Batches:
        def use_refreshed(self, samples: Sequence[Sample], start: int) -> None:
            learnt_from.append((len(samples), start))

    learnt_from: list[tuple[int, int]] = []

    with contextlib.ExitStack() as stack:
        for fake in fakes:
            stack.enter_context(fake).model_path = str(project / "run" / "sft" / "model")
        engine = fleet_of([fake.engine(max_in_flight=1) for fake in fakes])
        with RefreshService(context, engine, project / "run" / "sft" / "model") as service:
            requester = RefreshRequester(job_of(project, context.folder), Server())
            training: Any = SimpleNamespace(state={"refresh_due": "2 steps"}, batches=Batches())
            requester.begin(training)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(requester.before_step, 2)
                try:
                    while not waiting.done():
                        service.serve_requests()
                        time.sleep(0.02)
                except BaseException:
                    # For ever, so that the waiting side ends too.
                    publish_json(context.folder / LOST, {})
                    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
                    raise
                waiting.result()
    assert learnt_from == [(8, 2)]
    assert pushed == [(2, False), (2, True), (2, True)]
    rollouts = context.folder / "refresh-0001" / "rollouts"
    assert {
        response.weight_version for response, _ in read_rows(rollouts, read_manifest(rollouts))
    } == {"step-2"}
    assert "default" in fakes[0].answered, "it did lose them"


class Trained:
    """A trainer that only exports."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.num_exports = 0
        self.memory = SimpleNamespace()

    def export(self, *, bucket_bytes: int) -> Iterator[list[tuple[str, Any]]]:
        self.num_exports += 1
        yield sorted(load_file(self._model / "model.safetensors").items())


class Log:
    def __init__(self) -> None:
        self.evaluations: list[tuple[int, int]] = []  # step, prompts

    def eval(self, stage: str, step: int, figures: dict[str, Any]) -> None:
        self.evaluations.append((step, figures["num_prompts"]))


def evaluation_of(
    fake: Forgetful, scored: Path, folder: Path, transport: str
) -> tuple[HeldOutEvaluation, Trained, Log]:
    job = job_of(scored, folder, f"sync.transport={transport}", "sglang.max_in_flight=1")
    fake.model_path = str(job.initial)
    trainer = Trained(job.initial)
    log = Log()
    training: Any = SimpleNamespace(trainer=trainer, samples=[], metrics=log, state={})
    student = StudentServer(job, StudentAddresses((fake.url,), None))
    evaluation = HeldOutEvaluation(job, student)
    student.begin(training)
    evaluation.begin(training)
    return evaluation, trainer, log


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_an_evaluation_asks_again(
    transport: str,
    scored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(SERVER_KEY, KEY)
    with Forgetful(4) as fake:
        evaluation, trainer, log = evaluation_of(fake, scored, tmp_path, transport)
        evaluation.evaluate(0)  # by the weights of its start
        assert (fake.weight_version, trainer.num_exports) == ("default", 0)
        evaluation.evaluate(2)
        assert trainer.num_exports == 2
        assert fake.answered[:10] == ["default"] * 6 + ["step-2"] * 4
        assert {*fake.answered[10:-6]} == {"default"}  # one, and what was under way beside it
        assert fake.answered[-6:] == ["step-2"] * 6
        evaluation.evaluate(2)
        assert trainer.num_exports == 2, "it has them"
    assert log.evaluations == [(0, 6), (2, 6), (2, 6)]
    assert (
        "a response has the weight version default, but step-2 was requested; "
        "the weights are sent again"
    ) in capsys.readouterr().out


def test_a_server_that_loses_them_again_and_again_is_an_error(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_KEY, KEY)
    with Forgetful(*[1] * 99) as fake:
        evaluation, trainer, log = evaluation_of(fake, scored, tmp_path, "tensor")
        with pytest.raises(
            EngineError,
            match=(
                "lost its weights 5 times: a response has the weight version default, "
                "but step-2 was requested"
            ),
        ):
            evaluation.evaluate(2)
    assert trainer.num_exports == MAX_SENDS == 5
    assert not log.evaluations
