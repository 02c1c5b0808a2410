"""``lopd evaluate``: the stage of a run, or any checkpoint on any prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.config import config_from, load_config
from lopd.config.hub import PREFIX
from lopd.errors import ConfigError, LopdError
from lopd.verbs.arguments import Overrides, input_path, options_named
from lopd.verbs.launch import Node, run_as_follower
from lopd.verbs.pipeline import run_stages

if TYPE_CHECKING:
    from lopd.config import Config

EPILOG = (
    "Example:  lopd evaluate --model Qwen3-8B --prompts aime25.jsonl --format aime_2025 "
    "--preset paper_math --out eval   Its knobs:  lopd knobs evaluate"
)


# The options that are knobs under another name.
_OPTIONS = {
    "prompts.eval.format": "--format",
    "task.name": "--task",
    "evaluate.preset": "--preset",
    "prompts.eval.num_prompts": "--num-prompts",
}
# Text and not a path, because the first override may land here (see below).
RunConfig = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="TOML file of a run. With --model it may be left out.",
        show_default=False,
    ),
]
# A name of the run, such as distilled, saves the user from knowing where its folder is.
Model = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face folder of the model to evaluate. With CONFIG it may also be base, sft, "
        "sft_longer, distilled or teacher."
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Prompts with answers: a JSONL or Parquet file, or a folder of them. If absent, "
        "prompts.eval of CONFIG."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="The data set whose columns the prompts have: gsm8k, aime_2024, ... (docs/tasks.md). "
        "If absent, the columns of lopd itself.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="The task whose verifier judges the answers: math, code, plain, ... open_ended has "
        "none. If absent, that of CONFIG, or math."
    ),
]
# The paper's sampling: temperature 0.6, top-p 0.95, 32 or 4 answers to each problem.
Preset = Annotated[
    str | None, typer.Option(help="Sampling settings of the paper: paper_math or paper_code.")
]
NumPrompts = Annotated[
    int | None, typer.Option(min=1, help="Use only this number of prompts, from the first on.")
]
# It holds the answers too, so that other options of the verifier need no sampling.
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results. After a kill, the same command continues there."),
]
# After a kill, the answers of an unfinished shard are sampled again.
ShardSize = Annotated[
    int, typer.Option(min=1, help="Number of responses that are published at a time.")
]
SummaryAsJson = Annotated[
    bool, typer.Option("--json", help="Print summary.json instead of a few lines.")
]


def evaluate(
    config: RunConfig = None,
    overrides: Overrides = None,
    model: Model = None,
    prompts: Prompts = None,
    form: Format = None,
    task: TaskName = None,
    preset: Preset = None,
    num_prompts: NumPrompts = None,
    out: Out = None,
    shard_size: ShardSize = 64,
    as_json: SummaryAsJson = False,
    node: Node = None,
) -> None:
    """Stage: pass@1 on held-out prompts and reverse KL to the teacher, for each model of the run.

    The models are the teacher, the base student, the SFT student and the distilled student, and
    with evaluate.equal_compute_baseline the SFT student trained longer. A task without a verifier
    (open_ended) has no pass@1: the lengths of the answers stand in its place.

    Reads the models of the run and prompts.eval. Publishes answers, scores, accuracy and reverse KL
    of each model in run.dir/evaluate, with manifest.json and logs. The stages that it reads from
    must be complete. The stage is reused if nothing that it depends on has changed. After a kill,
    the same command continues.

    With --model, CONFIG is not needed. The command then evaluates any checkpoint on any prompts. It
    writes avg@k, pass@k, 95% intervals, lengths, and JSONL files of problems and transcripts
    into --out.
    """
    given = list(overrides or [])
    if model is None:
        # These options describe an evaluation outside a run. A run has them in its configuration.
        useless = {
            "--prompts": prompts,
            "--format": form,
            "--task": task,
            "--preset": preset,
            "--out": out,
        }
        _run_stage(config, given, useless, node)
        return
    # Both positional arguments may be left out, so the first override can land in CONFIG's place.
    if config is not None and "=" in config:
        given.insert(0, config)
        config = None
    flags = {
        "prompts.eval.format": form,
        "task.name": task,
        "evaluate.preset": preset,
        "prompts.eval.num_prompts": num_prompts,
    }
    typed = _typed_options(flags, has_prompts=prompts is not None, has_out=out is not None)
    # JSON strings and numbers are TOML values too. What the user overrides comes last and wins.
    settings = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    # A context length that the user has chosen stays. Otherwise the longest prompt and the longest
    # answer decide.
    has_own_length = config is not None or any(
        key.startswith("sglang.context_length") for key in given
    )
    # From here on the evaluation is a configuration like any other.
    with options_named(typed):
        loaded = _configuration(config, model, prompts, out, [*settings, *given])
        _evaluate_model(loaded, shard_size, fit_context=not has_own_length, as_json=as_json)


def _typed_options(flags: dict[str, Any], *, has_prompts: bool, has_out: bool) -> dict[str, str]:
    """Return the options that the user has typed, by the knobs that they set.

    Args:
        flags: The values of the options in _OPTIONS, by their knobs. None was not typed.
        has_prompts: Whether --prompts was typed.
        has_out: Whether --out was typed.
    """
    typed = {
        "models.student": "--model",
        # A name that is not the user's: a configuration must name a teacher.
        "models.teacher": "--model",
        **{key: _OPTIONS[key] for key, value in flags.items() if value is not None},
    }
    if has_out:
        typed["run.dir"] = "--out"
    if has_prompts:
        # An error may name the file or the table that it stands in.
        typed["prompts.eval.file"] = "--prompts"
        typed["prompts.eval"] = "--prompts"
    return typed


def _run_stage(
    config: str | None, overrides: list[str], useless: dict[str, Any], node: str | None
) -> None:
    """Run the evaluate stage of a run.

    Args:
        config: The TOML file. None if it was not given.
        overrides: Overrides of knobs.
        useless: The options that need --model, and their values.
        node: The value of --node.
    """
    is_follower = (
        config is not None
        and node is not None
        and run_as_follower("evaluate", Path(config), overrides, node)
    )
    if is_follower:
        return
    # Silently ignored options would let a user believe in the results of other prompts.
    wrong = [name for name, value in useless.items() if value is not None]
    if config is None or wrong:
        raise ConfigError(
            f"{wrong[0]} can only be used with --model"
            if wrong
            else "missing argument 'CONFIG', or --model",
            where="lopd evaluate",
            remedy="give a TOML file, for example: lopd evaluate examples/tiny_moe.toml; "
            "or --model FOLDER --prompts FILE --out FOLDER",
        )
    loaded = load_config(Path(config), overrides)
    # The run leaves this stage out, and its summary would not show the metrics.
    if not loaded.evaluate.enabled:
        raise ConfigError(
            "evaluate.enabled is false: this run has no evaluation",
            where="lopd evaluate",
            remedy="add evaluate.enabled=true, or give --model, --prompts and --out",
        )
    # On machine 0, or on the only machine, the stage runs as `lopd run` runs it.
    run_stages(loaded, stage="evaluate")


def _evaluate_model(config: Config, shard_size: int, *, fit_context: bool, as_json: bool) -> None:
    """Evaluate one checkpoint and print the result."""
    from lopd import pipeline
    from lopd.checks import CHECKS
    from lopd.stages import evaluate_checkpoint

    # The other checks are about training, a teacher and a cache. None of them is here.
    for name in ("student", "server", "folders"):
        for finding in CHECKS[name][0](config):
            if isinstance(finding, LopdError):
                raise finding
    # Two commands that write into one folder would mix their shards.
    with pipeline.locked(config.run.dir):
        summary = evaluate_checkpoint.evaluate_model(
            config, fit_context=fit_context, shard_size=shard_size
        )
    if as_json:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        for line in _summary_lines(summary, config.run.dir):
            typer.echo(line)


def _configuration(
    config: str | None, model: str, prompts: str | None, out: Path | None, overrides: list[str]
) -> Config:
    """Return the configuration that evaluates one checkpoint.

    Args:
        config: The TOML file of a run, if there is one.
        model: The folder of the model, or the name of a model of the run.
        prompts: The prompts with answers. None takes those of the run.
        out: The folder for the results.
        overrides: Overrides of knobs, the user's own last.

    Raises:
        ConfigError: --out or --prompts is missing, or a setting is wrong.
    """
    # No default: results of several models would end in one folder.
    if out is None:
        raise ConfigError(
            "the option --out is missing",
            where="lopd evaluate",
            remedy="add --out with a new folder for the results",
        )
    if prompts is None and config is None:
        raise ConfigError(
            "the option --prompts is missing",
            where="lopd evaluate",
            remedy="add --prompts with a JSONL or Parquet file of prompts and answers",
        )
    folder = _model_folder(config, model)
    settings = [
        f"run.dir={_quoted(out)}",
        f"models.student={_quoted(folder)}",
        # A configuration must name a teacher. Nothing is asked of this one.
        f"models.teacher={_quoted(folder)}",
    ]
    if prompts is not None:
        is_on_hub = prompts.startswith(PREFIX)
        file = input_path(prompts) if is_on_hub else Path(prompts)
        settings.append(f"prompts.eval.file={_quoted(file)}")
    # In this order a user can override even the model's settings above.
    settings += overrides
    if config is not None:
        return load_config(Path(config), settings)
    # It must also say how many prompts sft and opd have, though neither stage runs.
    unused = {"num_prompts": 1}
    table: dict[str, Any] = {
        "task": {"name": "math"},
        "prompts": {"sft": dict(unused), "opd": dict(unused), "eval": {}},
    }
    # Relative paths are relative to the current folder, as if a file of this name were there.
    return config_from(table, settings, where="lopd evaluate", base=Path("lopd-evaluate.toml"))


def _model_folder(config: str | None, model: str) -> Path:
    """Return the folder of a model, which may be named as a model of the run."""
    # A name on the hub is a folder of this machine once it is downloaded.
    if model.startswith(PREFIX):
        return input_path(model)
    # A folder of the user's goes first, even one with the name of a model such as `sft`.
    if Path(model).is_dir() or config is None:
        return Path(model)
    from lopd.stages.context import StageContext
    from lopd.stages.evaluate import models_of
    from lopd.stages.order import stage_named

    context = StageContext(load_config(Path(config)), stage_named("evaluate"))
    return models_of(context).get(model, Path(model))


def _quoted(path: Path) -> str:
    """Return a path as a TOML string. It is absolute, because overrides count from CONFIG."""
    return json.dumps(str(path.expanduser().absolute()), ensure_ascii=False)


def _summary_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    """Return the lines on screen. Shares of summary.json become percentages."""
    tokens = summary["response_len_quantiles"]
    lines = [
        *_accuracy_lines(summary),
        f"tokens of a response: mean {summary['response_len']:,.0f}, "
        f"median {tokens['0.5']:,.0f}, longest {tokens['1']:,.0f}; "
        f"cut off {100 * summary['truncated_share']:.1f}%",
    ]
    # Why answers were wrong tells a bad model from a bad verifier or a wrong format.
    if summary.get("reasons"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["reasons"].items())
        lines.append(f"wrong: {reasons}")
    return [*lines, f"everything is in {folder}"]


def _accuracy_lines(summary: dict[str, Any]) -> list[str]:
    """Return avg@k and pass@k, or that there is none where the task has no verifier."""
    if "mean" not in summary:
        task = summary["task"]["name"]
        return [f"no accuracy over {summary['num_problems']} problems: {task} has no verifier"]
    # The interval is over problems, not over answers to one problem.
    low, high = summary["interval"]
    # The share of problems that k answers solve at least once.
    passes = ", ".join(f"pass@{k} {100 * share:.1f}%" for k, share in summary["pass_at"].items())
    return [
        f"avg@{summary['samples_per_problem']}  {100 * summary['mean']:.1f}%  "
        f"(95%: {100 * low:.1f} to {100 * high:.1f}, over {summary['num_problems']} problems)",
        passes,
    ]
