"""A server that dies or hangs is started again with the newest weights, and nobody loses an answer;
one that dies again and again stops the stage.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lopd.errors import EngineError
from sglang_rollout.requests.client import OtherWeights, SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers import supervision
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.supervision import Activity, Watcher
from sglang_rollout.servers.weights_file import (
    ask_for_restart,
    ask_to_end,
    num_starts,
    remember_unsaved_weights,
    remember_weights,
    remembered_weights,
)
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import sampling, sampling_requests, settings
from tests.sglang.weight_syncing import receiver, send, tensors

# ---- the newest weights ----


def test_the_newest_weights_are_remembered_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    assert remembered_weights(file) is None
    for version in ("step-1", "step-2"):
        remember_weights(file, tmp_path / version, version)
        assert remembered_weights(file) == (tmp_path / version, version)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]


@pytest.mark.parametrize("content", ["", "[1]", '{"version": "1"}'])
def test_a_damaged_memory_is_an_error_not_the_first_weights(tmp_path: Path, content: str) -> None:
    (tmp_path / "weights.json").write_text(content)
    with pytest.raises(EngineError, match="newest weights"):
        remembered_weights(tmp_path / "weights.json")


# ---- when it is given up, without a server ----


class Frail:
    """A server that dies when told; fails_to_start: how many starts fail after that."""

    def __init__(self, folder: Path) -> None:
        self.name = "student"
        self.log = folder / "log"
        self.weights_file = folder / "weights.json"
        self.activity = Activity()
        self.replica = self.num_starts = self.num_ends = self.fails_to_start = 0
        self.is_alive = self.is_responding = self.is_reachable = True

    def alive(self) -> bool:
        return self.is_alive

    def responds(self) -> bool:
        return self.is_responding

    def reachable(self) -> bool:
        return self.is_reachable

    def end_process(self) -> None:
        self.num_ends += 1
        self.is_alive = False

    def relaunch(self) -> None:
        self.num_starts += 1
        if self.fails_to_start:
            self.fails_to_start -= 1
            raise EngineError("it did not start: no memory")
        self.is_alive = self.is_responding = self.is_reachable = True

    def death(self) -> EngineError:
        return EngineError("it died; its log ends: the last line", where=str(self.log))


@pytest.fixture
def frail(tmp_path: Path) -> Frail:
    return Frail(tmp_path)


def watching(
    server: Frail, restarts: int, *, hang_timeout_s: float = 60, tell: list[str] | None = None
) -> Watcher:
    watcher = Watcher(
        server,
        restarts=restarts,
        hang_timeout_s=hang_timeout_s,
        tell=tell.append if tell is not None else None,
    )
    watcher.start()
    return watcher


def until(what: str, condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def die(server: Frail, watcher: Watcher) -> None:
    restarts = watcher.num_restarts
    server.is_alive = False
    until(
        "neither restarted nor given up",
        lambda: watcher.num_restarts > restarts or watcher.failure is not None,
    )


def test_three_deaths_in_a_row_are_the_end(frail: Frail) -> None:
    told: list[str] = []
    watcher = watching(frail, 2, tell=told)
    for death in range(3):
        assert watcher.failure is None, death
        die(frail, watcher)
    assert watcher.failure is not None
    assert (
        "died 3 times in a row without answering a request; at last: it died; "
        "its log ends: the last line"
    ) in str(watcher.failure)
    assert "sglang.restarts = 2" in str(watcher.failure)
    assert (frail.num_starts, len(told)) == (2, 2)
    assert not frail.alive()


@pytest.mark.parametrize("progress", ["answer", "weights"])
def test_an_answer_or_new_weights_between_deaths_begin_the_count_anew(
    frail: Frail, progress: str
) -> None:
    watcher = watching(frail, 2)
    for death in range(7):
        if progress == "answer":
            frail.activity.begin()
            frail.activity.end(answered=True)
        else:
            remember_weights(frail.weights_file, frail.log.parent, f"step-{death}")
            os.utime(frail.weights_file, (death, death))
        die(frail, watcher)
    assert (frail.num_starts, watcher.num_restarts, watcher.failure) == (7, 7, None)
    watcher.stop()
    watcher.join()


def test_failed_requests_are_no_progress(frail: Frail) -> None:
    watcher = watching(frail, 2)
    for _ in range(3):
        frail.activity.begin()
        frail.activity.end(answered=False)
        die(frail, watcher)
    assert watcher.failure is not None


def test_a_start_that_fails_is_a_death_too(frail: Frail) -> None:
    frail.fails_to_start = 99
    watcher = watching(frail, 2)
    die(frail, watcher)
    assert "at last: it did not start: no memory" in str(watcher.failure)
    assert frail.num_starts == 2


def test_a_start_on_a_full_disk_is_a_death_too(
    frail: Frail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that watches lives on and says why; before, nobody would have heard of it."""

    def relaunch() -> None:
        raise OSError(28, "No space left on device")

    watcher = watching(frail, 2)
    monkeypatch.setattr(frail, "relaunch", relaunch)
    die(frail, watcher)
    assert "died 3 times in a row" in str(watcher.failure)
    assert (
        "at last: the student server cannot be started again ([Errno 28] No space left on device)"
        in str(watcher.failure)
    )


