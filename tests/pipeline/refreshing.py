"""``lopd`` with real ranks but fake servers, in a process that can be killed: ``python -m
tests.pipeline.refreshing FOLDER VERB CONFIG OVERRIDES...``.

LOPD_TEST_HOLDS: as for tests.pipeline.holding, of shards. FOLDER/asked.jsonl tells, over all
commands, what the servers were asked: one line a sampled or scored response and a line for each set
of weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopd import cli
from lopd.config import SGLangSection
from lopd.stages.context import StageContext
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import fleet_of
from sglang_rollout.servers import shared_gpus
from tests.pipeline.holding import hold_after_shards
from tests.sglang.answers import sequences
from tests.sglang.fake_server import KEY, FakeServer

DELAY = "LOPD_TEST_DELAY_S"  # of each answer
REFUSES = "LOPD_TEST_REFUSES"  # a role whose server refuses to score


class RecordingServer(FakeServer):
    """Its responses follow from the weights that it was given, as a real server's do."""

    def __init__(self, role: str, replica: int, folder: Path, model: Path) -> None:
        super().__init__()
        self._role = role
        self._replica = replica
        self._record = folder / "asked.jsonl"
        self._away: set[str] = set()  # memory that it has given back
        self.model_path = str(model)
        self.delay_s = float(os.environ.get(DELAY, "0"))
        self._take(model)

    def _take(self, model: Path) -> None:
        self._salt = sum(zlib.crc32(path.read_bytes()) for path in model.glob("*.safetensors"))

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        path = path.partition("?")[0]
        if path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self._away ^= {*body["tags"]}
            if "weights" in self._away:
                self._salt = 0  # what was given back has lost its contents
            self._note({"away": sorted(self._away)})
            return 200, {}
        if self._away and (
            path == "/generate" or ("weights" in self._away and path == "/update_weights_from_disk")
        ):
            return 400, {"error": {"message": f"{self._away} given back"}}
        if path == "/update_weights_from_disk":
            self._take(Path(body["model_path"]))
            self._note({"weights": body["weight_version"]})
        if path == "/generate" and "sampling_seed" in body["sampling_params"]:
            seed = body["sampling_params"]["sampling_seed"]
            body["sampling_params"]["sampling_seed"] = seed + self._salt
            status, answer = super()._answer(path, body)
            self._note({"seed": seed, "version": answer["meta_info"]["weight_version"]})
            return status, answer
        if path == "/generate" and len(body["input_ids"]) > 1:
            if os.environ.get(REFUSES) == self._role:
                return 400, {"error": {"message": "as told"}}
            for one in sequences(body):
                self._note({"scored": one["input_ids"]})
        return super()._answer(path, body)

    def _note(self, what: dict[str, Any]) -> None:
        with self._record.open("a") as handle:
            handle.write(json.dumps({"role": self._role, "replica": self._replica, **what}) + "\n")


def main(folder: Path, *arguments: str) -> None:
    @contextlib.contextmanager
    def serve(
        context: StageContext, role: str, model: Path, settings: SGLangSection | None = None
    ) -> Iterator[SGLangEngine]:
        settings = settings or context.config.sglang
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(RecordingServer(role, replica, folder, model))
                for replica in range(settings.replicas)
            ]
            yield fleet_of([SGLangEngine(server.url, KEY, settings) for server in servers])

    hold_after_shards()
    # A fake server has no GPU memory to give back, so this check finds no problem on a CPU either.
    shared_gpus.colocation_problems = lambda config, on_gpu: iter(())
    StageContext.serve = serve  # type: ignore[method-assign,assignment]
    sys.argv = ["lopd", *arguments]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
