"""The stages in order: run, resume, reuse, status. This file knows nothing of the method.

Each stage runs, or is reused where its artifact has these inputs (lopd.stages.reuse).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopd import summary
from lopd.artifacts import (
    MANIFEST,
    Share,
    publish_json,
    published_rows,
    read_manifest,
    storage_errors,
    verify,
)
from lopd.artifacts.file_hashes import HASHES, STORE
from lopd.config import Config, result_keys
from lopd.config.secrets import scrubbed
from lopd.errors import ArtifactError, ConsistencyError, LopdError
from lopd.records import ModelIdentity
from lopd.report.console import print_line, progress
from lopd.stages.context import Stage, StageContext
from lopd.stages.evaluate import LONGER
from lopd.stages.order import STAGES, is_needed, stage_named
from lopd.stages.overlap import Overlap, overlaps
from lopd.stages.progress import Progress, progress_of
from lopd.stages.reuse import default_of, inspect, reusable, supersede
from lopd.stages.training import follow_trainings
from lopd.summary import Outcome
from lopd.tasks.rendered import write_held

# What this file writes: in the run directory the configuration of the last stage that ran, and in
# each stage's folder how long it took. Neither decides what is reused.
_CONFIG = "config.json"
_SECONDS = "seconds.json"
# How often status looks at a stage whose files do not fit together, and the time in between.
_LOOKS = 3
_BETWEEN_LOOKS_S = 0.05


def run(config: Config, only: Sequence[str] | None = None) -> list[Outcome]:
    """Run the stages, and reuse what is published from the same inputs.

    Args:
        config: The configuration.
        only: The names of the stages to run. The stages that they read must be complete. None: all
            that this configuration needs.

    Returns:
        What each stage came to, in order.

    Raises:
        LopdError: The run directory is in use, an artifact is damaged, or a stage failed.
    """
    # One lock for the whole command. Without it a second command could move a stage aside while
    # this one writes into it.
    outcomes: list[Outcome] = []
    identities: dict[str, ModelIdentity] = {}
    load_hashes(config)
    if only is None:
        chosen = [stage for stage in STAGES if is_needed(stage, config)]
    else:
        chosen = [stage for stage in STAGES if stage.name in only]
    names = [stage.name for stage in chosen]
    # What overlaps ends before the lock is free: the next command must not meet it.
    with locked(config.run.dir), Overlap(names) as overlap:
        report_changes(config)
        # Now that the folder is this command's: what its checks have rendered.
        write_held(config.run.dir)
        for stage in chosen:
            # What this command has just written or verified need not be read again.
            verified = {outcome.name for outcome in outcomes}
            context = StageContext(config, stage, identities)
            context.overlap = overlap if overlaps(config) else None
            outcomes.append(_run_stage(context, verified))
            # After each stage, not at the end: a later stage may fail, or be killed.
            HASHES.save(config.run.dir / STORE)
            publish_json(config.run.dir / _CONFIG, config_record(config))
            complete = _complete_stages(config, identities)
            summary.write(config, outcomes, complete)
            # The curve is drawn when it may have changed, and at the end of the command.
            if "distill" in complete and (outcomes[-1].status == "done" or stage is chosen[-1]):
                summary.draw(config)
    return outcomes


def run_share(config: Config, name: str, share: Share) -> None:
    """Do one worker's share of a stage that samples or scores.

    Workers may run at the same time on several machines that share the run directory. Each
    publishes its shards and completes nothing. The stage's own command afterwards finds all shards,
    makes the shards that a failed worker did not make, and completes the artifact.
    """
    # All workers hold the lock together. The stage's own command needs it alone, so it waits for no
    # worker: it is refused while one runs.
    context = StageContext(config, stage_named(name), share=share)
    load_hashes(config)
    with locked(config.run.dir, shared=True):
        _require_parents(context, ())
        assert context.inputs is not None, "hash models before other workers wait for the lock"
        with storage_errors(config.run.dir), (config.run.dir / ".lock-workers").open("w") as handle:
            # The first worker moves an outdated artifact aside. The others wait here, and then find
            # that this is done.
            fcntl.flock(handle, fcntl.LOCK_EX)
            supersede(context)
            context.folder.mkdir(parents=True, exist_ok=True)
        if reusable(context) is not None:
            context.log("reused")
            return
        context.log(f"{context.stage.summary} Worker {share.index} of {share.count}.")
        with storage_errors(context.folder):
            context.stage.run(context)
        context.log(f"worker {share.index} of {share.count} is done")


def follow(config: Config, name: str, index: int, count: int) -> None:
    """Run this machine's ranks of a stage that trains, until the stage is done.

    Machine 0 runs the stage's own command on the same run directory.

    Args:
        config: The configuration.
        name: The stage.
        index: Which machine this is, from 1.
        count: How many machines there are.
    """
    context = StageContext(config, stage_named(name))
    # The only training of evaluate is the equal-compute baseline, which is an SFT.
    folder = context.folder / LONGER if name == "evaluate" else context.folder
    # No lock here: machine 0 holds it for all of them.
    print_line(f"{name}: machine {index} of {count} follows the first one")
    follow_trainings(
        folder,
        "distill" if name == "distill" else "sft",
        config.distill if name == "distill" else config.sft,
        index=index,
        count=count,
        is_done=lambda: inspect(context)[0] == "done",
    )


def status(config: Config) -> list[dict[str, Any]]:
    """Return a row for each stage, without changing anything.

    A row has name, state, progress (unit, done, total and part, if it is begun), rows, seconds,
    fingerprint and a note: the keys that differ, or what is damaged.
    """
    rows: list[dict[str, Any]] = []
    identities: dict[str, ModelIdentity] = {}
    load_hashes(config)
    for stage in STAGES:
        if is_needed(stage, config):
            rows.append(_status_row(config, stage, identities))
    return rows


def load_hashes(config: Config) -> None:
    """Take over the hashes of files that earlier commands of the run have read.

    From now on a bar is shown where many bytes are read all the same.
    """
    HASHES.show_with(_reading_bar)
    if not config.run.rehash:
        HASHES.load(config.run.dir / STORE)


@contextlib.contextmanager
def _reading_bar(num_bytes: int) -> Iterator[Callable[[int], None]]:
    title = "reading files for their checksums"
    # On stderr: lopd status --json comes here too.
    with progress(title, total=num_bytes, unit="bytes", on_stderr=True) as bar:
        yield bar.advance


def _status_row(
    config: Config, stage: Stage, identities: dict[str, ModelIdentity]
) -> dict[str, Any]:
    """Return what is known of a stage, which another process may be running or moving now."""
    note = ""
    for look in range(_LOOKS):
        # Each look has a context of its own, which remembers nothing of the one before.
        try:
            return _row_of(StageContext(config, stage, identities))
        except (LopdError, OSError) as error:
            note = " ".join(str(error).split())
        # A folder that is moved between two readings is whole again at the next look. What stays
        # is damage.
        if look + 1 < _LOOKS:
            time.sleep(_BETWEEN_LOOKS_S)
    # One damaged stage must not hide the state of the others.
    return {
        "name": stage.name,
        "state": "damaged",
        "progress": None,
        "rows": 0,
        "seconds": None,
        "fingerprint": "",
        "note": note,
    }


def _row_of(context: StageContext) -> dict[str, Any]:
    """Return the row of one look. LopdError, OSError: A file is damaged, or was just moved."""
    progress: Progress | None = None
    state, differs = inspect(context)
    manifest = read_manifest(context.folder) if state != "absent" else None
    num_rows = manifest.rows if manifest is not None else 0
    if state == "partial":
        progress = progress_of(context)
        # The manifest of an artifact that is being made does not list its newest shards.
        num_rows = published_rows(context.folder)
    return {
        "name": context.stage.name,
        "state": state,
        "progress": None if progress is None else {**asdict(progress), "text": str(progress)},
        "rows": num_rows,
        "seconds": _read_table(context.folder / _SECONDS).get("seconds"),
        "fingerprint": manifest.fingerprint[:12] if manifest else "",
        "note": f"differs in {', '.join(differs[:4])}" if differs else "",
    }


@contextlib.contextmanager
def locked(run_dir: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the run directory for this process. The kernel frees it however the process ends.

    Args:
        run_dir: The run directory, which is made if it is missing.
        shared: Let other processes hold it as well, if they share it too.

    Raises:
        ArtifactError: Another process holds it, or it cannot be locked.
    """
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        # Children do not inherit it (O_CLOEXEC): a server that outlives us must not hold the lock.
        handle = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            # The lock itself does not tell who holds it, so each holder writes its number into the
            # file.
            holder = os.pread(handle, 32, 0).decode() or "unknown"
            raise ArtifactError(
                f"in use by process {holder.strip()}",
                where=str(run_dir),
                remedy="wait until that process ends, or set run.dir to another folder",
            ) from None
        except OSError as error:
            raise ArtifactError(
                f"the run directory cannot be locked ({error.strerror})",
                where=str(run_dir),
                remedy="set run.dir to a folder on a file system that has locks",
            ) from None
        # For the message of the next process that finds it locked.
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _complete_stages(config: Config, identities: dict[str, ModelIdentity]) -> list[str]:
    """Return the stages whose artifacts are complete and made from this configuration."""
    names: list[str] = []
    for stage in STAGES:
        # A damaged one stops the command when it is run.
        with contextlib.suppress(LopdError):
            context = StageContext(config, stage, identities)
            if is_needed(stage, config) and inspect(context)[0] == "done":
                names.append(stage.name)
    return names


