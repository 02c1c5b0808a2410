"""Every metric that the code reports is in the schema, and docs/metrics.md shows the schema."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from lopd.config import DistillSection, ObjectiveSection
from lopd.megatron.training.health import expert_load
from lopd.objective import reduce_metrics
from lopd.objective.quantiles import is_count
from lopd.objective.registry import objective_from_config
from lopd.objective.supervised import Supervised
from lopd.objective.top_k import TopKKL
from lopd.report.html.curves import PANELS
from lopd.report.metric_schema import METRICS, metric_lines, metric_of
from tests.objective.dense import TableModel
from tests.objective.pieces import packed_logprobs, samples_with_everything
from tests.objective.test_top_k import NUM_TOKENS, batch_of

ROOT = Path(__file__).resolve().parents[2]


def unknown(kind: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if metric_of(kind, name) is None}


def test_a_figure_of_nobody_is_noticed() -> None:
    """The control of the tests below."""
    assert unknown("train", ["loss", "a_new_figure"]) == {"a_new_figure"}
    assert unknown("eval", ["loss"]) == {"loss"}
    assert metric_of("train", "advantage/maths") is metric_of("train", "advantage")


def test_the_figures_of_objectives_are_in_the_schema() -> None:
    model = TableModel()
    logprobs, batch = packed_logprobs(model, samples_with_everything())
    batch = dataclasses.replace(batch, student_entropy=torch.ones_like(logprobs))
    section = DistillSection(
        objective=ObjectiveSection(importance_cap=2.0, step_divergence_cap=1.2, reference_kl=0.1)
    )
    available = {field.name for field in dataclasses.fields(batch)}
    chosen = objective_from_config(section, available)
    reported = reduce_metrics(
        {name: float(value) for name, value in chosen(logprobs, batch).metric_sums.items()}
    )
    expected = {"student_entropy", "importance_capped_share", "step_weight", "reference_kl"}
    assert expected <= reported.keys()
    assert unknown("train", reported) == set()
    supervised = Supervised()(logprobs, batch).metric_sums
    of_sft = reduce_metrics({name: float(value) for name, value in supervised.items()})
    assert "perplexity" in of_sft
    assert unknown("train", of_sft) == set()
    logits = torch.randn(NUM_TOKENS, 5)
    teacher = torch.log_softmax(torch.randn(NUM_TOKENS, 5), -1)
    top = batch_of(logits, teacher, 3)
    sums = TopKKL("reverse", "tail").metric_sums(logits[:, 0], top, top.loss_mask)
    reduced = {name for name in sums if not is_count(name)}
    assert len(reduced) < len(sums)
    inner = {"advantage_squared", "clipped", "sequence_log_weight_squared"}
    assert unknown("train", reduced) <= inner


def test_the_charts_of_the_report_show_figures_of_the_schema() -> None:
    drawn = {
        (one.kind, name)
        for one in PANELS
        if one.kind != "final"
        for name in ([part for part, _ in one.parts] or [one.name])
    }
    assert {pair for pair in drawn if metric_of(*pair) is None} == set()
    assert ("train", "advantage_p50") in drawn


def test_the_figures_of_the_trainer_are_in_the_schema() -> None:
    load = expert_load(torch.ones(2, 4), 4.0)
    tree = ast.parse((ROOT / "lopd/megatron/training/step_metrics.py").read_text())
    (step,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "Step" in node.name
    ]
    fields = {node.target.id for node in step.body if isinstance(node, ast.AnnAssign)}
    assert {"loss", "grad_norm"} <= fields
    health = keys_in("lopd/megatron/training/health.py", "figures")
    assert "peak_memory_gib" in health
    rank = keys_in("lopd/stages/training_rank.py", "record")
    refresh = keys_in("lopd/stages/refresh_requester.py", "after_step")
    # What the lines have anyway, and the count that the trainer takes out again.
    others = {"step", "metrics", "num_processed"}
    assert unknown("train", {*load, *fields, *health, *rank, *refresh} - others) == set()


def test_the_figures_of_a_sync_are_in_the_schema() -> None:
    names = keys_in("lopd/stages/held_out.py", "figures")
    assert "accuracy_interval" in names
    assert unknown("eval", {*names, "training_reverse_kl"}) == set()


def keys_in(path: str, function: str) -> set[str]:
    """The string keys of the dictionaries that the functions of this name write down."""
    found = [
        node
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    return {
        key.value
        for node in found
        for inner in ast.walk(node)
        if isinstance(inner, ast.Dict)
        for key in inner.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_the_page_shows_the_schema() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert "\n".join(metric_lines()) in page, (
        "copy the lines of metric_lines() into docs/metrics.md"
    )
    assert len({(one.kind, one.name) for one in METRICS}) == len(METRICS)
