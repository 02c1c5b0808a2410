"""lopd watch and lopd show: a run as it is now, and what its models answered."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lopd import pipeline
from lopd.cache.newest import last_rows
from lopd.config import load_config
from lopd.errors import ArtifactError
from lopd.report.held_out import write_transcripts
from lopd.report.token_pieces import pieces_of
from lopd.tasks.tokenizer import token_texts
from tests.stand_ins import Result, StandIns, command, contents, write_project

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "100")
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run is complete by stand-ins, with other verdicts for two of its models."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        StandIns().install(patch)
        pipeline.run(load_config(write_project(folder)))
    evaluate = folder / "run/evaluate"
    for name, right in (("sft", (1, 3)), ("distilled", (1, 2))):
        path = evaluate / f"verdicts-{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [{**row, "right": index in right} for index, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return folder


@pytest.fixture
def running(project: Path, tmp_path: Path) -> Path:
    """The same run in the middle of distill."""
    run = Path(shutil.copytree(project / "run", tmp_path / "run"))
    shutil.rmtree(run / "evaluate")
    shutil.rmtree(run / "export")
    (run / "distill/manifest.json").unlink()
    (run / "distill/job.json").write_text('{"num_steps": 16}')
    rows = [
        {"right": True, "reason": "", "found": "7"},
        {"right": False, "reason": "no answer", "found": ""},
    ]
    about = {"finish_reason": "length", "response": "I \x1b[31mthink", "response_len": 3}
    asked = {"messages": [{"role": "user", "content": "1+6=?"}], "prompt_id": "p"}
    write_transcripts(run / "distill", 2, [{**about, **asked, **row} for row in rows])
    return run


def test_a_frame_of_a_run_that_trains(lopd: Callable[..., Result], running: Path) -> None:
    before = contents(running)
    shown = lopd("watch", running, "--once").succeeded().out
    assert "stage 5 of 7: distill  step 2 of 16" in shown
    assert "no process of this machine runs it" in shown
    assert "evaluate (absent)" in shown
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("loss")] == [
        ["loss", "1.0000", "0.5000"]
    ]
    assert "█▁" in shown
    assert "right, cut off: 1+6=?" in shown
    assert "wrong (no answer), cut off: 1+6=?" in shown
    assert "\x1b" not in shown
    assert "I ␛[31mthink" in shown
    assert contents(running) == before, "nothing of the run is written"


def test_a_run_that_is_done_and_its_toml_file(lopd: Callable[..., Result], project: Path) -> None:
    shown = lopd("watch", project / "config.toml", "--once").succeeded().out
    assert "7 of 7 stages are done" in shown
    assert "distilled student" in shown
    assert "newest responses of evaluate/answers-distilled" in shown
    # Without a terminal, one line for a run that is done.
    assert lopd("watch", project / "run").succeeded().out == "7 of 7 stages are done  loss 0.5000\n"


def test_status_says_that_a_command_runs_now(lopd: Callable[..., Result], project: Path) -> None:
    config = project / "config.toml"
    lock = project / "run/.lock"
    lock.write_text(f"{os.getpid()}\n")
    line = f"process {os.getpid()} runs a command here now"
    changed = ("distill.optimizer.lr=5e-3",)
    with lock.open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        out = lopd("status", config, *changed).succeeded().out
        assert "outdated" in out
        assert line in out
        assert "repeat them after lopd status CONFIG" in out
        json.loads(lopd("status", config, "--json").succeeded().out)
    # The control: the file stays, and nobody holds it.
    assert line not in lopd("status", config, *changed).succeeded().out


def test_a_frame_for_programs(lopd: Callable[..., Result], running: Path) -> None:
    found = json.loads(lopd("watch", running, "--json", "--answers", "1").succeeded().out)
    assert found["stages"][4]["work"]["done"] == 2
    assert found["newest"]["train"]["loss"] == 0.5
    assert [one["verdict"] for one in found["answers"]] == ["right"]
    assert found["gpus"] == []


def test_where_there_is_no_run(lopd: Callable[..., Result], tmp_path: Path) -> None:
    lopd("watch", tmp_path, "--once").refused("there is no run in this folder")
    lopd("show", tmp_path / "absent").refused("there is no run in this folder")


def test_newest_responses_while_they_are_sampled(
    lopd: Callable[..., Result], running: Path
) -> None:
    (running / "rollout/manifest.json").unlink()
    shown = lopd("watch", running, "--once").succeeded().out
    assert "stage 3 of 7: rollout  shard 3" in shown
    assert "newest responses of rollout" in shown
    assert shown.count("not judged: <|im_start|>user") == 4
    damaged = max((running / "rollout").glob("shard-*"), key=lambda path: path.stat().st_mtime)
    assert len(last_rows(damaged, 3)) == 3
    damaged.write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="the shard is damaged"):
        last_rows(damaged, 3)
    # A file that is just being replaced ends no watch.
    assert "stage 3 of 7" in lopd("watch", running, "--once").succeeded().out


def test_a_terminal_gets_frames_until_ctrl_c(running: Path) -> None:
    main, other = pty.openpty()
    code = "import sys; from lopd.cli import main; sys.exit(main())"
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "watch", str(running), "--every", "0.2"],
        stdout=other,
        stdin=other,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PYTHONUTF8": "1"},
        cwd=ROOT,
    )
    os.close(other)
    seen = b""
    deadline = time.monotonic() + 300
    log = running / "metrics.jsonl"
    while b"step 3 of 16" not in seen and time.monotonic() < deadline:
        seen += os.read(main, 65536)
        if b"step 2 of 16" in seen and b'"step": 3' not in log.read_bytes():
            with log.open("a") as handle:
                handle.write('{"kind": "train", "stage": "distill", "step": 3, "loss": 0.25}\n')
    started.send_signal(signal.SIGINT)
    assert started.stderr is not None
    errors = started.stderr.read()
    assert started.wait(timeout=300) == 0, errors
    os.close(main)
    assert b"step 3 of 16" in seen
    assert errors == b""


# ---- lopd show ---------------------------------------------------------------------------------


def shown_by(lopd: Callable[..., Result], run: Path, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lopd("show", run, "--json", *options).succeeded().out)
    return found


def test_what_distill_has_fixed_and_broken(lopd: Callable[..., Result], project: Path) -> None:
    run = project / "run"
    (fixed,) = shown_by(lopd, run, "--fixed", "5")
    (broken,) = shown_by(lopd, run, "--broken", "5")
    for found, before, after in ((fixed, False, True), (broken, True, False)):
        right = {one["model"]: one["right"] for one in found["responses"]}
        assert list(right) == ["teacher", "sft", "distilled"]
        assert (right["sft"], right["distilled"]) == (before, after)
    assert fixed["prompt_id"] != broken["prompt_id"]
    text = lopd("show", run, "--fixed", "5").succeeded().out
    assert "SFT student: wrong" in text
    assert "distilled student: right" in text
    assert "\x1b" not in text


def test_the_worst_are_those_with_the_largest_mean(
    lopd: Callable[..., Result], project: Path, tmp_path: Path
) -> None:
    run = project / "run"
    # The stand-in scores every token alike: log pi_T - log pi_S is 0.1 everywhere.
    found = shown_by(lopd, run, "--worst", "2")
    assert len(found) == 2
    for one in found[0]["responses"]:
        assert one["disagreement"] == pytest.approx(0.1, abs=1e-6)
        assert sum(piece["num_tokens"] for piece in one["pieces"]) == one["num_tokens"] == 13
        assert "".join(piece["text"] for piece in one["pieces"]) == one["response"]
    # Before the evaluation there are the rollouts.
    shutil.copytree(run / "score", tmp_path / "run/score")
    (one, *_) = shown_by(
        lopd, tmp_path / "run", "--worst", "1", "--tokenizer", str(run / "sft/model")
    )
    assert [row["model"] for row in one["responses"]] == ["sft"]
    (alone,) = shown_by(lopd, run / "rollout", "--prompt", f"{one['prompt_id']}/0")
    assert alone["responses"][0]["disagreement"] is None
    assert alone["responses"][0]["response"] == one["responses"][0]["response"]
    assert "no colours" in lopd("show", run / "rollout", "--prompt", one["prompt_id"]).out


def test_what_cannot_be_shown_is_one_line(lopd: Callable[..., Result], project: Path) -> None:
    run = project / "run"
    lopd("show", run, "--prompt", "nobody").refused("no prompt 'nobody'", "names such as")
    lopd("show", run, "--worst", "1", "--fixed", "1").refused("are two choices")
    lopd("show", run, "--model", "best").refused("no responses of the model 'best'", "distilled")
    lopd("show", run / "rollout", "--worst", "1").refused("scored none of these responses")


def test_side_by_side_where_there_is_room(
    lopd: Callable[..., Result], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = lopd("show", project / "run", "--worst", "1").succeeded().out
    assert len([line for line in narrow.splitlines() if "nats a token" in line]) == 3
    monkeypatch.setenv("COLUMNS", "120")
    wide = lopd("show", project / "run", "--worst", "1").succeeded().out
    (heading,) = [line for line in wide.splitlines() if "teacher:" in line]
    assert "SFT student:" in heading
    assert "distilled student:" in heading


# ---- characters of several tokens --------------------------------------------------------------


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token, so most characters beyond ASCII are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Bytes:
    """The tokenizer as lopd.tasks asks for it."""

    def __init__(self) -> None:
        self.real = bytes_tokenizer()

    def decode(self, token_ids: Any, **_: Any) -> str:
        return str(self.real.decode(list(token_ids), skip_special_tokens=False))


def test_tokens_are_coloured_in_whole_characters() -> None:
    tokenizer = Bytes()
    ids = tokenizer.real.encode("aé漢🙂b").ids
    assert len(ids) == 11
    values = np.arange(1.0, 12.0)
    found = pieces_of(token_texts(tokenizer, ids), values, len(ids))
    assert [(piece.text, piece.num_tokens, piece.value) for piece in found] == [
        ("a", 1, 1.0),
        ("é", 2, 2.0 + 3.0),
        ("漢", 3, 4.0 + 5.0 + 6.0),
        ("🙂", 4, 7.0 + 8.0 + 9.0 + 10.0),
        ("b", 1, 11.0),
    ]
    # The control: by the tokenizer's own spans, the tokens of one character cover the same text.
    spans = tokenizer.real.encode("aé漢🙂b").offsets
    assert spans[1] == spans[2], "which text would get the colour of which token?"


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_response_that_ends_inside_of_a_character_loses_no_token(cut: int) -> None:
    tokenizer = Bytes()
    ids = tokenizer.real.encode("aé漢🙂b").ids[:cut]
    found = pieces_of(token_texts(tokenizer, ids), [1.0] * cut, cut)
    assert sum(piece.num_tokens for piece in found) == cut
    assert sum(piece.value or 0.0 for piece in found) == pytest.approx(cut)
    assert [piece.first for piece in found] == [
        sum(one.num_tokens for one in found[:index]) for index in range(len(found))
    ]
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids)