def _run_stage(context: StageContext, verified: Collection[str]) -> Outcome:
    """Run or reuse one stage.

    Args:
        context: The stage.
        verified: Stages whose files this command has written or checked already.
    """
    start = time.monotonic()
    # In this order: what a stage reads is checked before anything of its own is moved, and what is
    # in the way is moved before anything is written.
    _require_parents(context, verified)
    supersede(context)
    manifest = reusable(context)
    if manifest is not None:
        # A reused artifact is only as good as its files. A changed one is named with the remedy.
        verify(context.folder, manifest)
        print_line(f"{context.stage.name}: reused", context.folder / "log.txt")
        return Outcome(context.stage.name, "reused", time.monotonic() - start)
    with storage_errors(context.folder):
        context.folder.mkdir(parents=True, exist_ok=True)
    context.log(context.stage.summary)
    # A stage that goes on may have all its shards. Then it needs no server.
    if not (context.folder / MANIFEST).exists():
        context.prepare_server()
    # A log, or a library, may also find the disk full.
    with storage_errors(context.folder):
        context.stage.run(context)
    seconds = time.monotonic() - start
    # Outside the manifest, which says only what decides the artifact.
    publish_json(context.folder / _SECONDS, {"seconds": seconds})
    context.log(f"done in {seconds:.1f} s")
    return Outcome(context.stage.name, "done", seconds)


