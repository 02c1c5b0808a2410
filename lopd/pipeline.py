"""The stages in order: run, resume, reuse, status. Knows nothing of the method; each stage decides
by its inputs whether its artifact still stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lopd import summary
from lopd.artifacts import (
    MANIFEST,
    Share,
    publish_json,
    published_rows,
    read_manifest,
    sha256_json,
    storage_errors,
    verify,
)
from lopd.config import Config, known_keys, result_keys
from lopd.config.secrets import scrubbed, scrubbed_inputs
from lopd.errors import ArtifactError, ConsistencyError, LopdError
from lopd.records import Manifest, ModelIdentity
from lopd.report.console import say
from lopd.report.metrics import bring_back, set_aside
from lopd.stages import STAGES, Stage, StageContext, training
from lopd.stages.evaluate import LONGER
from lopd.stages.training import CHECKPOINTS, RESULT
from lopd.summary import Outcome

State = Literal["done", "partial", "outdated", "absent"]
SUPERSEDED = "superseded"
_CONFIG = "config.json"


@contextlib.contextmanager
def locked(run_dir: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the run directory for this process, or shared by the workers of a stage. ArtifactError:
    another one uses it (the lock ends with its process, however it ends).
    """
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode() or "unknown"
            raise ArtifactError(
                f"in use by process {holder.strip()}",
                where=str(run_dir),
                remedy="wait for it to end, or use another run.dir",
            ) from None
        except OSError as error:
            raise ArtifactError(
                f"cannot be locked ({error.strerror})",
                where=str(run_dir),
                remedy="use a run.dir on a file system with locks",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def run(config: Config, only: Sequence[str] | None = None) -> list[Outcome]:
    """Runs all stages (or those named, whose parents must then be complete), reusing what is
    published from the same inputs.
    """
    outcomes: list[Outcome] = []
    identities: dict[str, ModelIdentity] = {}
    with locked(config.run.dir):
        report_changes(config)
        chosen = [
            stage
            for stage in STAGES
            if (_needed(stage, config) if only is None else stage.name in only)
        ]
        for stage in chosen:
            outcomes.append(
                _run_stage(
                    StageContext(config, stage, identities),
                    verified={outcome.name for outcome in outcomes},
                )
            )
            publish_json(config.run.dir / _CONFIG, _flat(config))
            standing = _standing(config, identities)
            summary.write(config, outcomes, standing)
            if "distill" in standing and (outcomes[-1].status == "done" or stage is chosen[-1]):
                summary.draw(config)
    return outcomes


def run_share(config: Config, name: str, share: Share) -> None:
    """One worker's part of a stage that samples or scores: publishes its shards and completes
    nothing. Workers may run at the same time on several machines that share the run directory; the
    stage's own command afterwards finds all shards, makes what a lost worker left, and completes
    the artifact.
    """
    context = StageContext(config, _stage(name), share=share)
    with locked(config.run.dir, shared=True):
        _require_parents(context, ())
        assert context.inputs is not None, "hashes models before the others have to wait for it"
        with storage_errors(config.run.dir), (config.run.dir / ".lock-workers").open("w") as handle:
            fcntl.flock(
                handle, fcntl.LOCK_EX
            )  # waits: the first worker moves an outdated artifact aside, the others find that done
            _supersede(context)
            context.folder.mkdir(parents=True, exist_ok=True)
        if _published(context) is not None:
            context.log("reused")
            return
        context.log(f"{context.stage.summary} Worker {share.index} of {share.count}.")
        with storage_errors(context.folder):
            context.stage.run(context)
        context.log(f"worker {share.index} of {share.count} is done")


def follow(config: Config, name: str, index: int, count: int) -> None:
    """Machine ``index`` of ``count``: its ranks of a stage that trains, while machine 0 runs the
    stage's own command on the same run directory. Ends when the stage is done.
    """
    context = StageContext(config, _stage(name))
    folder = context.folder / LONGER if name == "evaluate" else context.folder
    say(f"{name}: machine {index} of {count} follows the first one")
    training.follow(
        folder,
        config.distill if name == "distill" else config.sft,
        index,
        count,
        done=lambda: inspect(context)[0] == "done",
    )


def _needed(stage: Stage, config: Config) -> bool:
    given = {
        "demonstrate": config.sft.demonstrations or config.sft.checkpoint,
        "rollout": config.distill.cache,
        "score": config.distill.cache,
    }
    return given.get(stage.name) is None


def _standing(config: Config, identities: dict[str, ModelIdentity]) -> list[str]:
    """The stages whose artifacts are complete and made from this configuration."""
    standing = []
    for stage in STAGES:
        with contextlib.suppress(LopdError):  # a damaged one stops the command when its turn comes
            if (
                _needed(stage, config)
                and inspect(StageContext(config, stage, identities))[0] == "done"
            ):
                standing.append(stage.name)
    return standing


def _run_stage(context: StageContext, verified: Collection[str]) -> Outcome:
    """verified: stages whose files this command has written or checked."""
    start = time.monotonic()
    _require_parents(context, verified)
    _supersede(context)
    manifest = _published(context)
    if manifest is not None:
        verify(context.folder, manifest)
        say(f"{context.stage.name}: reused", context.folder / "log.txt")
        return Outcome(context.stage.name, "reused", time.monotonic() - start)
    with storage_errors(context.folder):
        context.folder.mkdir(parents=True, exist_ok=True)
    context.log(context.stage.summary)
    with storage_errors(context.folder):  # a log or a library that finds no room
        context.stage.run(context)
    seconds = time.monotonic() - start
    _record_seconds(context, seconds)
    context.log(f"done in {seconds:.1f} s")
    return Outcome(context.stage.name, "done", seconds)


def _record_seconds(context: StageContext, seconds: float) -> None:
    """Seconds of the command that finished the stage; outside the manifest, which says only what
    decides the artifact.
    """
    publish_json(context.folder / "seconds.json", {"seconds": seconds})


def _require_parents(context: StageContext, verified: Collection[str]) -> None:
    """Before anything is touched: the stages this one reads are done, and their files are as they
    were published.
    """
    for name in context.stage.parents(context.config):
        parent = StageContext(context.config, _stage(name), context.identities)
        state, differs = inspect(parent)
        if state != "done":
            _refuse_another_teacher(context, parent)
            reason = (
                f"was made from other knobs ({', '.join(differs)})" if differs else f"is {state}"
            )
            raise ArtifactError(
                f"{context.stage.name} needs {name}, which {reason}",
                where=str(parent.folder),
                remedy=f"run: lopd {name} CONFIG, or lopd run CONFIG",
            )
        if name not in verified:
            verify(parent.folder, read_manifest(parent.folder))


def _refuse_another_teacher(context: StageContext, parent: StageContext) -> None:
    """ConsistencyError where all that keeps a stage with a teacher from running is that
    models.teacher is not the one that everything was made with.
    """
    cause = parent
    while (differs := inspect(cause)[1]) and (
        outdated := [key.removeprefix("parent ") for key in differs if key.startswith("parent ")]
    ):
        cause = StageContext(context.config, _stage(outdated[0]), context.identities)
    if (
        "teacher" in context.stage.models
        and differs
        and all(key.startswith("models.teacher") for key in differs)
    ):
        raise ConsistencyError(
            f"{context.config.models.teacher} is not the teacher of {cause.stage.name}, which {parent.stage.name} goes back to",
            where="models.teacher",
            limit=str(read_manifest(cause.folder).models["teacher"].path),
            remedy="use that teacher, or make all stages with this one: lopd run CONFIG",
        )


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _published(context: StageContext) -> Manifest | None:
    """The complete artifact from these very inputs, or None."""
    if not (context.folder / MANIFEST).exists():
        return None
    manifest = read_manifest(context.folder)
    return manifest if manifest.complete and not differences(context, manifest) else None


def differences(context: StageContext, manifest: Manifest) -> list[str]:
    """Keys in which the artifact's inputs differ from what this configuration asks for; a parent's
    name where the parent changed.

    A knob that the artifact does not name is newer than the artifact; its default stands for what
    was done before there was such a knob.
    """
    wanted = json.loads(
        json.dumps(
            {
                **context.inputs,
                **{f"parent {name}": value for name, value in context.parents.items()},
            },
            default=str,
        )
    )
    found: dict[str, Any] = {
        **scrubbed_inputs(manifest.inputs),
        **{f"parent {name}": value for name, value in manifest.parents.items()},
    }
    for key in wanted.keys() - found.keys():
        found[key] = _default(key)
    return sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found[key])


