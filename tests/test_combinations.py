"""Knobs of the servers' side that do not go together: each was once noticed hours later, or by
nobody. Every refusal has a like configuration that passes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd import checks
from lopd.checks import combinations
from lopd.config import Config, load_config
from lopd.errors import ConfigError, LopdError
from sglang_rollout.servers.launch import KEY_VARIABLE
from tests.checking import forbid_processes, wrong
from tests.sglang.fake_server import KEY, FakeServer
from tests.stand_ins import Lopd, StandIns, command, contents, write_project

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a CPU lacks is part of what is said"
)
URL = "http://127.0.0.1:30001"
REFRESHED = "distill.refresh.every=1"
SYNCED = "distill.sync_every=1"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a project in which nothing is wrong; only read."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return forbid_processes(monkeypatch)


# overrides that are refused, the line, and what is as good in their place
PAIRS: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    # limits that are never reached
    (
        ("rollout.max_new_tokens=129",),
        (
            "sampling | rollout: rollout.max_new_tokens = 129 is too large; limit: at most "
            "sglang.context_length = 128"
        ),
        ("rollout.max_new_tokens=128",),
    ),
    (
        ("demonstrate.max_new_tokens=4096",),
        (
            "demonstrate.max_new_tokens = 4096 is too large; limit: at most "
            "sglang.context_length = 128"
        ),
        ("demonstrate.max_new_tokens=64",),
    ),
    (
        ("evaluate={preset='paper_math'}",),
        "evaluate.max_new_tokens = 32768 is too large; limit: at most sglang.context_length = 128",
        ("evaluate={preset='paper_math',max_new_tokens=64}",),
    ),
    (
        ("rollout.min_p=0.1",),
        "rollout.min_p = 0.1 cannot be used with sglang.deterministic",
        ("rollout.min_p=0.1", "sglang.deterministic=false"),
    ),
    (
        ("sglang.extra_args.max_queued_requests=63",),
        "the server would refuse requests beyond 127",
        ("sglang.extra_args.max_queued_requests=64",),
    ),
    (
        ("sglang.max_total_tokens=135",),
        "limit: at least one full sequence: sglang.context_length = 128, plus 8 tokens",
        ("sglang.max_total_tokens=136",),
    ),
    # refreshes
    (
        ("distill.refresh.keep_teacher=true",),
        "refresh | distill.refresh: refresh.keep_teacher has no effect without a refresh",
        ("distill.refresh.keep_teacher=true", REFRESHED),
    ),
    (
        (REFRESHED, "sglang.port=23456"),
        (
            "sglang.port = 23456 with distill.refresh: "
            "the student's server already uses it when the teacher's server starts"
        ),
        (REFRESHED, "sglang.port=23456", "score.engine=megatron"),
    ),
    (
        (REFRESHED, "score.engine=megatron", "score.forward.max_tokens_per_microbatch=127"),
        (
            "score.forward.max_tokens_per_microbatch = 127 is too small; limit: at least one "
            "full sequence: 128"
        ),
        (REFRESHED, "score.engine=megatron", "score.forward.max_tokens_per_microbatch=128"),
    ),
    (
        (REFRESHED, "score.entropy=true"),
        "score.entropy is set, but SGLang returns no entropies",
        (REFRESHED, "score.entropy=true", "score.engine=megatron"),
    ),
    # servers
    (
        ("sglang.host=192.0.2.1",),
        "sglang.host = 192.0.2.1: no network interface of this machine has this address",
        ("sglang.host=127.0.0.2",),
    ),
    (
        (f"sglang.teacher_urls=['{URL}/v1']",),
        "is the address of the OpenAI interface",
        (f"sglang.teacher_urls=['{URL}/behind/a/proxy']",),
    ),
    (
        (f"sglang.student_urls=['{URL}', 'http://localhost:30001']",),
        "is in the list 2 times; limit: each server exactly once",
        (f"sglang.student_urls=['{URL}', 'http://localhost:30002']",),
    ),
    (
        ("sglang.extra_args.attention_backend=triton",),
        "limit: exactly torch_native on a machine without a GPU",
        ("sglang.extra_args.attention_backend=torch_native",),
    ),
    (
        ("sglang.extra_args.enable_memory_saver=true",),
        "lopd sets it where sync.colocate is true",
        ("sglang.extra_args.enable_metrics=true",),
    ),
    (
        ("sglang.extra_args.chunked_prefill_size='many'",),
        "chunked_prefill_size = 'many' has a wrong type; limit: a whole number",
        ("sglang.extra_args.chunked_prefill_size=64",),
    ),
]


@pytest.mark.parametrize(("bad", "line", "good"), PAIRS, ids=[" ".join(bad) for bad, _, _ in PAIRS])
def test_what_is_refused_and_what_is_as_good(
    project: Path, bad: tuple[str, ...], line: str, good: tuple[str, ...]
) -> None:
    (found,) = wrong(project, *bad)
    assert line in found
    assert "; remedy: " in found
    assert wrong(project, *good) == [], "the control"


def test_a_default_that_is_longer_than_the_context_is_no_mistake_of_the_user(project: Path) -> None:
    config = load_config(project)
    assert "max_new_tokens" in config.rollout.model_fields_set
    unset = config.rollout.model_validate({})
    assert unset.max_new_tokens > config.sglang.context_length
    assert not [*combinations.sampling_problems(config.model_copy(update={"rollout": unset}))]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (
            (REFRESHED, "score.engine=megatron", "score.forward.max_tokens_per_microbatch=32"),
            ("run", "score", "distill"),
        ),
        ((REFRESHED, "sglang.port=23456"), ("run", "distill")),
        (("distill.refresh.keep_teacher=true",), ("run", "distill")),
        (("sync.colocate=true",), ("run", "distill")),
        (("rollout.max_new_tokens=4096",), ("run", "rollout")),
        (
            ("sglang.extra_args.disable_radix_cache=1",),
            ("run", "demonstrate", "rollout", "score", "distill", "evaluate"),
        ),
    ],
    ids=str,
)
def test_the_stages_refuse_them_before_anything_starts(
    project: Path,
    lopd: Lopd,
    nothing_starts: StandIns,
    overrides: tuple[str, ...],
    stages: tuple[str, ...],
) -> None:
    before = contents(project.parent)
    for verb in stages:
        lopd(verb, project, *overrides).refused("; remedy: ")
    assert not nothing_starts.started
    assert contents(project.parent) == before


def test_a_distill_without_a_refresh_does_not_ask_for_a_scorer(project: Path) -> None:
    narrow = ("score.engine=megatron", "score.forward.max_tokens_per_microbatch=32")
    names = {
        name
        for name, finding in checks.check(load_config(project, narrow), "distill")
        if isinstance(finding, LopdError)
    }
    assert "scorer" not in names
    refreshed = {
        name
        for name, finding in checks.check(load_config(project, [*narrow, REFRESHED]), "distill")
        if isinstance(finding, LopdError)
    }
    assert "scorer" in refreshed


# ---- what depends on a GPU, judged for both kinds of machine ----


def sync_lines(config: Config, *, on_gpu: bool | None) -> list[str]:
    return [str(problem) for problem in combinations.sync_problems(config, on_gpu=on_gpu)]


def test_turns_with_nobody_are_refused(project: Path) -> None:
    (line,) = sync_lines(load_config(project, ["sync.colocate=true"]), on_gpu=None)
    assert (
        "sync.colocate = true has no effect: no server runs during the training; limit: "
        "distill.sync_every above 0 with evaluate.enabled, or a refresh"
    ) in line
    for server in (SYNCED, REFRESHED):
        assert sync_lines(load_config(project, ["sync.colocate=true", server]), on_gpu=None) == []


def test_buffers_of_nccl_cannot_be_given_back(project: Path) -> None:
    (line,) = sync_lines(
        load_config(project, ["sync.colocate=true", SYNCED, "distill.megatron={nccl_ub=true}"]),
        on_gpu=None,
    )
    assert (
        "distill.megatron.nccl_ub cannot be used with sync.colocate: only memory that torch "
        "allocates can be given back and taken again"
    ) in line
    for good in (
        ["sync.colocate=true", "distill.megatron={nccl_ub=false}"],
        ["distill.megatron={nccl_ub=true}"],
    ):
        assert sync_lines(load_config(project, [SYNCED, *good]), on_gpu=None) == []


def test_a_broadcast_needs_a_gpu_for_each_of_its_ends(project: Path) -> None:
    config = load_config(project, [SYNCED, "sync.transport=distributed"])
    for on_gpu in (True, None):
        (line,) = sync_lines(config, on_gpu=on_gpu)
        assert (
            'sync.transport = "distributed": '
            "NCCL does not broadcast between two processes of one GPU"
        ) in line
    assert sync_lines(config, on_gpu=False) == [], "gloo does"
    assert (
        sync_lines(
            load_config(
                project, [SYNCED, "sync.transport=distributed", f"sglang.student_urls=['{URL}']"]
            ),
            on_gpu=True,
        )
        == []
    )
    assert sync_lines(load_config(project, ["sync.transport=distributed"]), on_gpu=True) == [], (
        "no server, no broadcast"
    )


def test_a_section_that_does_nothing_is_said_to(project: Path) -> None:
    said = dict(checks.check(load_config(project, ["sync.transport=tensor", "sync.delta=true"])))
    assert said["sync"] == "no server lives beside the training: [sync] has no effect"
    said = dict(checks.check(load_config(project, ["sync.transport=tensor", SYNCED])))
    assert said["sync"] == "by tensor"


# ---- servers of the user, asked ----


class Checked(FakeServer):
    """Answers /weights_checker as SGLang does (tells_fingerprints: as a server of lopd's does)."""

    tells_fingerprints = False

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path != "/weights_checker":
            return super()._answer(path, body)
        if self.tells_fingerprints:
            return 200, {"success": True, "ranks": []}
        return 400, {"success": False, "message": f"Unsupported action={body['action']!r}"}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checked]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with Checked() as server:
        yield server


