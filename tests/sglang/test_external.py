"""Servers that a user runs: what they are is checked before they are used. On a fake that says what
it is told, and once on the real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import identify_model
from lopd.config import Config
from lopd.errors import ConfigError, EngineError
from lopd.stages.context import Stage, StageContext
from lopd.stages.user_servers import tokenized
from lopd.tasks.tokenizer import load_tokenizer
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.external import PROBE_LEN, Expected, check_external, connect, probe_ids
from sglang_rollout.servers.launch import KEY_VARIABLE
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import sampling, sampling_requests, settings
from tests.sglang.fake_server import KEY, LOGPROB, FakeServer
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import receiver, tensors, worst_difference

TEXT = {"w4 w5": [4, 5]}


def expected(
    model: Path, *, probe: Sequence[float] | None = None, loads_weights: bool = False
) -> Expected:
    identity = identify_model(model).weights
    return Expected(
        model,
        lambda folder: identify_model(folder).weights == identity,
        loads_weights=loads_weights,
        tokenized=TEXT,
        probe=probe,
    )


@pytest.fixture
def served(fake: FakeServer, student_dir: Path) -> FakeServer:
    """A fake that says all that is right."""
    fake.model_path = str(student_dir)
    fake.model_info = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    fake.server_info = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enable_deterministic_inference": True,
        "max_req_input_len": 130,
    }
    return fake


def check(fake: FakeServer, wanted: Expected, **changes: Any) -> dict[str, Any]:
    return check_external(fake.engine(**{"dtype": "float32", **changes}), wanted)


def test_a_model_folder_that_can_be_read_proves_the_weights(
    served: FakeServer, student_dir: Path
) -> None:
    found = check(served, expected(student_dir))
    assert (found["weights"], found["version"], found["dtype"], found["url"]) == (
        "content",
        "0.5.17",
        "float32",
        [served.url],
    )
    assert found["probe"] == [LOGPROB] * (PROBE_LEN - 1)
    assert len(set(probe_ids(VOCAB_SIZE))) > PROBE_LEN // 2


def test_other_weights_in_that_folder_are_refused(
    served: FakeServer, student_dir: Path, other_dir: Path
) -> None:
    with pytest.raises(
        EngineError,
        match=(
            f"{served.url}: the server has loaded {student_dir}, "
            f"which is not the model in {other_dir}"
        ),
    ):
        check(served, expected(other_dir))


def test_weights_out_of_sight_are_known_by_the_probe_on_record_or_only_declared(
    served: FakeServer, student_dir: Path
) -> None:
    served.model_path = "/nowhere/model"
    assert check(served, expected(student_dir))["weights"] == "declared"
    assert (
        check(served, expected(student_dir, probe=[LOGPROB + 5e-4] * (PROBE_LEN - 1)))["weights"]
        == "probe"
    )
    with pytest.raises(
        EngineError, match=r"0.01 nats per token from the recorded ones; limit: at most 0.001"
    ):
        check(served, expected(student_dir, probe=[LOGPROB - 0.01] * (PROBE_LEN - 1)))
    with pytest.raises(EngineError, match="nan nats"):
        check(served, expected(student_dir, probe=[float("nan")] * (PROBE_LEN - 1)))


@pytest.mark.parametrize(
    ("attribute", "value", "error", "message"),
    [
        (
            "model_info",
            {"architectures": ["LlamaForCausalLM"]},
            EngineError,
            r"the served model has architectures = \['LlamaForCausalLM'\]",
        ),
        (
            "version",
            "0.4.9",
            EngineError,
            "the server runs SGLang 0.4.9, which is too old; limit: at least 0.5.17",
        ),
        (
            "server_info",
            {"dtype": "bfloat16"},
            ConfigError,
            "computes in bfloat16; limit: exactly sglang.dtype = float32",
        ),
        (
            "server_info",
            {"enable_deterministic_inference": False},
            ConfigError,
            "without deterministic inference",
        ),
        (
            "server_info",
            {"max_req_input_len": 100},
            ConfigError,
            (
                "accepts only 100 tokens of prompt and response; limit: at least "
                "sglang.context_length = 128"
            ),
        ),
        (
            "server_info",
            {"enable_watermark": True, "watermark_default_enabled": True},
            ConfigError,
            "the server marks its text with a watermark, .*; remedy: start the server without",
        ),
        (
            "server_info",
            {"enable_watermark": True, "watermark_enforce_all": True},
            ConfigError,
            "the server marks its text with a watermark",
        ),
        (
            "server_info",
            {"skip_tokenizer_init": False},
            EngineError,
            r"the tokenizer of the server turns 'w4 w5' into \[4, 6\]",
        ),
    ],
)
def test_what_is_not_as_configured_is_named(
    served: FakeServer,
    student_dir: Path,
    attribute: str,
    value: Any,
    error: type[Exception],
    message: str,
) -> None:
    served.tokens = [4, 6]
    check(served, expected(student_dir))
    setattr(
        served,
        attribute,
        {**getattr(served, attribute), **value} if isinstance(value, dict) else value,
    )
    with pytest.raises(error, match=f"{served.url}: .*{message}"):
        check(served, expected(student_dir))


def test_a_server_that_marks_text_only_on_request_is_taken(
    served: FakeServer, student_dir: Path
) -> None:
    """No request of lopd asks for a watermark."""
    served.server_info |= {
        "enable_watermark": True,
        "watermark_default_enabled": False,
        "watermark_enforce_all": False,
    }
    assert check(served, expected(student_dir))["weights"] == "content"


def test_a_server_whose_tokenizer_agrees_may_keep_it(served: FakeServer, student_dir: Path) -> None:
    served.tokens = [4, 5]
    served.server_info["skip_tokenizer_init"] = False
    assert check(served, expected(student_dir))["weights"] == "content"


def test_servers_that_take_weights_need_the_architecture_and_a_folder_both_can_read(
    served: FakeServer, student_dir: Path, other_dir: Path
) -> None:
    assert check(served, expected(other_dir, loads_weights=True))["weights"] == "to be loaded"
    served.model_path = "/nowhere/model"
    with pytest.raises(EngineError, match="cannot be read here"):
        check(served, expected(other_dir, loads_weights=True))


def test_the_key_comes_from_the_environment(
    served: FakeServer, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(student_dir)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(EngineError, match=rf"401.*environment variable {KEY_VARIABLE}"):
        check_external(connect([served.url], settings(), student_dir), wanted)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert (
        check_external(connect([served.url, served.url], settings(), student_dir), wanted)["url"]
        == [served.url] * 2
    )
    with pytest.raises(ConfigError, match="'localhost:30000' is not a URL"):
        connect([], settings(teacher_urls=["localhost:30000"]), student_dir)


# ---- the stages' way in, on the real server ----


def context_of(folder: Path, teacher: Path, student: Path, **sglang: Any) -> StageContext:
    table = {
        "run": {"dir": str(folder)},
        "models": {"teacher": str(teacher), "student": str(student)},
        "task": {"name": "register_arithmetic"},
        "prompts": {
            name: {"num_prompts": 4, "seed": seed}
            for seed, name in enumerate(("sft", "opd", "eval"))
        },
        "sglang": {**settings().model_dump(), **sglang},
    }
    stage = Stage(
        "score",
        "",
        "teacher_cache",
        knobs=(),
        models=(),
        prompts=(),
        parents=lambda config: (),
        run=lambda context: None,
    )
    return StageContext(Config.model_validate(table), stage)


def test_a_stage_uses_the_users_teacher_where_it_is_the_configured_one(
    server: SGLangServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, server.api_key)
    context = context_of(tmp_path, student_dir, other_dir, teacher_urls=[server.url])
    with context.serve("teacher", student_dir) as engine:
        assert engine.server is None
        assert len(list(engine.generate(sampling_requests(3), sampling(max_new_tokens=4)))) == 3
    assert context.served["teacher"]["weights"] == "content"
    assert server.api_key not in json.dumps(context.served)
    wrong = context_of(tmp_path, other_dir, student_dir, teacher_urls=[server.url])
    with pytest.raises(EngineError, match="is not the model in"), wrong.serve("teacher", other_dir):
        pass


def test_a_stage_puts_the_students_weights_into_the_users_servers(
    server: SGLangServer,
    engine: SGLangEngine,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, server.api_key)
    context = context_of(tmp_path, student_dir, other_dir, student_urls=[server.url])
    # It belongs to a trainer that left the servers paused, with half of a sync.
    killed = receiver("tensor", engine, tmp_path, student_dir)
    killed.begin("step-4")
    killed.receive(tensors(student_dir)[:5])
    killed._await_sent()  # type: ignore[attr-defined]
    assert engine.model_info()["weight_version"] == "step-4 (incomplete)"
    try:
        with context.serve("student", other_dir):
            assert len(list(engine.generate(sampling_requests(3), sampling(max_new_tokens=4)))) == 3
            assert worst_difference(engine, other_dir) <= MAX_DIFFERENCE
            assert (
                engine.model_info()["weight_version"]
                == f"lopd-{identify_model(other_dir).weights[:12]}"
            )
            assert engine.model_info()["model_path"] == str(other_dir)
    finally:
        update_weights_from_disk(engine, student_dir, version="default")


def test_a_tokenizer_without_the_words_of_the_text_is_not_compared() -> None:
    tiny = Path(__file__).parents[2] / "examples/tiny_models/student"
    assert tokenized(tiny, "What is 12 + 30?") == {}
    assert tokenized(tiny, "+") == {"+": [load_tokenizer(tiny).convert_tokens_to_ids("+")]}
