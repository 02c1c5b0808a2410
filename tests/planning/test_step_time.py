"""The parts of a step's time, of a sync and of a server's memory, each by its cause; and the
recipes' settings by them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopd.config import TrainSection
from lopd.planning import Assumptions, Plan, node_of
from lopd.planning.assumptions import meanings, sources
from lopd.planning.training import StepTime, exchanged_bytes, optimizer_seconds, step_time
from lopd.planning.view import show_plan
from tests.planning.configs import REFERENCE_30B, architecture, plan_of
from tests.planning.test_recipes import planned

GIB = 2**30
MOE = architecture("Qwen3-30B-A3B-Base")
NODE = node_of("h100-80gb", 8)
TP4 = {"ranks": 8, "tensor": 4, "expert": 8}
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
PARAMETERS = 30_532_122_624


def section(**fields: Any) -> TrainSection:
    return TrainSection.model_validate({"parallel": TP4, "batch_size": 512, **fields})


def step(length: float = 4096, assumed: Assumptions | None = None, **fields: Any) -> StepTime:
    about: dict[str, Any] = {"sequence_len": length, "parameters": PARAMETERS}
    return step_time(MOE, section(**fields), NODE, assumed or Assumptions(), **about)


# ---- a training step -----------------------------------------------------------------------------
# ---------------------------------------------------


def test_the_published_rate_of_this_model() -> None:
    """NVIDIA's NeMo AutoModel: 8 H100, bfloat16, 512 sequences of 4,096 tokens in 21.773 s, without
    tensor ranks: 277 TFLOP/s, as we count.

    The plan says somewhat less of that layout: the logits are computed twice here, and NCCL sends
    more than DeepEP.
    """
    published = step(parallel={"ranks": 8, "expert": 8}, assumed=Assumptions(expert_slowdown=1))
    assert published.model_flops / 8 / 21.773 == pytest.approx(277e12, rel=0.01)
    assert 0.88 < 21.773 / published.seconds < 1
    slower = step(
        parallel={"ranks": 8, "expert": 8},
        assumed=Assumptions(expert_slowdown=1, moe_utilisation=0.12),
    )
    assert 21.773 / slower.seconds < 0.5, "control: the rate that was assumed before"


def test_what_is_recomputed_takes_time() -> None:
    none, selective, full = (
        step(recompute=recompute) for recompute in ("none", "selective", "full")
    )
    assert none.seconds < selective.seconds < full.seconds
    assert none.model_flops == selective.model_flops == full.model_flops
    head = 2.0 * 2048 * 151_936 * 512 * 4096
    assert none.flops == pytest.approx(none.model_flops + head)
    assert full.flops == pytest.approx(4 / 3 * full.model_flops)
    assert selective.exchanges > none.exchanges, "tokens go to the experts a third time"


def test_exchanges_follow_the_layout() -> None:
    def per_token(**parallel: int) -> float:
        return exchanged_bytes(
            MOE, section(parallel={"ranks": 8, **parallel}), Assumptions(expert_slowdown=1)
        )

    number, layers = 2048 * 2, 48
    assert per_token() == 0
    assert per_token(expert=8) == layers * number * 4 * 8 * 7 / 8
    assert per_token(expert=8, tensor=4) - per_token(expert=8) == layers * number * 5 * 3


def test_an_optimizer_on_the_cpu_is_as_fast_as_its_threads() -> None:
    def seconds(assumed: Assumptions | None = None, **fields: Any) -> float:
        return optimizer_seconds(section(**fields), NODE, assumed or Assumptions(), PARAMETERS)

    assert seconds() == 0
    one = seconds(megatron=OFFLOAD, threads_per_rank=1)
    assert one == pytest.approx(PARAMETERS / (8 * 2.7e8)), "14 s, which a step would wait for"
    shared = seconds(megatron=OFFLOAD)
    assert shared == pytest.approx(PARAMETERS * 28 / 4e11), (
        "96 threads are faster than the memory: 2.1 s"
    )
    assert seconds(megatron=OFFLOAD, assumed=Assumptions(node_cores=32)) == pytest.approx(
        PARAMETERS / (32 * 2.7e8)
    )
    assert seconds(megatron={**OFFLOAD, "optimizer_offload_fraction": 0.5}) == pytest.approx(
        shared / 2
    )
    copies = PARAMETERS / 8 * 6 / 5e10
    one_after_the_other = {**OFFLOAD, "overlap_cpu_optimizer_d2h_h2d": False}
    assert seconds(megatron=one_after_the_other) == pytest.approx(shared + copies)


# ---- memory --------------------------------------------------------------------------------------
# ---------------------------------------------------


def distilling(folder: Path, *overrides: str) -> dict[str, float]:
    plan = plan_of(REFERENCE_30B, folder, overrides)
    return dict(plan.memory["distill"].gpu)


def test_a_precision_aware_optimizer_keeps_half_of_the_copy(tmp_path: Path) -> None:
    plain = distilling(tmp_path, "distill.megatron={}")["optimizer"]
    precise = distilling(tmp_path, "distill.megatron={use_precision_aware_optimizer=true}")[
        "optimizer"
    ]
    whole = distilling(
        tmp_path,
        "distill.megatron={use_precision_aware_optimizer=true, store_param_remainders=false}",
    )["optimizer"]
    assert precise == pytest.approx(10 / 12 * plain)
    assert whole == plain


def test_recompute_keeps_less(tmp_path: Path) -> None:
    ways = ("none", "selective", "full")
    uses = [distilling(tmp_path, f"distill.recompute={way}") for way in ways]
    none, selective, full = (use["activations"] for use in uses)
    assert full < 0.2 * selective
    assert selective < 0.4 * none, "most of what a layer keeps is the experts'"


def test_logits_while_scoring_are_sglangs_own_part(tmp_path: Path) -> None:
    """SGLang 0.5.17 makes them for 2,048 tokens at a time, whatever the prompt's chunk; a smaller
    chunk is smaller still.
    """

    def logits(*overrides: str) -> float:
        return plan_of(REFERENCE_30B, tmp_path, overrides).memory["score"].gpu["logits of a chunk"]

    plain = logits()
    assert plain == 2048 * 151_936 * 8
    assert logits("sglang.extra_args={chunked_prefill_size=4096}") == plain
    assert logits("sglang.extra_args={chunked_prefill_size=-1}") == plain
    assert logits("sglang.extra_args={chunked_prefill_size=1024}") == plain / 2


# ---- servers and syncs ---------------------------------------------------------------------------
# ---------------------------------------------------


def test_deterministic_sampling_takes_longer(tmp_path: Path) -> None:
    plain, slow = (
        plan_of(REFERENCE_30B, tmp_path, ["sglang.deterministic=" + value], startup_s=0)
        for value in ("false", "true")
    )
    for stage in ("demonstrate", "rollout"):
        assert slow.gpu_hours(stage) == pytest.approx(2 * plain.gpu_hours(stage)), stage
    assert slow.gpu_hours("score") == plain.gpu_hours("score")


SYNCED = (
    "distill.sync_every=50",
    "sync.colocate=true",
    "sync.transport=tensor",
    "distill.recompute=none",
)


def test_syncs_have_their_seconds(tmp_path: Path) -> None:
    apart = plan_of(REFERENCE_30B, tmp_path, ["distill.recompute=none"])
    plan = plan_of(REFERENCE_30B, tmp_path, SYNCED)
    assert apart.syncs.seconds == 0
    assert plan.times["distill"].seconds == pytest.approx(
        apart.times["distill"].seconds + plan.syncs.seconds
    )
    assert plan.times["distill"].utilisation == apart.times["distill"].utilisation, (
        "of the steps alone"
    )
    away = apart.memory["distill"].gpu["weights"]  # an offloaded optimizer is on the host already
    quick = plan_of(REFERENCE_30B, tmp_path, SYNCED, host_link=1e15)
    assert plan.syncs.seconds - quick.syncs.seconds == pytest.approx(
        4 * 2 * away / 5e10, rel=1e-3
    ), "steps 0, 50, 100, 150"
    faster = plan_of(REFERENCE_30B, tmp_path, SYNCED, sync_rate=4e9)
    assert plan.syncs.seconds - faster.syncs.seconds == pytest.approx(4 * PARAMETERS * 2 / 4e9)


def test_turns_are_shown_with_their_memory_and_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(REFERENCE_30B, tmp_path, SYNCED)
    use = plan.memory["distill"]
    assert set(use.turns) == {"the trainer", "a sync", "the student's servers"}
    assert use.gpu_total == max(use.turns.values())
    alone = plan_of(REFERENCE_30B, tmp_path, ["distill.recompute=none"])
    asleep = 2.5 * GIB  # of the servers' processes
    assert use.turns["the trainer"] == pytest.approx(alone.memory["distill"].gpu_total + asleep)
    show_plan(plan, assumptions=False)
    shown = capsys.readouterr().out
    assert (
        f"in turns with the GPUs, GiB: the trainer {use.turns['the trainer'] / GIB:.1f}, a sync"
        in shown
    )
    assert "syncs, evaluations in it" in shown
    show_plan(alone, assumptions=False)
    assert "in turns" not in (shown := capsys.readouterr().out)
    assert "syncs" not in shown


def test_the_page_has_every_assumption_with_its_value_and_source() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    kinds = {"fitted", "published", "measured", "read", "data sheet", "assumed"}
    assert set(sources().values()) == kinds
    for name, meaning in meanings().items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        value, source, said = (cell.strip() for cell in row.strip("| ").split(" | ")[1:])
        assert (source, said) == (sources()[name], meaning)
        default = getattr(Assumptions(), name)
        shown = float(value.removesuffix(" GiB").replace(",", "")) * (
            GIB if value.endswith("GiB") else 1
        )
        assert shown == pytest.approx(default), name


# ---- the recipes ---------------------------------------------------------------------------------
# ---------------------------------------------------


@pytest.fixture(scope="module")
def flagship() -> Plan:
    return planned("qwen3_30b_a3b", "h100-80gb", 8)


def test_the_flagship_by_the_plan(flagship: Plan) -> None:
    """docs/plan.md has the whole; these are what its settings were chosen by."""
    assert flagship.memory["sft"].gpu_total < 74 * GIB
    assert flagship.memory["distill"].gpu_total < 74 * GIB
    assert flagship.times["sft"].utilisation > 0.21
    assert flagship.times["distill"].utilisation > 0.18
    assert sum(flagship.gpu_hours(stage) for stage in ("rollout", "score", "distill")) < 20
    assert "student's server: KV cache" in flagship.memory["distill"].gpu, (
        "the fullest is the servers' turn"
    )


def test_every_other_memory_setting_is_slower_or_does_not_fit(
    flagship: Plan, tmp_path: Path
) -> None:
    text = (Path(__file__).resolve().parents[2] / "examples" / "run_qwen3_30b_a3b.toml").read_text()
    tables = {"offloaded": None, "plain": "{}", "precise": "{use_precision_aware_optimizer=true}"}
    for name, table in tables.items():
        for recompute in ("none", "selective", "full"):
            if (name, recompute) == ("offloaded", "none"):
                continue  # the recipe's
            changes = [f"sft.recompute={recompute}", *([f"sft.megatron={table}"] if table else [])]
            other = plan_of(text, tmp_path, changes)
            fits = other.memory["sft"].gpu_total <= 74 * GIB
            assert not fits or other.times["sft"].seconds > flagship.times["sft"].seconds, (
                name,
                recompute,
            )


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_8b", "qwen3_4b"])
def test_servers_take_as_many_requests_as_their_cache_holds(name: str) -> None:
    plan = planned(name, "h100-80gb", 8)
    use = plan.memory["rollout"].figures
    mean_len = plan.amounts.prompt_len + plan.amounts.rollout_len
    assert use["concurrency"] == pytest.approx(use["kv_tokens"] / mean_len), (
        "max_running_requests is no bound"
    )
    assert plan.config.sglang.max_in_flight >= use["concurrency"]
    assert plan.config.sglang.deterministic is False