def test_without_restarts_a_death_is_the_end_at_once(frail: Frail) -> None:
    watcher = watching(frail, 0)
    die(frail, watcher)
    assert str(watcher.failure).startswith(f"{frail.log}: it died; its log ends: the last line")
    assert frail.num_starts == 0


def test_clients_of_other_processes_are_told_that_it_is_the_end(frail: Frail) -> None:
    """They would wait for a server that nobody starts again: as long as outage_timeout_s."""
    elsewhere = SGLangEngine(
        "http://127.0.0.1:9", "key", settings(outage_timeout_s=300), weights_file=frail.weights_file
    )
    elsewhere.check_alive()
    watcher = watching(frail, 1)
    die(frail, watcher)
    elsewhere.check_alive()
    die(frail, watcher)
    until("told", lambda: frail.weights_file.with_name("weights.json.failure").exists())
    with pytest.raises(
        EngineError,
        match=(
            r"log: the student server died 2 times in a row .* its log ends: the last line; "
            r"limit: at most sglang.restarts = 1"
        ),
    ):
        list(elsewhere.generate(sampling_requests(2), sampling()))
    with pytest.raises(EngineError, match="died 2 times in a row"):
        elsewhere.model_info()
    frail.is_alive = True
    next_run = watching(frail, 1)
    elsewhere.check_alive()
    next_run.stop()
    next_run.join()


def test_silence_alone_is_no_death_but_silence_and_no_sign_of_health_is(frail: Frail) -> None:
    watcher = watching(frail, 2, hang_timeout_s=0.05)
    frail.is_responding = False
    time.sleep(0.5)  # nothing is open: nobody asks after its health
    assert frail.num_starts == 0
    frail.is_responding = True
    frail.activity.begin()
    time.sleep(0.5)  # open and silent, but healthy
    assert frail.num_starts == 0
    frail.is_responding = False
    until("a hanging server is started again", lambda: frail.num_starts == 1)
    watcher.stop()
    watcher.join()
    assert frail.num_starts == 1


def test_a_main_process_that_answers_does_not_hide_a_scheduler_that_does_not(frail: Frail) -> None:
    watcher = watching(frail, 2, hang_timeout_s=0.25)
    time.sleep(0.1)
    frail.is_responding = False
    frail.activity.begin()  # between two looks at the main process
    until("a hanging scheduler is found", lambda: frail.num_starts == 1)
    watcher.stop()
    watcher.join()


def test_a_frozen_server_is_found_also_where_others_wait_for_it(frail: Frail) -> None:
    watcher = watching(frail, 2, hang_timeout_s=0.05)
    frail.is_reachable = False
    until("a frozen server is started again", lambda: frail.num_starts == 1)
    watcher.stop()
    watcher.join()


def test_any_process_can_ask_for_a_restart(frail: Frail) -> None:
    ask_for_restart(frail.weights_file)  # of a former run: means nothing
    told: list[str] = []
    watcher = watching(frail, 2, tell=told)
    time.sleep(0.3)
    assert frail.num_starts == 0
    ask_for_restart(frail.weights_file)
    until("started again", lambda: watcher.num_restarts == 1)
    time.sleep(0.3)
    assert (frail.num_starts, told) == (
        1,
        ["a restart of the student server was requested; starting it again"],
    )
    watcher.stop()
    watcher.join()


def test_who_asks_for_the_end_of_a_process_says_of_which(frail: Frail) -> None:
    """One that has been started again meanwhile is not ended for what its predecessor did."""
    ask_to_end(frail.weights_file, 0, 1)  # of a former run: means nothing
    watcher = watching(frail, 9)
    assert num_starts(frail.weights_file, 0) == 1
    die(frail, watcher)
    assert num_starts(frail.weights_file, 0) == 2
    ask_to_end(frail.weights_file, 0, 1)  # it is dead already
    ask_to_end(frail.weights_file, 1, 2)  # another server
    die(frail, watcher)
    ask_to_end(frail.weights_file, 0, 3)
    until("ended and started again", lambda: watcher.num_restarts == 3)
    die(frail, watcher)
    assert (
        frail.num_starts,
        num_starts(frail.weights_file, 0),
        num_starts(frail.weights_file, 1),
    ) == (4, 5, 0)
    watcher.stop()
    watcher.join()


# ---- the real one ----


@pytest.fixture(scope="module")
def restarted(
    student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    log = tmp_path_factory.mktemp("restarted") / "server.log"
    with SGLangServer(
        student_dir, settings(restarts=2, context_length=256, max_in_flight=16), log=log
    ) as running:
        yield running


def kill(server: SGLangServer) -> None:
    os.killpg(server.group_id, signal.SIGKILL)


def scores_of(engine: SGLangEngine) -> dict[tuple[str, int], np.ndarray]:  # type: ignore[type-arg]
    items = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids[:6], r.prompt_ids[6:])
        for r in sampling_requests(8)
    ]
    return {
        score.key: score.teacher_logprobs for score in engine.score(items, vocab_size=VOCAB_SIZE)
    }


