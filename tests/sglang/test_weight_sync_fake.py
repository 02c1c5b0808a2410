"""The calls of a sync, against a fake server: their order, refusals, versions of SGLang, requests
under way, what goes over the wire.
"""

from __future__ import annotations

import base64
import pickletools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.config import SyncSection
from lopd.errors import EngineError
from sglang_rollout.server_side.checkpoint import tensor_shapes
from sglang_rollout.servers.weights_file import remember_weights, remembered_weights
from sglang_rollout.weight_sync import build_receiver, load_folder
from tests.models import write_qwen3_moe
from tests.sglang.weight_syncing import Named, UpdatedFake, receiver, send, tensors


@pytest.fixture
def fake(student_dir: Path) -> Any:
    with UpdatedFake() as running:
        running.model_path = str(student_dir)
        yield running


def sync(
    fake: UpdatedFake,
    template: Path,
    folder: Path,
    transport: str = "tensor",
    version: str = "v1",
    **settings: Any,
) -> None:
    send(
        receiver(transport, fake.engine(), folder, template, verify="off", **settings),
        version,
        tensors(template),
    )


ORDER = {
    "disk": ["/update_weights_from_disk"],
    "tensor": [
        *(
            "/pause_generation",
            "/flush_cache",
            "/update_weight_version",
            "/update_weights_from_tensor",
            "/flush_cache",
            "/update_weight_version",
        ),
        "/continue_generation",
    ],
}


@pytest.mark.parametrize("transport", ORDER)
def test_the_order_of_calls(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, transport: str
) -> None:
    to = receiver(transport, fake.engine(), tmp_path, student_dir, verify="off")
    to.begin("v1")
    to.receive(tensors(student_dir))
    to.commit()
    assert fake.updates == ORDER[transport]
    assert fake.weight_version == "v1"
    assert not fake.paused
    if transport == "tensor":
        assert [body["new_version"] for body in fake.paths("/update_weight_version")] == [
            "v1 (incomplete)",
            "v1",
        ]


@pytest.mark.parametrize(
    ("transport", "version", "bracketed"),
    [
        *(
            ("disk", *case)
            for case in (
                ("0.5.17", False),
                ("0.5.20.post1", False),
                ("0.5.21", True),
                ("0.6.0", True),
            )
        ),
        ("tensor", "0.5.22", True),
    ],
)
def test_newer_servers_are_told_where_an_update_begins_and_ends(
    fake: UpdatedFake,
    student_dir: Path,
    tmp_path: Path,
    transport: str,
    version: str,
    bracketed: bool,
) -> None:
    fake.version = version
    to = receiver(transport, fake.engine(), tmp_path, student_dir, verify="off")
    for step in ("v1", "v2"):
        send(to, step, tensors(student_dir), size=25)
    update = f"/update_weights_from_{transport}"
    called = [
        path
        for path in fake.updates
        if path in (update, "/begin_weight_update", "/end_weight_update")
    ]
    one = [update] * (1 if transport == "disk" else 2)
    assert (
        called == (["/begin_weight_update", *one, "/end_weight_update"] if bracketed else one) * 2
    )


@pytest.mark.parametrize(
    ("mode", "word"), [("pause", "retract"), ("keep", "in_place"), ("abort", "abort")]
)
@pytest.mark.parametrize("transport", ["disk", "tensor"])
def test_running_requests_by_choice(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, transport: str, mode: str, word: str
) -> None:
    sync(fake, student_dir, tmp_path, transport, running_requests=mode)
    assert [body["mode"] for body in fake.paths("/pause_generation")] == [word]
    assert fake.updates[-1] == "/continue_generation"
    # With flush_cache, a waiting request would end the scheduler.
    assert not any(
        body.get("flush_cache") for path, body in fake.calls if path.startswith("/update_weights")
    )


@pytest.mark.parametrize("cached", [True, False])
def test_an_update_forgets_prefixes_only_where_there_are_any(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, cached: bool
) -> None:
    """Else SGLang's scheduler may end of an assertion (issue 14062). And it is asked something
    before: then the last request's end is behind it.
    """
    fake.info["disable_radix_cache"] = not cached
    to = receiver("disk", fake.engine(), tmp_path, student_dir, verify="off")
    for version in ("v1", "v2"):
        fake.calls.clear()
        send(to, version, tensors(student_dir))
        assert [body["flush_cache"] for body in fake.paths("/update_weights_from_disk")] == [cached]
        paths = [path for path, _ in fake.calls]
        assert paths.index("/server_info") < paths.index("/update_weights_from_disk")


@pytest.mark.parametrize("mode", ["pause", "keep", "abort"])
def test_what_ended_before_the_pause_is_waited_for_before_the_version_changes(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, mode: str
) -> None:
    """SGLang answers /pause_generation while its scheduler is still in a step; what that step ends
    would be called incomplete.
    """
    sync(fake, student_dir, tmp_path, running_requests=mode)
    paths = [path for path, _ in fake.calls]
    assert (
        "/server_info"
        in paths[paths.index("/pause_generation") : paths.index("/update_weight_version")]
    )


