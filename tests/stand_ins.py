"""A whole run in seconds: the real command line, checks, pipeline, stages and artifacts, with
stand-ins for SGLang and the trainer's ranks.

For tests of what happens around them. What the real ones do is tested in tests/sglang,
tests/megatron and tests/pipeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from lopd import cache, cli, pipeline
from lopd.artifacts import publish_json, storage_errors
from lopd.config import Config, SGLangSection
from lopd.records import Response, TeacherScores, float32, int32, token_hash, top_k_of
from lopd.report.metrics import MetricsLog
from lopd.stages import distill, evaluate, sft
from lopd.stages.context import StageContext
from lopd.stages.training import TrainingJob
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.requests.turns import Turns, sample_turns
from tests.models import write_qwen3_moe

ROOT = Path(__file__).resolve().parents[1]
TINY_MODELS = ROOT / "examples" / "tiny_models"
STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")

CONFIG = """
[run]
dir = "run"
[models]
teacher = "teacher"
student = "student"
[task]
name = "register_arithmetic"
[prompts]
sft = { num_prompts = 24, seed = 1 }
opd = { num_prompts = 24, seed = 2 }
eval = { num_prompts = 8, seed = 3 }
[sglang]
dtype = "float32"
context_length = 128
max_total_tokens = 8192
[demonstrate]
max_new_tokens = 64
shard_size = 8
[sft]
num_steps = 2
batch_size = 8
dtype = "float32"
[rollout]
max_new_tokens = 64
shard_size = 8
[distill]
num_steps = 2
batch_size = 8
dtype = "float32"
sync_every = 0
[evaluate]
max_new_tokens = 64
equal_compute_baseline = true
"""


def write_project(folder: Path, config: str = CONFIG) -> Path:
    """A folder as a user has it: config.toml, and copies of the example's two models; returns the
    config's path.
    """
    for role in ("teacher", "student"):
        shutil.copytree(TINY_MODELS / role, folder / role)
    path = folder / "config.toml"
    path.write_text(config)
    return path


@dataclass
class Engine:
    """Answers every request with tokens that follow from its seed, and scores every token alike.
    fail_after: raise this error after so many answers.
    """

    answered: int = 0
    fail_after: tuple[int, Exception] | None = None

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
        turns: Turns | None = None,
    ) -> Iterator[Response]:
        async def one_turn(request: SamplingRequest, allowed: int) -> Response:
            return self.turn(request, params)

        for request in requests:
            self._count()
            # The turns are the product's own.
            yield asyncio.run(sample_turns(request, turns, params.max_new_tokens, one_turn))

    def turn(self, request: SamplingRequest, params: SamplingParams) -> Response:
        tokens = int32(
            [*np.random.default_rng(request.seed).integers(4, 30, 12), params.stop_token_ids[0]]
        )
        return Response(
            request.prompt_id,
            request.sample_index,
            request.prompt_ids,
            tokens,
            float32(np.full(len(tokens), -0.5)),
            "stop",
            "stand-in",
        )

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        for request in requests:
            self._count()
            name = token_hash(request.prompt_ids, request.token_ids)
            others = np.arange(4, 4 + top_k)[None].repeat(len(request.token_ids), 0)  # [R, top_k]
            top = top_k_of(others, np.full(others.shape, -4.0)) if top_k else None
            yield TeacherScores(
                request.prompt_id,
                request.sample_index,
                name,
                float32(np.full(len(request.token_ids), -0.4)),
                top,
            )

    @property
    def settings(self) -> SGLangSection:
        return SGLangSection()

    @property
    def engines(self) -> tuple[Engine, ...]:
        return (self,)

    def model_info(self) -> dict[str, str]:
        return {"weight_version": "stand-in"}

    def _count(self) -> None:
        if self.fail_after is not None and self.answered >= self.fail_after[0]:
            raise self.fail_after[1]
        self.answered += 1


@dataclass
class StandIns:
    """What was started, instead of the real thing."""

    engine: Engine = field(default_factory=Engine)
    served: list[str] = field(default_factory=list)  # roles
    trained: list[str] = field(default_factory=list)  # folder names

    @property
    def started(self) -> bool:
        return bool(self.served or self.trained)

    @contextlib.contextmanager
    def serve(self, _: StageContext, role: str, model: Path) -> Iterator[Engine]:
        self.served.append(role)
        yield self.engine

    def train(
        self, job: TrainingJob, student: object = None, *, serve_requests: object = None
    ) -> dict[str, Any]:
        """Read the data as the ranks do. The "trained" model is the initial one."""
        self.trained.append(job.folder.name)
        rows = [
            len(response.prompt_ids) + len(response.token_ids)
            for response, _ in cache.read_rows(job.data, without_sampling=True)
        ]
        if not job.result.exists():
            _copy_model(job.initial, job.model)
            metrics = MetricsLog(job.config.run.dir)
            for step in range(1, job.num_steps + 1):
                metrics.train(job.stage, step, {"loss": 1 / step})
            metrics.close()
            figures = {
                "num_steps": job.num_steps,
                "num_tokens": sum(rows),
                "first_loss": 1.0,
                "last_loss": 0.5,
                "weight_syncs": 0,
            }
            publish_json(job.result, figures)
        result: dict[str, Any] = json.loads(job.result.read_text())
        return result

    def install(self, patch: pytest.MonkeyPatch) -> StandIns:
        patch.setattr(
            StageContext,
            "serve",
            lambda context, role, model, settings=None: self.serve(context, role, model),
        )
        patch.setattr(StageContext, "prepare_server", lambda context: None)
        patch.setattr("lopd.stages.overlap.prepare_ranks", lambda settings: None)
        patch.setattr("sglang_rollout.weight_sync.update_weights_from_disk", lambda *_, **__: None)
        for stage in (sft, distill, evaluate):
            patch.setattr(stage, "train_on_ranks", self.train)
        return self


def _copy_model(source: Path, target: Path) -> None:
    """Whole or not at all, as save_hf does."""
    partial = target.with_name("copied.partial")
    with storage_errors(target):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                shutil.copyfile(path, partial / path.name)
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            raise


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str

    def refused(self, *fragments: str) -> str:
        """Asserts that the command ended with one line of error, exit code 2 and no traceback, and
        that the line holds every fragment; returns the line.
        """
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, f"not one line:\n{self.err}"
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.out + self.err
        missing = [fragment for fragment in fragments if fragment not in lines[0]]
        assert not missing, f"{missing} not in: {lines[0]}"
        return lines[0]

    def succeeded(self) -> Result:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


def command(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``lopd(verb, config, *overrides)`` in this process, through the entry point of the script."""

    def lopd(*arguments: str | Path) -> Result:
        patch.setattr(sys, "argv", ["lopd", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(code, *capsys.readouterr())

    return lopd


Lopd: TypeAlias = Callable[..., Result]  # what ``command`` gives


def states(lopd: Lopd, config: Path, *overrides: str) -> dict[str, str]:
    return {
        row["name"]: row["state"]
        for row in json.loads(lopd("status", config, "--json", *overrides).succeeded().out)
    }


def contents(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """sha256 of every file below a folder that matches."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def flip_bit(path: Path, *, at: float = 0.5) -> None:
    """Changes one bit at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def cut(path: Path, *, to: float = 0.5) -> None:
    """Truncates a file to this share of its size."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * to)])


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def scored_project(folder: Path, load: Callable[..., Config], *overrides: str) -> Iterator[Path]:
    """Two models of random weights whose run has come as far as score by stand-ins, which serve as
    long as this is open.
    """
    for role, seed in (("teacher", 1), ("student", 0)):
        write_qwen3_moe(folder / role, seed=seed)
    (folder / "config.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        StandIns().install(patch)
        pipeline.run(load(folder, *overrides), ("demonstrate", "sft", "rollout", "score"))
        yield folder