def test_a_restarted_server_has_the_newest_weights_for_clients_of_any_process(
    restarted: SGLangServer, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    owner = SGLangEngine(restarted.url, restarted.api_key, restarted.settings, server=restarted)
    # A trainer's rank has an engine like this: without a handle on the server.
    elsewhere = SGLangEngine(restarted.url, restarted.api_key, restarted.settings)
    first = scores_of(elsewhere)
    address = (restarted.url, restarted.api_key, restarted.num_restarts + 1)
    update_weights_from_disk(owner, other_dir, version="step-7")
    newest = scores_of(elsewhere)
    kill(restarted)
    again = scores_of(elsewhere)  # sent to a server that is not there
    # Clients may reach the server a moment before the restart is counted.
    until("the restart is counted", lambda: restarted.num_restarts == address[2])
    assert (restarted.url, restarted.api_key, restarted.num_restarts) == address
    assert elsewhere.model_info()["weight_version"] == "step-7"
    for key, logprobs in again.items():
        np.testing.assert_array_equal(logprobs, newest[key])
        assert not np.allclose(logprobs, first[key], atol=1e-3)
    # This goes into the newly started server.
    send(receiver("disk", elsewhere, tmp_path, student_dir), "step-8", tensors(student_dir))
    assert elsewhere.model_info()["weight_version"] == "step-8"
    for key, logprobs in scores_of(elsewhere).items():
        np.testing.assert_array_equal(logprobs, first[key])


def test_a_server_that_hangs_is_started_again_and_weights_that_were_in_no_folder_are_missed(
    restarted: SGLangServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The patience is short only while the server is stopped: one that lives must not be taken for
    one that hangs, however slow the machine.
    """
    engine = SGLangEngine(restarted.url, restarted.api_key, restarted.settings, server=restarted)
    to = receiver("tensor", engine, tmp_path, student_dir)
    params = sampling(max_new_tokens=4)
    send(to, "step-9", tensors(other_dir))
    remember_unsaved_weights(restarted.weights_file, "step-9")
    wanted = {
        response.key: response.token_ids.tolist()
        for response in engine.generate(sampling_requests(4), params, version="step-9")
    }
    restarts = restarted.num_restarts
    relaunch = restarted.relaunch
    os.killpg(restarted.group_id, signal.SIGSTOP)
    with monkeypatch.context() as patch:

        def relaunch_with_patience() -> None:
            patch.undo()
            relaunch()

        patch.setattr(restarted, "relaunch", relaunch_with_patience)
        patch.setattr(
            restarted, "settings", restarted.settings.model_copy(update={"hang_timeout_s": 0.5})
        )
        patch.setattr(restarted._watcher, "_hang_timeout_s", 0.5)
        patch.setattr(supervision, "_FAILED_PROBES", 1)
        answers: list[object] = []
        reader = threading.Thread(
            target=lambda: answers.extend(
                engine.generate(sampling_requests(4), sampling(max_new_tokens=4))
            )
        )
        reader.start()
        reader.join(timeout=240)
    assert not reader.is_alive()
    until("the restart is counted", lambda: restarted.num_restarts > restarts)
    assert (len(answers), restarted.num_restarts) == (4, restarts + 1)
    with pytest.raises(
        OtherWeights, match="a response has the weight version default, but step-9 was requested"
    ):
        list(engine.generate(sampling_requests(4), params, version="step-9"))
    send(to, "step-9", tensors(other_dir))
    assert {
        response.key: response.token_ids.tolist()
        for response in engine.generate(sampling_requests(4), params, version="step-9")
    } == wanted


@pytest.mark.slow
def test_three_deaths_of_a_real_server_in_a_row_are_the_end(
    student_dir: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    with SGLangServer(
        student_dir, settings(restarts=2), log=tmp_path / "server.log", tell=told.append
    ) as server:
        engine = SGLangEngine(server.url, server.api_key, server.settings, server=server)
        for death in range(3):
            until(
                "it runs",
                lambda death=death: server.num_restarts == death and server.ready(),
                seconds=240,
            )  # type: ignore[misc]
            assert server._watcher.failure is None
            with server.log.open("a") as log:
                log.write(f"RuntimeError: cause number {death}\n")
            kill(server)
            until(
                "its death is noticed",
                lambda death=death: len(told) > death or server._watcher.failure is not None,
            )  # type: ignore[misc]
        until("it is given up", lambda: server._watcher.failure is not None)
        for attempt in (
            lambda: list(engine.generate(sampling_requests(4), sampling())),
            engine.model_info,
        ):
            with pytest.raises(
                EngineError, match="died 3 times in a row without answering a request; at last: "
            ) as caught:
                attempt()
            assert "its log ends: RuntimeError: cause number 2" in str(caught.value)
            assert "cause number 1" not in str(caught.value)
            assert "sglang.restarts = 2" in str(caught.value)
        assert (server.num_restarts, len(told), server.alive()) == (2, 2, False)