def test_a_sync_does_not_wait_until_its_group_is_closed_but_the_next_one_does(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    to = receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off")
    detach = to._detach_transport
    may_end = threading.Event()
    closed = list[str]()

    def close() -> None:
        assert may_end.wait(60.0)
        closed.append(fake.weight_version)

    to._detach_transport = lambda: close
    send(to, "v1", tensors(student_dir))
    assert fake.weight_version == "v1"
    assert not fake.paused
    to._detach_transport = detach
    begins = threading.Thread(target=lambda: send(to, "v2", tensors(student_dir)))
    begins.start()
    begins.join(0.3)
    assert not closed
    may_end.set()
    begins.join(60.0)
    assert not begins.is_alive()
    assert closed == ["v1"]  # not under the next version
    assert fake.weight_version == "v2"


@pytest.mark.parametrize("mode", ["pause", "keep"])
def test_cached_prefixes_that_cannot_be_forgotten(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, mode: str
) -> None:
    fake.refuse["/flush_cache"] = "2 requests are running"
    with pytest.raises(
        EngineError,
        match=r"cached prefixes of the old weights.*2 requests are running.*disable_radix_cache",
    ):
        sync(fake, student_dir, tmp_path, running_requests=mode)
    assert not fake.paused
    assert fake.weight_version == "default"
    assert "/update_weights_from_tensor" not in fake.updates
    fake.info["disable_radix_cache"] = True  # nothing is cached: nothing to forget
    sync(fake, student_dir, tmp_path, running_requests=mode)
    assert fake.weight_version == "v1"


@pytest.mark.parametrize(
    ("path", "transport"),
    [
        ("/update_weights_from_disk", "disk"),
        ("/pause_generation", "tensor"),
        ("/update_weights_from_tensor", "tensor"),
        ("/continue_generation", "tensor"),
        ("/init_weights_update_group", "distributed"),
    ],
)
def test_a_refusal_gives_the_servers_message(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, path: str, transport: str
) -> None:
    fake.refuse[path] = "not today"
    with pytest.raises(EngineError, match=r"refused with HTTP 400.*not today"):
        sync(fake, student_dir, tmp_path, transport, timeout_s=60.0)
    assert fake.weight_version in ("default", "v1 (incomplete)", "v1")
    del fake.refuse[path]
    if transport != "distributed":  # the fake has no ranks to broadcast to
        sync(fake, student_dir, tmp_path, transport, version="v2")
        assert fake.weight_version == "v2"


def test_after_a_failure_in_the_middle_nobody_is_answered(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    fake.refuse["/update_weights_from_tensor"] = "no"
    with pytest.raises(EngineError, match="no"):
        sync(fake, student_dir, tmp_path)
    assert fake.paused
    assert fake.weight_version == "v1 (incomplete)"
    assert fake.updates[-1] == "/abort_request"  # who waits is told


def test_half_an_update_asks_the_owner_for_a_restart(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    weights_file = tmp_path / "weights.json"
    section = SyncSection(transport="tensor", verify="off", timeout_s=60.0)
    to = build_receiver(
        section,
        [fake.engine()],
        folder=tmp_path,
        template_dir=student_dir,
        weights_file=weights_file,
    )
    with pytest.raises(EngineError, match="came twice"):
        send(to, "v1", [*tensors(student_dir), *tensors(student_dir)], size=9)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json.restart"]


def test_a_sync_without_a_folder_is_remembered_as_one(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    """By a receiver alone. A server that comes back then has its first weights, not the older
    folder's under a version that nobody asks for; a sync that fails changes nothing of that.
    """
    weights_file = tmp_path / "weights.json"
    remember_weights(weights_file, tmp_path / "v1", "v1")
    to = build_receiver(
        SyncSection(transport="tensor", verify="off"),
        [fake.engine()],
        folder=tmp_path,
        template_dir=student_dir,
        weights_file=weights_file,
    )
    with pytest.raises(EngineError, match="never came"):
        send(to, "v2", tensors(student_dir)[:9])
    assert remembered_weights(weights_file) == (tmp_path / "v1", "v1")
    send(to, "v3", tensors(student_dir))
    assert remembered_weights(weights_file) is None
    assert '"v3"' in weights_file.read_text()


def test_a_disk_sync_is_remembered_before_the_former_goes(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    weights_file = tmp_path / "weights.json"
    folder = tmp_path / "sync"
    to = build_receiver(
        SyncSection(verify="off"),
        [fake.engine()],
        folder=folder,
        template_dir=student_dir,
        weights_file=weights_file,
    )
    for version in ("v1", "v2"):
        send(to, version, tensors(student_dir))
        assert remembered_weights(weights_file) == (folder / version, version)
        assert [path.name for path in folder.iterdir()] == [version]
    assert tensor_shapes(folder / "v2") == tensor_shapes(student_dir)
    assert (folder / "v2" / "config.json").read_bytes() == (
        student_dir / "config.json"
    ).read_bytes()


def test_a_version_begun_and_never_committed_is_forgotten(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    to = receiver("disk", fake.engine(), tmp_path, student_dir, verify="off")
    to.begin("v1")
    to.receive(tensors(student_dir)[:3])
    send(to, "v2", tensors(student_dir))
    assert fake.weight_version == "v2"
    assert [path.name for path in tmp_path.iterdir()] == ["v2"]


def test_a_server_that_accepts_and_reports_another_version_is_not_believed(
    fake: UpdatedFake, student_dir: Path
) -> None:
    engine = fake.engine()
    call = fake.engine().call

    def stubborn(method: str, path: str, *rest: Any, **named: Any) -> Any:
        answer = call(method, path, *rest, **named)
        return {**answer, "weight_version": "default"} if path == "/model_info" else answer

    engine.call = stubborn  # type: ignore[method-assign]
    with pytest.raises(
        EngineError, match="reports weight version 'default' after the update to 'v1'"
    ):
        load_folder([engine], student_dir, "v1")


@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_a_server_of_another_architecture_is_sent_nothing(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path, transport: str
) -> None:
    """SGLang itself would say success to experts of another width, and serve garbage."""
    fake.model_path = str(write_qwen3_moe(tmp_path / "other", moe_intermediate_size=64))
    with pytest.raises(EngineError, match=r"tensor .*experts.* has shape .* in the served model"):
        sync(fake, student_dir, tmp_path / "sync", transport)
    with pytest.raises(EngineError, match=r"tensor .*experts.* has shape .* in the served model"):
        load_folder([fake.engine()], student_dir, "v1")
    assert not fake.updates


def test_a_server_of_copies_takes_folders_only(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    fake.info["dp_size"] = 2
    with pytest.raises(
        EngineError,
        match=r"2 data-parallel copies or pipeline stages accepts weights only from a folder",
    ):
        sync(fake, student_dir, tmp_path)
    sync(fake, student_dir, tmp_path, "disk")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transport": "tensor", "running_requests": "finish"}, 'only with transport = "disk"'),
        ({"delta": True}, "a folder must hold every tensor"),
    ],
    ids=["finish-in-place", "delta-by-disk"],
)
def test_what_a_transport_cannot_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncSection.model_validate(fields)


def test_what_is_pickled_names_torch_and_nothing_else(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    sync(fake, student_dir, tmp_path)
    texts = set[str]()
    opcodes = set[str]()
    num_bytes = 0
    for body in fake.paths("/update_weights_from_tensor"):
        for payload in body["serialized_named_tensors"]:
            data = base64.b64decode(payload)
            num_bytes += len(data)
            for opcode, argument, _ in pickletools.genops(data):
                opcodes.add(opcode.name)
                texts.update([argument] if isinstance(argument, str) else [])
    assert "STACK_GLOBAL" in opcodes  # names of code come from the texts
    assert not opcodes & {
        "GLOBAL",
        "INST",
        "OBJ",
        "BUILD",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "BINPERSID",
    }
    assert texts - {name for name, _ in tensors(student_dir)} == {
        *("torch", "Tensor", "Size", "float32", "torch.storage", "UntypedStorage"),
        *(
            "torch.multiprocessing.reductions",
            "rebuild_tensor",
            "rebuild_typed_storage",
            "rebuild_storage_filename",
        ),
    }
    assert num_bytes < 1000 * len(tensors(student_dir))  # handles, not values


# ---- only what has changed ----


def delta_receiver(fake: UpdatedFake, student_dir: Path, tmp_path: Path) -> Any:
    return receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off", delta=True)


def test_only_changed_tensors_are_sent_again(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    to = delta_receiver(fake, student_dir, tmp_path)
    named = tensors(student_dir)
    send(to, "v1", named)
    assert to.report.sent_tensors == len(named)
    changed: Named = [
        (name, tensor + (name == "model.norm.weight") * torch.finfo(torch.float32).eps)
        for name, tensor in named
    ]
    send(to, "v2", changed)
    assert (to.report.sent_tensors, to.report.num_tensors, to.report.sent_bytes) == (
        1,
        len(named),
        64 * 4,
    )
    send(to, "v3", changed)
    assert to.report.sent_tensors == 0
    assert fake.weight_version == "v3"


def test_everything_is_sent_to_a_server_that_came_back(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    to = delta_receiver(fake, student_dir, tmp_path)
    named = tensors(student_dir)
    send(to, "v1", named)
    fake.weight_version = "default"
    send(to, "v2", named)
    assert to.report.sent_tensors == len(named)


def test_a_failed_sync_makes_the_next_one_whole(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    to = delta_receiver(fake, student_dir, tmp_path)
    named = tensors(student_dir)
    send(to, "v1", named)
    with pytest.raises(EngineError, match="never came"):
        send(to, "v2", [(name, tensor * 2) for name, tensor in named[1:]])
    send(to, "v3", named)
    assert to.report.sent_tensors == len(named)
