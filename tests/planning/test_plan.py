"""Plans against what is known: what fits one node of 8 x 80 GB, and the paper's GPU hours."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lopd.cache.reader import CacheReader
from lopd.checks import check_anywhere
from lopd.cli import app
from lopd.errors import ConfigError
from lopd.planning import Assumptions, node_of
from lopd.planning.assumptions import read_assumptions
from lopd.planning.layouts import changed, nearest_that_fits
from lopd.planning.memory import (
    INDEX_BYTES,
    KEPT_TOKENS,
    MEMORY_TOKENS,
    SAMPLE_BYTES,
    TOKEN_BYTES,
    replayed_bytes,
)
from lopd.planning.models import planned_models
from lopd.planning.parameters import parameters_by_formula
from lopd.planning.plan_json import as_json
from lopd.planning.stages import STAGES, given_stages
from lopd.stages import training_data
from tests.planning.configs import PAPER_8B, REFERENCE_30B, config_of, plan_of


def test_the_reference_layout_fits(tmp_path: Path) -> None:
    plan = plan_of(REFERENCE_30B, tmp_path)
    assert plan.fits, plan.problems
    assert 24 < plan.memory["distill"].gpu_total / 2**30 < 36, (
        "24 GB of weights and gradients, and what a step needs"
    )
    assert plan.memory["distill"].host["optimizer"] == pytest.approx(
        16 * (30.5e9 + 4 * 14.8e6), rel=0.01
    ), "copy, moments and gradient of everything"


LONG = "distill.max_tokens_per_microbatch=65536"  # five times the reference's


def test_without_the_offload_it_is_the_optimizer_that_breaks(tmp_path: Path) -> None:
    offloaded = plan_of(REFERENCE_30B, tmp_path)
    kept = plan_of(REFERENCE_30B, tmp_path, ["distill.megatron={}"])
    shard = 3_623_878_656 + 394_868_736 // 2  # experts have one copy, everything else two
    assert (
        kept.memory["distill"].gpu["optimizer"] - offloaded.memory["distill"].gpu["optimizer"]
        == 12 * shard
    )
    assert kept.memory["distill"].gpu_total > 0.9 * kept.node.gpu.memory, (
        "tight even at the reference's microbatches"
    )
    assert plan_of(REFERENCE_30B, tmp_path, [LONG]).fits
    plan = plan_of(REFERENCE_30B, tmp_path, [LONG, "distill.megatron={}"])
    assert [problem.stage for problem in plan.problems] == ["distill"]
    assert "largest term: optimizer" in plan.problems[0].what
    assert plan_of(REFERENCE_30B, tmp_path, [LONG, "distill.megatron={}"], gpu="h200-141gb").fits


def test_standard_opd_does_not_fit_beside_the_trainer(tmp_path: Path) -> None:
    """The paper: 30B-A3B standard OPD is out of memory on this node. It is so without offload even
    at the least memory that servers could do with.
    """
    lean = [
        "sglang.mem_fraction=0.25",
        "sglang.tensor=4",
        "sglang.replicas=2",
        "distill.megatron={}",
    ]
    beside = plan_of(REFERENCE_30B, tmp_path, lean, cohost=True)
    assert "distill" in [problem.stage for problem in beside.problems]
    assert plan_of(
        PAPER_8B.replace("Qwen3-32B", "Qwen3-8B"),
        tmp_path,
        ["sglang.mem_fraction=0.15", "distill.recompute=full"],
        cohost=True,
    ).fits, "an 8B pair would"


def test_the_papers_gpu_hours(tmp_path: Path) -> None:
    """30 GPU hours: rollouts 10, scoring 4, training 16, by code that runs two more forward passes
    a step. Ours, without them, takes fewer.
    """
    theirs = plan_of(PAPER_8B, tmp_path, extra_forward_passes=2)
    for stage, hours in {"rollout": 10, "score": 4, "distill": 16}.items():
        assert theirs.gpu_hours(stage) == pytest.approx(hours, rel=0.15), stage
    assert as_json(theirs)["gpu_hours"]["lightning_opd"] == pytest.approx(30, rel=0.1)
    ours = plan_of(PAPER_8B, tmp_path)
    assert ours.gpu_hours("distill") < 0.65 * theirs.gpu_hours("distill")


def test_hours_follow_their_causes(tmp_path: Path) -> None:
    plain = plan_of(PAPER_8B, tmp_path, startup_s=0)
    assert plan_of(PAPER_8B, tmp_path, ["distill.num_steps=300"], startup_s=0).gpu_hours(
        "distill"
    ) == pytest.approx(2 * plain.gpu_hours("distill"))
    assert plan_of(PAPER_8B, tmp_path, ["distill.recompute=full"], startup_s=0).gpu_hours(
        "distill"
    ) == pytest.approx(4 / 3 * plain.gpu_hours("distill"))
    assert plan_of(PAPER_8B, tmp_path, ["rollout.samples_per_prompt=2"], startup_s=0).gpu_hours(
        "score"
    ) == pytest.approx(2 * plain.gpu_hours("score"), rel=0.01)
    fewer = plan_of(PAPER_8B, tmp_path, ["sglang.replicas=2"], startup_s=0)
    assert fewer.gpu_hours("rollout") > 1.3 * plain.gpu_hours("rollout"), (
        "the node is held while half of it idles"
    )


def test_a_small_cache_bounds_the_concurrency(tmp_path: Path) -> None:
    plan = plan_of(
        PAPER_8B, tmp_path, ["sglang.mem_fraction=0.45", "sglang.max_running_requests=256"]
    )
    figures = plan.memory["demonstrate"].figures
    # Keys and values, layers, heads of a rank of TP2, numbers of a head, bytes.
    per_token = 2 * 64 * 4 * 128 * 2
    assert figures["kv_tokens"] == pytest.approx(
        (0.45 * node_of("h100-80gb", 8).gpu.memory - 32.76e9 * 2 / 2) / per_token, rel=0.001
    )
    assert figures["concurrency"] < 64
    broken = plan_of(PAPER_8B, tmp_path, ["sglang.mem_fraction=0.4", "sglang.context_length=16384"])
    assert any("KV cache" in problem.what for problem in broken.problems)


def test_a_server_beside_the_trainer_counts(tmp_path: Path) -> None:
    assert plan_of(PAPER_8B, tmp_path).fits
    plan = plan_of(PAPER_8B, tmp_path, ["distill.sync_every=10"])
    assert [problem.stage for problem in plan.problems] == ["distill"]
    assert "student's server: KV cache" in plan.memory["distill"].gpu


def test_servers_that_take_turns_with_the_trainer(tmp_path: Path) -> None:
    """What does not fit beside each other may fit in turns: the peak is the fuller side's, and the
    other's state lies in host memory.
    """
    beside = plan_of(PAPER_8B, tmp_path, ["distill.sync_every=10"])
    assert not beside.fits
    turns = plan_of(PAPER_8B, tmp_path, ["distill.sync_every=10", "sync.colocate=true"])
    assert turns.fits, turns.problems
    served = turns.memory["rollout"].gpu_total
    trained = plan_of(PAPER_8B, tmp_path).memory["distill"]
    assert turns.memory["distill"].gpu_total == pytest.approx(
        max(served + trained.gpu["context, NCCL"], trained.gpu_total + 2.5 * 2**30)
    )
    assert turns.memory["distill"].gpu_total < beside.memory["distill"].gpu_total
    away = turns.memory["distill"].host["trainer, while a server works"]
    assert away == 8 * (trained.gpu["weights"] + trained.gpu["optimizer"]), (
        "gradients are forgotten"
    )
    long = plan_of(
        PAPER_8B,
        tmp_path,
        ["distill.sync_every=10", "sync.colocate=true", "distill.max_tokens_per_microbatch=65536"],
    )
    assert "activations" in long.problems[0].what, (
        "in its own turn the trainer must fit all the same"
    )


def test_the_nearest_that_fits(tmp_path: Path) -> None:
    config = config_of(
        REFERENCE_30B,
        tmp_path,
        [LONG, "distill.megatron={}", "sft.parallel.tensor=1", "sft.parallel.expert=1"],
    )
    models = planned_models(config, {})
    node = node_of("h100-80gb", 8)
    found = nearest_that_fits(config, models, node, Assumptions(), build=False)
    assert found is not None
    assert found.plan.fits
    assert {key.partition(".")[0] for key in found.changes} == {"sft", "distill"}, (
        "the servers fit as they are"
    )
    assert not any(key.endswith(("ranks", "recompute")) for key in found.changes), (
        "what was right stays"
    )
    again = nearest_that_fits(
        changed(config, found.changes), models, node, Assumptions(), build=False
    )
    assert again is not None
    assert not again.changes, "what fits stays as it is"
    pasted = config_of(REFERENCE_30B, tmp_path, [LONG, *found.overrides])
    assert pasted == changed(config_of(REFERENCE_30B, tmp_path, [LONG]), found.changes), (
        "the overrides can be pasted"
    )


def test_servers_beside_a_trainer_get_smaller(tmp_path: Path) -> None:
    config = config_of(PAPER_8B.replace("Qwen3-32B", "Qwen3-8B"), tmp_path)
    models = planned_models(config, {})
    node = node_of("h100-80gb", 8)
    found = nearest_that_fits(config, models, node, Assumptions(), cohost=True, build=False)
    assert found is not None
    assert found.plan.fits
    assert found.changes["sglang.mem_fraction"] < 0.3
    evaluating = config_of(PAPER_8B, tmp_path, ["distill.sync_every=10"])
    alone = nearest_that_fits(
        evaluating, planned_models(evaluating, {}), node, Assumptions(), build=False
    )
    assert alone is not None
    assert alone.changes == {"distill.sync_every": 0}, "the teacher of 32B leaves no smaller share"


def test_nothing_fits_a_single_small_gpu(tmp_path: Path) -> None:
    config = config_of(REFERENCE_30B, tmp_path)
    assert (
        nearest_that_fits(
            config,
            planned_models(config, {}),
            node_of("rtx4090-24gb", 1),
            Assumptions(),
            build=False,
        )
        is None
    )


def test_a_layout_larger_than_the_node(tmp_path: Path) -> None:
    assert any(
        "needs 8 GPUs, the node has 4" in problem.what
        for problem in plan_of(PAPER_8B, tmp_path, gpus=4).problems
    )


def test_a_training_over_two_nodes(tmp_path: Path) -> None:
    one = plan_of(REFERENCE_30B, tmp_path)
    two = plan_of(
        REFERENCE_30B, tmp_path, ["distill.parallel.ranks=16", "distill.parallel.nodes=2"]
    )
    assert two.fits, two.problems
    assert two.memory["distill"].host["optimizer"] == pytest.approx(
        one.memory["distill"].host["optimizer"] / 2, rel=0.05
    ), "each holds half of the moments"
    assert two.times["distill"].seconds < 0.7 * one.times["distill"].seconds
    assert two.gpu_hours("distill") > one.gpu_hours("distill"), "two nodes are held"
    assert any(
        "needs 16 GPUs" in problem.what
        for problem in plan_of(REFERENCE_30B, tmp_path, ["distill.parallel.ranks=16"]).problems
    )


def test_a_teacher_that_megatron_scores_with(tmp_path: Path) -> None:
    served = plan_of(PAPER_8B, tmp_path)
    ours = plan_of(
        PAPER_8B,
        tmp_path,
        [
            "score.engine=megatron",
            "score.forward.parallel.ranks=8",
            "score.forward.parallel.tensor=4",
        ],
    )
    assert "KV cache" in served.memory["score"].gpu
    assert "KV cache" not in ours.memory["score"].gpu
    assert ours.memory["score"].gpu["weights"] == pytest.approx(2 * 32.76e9 / 4, rel=0.001)
    assert ours.gpu_hours("score") == pytest.approx(served.gpu_hours("score")), (
        "the same forward pass on as many GPUs"
    )
    with pytest.raises(ConfigError, match=r"score\.forward\.parallel: ranks = 3 is not a multiple"):
        plan_of(
            PAPER_8B,
            tmp_path,
            [
                "score.engine=megatron",
                "score.forward.parallel.ranks=3",
                "score.forward.parallel.tensor=2",
            ],
        )


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [("run.seed=1", 0, "fits 8 x h100-80gb"), ("sft.parallel.tensor=1", 2, "does not fit sft")],
)
def test_the_verdict_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, code: int, expected: str
) -> None:
    monkeypatch.setattr(
        "lopd.planning.plan.count_parameters",
        lambda jobs: [parameters_by_formula(job.arch, job.parallel) for job in jobs],
    )
    config_of(PAPER_8B, tmp_path)
    found = CliRunner().invoke(app, ["plan", str(tmp_path / "config.toml"), override, "--suggest"])
    assert found.exit_code == code, found.output
    assert expected in found.output
    assert (
        "the configuration fits as it is" in found.output
        if code == 0
        else "the nearest that fits: sft." in found.output
    )


REFUSED = [  # what is wrong on any node
    (
        [
            "sync.colocate=true",
            "distill.sync_every=10",
            "distill.refresh={every=10,keep_teacher=true}",
        ],
        "keep_teacher keeps the teacher's server on the GPUs",
    ),
    (
        ["sync.colocate=true"],
        "sync.colocate = true has no effect: no server runs during the training",
    ),
    (
        ["sync.colocate=true", "distill.sync_every=10", "distill.megatron={nccl_ub=true}"],
        (
            "distill.megatron.nccl_ub cannot be used with sync.colocate: only memory that torch "
            "allocates can be given back and taken again"
        ),
    ),
    (
        ["sync.transport=distributed", "distill.sync_every=10"],
        "NCCL does not broadcast between two processes of one GPU",
    ),
    (
        ["sft.checkpoint=absent", "evaluate.equal_compute_baseline=false"],
        "sft.checkpoint: no such folder",
    ),
    (
        ["sft.checkpoint=hf://org/it@main", "evaluate.equal_compute_baseline=true"],
        "the equal-compute baseline continues SFT",
    ),
    (
        ["rollout.max_new_tokens=8192"],
        "rollout.max_new_tokens = 8192 is too large; limit: at most sglang.context_length = 4096",
    ),
    (["sglang.context_length=65536"], "at most max_position_embeddings of the student: 32768"),
    (
        ["sglang.tensor=3"],
        "number of attention heads of the teacher (64) does not divide by sglang.tensor (3)",
    ),
    (
        ["distill.max_tokens_per_microbatch=4095"],
        (
            "distill.max_tokens_per_microbatch = 4095 is too small; limit: at least one full "
            "sequence: 4096 tokens"
        ),
    ),
    (
        ["score.engine=megatron", "score.forward.max_tokens_per_microbatch=1024"],
        "score.forward.max_tokens_per_microbatch = 1024 is too small; limit: at least one",
    ),
    (
        ["distill.refresh.keep_teacher=true"],
        "refresh.keep_teacher has no effect without a refresh: no teacher is needed",
    ),
    (
        ["distill.objective.loss=top_k_reverse_kl"],
        "loss = top_k_reverse_kl cannot be used: it needs teacher_top_logprobs",
    ),
    (
        ["sglang.extra_args.chunked_prefill_size='4096'"],
        "chunked_prefill_size = '4096' has a wrong type; limit: a whole number",
    ),
    (
        ["sglang.student_urls=['http://10.0.0.7:1']", "sync.transport=tensor"],
        "the transport tensor works only on one machine, because it shares memory",
    ),
]
ACCEPTED = [
    ["sync.colocate=true", "distill.sync_every=10"],
    ["distill.sync_every=10", "distill.megatron={nccl_ub=true}"],
    ["sync.transport=tensor", "distill.sync_every=10"],
    ["sft.checkpoint=hf://org/it@main", "evaluate.equal_compute_baseline=false"],
    ["rollout.max_new_tokens=4096", "sglang.context_length=16384"],
    ["score.engine=megatron", "score.forward.max_tokens_per_microbatch=4096"],
    ["distill.refresh={every=10,keep_teacher=true}"],
    ["sglang.extra_args.chunked_prefill_size=4096"],
    # These are addresses of the future machine, not of this one.
    [
        "sync.host=10.0.0.1",
        "sync.transport=distributed",
        "sglang.host=10.0.0.1",
    ],
]


def refusals(folder: Path, overrides: list[str]) -> list[str]:
    config = config_of(PAPER_8B, folder, overrides)
    return [
        str(problem)
        for problem in check_anywhere(
            config,
            {role: model.arch for role, model in planned_models(config, {}).items()},
            given_stages(config),
        )
    ]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_plan_refuses_what_no_machine_can_run(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    found = refusals(tmp_path, overrides)
    assert [line for line in found if said in line and "; remedy: " in line], found


@pytest.mark.parametrize("overrides", [[], *ACCEPTED], ids=str)
def test_what_a_plan_has_nothing_against(tmp_path: Path, overrides: list[str]) -> None:
    assert refusals(tmp_path, overrides) == []


def test_the_plan_says_so_and_its_exit_code_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lopd.planning.plan.count_parameters",
        lambda jobs: [parameters_by_formula(job.arch, job.parallel) for job in jobs],
    )
    config_of(PAPER_8B, tmp_path)
    command = ["plan", str(tmp_path / "config.toml"), "sync.colocate=true"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 2, shown.output
    assert "fits 8 x h100-80gb" in shown.output, "the node is not the trouble"
    assert (
        "refused sync.colocate: sync.colocate = true has no effect: no server runs during "
        "the training; limit:"
    ) in shown.output
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert not told["fits"]
    assert [problem["stage"] for problem in told["problems"]] == ["configuration"]


def test_disk_and_samples(tmp_path: Path) -> None:
    plan = plan_of(PAPER_8B, tmp_path)
    tokens = 17_398 * 0.9 * (4096 - 200)
    assert plan.disk["rollouts and cache"] == pytest.approx(2 * 6.64 * tokens, rel=0.01)
    often = [
        plan_of(
            PAPER_8B, tmp_path, ["distill.checkpoint_every=10", f"distill.keep_checkpoints={keep}"]
        ).disk["checkpoints to resume from"]
        for keep in (1, 4)
    ]
    assert often[1] - often[0] == 3 * 14 * plan.total, "weights, two moments and the float32 copy"


def test_a_rank_holds_few_samples_and_reads_many_from_disk(tmp_path: Path) -> None:
    """As lopd.stages.training_data does, with its limits."""
    few = 2_000
    length = 0.9 * (4096 - 200)
    assert few * length < MEMORY_TOKENS
    small = plan_of(PAPER_8B, tmp_path, [f"prompts.opd.num_prompts={few}"])
    assert small.memory["distill"].host["samples"] == pytest.approx(
        8 * few * (13 * (length + 200) + SAMPLE_BYTES)
    )
    demonstrations = [
        plan_of(PAPER_8B, tmp_path, [f"prompts.sft.num_prompts={count}"])
        .memory["sft"]
        .host["samples"]
        for count in (300_000, 600_000)
    ]
    assert demonstrations[1] - demonstrations[0] == pytest.approx(8 * 300_000 * INDEX_BYTES), (
        "only the index grows"
    )
    assert demonstrations[1] < 2**30 < 8 * 13 * 300_000 * 1000, (
        "control: all in memory would be far more"
    )
    assert training_data.MEMORY_TOKENS == MEMORY_TOKENS
    assert training_data._TOKEN_BYTES == TOKEN_BYTES
    assert inspect.signature(CacheReader).parameters["kept_tokens"].default == KEPT_TOKENS


def test_replayed_experts_take_disk_and_memory(tmp_path: Path) -> None:
    keys = ["rollout.routed_experts=true", "distill.routing_replay=true"]
    plain = plan_of(REFERENCE_30B, tmp_path)
    plan = plan_of(REFERENCE_30B, tmp_path, keys)
    experts = 48 * 8  # Qwen3-30B-A3B's, a byte each on disk and two in memory
    positions = 17_398 * (plan.amounts.rollout_len + plan.amounts.prompt_len)
    more = plan.disk["rollouts and cache"] - plain.disk["rollouts and cache"]
    assert more == pytest.approx(2 * experts * positions)
    student = planned_models(config_of(REFERENCE_30B, tmp_path), {})["student"].arch
    settings = config_of(REFERENCE_30B, tmp_path, keys).distill
    assert replayed_bytes(student, settings) == 2 * experts
    assert replayed_bytes(student, config_of(REFERENCE_30B, tmp_path).distill) == 0
    small = [f"prompts.opd.num_prompts={count}" for count in (20, 60)]
    held = [
        plan_of(REFERENCE_30B, tmp_path, [*keys, count]).memory["distill"].host["samples"]
        for count in small
    ]
    length = plan.amounts.rollout_len + plan.amounts.prompt_len
    assert held[1] - held[0] == pytest.approx(
        8 * 40 * ((13 + 2 * experts) * length + SAMPLE_BYTES)
    ), "so few are all held"


def test_what_is_given_is_not_planned(tmp_path: Path) -> None:
    whole = plan_of(PAPER_8B, tmp_path)
    assert set(whole.memory) == set(STAGES)
    for override, given in (
        ("sft.demonstrations=elsewhere", {"demonstrate"}),
        ("sft.checkpoint=elsewhere", {"demonstrate", "sft"}),
        ("distill.cache=elsewhere", {"rollout", "score"}),
    ):
        plan = plan_of(PAPER_8B, tmp_path, [override])
        assert set(STAGES) - set(plan.memory) == given
        assert {stage for stage in STAGES if plan.gpu_hours(stage) == 0} == given
        assert sum(plan.disk.values()) < sum(whole.disk.values())
    broken = "sft.parallel.tensor=1"
    assert not plan_of(PAPER_8B, tmp_path, [broken]).fits
    assert plan_of(PAPER_8B, tmp_path, [broken, "sft.checkpoint=elsewhere"]).fits, (
        "a layout that is not used does not matter"
    )
    config = config_of(
        PAPER_8B, tmp_path, ["sft.checkpoint=elsewhere", "distill.parallel.tensor=1"]
    )
    found = nearest_that_fits(
        config, planned_models(config, {}), node_of("h100-80gb", 8), Assumptions(), build=False
    )
    assert found is not None
    assert {key.partition(".")[0] for key in found.changes} == {"distill"}


def test_teachers_of_domains(tmp_path: Path) -> None:
    alone = plan_of(PAPER_8B.replace("Qwen3-32B", "Qwen3-8B"), tmp_path)
    plan = plan_of(
        PAPER_8B.replace("Qwen3-32B", "Qwen3-8B"),
        tmp_path,
        ['models.teachers={ math = "Qwen3-32B" }'],
        startup_s=0,
    )
    big = plan_of(PAPER_8B, tmp_path, startup_s=0)
    small = plan_of(PAPER_8B.replace("Qwen3-32B", "Qwen3-8B"), tmp_path, startup_s=0)
    for stage in ("demonstrate", "score"):
        assert plan.memory[stage].gpu == big.memory[stage].gpu, (
            "the fullest of what is served in turn"
        )
        assert plan.gpu_hours(stage) == pytest.approx(
            (big.gpu_hours(stage) + small.gpu_hours(stage)) / 2, rel=1e-6
        ), "half of the prompts each"
    assert plan.memory["evaluate"].gpu == alone.memory["evaluate"].gpu
    assert as_json(plan)["models"]["teachers.math"]["name"] == "Qwen3-32B"


def test_context_ranks_share_a_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopd.planning.plan.layout_problems", lambda *_, **__: iter(()))
    four = "distill.parallel.tensor=4"
    two = "distill.parallel.tensor=2"
    without = plan_of(PAPER_8B, tmp_path, [two])
    cut = plan_of(PAPER_8B, tmp_path, [two, "distill.parallel.context=2"])
    for term in ("weights", "gradients", "optimizer"):
        assert cut.memory["distill"].gpu[term] == without.memory["distill"].gpu[term], (
            "parameters are not cut; data and context ranks share the optimizer"
        )
    keys_and_values = 16384 // 2 * 4 * 2 * 2 * 8 * 128 / 2
    assert cut.memory["distill"].gpu["activations"] == pytest.approx(
        without.memory["distill"].gpu["activations"] / 2 + keys_and_values
    )
    assert (
        cut.memory["distill"].gpu["context, NCCL"]
        == without.memory["distill"].gpu["context, NCCL"] + 2**29
    )
    assert cut.memory["distill"].gpu_total < without.memory["distill"].gpu_total
    assert (
        plan_of(PAPER_8B, tmp_path, [four]).memory["distill"].gpu["weights"]
        < cut.memory["distill"].gpu["weights"]
    ), "control: tensor ranks cut parameters"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("dense_utilization=0.4", "nearest known name is dense_utilisation"),
        ("moe_utilisation=2", "at most 1"),
        ("startup_s=fast", "a number"),
        ("prompt_len=0", "above 0"),
    ],
)
def test_wrong_assumptions_are_refused(setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_assumptions([setting])


def test_an_unknown_gpu_and_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearest known GPU is h100-80gb"):
        node_of("h100-80", 8)
    config = config_of(PAPER_8B.replace("Qwen3-8B-Base", "Somebodys-8B"), tmp_path)
    with pytest.raises(ConfigError, match="--student-config FILE"):
        planned_models(config, {})
