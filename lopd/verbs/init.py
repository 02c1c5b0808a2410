"""``lopd init``: write a configuration for a user's own models and prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lopd.errors import ConfigError

EPILOG = (
    "Example:  lopd init mine --teacher models/Qwen3-8B --student models/Qwen3-0.6B-Base "
    "--sft sft.jsonl --opd opd.jsonl --eval eval.jsonl"
)
FILE = "config.toml"
# What a configuration has in place of an option that was not given. The paths are in FOLDER.
_PLACES = {
    "teacher": "models/teacher",
    "student": "models/student",
    "sft": "sft.jsonl",
    "opd": "opd.jsonl",
    "eval": "eval.jsonl",
}
# The settings that differ between a machine with a GPU and one without.
_DEVICES = {
    "gpu": {
        "dtype": "bfloat16",
        "mem_fraction": "0.8",
        "max_tokens": "16384",
        "why": "of weights and activations, in servers and trainer",
    },
    "cpu": {
        "dtype": "float32",
        "mem_fraction": "0.1",
        "max_tokens": "8192",
        "why": "on a CPU, where it is as fast as bfloat16 and exact",
    },
}
# A text and no generated table: the file is for people, and half of it is comments.
_TEMPLATE = """\
# Written by lopd init. Paths are relative to this file's folder. Every knob that is not here has a
# default: lopd knobs lists them. A line may also be changed for one run:
#     lopd run config.toml distill.num_steps=8

[run]
dir = "run" # everything that the run writes
seed = 17

[models] # Hugging Face folders with one tokenizer, or hf://org/name@revision
teacher = {teacher}
student = {student} # the base model that becomes the student

[task]
name = {task} # how answers are judged: math, code, plain, or open_ended: not at all (docs/tasks.md)

# JSONL, one object a line: {{"question": "...", "answer": "..."}}, with prompt_id if there are ids.
# Another form: format = "gsm8k", or format = "fields" with fields = {{ question = "COLUMN" }}.
[prompts]
sft = {{ file = {sft} }} # the teacher answers these, and the student learns from it
opd = {{ file = {opd} }} # the student answers these, and the teacher scores each token
eval = {{ file = {eval} }} # held out, with answers; none of them may be in the two others

[sglang] # the servers of teacher and student
dtype = "{dtype}" # {why}
context_length = {context} # the most tokens of a prompt and its response together
mem_fraction = {mem_fraction} # of the device memory, for weights and KV cache
tensor = 1 # the GPUs of one server
replicas = 1 # the number of servers

[demonstrate] # the teacher answers prompts.sft
temperature = 1.0
max_new_tokens = {new_tokens} # the prompt must fit in what is left of context_length

[sft] # the student learns the demonstrations, so that both write alike
num_steps = {sft_steps} # of batch_size responses each
batch_size = {sft_batch}
dtype = "{dtype}"
max_tokens_per_microbatch = {max_tokens} # lower it where memory is short
checkpoint_every = 50
parallel = {{ ranks = 1, tensor = 1 }} # the GPUs, and how they divide the model
optimizer = {{ {sft_optimizer} }} # by the student's size: see [distill]

[rollout] # the student answers prompts.opd, once
temperature = 1.0
max_new_tokens = {new_tokens}
samples_per_prompt = 1

[score] # the teacher's log-probability of each token, once; nothing must be set
# top_k = 8 # for the objective that is commented out in [distill]

[score.forward]
dtype = "{dtype}"

[distill] # the student learns from the scores; the teacher is not needed any more
num_steps = {opd_steps} # of batch_size responses each
batch_size = {opd_batch}
dtype = "{dtype}"
max_tokens_per_microbatch = {max_tokens}
checkpoint_every = 50
sync_every = 0 # N: every N steps the weights go into a server, and prompts.eval are answered
parallel = {{ ranks = 1, tensor = 1 }}
# A rule of thumb: 2e-6 (the paper's) for billions of parameters, 1e-4 for some millions, and up to
# 1e-3 with schedule = "cosine" below one million. {size}
optimizer = {{ {distill_optimizer} }}
# Few rollouts carry a stronger signal with this top-K loss, which needs score.top_k = 8:
# objective = {{ loss = "top_k_reverse_kl" }}