def test_a_server_that_tells_no_fingerprints_is_found_before_the_first_sync(
    project: Path, theirs: Checked
) -> None:
    asked = (f"sglang.student_urls=['{theirs.url}']", "sync.verify=tensors")
    (line,) = wrong(project, *asked, SYNCED)
    assert f"server | {theirs.url}: this server cannot report fingerprints of its weights" in line
    assert "remedy: remove sync.verify" in line
    theirs.calls.clear()
    assert wrong(project, *asked) == [], "no sync, no fingerprints"
    assert wrong(project, asked[0], SYNCED) == [], "scores, unless asked for"
    assert not theirs.calls, "nobody is asked for nothing"
    theirs.tells_fingerprints = True
    assert wrong(project, *asked, SYNCED) == []
    assert wrong(project, f"sglang.student_urls=['{URL}']", "sync.verify=tensors", SYNCED) == [], (
        "one that is not there yet may come"
    )


def test_the_port_of_a_replica_is_looked_at_too(project: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two cores")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        (line,) = wrong(project, f"sglang.port={port - 1}", "sglang.replicas=2")
        assert (
            f"port {port}, of replica 2, is taken" in line
            or f"sglang.port = {port - 1} is taken" in line
        )


# ---- what the file itself says ----


@pytest.mark.parametrize(
    ("bad", "said", "good"),
    [
        (
            ("rollout.top_k=0",),
            (
                "rollout.top_k = 0 is not allowed; limit: exactly -1 (all tokens are "
                "candidates), or at least 1"
            ),
            ("rollout.top_k=1",),
        ),
        (
            ("sglang.port=65535", "sglang.replicas=2"),
            "sglang.port = 65535 is too large for replicas = 2; limit: at most 65534",
            ("sglang.port=65534", "sglang.replicas=2"),
        ),
        (
            ("sglang.urls=['x']",),
            "the nearest known key is sglang.student_urls",
            ("sglang.student_urls=['x']",),
        ),
        (("sglang.tp=2",), "the nearest known key is sglang.tensor", ("sglang.tensor=2",)),
        (
            ("rollout.n=4",),
            "the nearest known key is rollout.samples_per_prompt",
            ("rollout.samples_per_prompt=4",),
        ),
        (
            ("evaluate.max_tokens=4",),
            "the nearest known key is evaluate.max_new_tokens",
            ("evaluate.max_new_tokens=4",),
        ),
    ],
    ids=str,
)
def test_mistakes_in_the_file(
    project: Path, bad: tuple[str, ...], said: str, good: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(project, bad)
    assert said in str(caught.value)
    load_config(project, good)
