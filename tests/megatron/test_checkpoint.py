"""Checkpoints: a killed training goes on bit for bit, or under another layout to rounding; what is
half written or damaged is not used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.limits import apart, within
from tests.megatron.checkpoint_cases import (
    CASES,
    CROSSINGS,
    LAST_STEP,
    SAVED_AT,
    TO_ONE_RANK,
    on_one_rank,
    resume_and_compare,
    save_and_die,
)
from tests.megatron.launch import RanksFailed, run_ranks
from tests.megatron.test_launch import eventually_none, mark_of
from tests.models import write_qwen3_dense, write_qwen3_moe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a training that was killed one step after it saved."""
    root = tmp_path_factory.mktemp("checkpoints")
    # It becomes 520 rows with padding, so that every change of layout cuts them anew too.
    write_qwen3_moe(root / "model", vocab_size=515)
    write_qwen3_dense(root / "dense")
    with pytest.raises(RanksFailed, match="all saved, one step lost"):
        run_ranks(
            save_and_die,
            2,
            model=str(root / "model"),
            dense=str(root / "dense"),
            folder=str(root),
            env={"LOPD_CASE": mark_of(root)},
        )
    return root


@pytest.fixture(scope="module")
def kept(folder: Path) -> list[str]:
    """What the killed training left, before anything is resumed."""
    return sorted(path.name for path in (folder / "data").iterdir())


