"""Faults that an attempt to break servers, syncs and manifests from outside has found, and that are
mended.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.config import SyncSection
from lopd.errors import ConfigError, LopdError
from lopd.records import Prompt, int32
from lopd.stages.sample_shards import sample_into
from sglang_rollout.requests.external import check_external, connect
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.server_side import served_weights
from sglang_rollout.weight_sync import build_receiver
from tests.sglang.conftest import sampling, sampling_requests, settings
from tests.sglang.fake_server import KEY, STOP_ID, FakeServer
from tests.sglang.test_external import context_of, expected
from tests.sglang.test_restart import Frail, watching
from tests.sglang.weight_syncing import UpdatedFake, receiver, send, tensors

SERVED = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enable_deterministic_inference": True,
    "max_req_input_len": 130,
}


def prepare(fake: FakeServer, model_path: Path | str) -> None:
    fake.model_path = str(model_path)
    fake.server_info = SERVED
    fake.model_info = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


# ---- servers of others ----


def test_a_users_server_that_comes_back_with_its_own_weights_is_noticed(
    fake: FakeServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever runs it starts it again amid a rollout: nobody there knows of the weights that went
    in. An error, or responses of one version.
    """
    monkeypatch.setenv("LOPD_SGLANG_KEY", KEY)
    prepare(fake, student_dir)
    context = context_of(tmp_path, student_dir, other_dir, student_urls=[fake.url], max_in_flight=1)
    answered: list[dict[str, Any]] = []

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answered.append(answer)
        if len(answered) == 5:
            fake.weight_version = "default"
        return answer

    fake.change = change
    prompts = [
        Prompt(
            prompt_id=f"p{i}", messages=({"role": "user", "content": "?"},), domain="x", answer=None
        )
        for i in range(10)
    ]
    writer = ArtifactWriter(tmp_path / "rollouts", kind="rollouts", inputs={}, shard_size=5)
    with context.serve("student", other_dir) as engine:
        try:
            ids = [int32([5, 6, 7 + i]) for i in range(10)]
            params = sampling(stop_token_ids=(STOP_ID,))
            sample_into(
                writer,
                engine,
                prompts,
                ids,
                params,
                samples_per_prompt=1,
                seed=1,
                purpose="rollout",
                title="rollouts",
            )
        except LopdError:
            return
    assert (
        len(
            {
                response.weight_version
                for response, _ in cache.read_rows(tmp_path / "rollouts", writer.finish())
            }
        )
        == 1
    )


def test_two_servers_whose_model_folder_is_out_of_sight_can_score(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: one such server can."""
    monkeypatch.setenv("LOPD_SGLANG_KEY", KEY)
    items = [
        ScoreRequest(r.prompt_id, 0, r.prompt_ids[:6], r.prompt_ids[6:])
        for r in sampling_requests(4)
    ]
    with FakeServer() as first, FakeServer() as second:
        for fake in (first, second):
            prepare(fake, "/nowhere/model")
        assert len(list(connect([first.url], settings(), student_dir).score(items))) == 4
        both = connect([first.url, second.url], settings(), student_dir)
        check_external(both, expected(student_dir))
        assert len(list(both.score(items))) == 4


# ---- a restart that fails in another way than an EngineError ----


@pytest.mark.parametrize("error", [OSError, ConfigError])
def test_a_restart_that_fails_in_whatever_way_is_a_death(
    tmp_path: Path, error: type[Exception]
) -> None:
    """OSError: a full disk, no process left to fork. ConfigError: the network interface of
    sglang.host is gone.
    """
    frail = Frail(tmp_path)

    def relaunch() -> None:
        raise error("no space left on device")

    frail.relaunch = relaunch  # type: ignore[method-assign]
    watcher = watching(frail, 2)
    frail.is_alive = False
    watcher._thread.join(60)
    assert not watcher._thread.is_alive()
    assert watcher.failure is not None


# ---- verification ----


def test_a_receiver_that_is_to_verify_by_scores_does_or_says_that_it_cannot(
    student_dir: Path, tmp_path: Path
) -> None:
    with UpdatedFake() as fake:
        fake.model_path = str(student_dir)
        try:
            section = SyncSection(verify="scores", transport="tensor")
            send(
                build_receiver(section, [fake.engine()], folder=tmp_path, template_dir=student_dir),
                "v1",
                tensors(student_dir),
            )
        except LopdError:
            return
        assert fake.paths("/generate")


# ---- secrets ----


def test_no_secret_of_extra_args_is_in_the_inputs_of_a_manifest(
    student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    from lopd.stages.context import StageContext
    from lopd.stages.score import STAGE

    config = context_of(
        tmp_path, student_dir, other_dir, extra_args={"ssl_keyfile_password": "hunter2"}
    ).config
    assert "hunter2" not in json.dumps(StageContext(config, STAGE).inputs)


# ---- newer versions of SGLang ----


def test_weights_change_between_begin_and_end_from_0_5_21_on(
    student_dir: Path, tmp_path: Path
) -> None:
    with UpdatedFake() as fake:
        fake.model_path = str(student_dir)
        fake.version = "0.5.21"
        send(
            receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off"),
            "v1",
            tensors(student_dir),
        )
        assert "/begin_weight_update" in fake.updates


class Bracketed(UpdatedFake):
    """Refuses a second begin, as 0.5.21 and later do."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "0.5.22"
        self.is_open = False

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/begin_weight_update" and self.is_open:
            return 400, {
                "success": False,
                "message": (
                    "a weight-update session is already open; call end_weight_update() first"
                ),
            }
        if path in ("/begin_weight_update", "/end_weight_update"):
            self.is_open = path.startswith("/begin")
        return super()._answer(path, body)


def test_an_update_that_a_killed_trainer_has_begun_is_closed_by_the_next(
    student_dir: Path, tmp_path: Path
) -> None:
    with Bracketed() as fake:
        fake.model_path = str(student_dir)
        killed = receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off")
        killed.begin("v1")
        killed.receive(tensors(student_dir)[:5])
        send(
            receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off"),
            "v2",
            tensors(student_dir),
        )
        assert fake.weight_version == "v2"


def test_fingerprints_come_from_newer_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    class WeightChecker:
        def handle(
            self,
            action: str,
            allow_quant_error: bool = False,
            skip_tensor_list: list[str] | None = None,
            *,
            role: str,
        ) -> dict[str, Any] | None:
            return {"role": role}

    module = types.SimpleNamespace(WeightChecker=WeightChecker)
    monkeypatch.setattr(served_weights.importlib, "import_module", lambda name: module)
    served_weights.install()
    assert WeightChecker().handle(
        action="checksum", allow_quant_error=False, skip_tensor_list=None, role="target"
    ) == {"role": "target"}