def _default(key: str) -> Any:
    field = known_keys().get(key)
    return (
        None
        if field is None or field.is_required()
        else json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
    )


def _supersede(context: StageContext) -> None:
    """Moves an artifact made from other inputs aside, with its metrics (nothing finished is lost),
    and brings back one that was moved aside before.
    """
    run_dir, folder = context.config.run.dir, context.folder
    shelf = run_dir / SUPERSEDED
    if not (folder / MANIFEST).exists() and any(
        next(folder.rglob(name), None) for name in (RESULT, CHECKPOINTS)
    ):
        context.log(
            f"trained, but without {MANIFEST}: nobody knows from what; kept in {SUPERSEDED}/{folder.name}-without-manifest"
        )
        shelf.mkdir(exist_ok=True)
        folder.rename(_free_name(shelf / f"{folder.name}-without-manifest"))
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        differs = differences(context, manifest)
        if not differs:
            bring_back(run_dir, folder)  # a kill while it was moved
            return
        key = sha256_json([manifest.inputs, manifest.parents])[:12]
        context.log(
            f"runs again: {', '.join(differs[:6])} changed; the former result is kept in {SUPERSEDED}/{folder.name}-{key}"
        )
        set_aside(
            run_dir,
            {folder.name, *(path.name for path in folder.iterdir() if path.is_dir())},
            folder,
        )
        shelf.mkdir(exist_ok=True)
        folder.rename(_free_name(shelf / f"{folder.name}-{key}"))
    kept = _kept(context, shelf)
    if kept is not None:
        if folder.exists():  # a stage that was killed before it had a manifest
            folder.rename(_free_name(shelf / f"{folder.name}-without-manifest"))
        kept.rename(folder)
        bring_back(run_dir, folder)