@pytest.fixture(scope="module")
def one(folder: Path, kept: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(
        on_one_rank, 1, model=str(folder / "model"), folder=str(folder)
    )[0]
    return result


@pytest.fixture(scope="module")
def results(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(
        resume_and_compare,
        2,
        model=str(folder / "model"),
        dense=str(folder / "dense"),
        folder=str(folder),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_bit_for_bit_the_unbroken_one(
    case: str, results: list[dict[str, Any]]
) -> None:
    for ranks in results:
        found = ranks[case]
        for figures in ("loss", "grad_norm", "lr"):
            assert found["resumed"][figures] == found["unbroken"][figures][SAVED_AT:]
        assert len(found["resumed"]["loss"]) == LAST_STEP - SAVED_AT
        assert found["resumed weights"] == found["unbroken weights"]
        assert found["state"] == {"cursor": SAVED_AT, "note": case}


# ---- another layout ----


LIMIT = 2e-6  # 3.8e-7 seen


def deviation(resumed: dict[str, Any], unbroken: dict[str, Any]) -> float:
    """Largest relative difference of loss and gradient norm over the steps after the checkpoint."""
    pairs = [
        pair
        for key in ("loss", "grad_norm")
        for pair in zip(resumed[key], unbroken[key][SAVED_AT:], strict=True)
    ]
    assert len(pairs) == 2 * (LAST_STEP - SAVED_AT)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(("saved", "layout"), CROSSINGS)
def test_a_training_goes_on_under_another_layout(
    saved: str, layout: str, one: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    unbroken = one["unbroken"] if saved == "one rank" else results[0][saved]["unbroken"]
    for ranks in results:
        within(deviation(ranks[f"{saved} -> {layout}"], unbroken), LIMIT)
    assert results[0][f"{saved} -> {layout}"]["cursor"] == SAVED_AT


@pytest.mark.parametrize("saved", TO_ONE_RANK)
def test_a_training_of_two_ranks_goes_on_on_one(
    saved: str, one: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    within(deviation(one[saved], results[0][saved]["unbroken"]), LIMIT)


def test_a_tied_embedding_that_a_pipeline_holds_twice_has_one_state(
    results: list[dict[str, Any]],
) -> None:
    within(deviation(results[0]["tied -> tied pipeline"], results[0]["tied"]), LIMIT)


def test_optimizer_state_lost_on_the_way_would_be_noticed(results: list[dict[str, Any]]) -> None:
    forgetful = results[0]["without moments, another layout"]
    apart(deviation(forgetful, results[0]["data"]["unbroken"]), 1e-4)


def test_through_another_layout_and_back_is_bit_for_bit(results: list[dict[str, Any]]) -> None:
    """In bfloat16, whose float32 weights only the optimizer has: between layouts even its rounding
    would show.
    """
    unbroken = results[0]["pipeline, bfloat16"]["unbroken"]
    for figures in ("loss", "grad_norm"):
        assert results[0]["there and back"][figures] == unbroken[figures][SAVED_AT:]


def test_another_layout_is_told(results: list[dict[str, Any]]) -> None:
    (note,) = results[0]["data -> tensor"]["notes"]
    assert note == (
        "checkpoint step-000003 is of another layout (tensor 1 -> 2): "
        "weights and optimizer state continue, equal up to rounding"
    )
    assert results[1]["data -> tensor"]["notes"] == [], "once, on rank 0"


# ---- what is kept, and what is not used ----


def test_lost_optimizer_state_would_be_noticed(results: list[dict[str, Any]]) -> None:
    without = results[0]["without moments"]["loss"]
    whole = results[0]["data"]["resumed"]["loss"]
    assert without[0] == whole[0], "the weights are the same"
    assert without[1:] != whole[1:]


def test_the_last_two_are_kept_and_the_newest_is_named(folder: Path, kept: list[str]) -> None:
    assert kept == ["latest", "step-000002", "step-000003"]
    assert (folder / "data" / "latest").read_text() == "step-000003\n"


def test_nothing_outlives_a_rank_that_was_killed_after_saving(folder: Path) -> None:
    """Megatron's own save starts a manager process that would."""
    assert eventually_none(mark_of(folder))


def test_what_is_ours_in_a_checkpoint_is_json(folder: Path, kept: list[str]) -> None:
    names = {path.name for path in (folder / "data" / "step-000003").iterdir()}
    assert {"trainer.json", "rng-00000.json", "rng-00001.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".distcp", ".pt", ""}, names


def test_a_damaged_checkpoint_is_set_aside_in_a_line_and_leftovers_are_removed(
    results: list[dict[str, Any]],
) -> None:
    found = results[0]["damaged"]
    assert found["state"] == {"cursor": 2, "note": "data"}
    (note,) = found["notes"]
    told = (
        r"checkpoint step-000003 is damaged \((.+)\) and set aside as step-000003\.damaged; "
        "the training continues from step-000002"
    )
    assert re.fullmatch(told, note), note
    assert re.search(r"\(__\d_\d\.distcp: \d+ bytes instead of \d+\)", note)
    assert found["left"] == ["latest", "step-000002", "step-000003.damaged"]
    assert found["latest"] == "step-000002\n"
    assert found["later"] == ["latest", "step-000002", "step-000003"], (
        "the next checkpoint takes its place"
    )


def test_a_flipped_bit_in_any_file_is_noticed_and_its_file_named(
    results: list[dict[str, Any]],
) -> None:
    for ranks in results:
        flips = ranks["damaged"]["flips"]
        assert {
            ".metadata",
            "common.pt",
            "trainer.json",
            "rng-00001.json",
            "__0_0.distcp",
            "__1_0.distcp",
        } <= set(flips)
        for name, problem in flips.items():
            assert problem.startswith(f"{name}: "), problem
        assert ranks["damaged"]["whole"] is None, "without the flip nothing is wrong"


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew_silently(
    results: list[dict[str, Any]],
) -> None:
    for ranks in results:
        refused = ranks["damaged"]["both"]
        assert (
            "every checkpoint is damaged: step-000003/__0_0.distcp: checksum differs; "
            "step-000002/__0_0.distcp: checksum differs" in refused
        )
        assert "remedy: remove this folder: the training then starts from step 0" in refused


def test_another_dtype_is_refused_by_name(results: list[dict[str, Any]]) -> None:
    assert (
        "the checkpoint was written with dtype = float32; limit: exactly dtype = bfloat16"
        in results[0]["refused"]
    )


def test_a_full_disk_loses_nothing(results: list[dict[str, Any]]) -> None:
    """And a checkpoint can be written once there is room."""
    for ranks in results:
        assert "checkpoint cannot be written" in ranks["no room"]["refused"]
        assert ranks["no room"]["nothing published"]
        assert ranks["no room"]["then"] == {"cursor": 0}


# ---- in the background ----


def test_training_goes_on_while_a_checkpoint_is_written(results: list[dict[str, Any]]) -> None:
    for ranks in results:
        assert ranks["background"]["while it is written"] == ["step-000003.tmp"]
        assert ranks["background"]["then"] == ["latest", "step-000003"]


def test_what_is_written_in_the_background_is_the_step_it_was_saved_at(
    results: list[dict[str, Any]],
) -> None:
    for ranks in results:
        found = ranks["background"]
        assert found["state"] == {"cursor": SAVED_AT}
        assert found["resumed"] == found["unbroken"]
        assert len(found["resumed"]["loss"]) == 2


def test_weights_that_change_while_they_are_written_would_be_noticed(
    results: list[dict[str, Any]],
) -> None:
    found = results[0]["background, not copied"]
    assert found["resumed"]["loss"] != found["unbroken"]["loss"]