def _require_parents(context: StageContext, verified: Collection[str]) -> None:
    """Check the stages that this one reads, before anything is moved or written.

    Raises:
        ArtifactError: A stage is not done, or a file has changed since it was written.
        ConsistencyError: The stages differ only in their teacher.
    """
    for name in context.stage.parents(context.config):
        # A stage run alone never runs its parents: that may take days, and was not asked for.
        parent = context.of_stage(stage_named(name))
        state, differs = inspect(parent)
        if state != "done":
            _refuse_another_teacher(context, parent)
            reason = f"is {state}"
            if differs:
                reason = f"was made with other settings ({', '.join(differs)})"
            raise ArtifactError(
                f"{context.stage.name} needs {name}, which {reason}",
                where=str(parent.folder),
                remedy=f"run lopd {name} CONFIG, or lopd run CONFIG",
            )
        # Checksums of a parent are read once in a command, although several stages may read from
        # it.
        if name not in verified:
            verify(parent.folder, read_manifest(parent.folder))


def _refuse_another_teacher(context: StageContext, parent: StageContext) -> None:
    """Raise ConsistencyError where only ``models.teacher`` keeps a stage from running.

    "Made from other knobs" would hide the one mistake that the method does not forgive.
    """
    # Follow the outdated parents to the stage where the difference begins.
    cause = parent
    while True:
        _, differs = inspect(cause)
        outdated = [key.removeprefix("parent ") for key in differs if key.startswith("parent ")]
        if not outdated:
            break
        cause = context.of_stage(stage_named(outdated[0]))
    only_teacher = differs and all(key.startswith("models.teacher") for key in differs)
    if "teacher" in context.stage.models and only_teacher:
        raise ConsistencyError(
            f"{context.config.models.teacher} is not the teacher that made the artifact "
            f"of {cause.stage.name}, from which {parent.stage.name} was made",
            where="models.teacher",
            limit=f"exactly {read_manifest(cause.folder).models['teacher'].path}",
            remedy="set models.teacher to that teacher, or run lopd run CONFIG to make all "
            "stages with this teacher",
        )


def report_changes(config: Config) -> None:
    """Print which keys differ from the configuration that this run directory was last made from."""
    # Stages decide by their manifests what runs again. This only tells the user beforehand.
    former = _read_table(config.run.dir / _CONFIG)
    if not former:
        return
    current = config_record(config)
    # A knob that is newer than the file had its default.
    former = {key: default_of(key) for key in current} | former
    changed = sorted(key for key in former if current.get(key) != former[key])
    if changed:
        shown = "; ".join(f"{key}: {former.get(key)} -> {current.get(key)}" for key in changed[:12])
        more = " ..." if len(changed) > 12 else ""
        print_line(
            f"this run directory was made from another config: {shown}{more}",
            config.run.dir / "log.txt",
        )


def config_record(config: Config) -> dict[str, Any]:
    """Return the knobs that decide results, flat, without secrets."""
    # Folders of the run and the speed of a machine decide no result. Models are named by path here:
    # hashing them would take too long for a line on the screen.
    sections = [name for name in type(config).model_fields if name not in ("run", "models")]
    keys = result_keys(config, sections)
    keys["run.seed"] = config.run.seed
    keys["models.teacher"] = str(config.models.teacher)
    keys["models.student"] = str(config.models.student)
    # It is published, and shown where it differs.
    plain: dict[str, Any] = json.loads(json.dumps(scrubbed(keys)))
    return plain


def _read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file that decides nothing: empty where it is missing or damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
