"""Where samples of py-spy count."""

from __future__ import annotations

import pytest

from benchmarks.profile_run import RATE, summary

RANK = 'process 2:"python -u -m lopd.megatron.ranks.forking"'
ENGINE = 'process 3:"sglang::scheduler"'
COMMAND = 'process 1:"python -m lopd.cli run examples/tiny_moe.toml"'
SCHEDULE = "forward_backward_no_pipelining (core/pipeline_parallel/schedules.py:656)"


@pytest.mark.parametrize(
    ("stack", "role", "kind"),
    [
        (f"{COMMAND};{RANK};{SCHEDULE};forward_step (a.py:1)", "rank", "trainer: forward"),
        (f"{COMMAND};{RANK};{SCHEDULE};backward_step (a.py:1)", "rank", "trainer: backward"),
        (f"{COMMAND};{RANK};<frozen importlib._bootstrap>:1", "rank", "imports"),
        (f"{COMMAND};{ENGINE};forward_batch (model_runner.py:1)", "engine", "engine: the model"),
        (f"{COMMAND};work (a.py:1)", "command", "other"),
    ],
)
def test_a_sample_counts_once_where_it_belongs(stack: str, role: str, kind: str) -> None:
    assert summary([f"{stack} {RATE}", f"{stack} {RATE}"]) == {role: {kind: 2.0}}
