"""Rollout, scoring and weight sync while servers are killed at random. ``python -m tests.soak.soak
--minutes 15 --json soak.json``

Rounds of three phases go on until the time is over: a rollout stage and a score stage of the real
code publish into artifacts, then weights are exchanged back and forth with answers asked after each
exchange. Meanwhile a thread kills: the whole server, its main process, its scheduler, or it stops
all of them (SIGSTOP), at random moments, also while the server is being started again. Servers and
clients are those of the stages; nothing is mended by hand.

Counted, over all rounds: responses that are missing (lost), there twice (duplicated), or not those
of an undisturbed server (wrong); answers with weights other than the newest (stale); phases without
any progress for two minutes (hung); stages that stopped with an error (stopped), which are then run
again, as a user would.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lopd import cache
from lopd.artifacts import MANIFEST, ArtifactWriter, read_manifest
from lopd.config import SGLangSection
from lopd.errors import EngineError
from lopd.records import Ints, Prompt
from lopd.stages.sample_shards import sample_into
from lopd.stages.score_shards import score_into
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import serve
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.weights_file import ask_for_restart
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.models import EOS_ID, VOCAB_SIZE, write_qwen3_moe

HUNG_S = 120.0
KINDS = ("server", "main process", "scheduler", "stop")
PHASES = ("rollout", "scoring", "sync")
FAULTS = ("lost", "duplicated", "wrong", "stale", "hung")


class Killer:
    """Kills servers at random moments in a thread of its own; counts kills by phase and kind.
    spare_starts: only one that has answered since its start.

    most: how many in one phase; where a start takes longer than the time between kills, work would
    hardly go on without such a bound.
    """

    def __init__(
        self,
        engine: SGLangEngine,
        seed: int,
        every_s: float,
        kinds: Sequence[str],
        kills: Counter[str],
        *,
        spare_starts: bool,
        most: int | None,
    ) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._every_s = every_s
        self._kinds = kinds
        self._spare_starts = spare_starts
        self._most = most
        self._of_phase = Counter[str]()
        self.phase = PHASES[0]
        self._kills = kills
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._random.uniform(0.3, 1.7) * self._every_s):
            server = self._random.choice(self._engine.engines).server
            assert server is not None
            if self._spare_starts and not (server.ready() and server.activity.answered):
                continue
            if self._most is not None and self._of_phase[self.phase] >= self._most:
                continue
            self._kill(server, self._random.choice(self._kinds))

    def _kill(self, server: SGLangServer, kind: str) -> None:
        try:
            group = server.group_id
            if kind in ("server", "stop"):
                os.killpg(group, signal.SIGKILL if kind == "server" else signal.SIGSTOP)
            else:
                children = psutil.Process(group).children(recursive=True)
                next(
                    child
                    for child in children
                    if ("scheduler" in child.name()) == (kind == "scheduler")
                ).kill()
        except (AssertionError, ProcessLookupError, psutil.Error, StopIteration):
            return  # it is between two lives
        self._kills[f"{self.phase}: {kind}"] += 1
        self._of_phase[self.phase] += 1


class Counts:
    """What went wrong, and how much was done."""

    def __init__(self) -> None:
        self.rounds = self.responses = self.syncs = 0
        self.wrong = Counter(dict.fromkeys((*FAULTS, "stopped", "repeated syncs"), 0))
        self.stops: list[str] = []

    def compare(self, found: Sequence[tuple[Any, Any]], wanted: dict[Any, Any]) -> None:
        """found: (key, value) pairs as published; wanted: key -> value of an undisturbed server."""
        times = Counter(key for key, _ in found)
        self.responses += len(found)
        self.wrong["lost"] += len(wanted.keys() - times.keys())
        self.wrong["duplicated"] += sum(number - 1 for number in times.values())
        self.wrong["wrong"] += sum(
            key not in wanted or value != wanted[key] for key, value in found
        )


@contextmanager
def bounded(
    counts: Counts, progress: Callable[[], int], patience_s: float = HUNG_S
) -> Iterator[None]:
    """Ends the process where a phase makes no progress for so long: then it hangs, which is what
    must never be.
    """
    done = threading.Event()

    def watch() -> None:
        last = progress()
        since = time.monotonic()
        while not done.wait(1.0):
            if progress() != last:
                last = progress()
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                counts.wrong["hung"] += 1
                sys.stderr.write(f"hung: nothing for {patience_s:g} s; so far {counts.wrong}\n")
                sys.stderr.flush()
                os._exit(3)  # the servers end with this process

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Soak:
    """One server (or several) of a random model under fire."""

    def __init__(
        self,
        folder: Path,
        *,
        responses: int,
        replicas: int,
        seed: int,
        every_s: float,
        kinds: Sequence[str] = KINDS,
        spare_starts: bool = False,
        syncs: int = 30,
        kills_of_a_phase: int | None = None,
        hang_timeout_s: float = 3.0,
    ) -> None:
        """every_s: mean time between kills. syncs: weight syncs of a round."""
        self._syncs = syncs
        self._kills_of_a_phase = kills_of_a_phase
        self._folder = folder
        self._seed = seed
        self._every_s = every_s
        self._kinds = kinds
        self._spare_starts = spare_starts
        self._models = [
            write_qwen3_moe(folder / name, seed=index)
            for index, name in enumerate(("first", "second"))
        ]
        self._settings = SGLangSection(
            dtype="float32",
            context_length=160,
            max_running_requests=32,
            max_in_flight=32,
            max_total_tokens=8192,
            replicas=replicas,
            restarts=2,
            hang_timeout_s=hang_timeout_s,
            request_timeout_s=max(20.0, 2 * hang_timeout_s),
            outage_timeout_s=250,
            start_timeout_s=200,
        )
        rng = np.random.default_rng(seed)
        samples = 4
        self._samples = samples
        self._prompts = [
            Prompt(
                prompt_id=f"p{i}",
                messages=({"role": "user", "content": "?"},),
                domain="soak",
                answer=None,
            )
            for i in range(responses // samples)
        ]
        self._ids: list[Ints] = [
            rng.integers(4, VOCAB_SIZE, 16).astype(np.int32) for _ in self._prompts
        ]
        self._params = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            max_new_tokens=100,
            stop_token_ids=(EOS_ID,),
        )
        self.counts = Counts()
        self._kills = Counter[str]()
        self._restarts = 0
        self._began = 0.0
        # This function gets the counts after every phase.
        self.report: Callable[[dict[str, Any]], None] = lambda found: None

    def run(self, seconds: float, *, restarts: int = 0) -> dict[str, Any]:
        """The counts, and the kills by phase and kind. seconds: no round begins later, unless fewer
        restarts than these were seen.
        """
        wanted: dict[str, dict[Any, Any]] = {}

        def going_on() -> bool:
            return time.monotonic() - self._began < seconds or self._restarts < restarts

        while not wanted or going_on():
            with serve(
                self._models[0],
                self._settings,
                log=self._folder / "sglang.log",
                name="student",
                tell=self._tell,
            ) as engine:
                if not wanted:
                    wanted = self._undisturbed(engine)
                    self._began = time.monotonic()
                stopped = False
                while not stopped and going_on():
                    self.counts.rounds += 1
                    seed = self._seed + self.counts.rounds
                    limits = {"spare_starts": self._spare_starts, "most": self._kills_of_a_phase}
                    killer = Killer(engine, seed, self._every_s, self._kinds, self._kills, **limits)
                    try:
                        with killer:
                            self._round(engine, killer, wanted, self._began + seconds)
                    except EngineError as error:
                        self.counts.wrong["stopped"] += 1
                        self.counts.stops.append(str(error))
                        stopped = True
        return self._found()

    def _found(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self._began,
            "rounds": self.counts.rounds,
            "responses": self.counts.responses,
            "syncs": self.counts.syncs,
            "kills": dict(sorted(self._kills.items())),
            "num_kills": sum(self._kills.values()),
            "restarts": self._restarts,
            **self.counts.wrong,
            "stops": self.counts.stops,
        }

    def _tell(self, line: str) -> None:
        self._restarts += line.endswith("starting it again")
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line[:160]}\n")

    # ---- the phases ----

    def _undisturbed(self, engine: SGLangEngine) -> dict[str, dict[Any, Any]]:
        folder = self._folder / "undisturbed"
        self._rollout(engine, folder / "rollouts")
        self._score(engine, folder / "rollouts", folder / "scores")
        wanted = {
            "rollout": dict(_rollouts_in(folder / "rollouts")),
            "scoring": dict(_scores_in(folder / "scores")),
        }
        for version, model in enumerate(self._models):
            update_weights_from_disk(engine, model, version=f"v{version}")
            wanted[f"v{version}"] = self._answers(engine)
        assert wanted["v0"] != wanted["v1"], "the two models answer alike: nothing would be seen"
        return wanted

    def _round(
        self, engine: SGLangEngine, killer: Killer, wanted: dict[str, dict[Any, Any]], end: float
    ) -> None:
        folder = self._folder / "round"
        killer.phase = "rollout"
        self._put(engine, "v0", self._models[0])
        self._rollout(engine, folder / "rollouts")
        self.counts.compare(_rollouts_in(folder / "rollouts"), wanted["rollout"])
        self.report(self._found())
        killer.phase = "scoring"
        self._score(engine, folder / "rollouts", folder / "scores")
        self.counts.compare(_scores_in(folder / "scores"), wanted["scoring"])
        self.report(self._found())
        shutil.rmtree(folder)
        killer.phase = "sync"
        for number in range(self._syncs):
            if number < 2 or time.monotonic() < end:
                self._sync(engine, f"v{(number + 1) % 2}", self._models[(number + 1) % 2], wanted)
                self.report(self._found())

    def _rollout(self, engine: SGLangEngine, folder: Path) -> None:
        writer = ArtifactWriter(folder, kind="rollouts", inputs={}, shard_size=32)
        with bounded(self.counts, lambda: len(list(folder.glob("*.parquet")))):
            sample_into(
                writer,
                engine,
                self._prompts,
                self._ids,
                self._params,
                samples_per_prompt=self._samples,
                seed=self._seed,
                purpose="soak",
                title="rollout",
            )
        writer.finish()

    def _score(self, engine: SGLangEngine, source: Path, folder: Path) -> None:
        writer = ArtifactWriter(folder, kind="teacher_cache", inputs={})
        with bounded(self.counts, lambda: len(list(folder.glob("*.parquet")))):
            score_into(writer, engine, source, read_manifest(source), title="scoring")
        writer.finish()

    def _sync(
        self, engine: SGLangEngine, version: str, model: Path, wanted: dict[str, dict[Any, Any]]
    ) -> None:
        """Weights in, then answers, which must be those of the new weights."""
        self._put(engine, version, model)
        self.counts.syncs += 1
        with bounded(self.counts, lambda: 0):
            answers = self._answers(engine)
        self.counts.wrong["stale"] += sum(
            answers[key] != wanted[version][key] for key in wanted[version]
        )

    def _put(self, engine: SGLangEngine, version: str, model: Path) -> None:
        """Weights into the servers; again, after a restart, where one is silent."""
        tries = [0]
        with bounded(self.counts, lambda: tries[0]):
            while True:
                try:
                    update_weights_from_disk(engine, model, version=version, timeout_s=10)
                    return
                except EngineError:
                    engine.check_alive()
                tries[0] += 1
                self.counts.wrong["repeated syncs"] += 1
                server = engine.server
                assert server is not None
                ask_for_restart(server.weights_file)
                time.sleep(1.0)
                while not all(
                    one.server is not None and one.server.ready() for one in engine.engines
                ):
                    engine.check_alive()
                    time.sleep(0.1)

    def _answers(self, engine: SGLangEngine) -> dict[Any, Any]:
        requests = [
            SamplingRequest(prompt.prompt_id, 0, ids, 5)
            for prompt, ids in zip(self._prompts[:24], self._ids[:24], strict=True)
        ]
        return {
            response.key: response.token_ids.tolist()
            for response in engine.generate(requests, self._params)
        }


def _rollouts_in(folder: Path) -> list[tuple[Any, Any]]:
    assert (folder / MANIFEST).is_file()
    return [
        (response.key, response.token_ids.tolist())
        for response, _ in cache.read_rows(folder, read_manifest(folder))
    ]


def _scores_in(folder: Path) -> list[tuple[Any, Any]]:
    rows = cache.read_rows(folder, read_manifest(folder))
    return [
        (response.key, (response.token_ids.tolist(), np.asarray(scores).tolist()))
        for response, scores in rows
    ]


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="(default %(default)s)")
    parser.add_argument(
        "--responses", type=int, default=1000, help="of a rollout (default %(default)s)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="servers (default %(default)s)")
    parser.add_argument(
        "--every", type=float, default=10.0, help="mean seconds between kills (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    options = parser.parse_args()
    # The exit goes through the servers' own ends: a stopped guard could not follow a sudden one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="lopd-soak-"))
    try:
        soak = Soak(
            folder,
            responses=options.responses,
            replicas=options.replicas,
            seed=options.seed,
            every_s=options.every,
        )
        if options.json is not None:
            soak.report = lambda found: write(options.json, found)
        found = soak.run(options.minutes * 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        write(options.json, found)
    sys.exit(any(found[name] for name in FAULTS))


if __name__ == "__main__":
    main()