[evaluate] # all models answer prompts.eval; enabled = false: none does
temperature = 0.6
top_p = 0.95
max_new_tokens = {new_tokens}
samples_per_prompt = 1
equal_compute_baseline = false # true: also train a student by SFT for as long, to compare

[launch] # what lopd doctor, lopd plan and lopd launch expect of the machine
device = "{device}"
"""


def init(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder for config.toml. It is made if it is missing.",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="The teacher: a Hugging Face folder or hf://org/name@main.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="The base student: a folder or hf://org/name@main.")
    ] = None,
    sft: Annotated[str | None, typer.Option(help="JSONL or Parquet prompts for SFT.")] = None,
    opd: Annotated[str | None, typer.Option(help="JSONL or Parquet prompts for rollouts.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="JSONL or Parquet held-out prompts with answers.")
    ] = None,
    task: Annotated[str, typer.Option(help="The task that judges answers.")] = "math",
    device: Annotated[
        str | None,
        typer.Option(help="gpu or cpu. If absent, gpu where nvidia-smi is installed."),
    ] = None,
) -> None:
    """Write a complete, commented config.toml for your own models and prompts. It asks nothing.

    Reads the number of prompts and the sizes of the models, and writes FOLDER/config.toml alone.
    What was given must exist. What was not given gets a place in FOLDER, and the command says what
    is to be put there.
    """
    given = {"teacher": teacher, "student": student, "sft": sft, "opd": opd, "eval": evaluation}
    # Everything that the user has given is checked before the file is written.
    _check(folder, given, task)
    device = device or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    if device not in _DEVICES:
        raise ConfigError(
            f"--device {device!r:.40} is not a known kind of machine",
            where="lopd init",
            limit="gpu or cpu",
            remedy="give one of these, or leave the option out",
        )
    from lopd.artifacts import publish_bytes

    publish_bytes(folder / FILE, config_text(folder, given, task, device).encode())
    typer.echo(f"wrote {folder / FILE} for a machine with a {device.upper()}")
    missing = [name for name, value in given.items() if value is None]
    for name in missing:
        place = folder / _PLACES[name]
        # The user may have put it there already.
        if not place.exists():
            typer.echo(f"missing: {place} (or give --{name}, or change the line in {FILE})")
    _print_next_steps(folder, given)


def _print_next_steps(folder: Path, given: dict[str, str | None]) -> None:
    """Print the commands that lead from the new file to a run, in their order."""
    remote = any(value is not None and value.startswith("hf://") for value in given.values())
    # Only models and prompts on the hub need a download.
    steps = [*(["fetch"] if remote else []), "check", "plan", "run"]
    purposes = {
        "fetch": "downloads what the configuration names on the hub",
        "check": "finds every mistake before anything starts",
        "plan": "says how much memory and time it takes",
        "run": "runs all stages; the same command continues after a kill",
    }
    typer.echo("next:")
    for step in steps:
        typer.echo(f"  lopd {step} {folder / FILE}    {purposes[step]}")


def _check(folder: Path, given: dict[str, str | None], task: str) -> None:
    """Refuse to overwrite a configuration, and what was given and is not there."""
    from lopd.tasks import get_task

    if (folder / FILE).exists():
        raise ConfigError(
            "the file exists already, and lopd init overwrites nothing",
            where=str(folder / FILE),
            remedy="give another FOLDER, or remove the file",
        )
    # It raises for a name that no task has.
    get_task(task, {})
    for name, value in given.items():
        # A name on the hub stands for a folder that lopd fetch fills.
        if value is None or value.startswith("hf://"):
            continue
        path = Path(value).expanduser()
        if not path.exists():
            raise ConfigError(
                "there is no such file or folder",
                where=f"--{name} {value}",
                remedy=f"correct the path, or leave --{name} out and put it there later",
            )
        if name in ("teacher", "student") and not (path / "config.json").is_file():
            raise ConfigError(
                "this is not a Hugging Face folder, because it has no config.json",
                where=f"--{name} {value}",
                remedy="give the folder that has config.json, safetensors and tokenizer.json",
            )


def config_text(folder: Path, given: dict[str, str | None], task: str, device: str) -> str:
    """Return the text of the configuration.

    Args:
        folder: The folder of the configuration.
        given: The values of --teacher, --student, --sft, --opd and --eval, or None.
        task: The name of the task.
        device: "gpu" or "cpu".
    """
    from lopd.planning.first_values import batch_and_steps

    values = {name: _quoted(folder, given[name] or _PLACES[name], given[name]) for name in _PLACES}
    numbers: dict[str, int] = {}
    for name in ("sft", "opd"):
        # The steps follow from the number of prompts. A fixed number would pass over a small file
        # many times.
        numbers[f"{name}_batch"], numbers[f"{name}_steps"] = batch_and_steps(_num_rows(given[name]))
    models = {role: _model_path(folder, role, given[role]) for role in ("teacher", "student")}
    return _TEMPLATE.format(
        **values,
        **numbers,
        **_of_models(models),
        **_DEVICES[device],
        device=device,
        task=json.dumps(task),
    )


def _model_path(folder: Path, role: str, given: str | None) -> Path:
    # A name on the hub is kept as it is: the shapes of public models are known by their names.
    return folder / _PLACES[role] if given is None else Path(given).expanduser()


def _of_models(models: dict[str, Path]) -> dict[str, str]:
    """Return what follows from the sizes of the models, as far as these are known.

    Args:
        models: The folders of teacher and student, or their names on the hub.
    """
    from lopd.planning.first_values import CONTEXT, learning_rates, shape_of
    from lopd.planning.parameters import total_and_active

    # None for a model that is not here yet and is no public one.
    shapes = {role: shape_of(path) for role, path in models.items()}
    # Both models read a prompt and its response, so the one with fewer positions decides.
    positions = [shape.max_position_embeddings for shape in shapes.values() if shape is not None]
    context = min([CONTEXT, *positions])
    student = shapes["student"]
    count = None if student is None else total_and_active(student)[0]
    rates = learning_rates(count)
    decay = "" if rates.schedule == "constant" else f', schedule = "{rates.schedule}"'
    size = "unknown" if count is None else f"{count:,} parameters"
    return {
        "context": str(context),
        # The other half of the context is for the prompt.
        "new_tokens": str(max(1, context // 2)),
        "sft_optimizer": f"lr = {rates.sft}{decay}",
        "distill_optimizer": f"lr = {rates.distill}{decay}",
        "size": f"Size of the student: {size}.",
    }


def _quoted(folder: Path, value: str, given: str | None) -> str:
    """Return a path as a TOML string, relative to the folder where it is inside of it."""
    if given is not None and not given.startswith("hf://"):
        path = Path(given).expanduser().resolve()
        # A path inside the folder stays right when the folder is moved. A path outside must be
        # absolute.
        root = folder.resolve()
        value = str(path.relative_to(root) if path.is_relative_to(root) else path)
    # A JSON string is a TOML string too.
    return json.dumps(value, ensure_ascii=False)


def _num_rows(given: str | None) -> int | None:
    """Return the number of prompts in a JSONL or Parquet file; None if it is not known yet."""
    path = Path(given or "").expanduser()
    if given is None or not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    # Blank lines are no rows, for the reader of prompts neither.
    with path.open("rb") as handle:
        return sum(bool(line.strip()) for line in handle)