def _kept(context: StageContext, shelf: Path) -> Path | None:
    """The stage's artifact among those moved aside that is made from what this configuration asks
    for; rather a complete one.
    """
    found: dict[bool, Path] = {}
    for path in sorted(shelf.glob(f"{context.stage.name}-*")):
        with contextlib.suppress(LopdError):  # damaged: it stays where it is
            manifest = read_manifest(path)
            if not differences(context, manifest):
                found[manifest.complete] = path
    return found.get(True, found.get(False))


def _free_name(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}.{index}") for index in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def report_changes(config: Config) -> None:
    """Says which keys differ from the configuration that a stage of this run directory was last
    made from.
    """
    former = _read_table(config.run.dir / _CONFIG)
    current = _flat(config)
    former = (
        {key: _default(key) for key in current} | former if former else current
    )  # a knob newer than the file had its default
    changed = sorted(key for key in former if current.get(key) != former[key])
    if changed:
        shown = "; ".join(f"{key}: {former.get(key)} -> {current.get(key)}" for key in changed[:12])
        say(
            f"this run directory was made from another config: {shown}{' ...' if len(changed) > 12 else ''}",
            config.run.dir / "log.txt",
        )


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON file that decides nothing: empty where it is missing or damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _flat(config: Config) -> dict[str, Any]:
    flat = result_keys(
        config, [name for name in type(config).model_fields if name not in ("run", "models")]
    )
    flat |= {
        "run.seed": config.run.seed,
        "models.teacher": str(config.models.teacher),
        "models.student": str(config.models.student),
    }
    plain: dict[str, Any] = json.loads(
        json.dumps(scrubbed(flat))
    )  # it is published, and shown where it differs
    return plain


def inspect(context: StageContext) -> tuple[State, list[str]]:
    """A stage's state without running anything, and for an outdated one the keys that differ, or
    the parent that is not done itself.
    """
    if not (context.folder / MANIFEST).exists():
        return "absent", []
    manifest = read_manifest(context.folder)
    parents = {
        name: inspect(StageContext(context.config, _stage(name), context.identities))[0]
        for name in context.stage.parents(context.config)
    }
    try:
        differs = differences(context, manifest)
    except ArtifactError:  # a parent is gone: its manifest cannot be read
        differs = []
    differs = differs or [f"parent {name}" for name, state in parents.items() if state != "done"]
    if differs:
        return "outdated", differs
    return ("done" if manifest.complete else "partial"), []


def status(config: Config) -> list[dict[str, Any]]:
    """One row a stage: name, state, rows, seconds, fingerprint, which keys differ. Reads only."""
    rows: list[dict[str, Any]] = []
    identities: dict[str, ModelIdentity] = {}
    for stage in STAGES:
        if not _needed(stage, config):
            continue
        context = StageContext(config, stage, identities)
        try:
            state, differs = inspect(context)
            manifest = read_manifest(context.folder) if state != "absent" else None
            num_rows = (
                published_rows(context.folder)
                if state == "partial"
                else manifest.rows
                if manifest is not None
                else 0
            )
        except LopdError as error:
            rows.append(
                {
                    "name": stage.name,
                    "state": "damaged",
                    "rows": 0,
                    "seconds": None,
                    "fingerprint": "",
                    "note": str(error),
                }
            )
            continue
        seconds_file = context.folder / "seconds.json"
        rows.append(
            {
                "name": stage.name,
                "state": state,
                "rows": num_rows,
                "seconds": _read_table(seconds_file).get("seconds"),
                "fingerprint": manifest.fingerprint[:12] if manifest else "",
                "note": f"differs in {', '.join(differs[:4])}" if differs else "",
            }
        )
    return rows
