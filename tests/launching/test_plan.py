"""Which jobs a configuration becomes, in which order, on how many machines; and how a job learns
its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lopd.artifacts import Share
from lopd.config import load_config
from lopd.errors import ConfigError, LopdError
from lopd.launching import LaunchPlan, Target, bridge, make_plan
from lopd.launching.place import read_node, read_share
from tests.stand_ins import command

CLUSTER = Path(__file__).with_name("cluster.toml")
TINY = Path(__file__).parents[2] / "examples/tiny_moe.toml"


def plan_of(
    target: Target,
    overrides: Sequence[str] = (),
    config: Path = CLUSTER,
    stages: Sequence[str] = (),
) -> LaunchPlan:
    return make_plan(
        load_config(config, overrides),
        target,
        config_file=Path("/shared/math.toml"),
        overrides=overrides,
        stages=stages,
    )


def test_every_job_comes_after_what_it_reads() -> None:
    for target in ("slurm", "k8s"):
        jobs = plan_of(target).jobs
        assert [job.name for job in jobs] == [
            *(
                "demonstrate-workers",
                "demonstrate",
                "sft",
                "rollout-workers",
                "rollout",
                "score-workers",
                "score",
                "distill",
                "evaluate",
                "export",
            )
        ]
        assert [job.after for job in jobs] == [(), *((before.name,) for before in jobs[:-1])]


def test_workers_are_an_array_where_there_are_arrays_and_jobs_elsewhere() -> None:
    array = {job.name: job for job in plan_of("slurm").jobs}
    assert array["rollout-workers"].workers == 4
    assert array["rollout-workers"].command[-2:] == ("--shards", "auto/4")
    assert "--shards" not in array["rollout"].command
    single = {job.name: job for job in plan_of("local", ["sft.parallel.nodes=1"]).jobs}
    assert [single[f"rollout-{index}"].command[-1] for index in range(4)] == [
        "0/4",
        "1/4",
        "2/4",
        "3/4",
    ]
    assert {single[f"rollout-{index}"].after for index in range(4)} == {("sft",)}
    assert single["rollout"].after == ("rollout-0", "rollout-1", "rollout-2", "rollout-3")
    assert {job.name for job in plan_of("slurm").jobs if job.share} == {
        "demonstrate-workers",
        "rollout-workers",
        "score-workers",
    }
    one = plan_of("slurm", ["launch.workers=1"])
    assert [job.name for job in one.jobs] == [
        "demonstrate",
        "sft",
        "rollout",
        "score",
        "distill",
        "evaluate",
        "export",
    ]


def test_machines() -> None:
    jobs = {job.name: job for job in plan_of("slurm").jobs}
    assert (jobs["sft"].nodes, jobs["sft"].gpus) == (2, 8)
    assert jobs["sft"].command[-2:] == ("--node", "auto/2")
    assert (jobs["score"].nodes, jobs["score"].gpus) == (1, 4)  # one server of sglang.tensor GPUs
    assert (jobs["distill"].nodes, jobs["distill"].gpus) == (1, 8)
    assert jobs["export"].gpus == 0
    on_cores = {
        job.name: job
        for job in plan_of("slurm", ["launch.device=cpu", "sft.threads_per_rank=2"]).jobs
    }
    assert {job.gpus for job in on_cores.values()} == {0}
    assert on_cores["sft"].cpus == 16  # 8 ranks a node, 2 threads each
    assert plan_of("slurm", ["sglang.replicas=2"]).jobs[0].gpus == 8


def test_commands_carry_config_and_overrides() -> None:
    job = plan_of("slurm", ["distill.num_steps=8"], stages=["distill"]).jobs[0]
    assert job.command == ("lopd", "distill", "/shared/math.toml", "distill.num_steps=8")
    assert job.after == ()
    tiny = plan_of("local", config=TINY, stages=["sft"]).jobs[0]
    assert tiny.command[1:4] == ("-m", "lopd.cli", "sft"), "without an image: this very environment"


def test_demonstrations_from_elsewhere_need_no_job() -> None:
    assert plan_of("slurm", ["sft.demonstrations=/shared/demonstrations"]).jobs[0].name == "sft"


@pytest.mark.parametrize(
    ("target", "overrides", "stages", "expected"),
    [
        ("local", [], [], "sft.parallel.nodes = 2 is too large"),
        ("slurm", ["sft.parallel.nodes=3"], [], "16 ranks cannot be divided equally among 3 nodes"),
        ("slurm", [], ["train"], "there is no stage 'train'"),
        ("slurm", ["run.dir=/shared/nemo_run/x"], [], "nemo_run"),
        ("slurm", ["run.dir=/shared/two words"], [], "the character ' '"),
        ("slurm", ["run.dir=/shared/%j"], [], "the character '%'"),
        ("slurm", ["run.dir=/shared/$USER"], [], r"the character '\$'"),
        ("slurm", ["run.dir=/shared/run(1)"], [], r"the character '\('"),
    ],
)
def test_refusals(target: Target, overrides: list[str], stages: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        plan_of(target, overrides, stages=stages)


def test_a_path_that_a_batch_script_leaves_alone_is_taken() -> None:
    """The control: these were run by a real Slurm, and other targets quote the rest."""
    assert plan_of("slurm", ["run.dir=/shared/ü_1.2/a#1,b=c"]).jobs
    assert plan_of("local", ["run.dir=/shared/two words/%j"], config=TINY).jobs


def test_containers_need_an_image() -> None:
    for target in ("docker", "k8s", "skypilot"):
        with pytest.raises(ConfigError, match=r"launch\.image is missing"):
            plan_of(target, config=TINY)
    assert plan_of("slurm", config=TINY).jobs


def test_a_missing_environment_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(bridge.PYTHON, str(tmp_path / "python"))
    with pytest.raises(LopdError, match=r"bash requirements/install_launch\.sh"):
        bridge.launch(plan_of("slurm"), render_to=tmp_path)
    assert not list(tmp_path.iterdir())


def test_places() -> None:
    assert read_share("1/4", {}) == Share(1, 4)
    assert read_share("auto/4", {"SLURM_ARRAY_TASK_ID": "3", "JOB_COMPLETION_INDEX": "1"}) == Share(
        3, 4
    )
    assert read_share("auto/4", {"JOB_COMPLETION_INDEX": "1"}) == Share(1, 4)
    assert read_node("auto/2", {"SLURM_NODEID": "1", "SLURM_ARRAY_TASK_ID": "0"}) == (1, 2)
    assert read_node("auto/2", {"PET_NODE_RANK": "0"}) == (0, 2)
    for text, environment in (
        ("auto/4", {}),
        ("4/4", {}),
        ("x/4", {}),
        ("1", {}),
        ("auto/2", {"SLURM_ARRAY_TASK_ID": "2"}),
    ):
        with pytest.raises(ConfigError):
            read_share(text, environment)


def test_shares_are_disjoint_and_leave_nothing_out() -> None:
    for count in (1, 3, 4):
        taken = [
            shard
            for index in range(count)
            for shard in range(10)
            if Share(index, count).takes(shard)
        ]
        assert sorted(taken) == list(range(10))


def test_the_verb_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lopd = command(monkeypatch, capsys)
    lopd("launch", TINY, "--on", "lsf").refused("'lsf'", "local, docker, slurm, k8s, skypilot")
    monkeypatch.setenv(bridge.PYTHON, str(tmp_path / "python"))
    lopd("launch", TINY, "--on", "slurm", f"run.dir={tmp_path}/run").refused(
        "bash requirements/install_launch.sh"
    )
    assert not list(tmp_path.iterdir()), "nothing is written before it is known that it can start"
    lopd("sft", TINY, "sft.parallel.nodes=2", f"run.dir={tmp_path}/run", "--node", "2/2").refused(
        "--node"
    )
