"""One real SGLang server for all tests that need one: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lopd.config import SGLangSection
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed
from sglang_rollout.servers.server import SGLangServer
from tests.models import EOS_ID, VOCAB_SIZE, write_qwen3_moe
from tests.sglang.fake_server import FakeServer

# These are 21 of 512 tokens: a response of the random model ends after about 24 tokens.
MANY_STOPS = (EOS_ID, *range(100, 120))


def settings(**overrides: object) -> SGLangSection:
    """Float32 and small: parity shows, and a start is quick."""
    base = {
        "dtype": "float32",
        "context_length": 128,
        "max_running_requests": 32,
        "max_in_flight": 32,
        "max_total_tokens": 8192,
        "start_timeout_s": 240,
        "restarts": 0,
    }
    return SGLangSection.model_validate({**base, **overrides})


def sampling(**overrides: object) -> SamplingParams:
    base = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "max_new_tokens": 40,
        "stop_token_ids": MANY_STOPS,
    }
    return SamplingParams(**{**base, **overrides})  # type: ignore[arg-type]


def sampling_requests(
    count: int, *, purpose: str = "test", prompt_len: int = 12
) -> list[SamplingRequest]:
    """Random prompts with a seed each; the same for the same arguments."""
    rng = np.random.default_rng(5)
    prompts = rng.integers(4, VOCAB_SIZE, (count, prompt_len)).astype(np.int32)
    return [
        SamplingRequest(f"p{i}", 0, prompts[i], request_seed(1, f"p{i}", 0, purpose))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same architecture, other weights."""
    return write_qwen3_moe(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def server(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    # It keeps the experts of every token, for those who ask.
    keeping = settings(extra_args={"enable_return_routed_experts": True})
    with SGLangServer(
        student_dir, keeping, log=tmp_path_factory.mktemp("server") / "server.log"
    ) as running:
        yield running


@pytest.fixture
def engine(server: SGLangServer) -> SGLangEngine:
    return SGLangEngine(server.url, server.api_key, server.settings, server=server)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running
