"""Weights into a real server: the same contract for every transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.weight_sync import disk, load_folder
from tests.sglang.conftest import sampling, sampling_requests
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import TRANSPORTS, Named, receiver, send, tensors, worst_difference


@pytest.fixture
def restored(engine: SGLangEngine, student_dir: Path) -> Iterator[SGLangEngine]:
    """The shared server, with its first weights again afterwards."""
    yield engine
    load_folder([engine], student_dir, "default")


def version(engine: SGLangEngine) -> str:
    return str(engine.model_info()["weight_version"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_new_weights_are_served_from_commit_on(
    transport: str, restored: SGLangEngine, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    to = receiver(transport, restored, tmp_path / "sync", student_dir)
    for name, folder in (("step-4", other_dir), ("step-8", student_dir)):
        send(to, name, tensors(folder), size=7)
        assert version(restored) == name
    named = tensors(other_dir)
    to.begin("step-12")
    to.receive(named[:9])
    if transport == "disk":  # the others hold requests back: nobody is answered with a mixture
        assert version(restored) == "step-8"
        assert worst_difference(restored, student_dir) <= MAX_DIFFERENCE
    else:
        assert version(restored) == "step-12 (incomplete)"
    to.receive(named[9:])
    to.commit()
    assert version(restored) == "step-12"
    assert worst_difference(restored, other_dir) <= MAX_DIFFERENCE
    # Control: the old weights are gone.
    assert worst_difference(restored, student_dir) > 100 * MAX_DIFFERENCE
    assert {
        response.weight_version for response in restored.generate(sampling_requests(3), sampling())
    } == {"step-12"}
    report = to.report
    assert (report.num_tensors, report.sent_tensors, report.verified_tensors) == (len(named),) * 3
    assert report.num_bytes == sum(tensor.numel() * 4 for _, tensor in named)
    if transport == "disk":
        assert [path.name for path in (tmp_path / "sync").iterdir()] == ["step-12"]


VICTIM = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_weight_that_arrives_changed_is_named(
    transport: str,
    restored: SGLangEngine,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to: Any = receiver(transport, restored, tmp_path / "sync", student_dir)

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if name == VICTIM:
            tensor[3, 5] = -tensor[3, 5]  # one bit
        return tensor

    if transport == "disk":
        save = disk.save_file
        monkeypatch.setattr(
            disk,
            "save_file",
            lambda named, *rest, **more: save(
                {n: changed(n, t) for n, t in named.items()}, *rest, **more
            ),
        )
    else:
        original = to._send
        to._send = lambda bucket: original(
            [(name, changed(name, tensor)) for name, tensor in bucket]
        )
    with pytest.raises(
        EngineError, match=rf"1 of \d+ tensors differ from what was sent: {VICTIM} \(other values\)"
    ):
        send(to, "flipped", tensors(student_dir))
    assert version(restored) == (
        "flipped (not verified)" if transport == "disk" else "flipped (incomplete)"
    )
    send(
        receiver(transport, restored, tmp_path / "sync", student_dir, verify="off"),
        "whole",
        tensors(student_dir),
    )
    assert version(restored) == "whole"


WRONG: list[tuple[Callable[[Named], Named], str]] = [
    (lambda named: [(name, tensor[:-1]) for name, tensor in named], "has shape"),
    (
        lambda named: [("model.extra", torch.zeros(2)), *named],
        "model.extra is not in the served model",
    ),
    (lambda named: [*named, named[0]], "came twice"),
    (lambda named: named[1:], "1 tensors never came, lm_head.weight first"),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wrong_tensors_are_refused_and_never_served(
    transport: str, restored: SGLangEngine, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    to = receiver(transport, restored, tmp_path / "sync", student_dir)
    send(to, "good", tensors(student_dir))
    for change, message in WRONG:
        with pytest.raises(EngineError, match=message):
            send(to, "bad", change(tensors(other_dir)), size=7)
        assert version(restored) in (
            ("good",) if transport == "disk" else ("good", "bad (incomplete)")
        )
    # Half of the other weights are in place: nobody gets an answer until a sync succeeds.
    if transport != "disk":
        assert version(restored) == "bad (incomplete)"
        send(to, "again", tensors(student_dir))
    assert worst_difference(restored, student_dir) <= MAX_DIFFERENCE
