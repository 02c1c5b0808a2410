"""``lopd evaluate``: the stage of a run, or any checkpoint on any prompt set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.config import config_from, load_config
from lopd.errors import ConfigError, LopdError
from lopd.verbs.launch import Node, follows

if TYPE_CHECKING:
    from lopd.config import Config

EPILOG = "Example:  lopd evaluate --model Qwen3-8B --prompts aime25.jsonl --format aime_2025 --preset paper_math --out eval   Its knobs:  lopd knobs evaluate"


def evaluate(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="TOML file of a run. With --model it may be left out.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of knobs, in TOML syntax: sglang.tensor=4",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder; with CONFIG also base, sft, sft_longer, distilled or teacher."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with answers: a JSONL or Parquet file, or a folder. Absent: prompts.eval of CONFIG."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Whose columns they have: gsm8k, aime_2024, ... (docs/tasks.md). Absent: our own.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Who verifies: math, code, plain, ... Absent: math, or that of CONFIG."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper_math or paper_code: the paper's sampling.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Only the first ones.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; the same command goes on there after a kill."),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Responses per shard: what is published at a time.")
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False,
    node: Node = None,
) -> None:
    """Stage: pass@1 on held-out prompts and reverse KL to the teacher, for teacher, base, SFT,
    longer SFT and distilled student.

    Reads the models of the run and prompts.eval. Publishes answers, scores, accuracy and reverse KL
    of each model in run.dir/evaluate, with manifest.json and logs. The stages it reads from must be
    complete. It is reused if nothing it depends on has changed; after a kill the same command goes
    on.

    With --model, CONFIG is not needed: evaluates any checkpoint on any prompts into --out: avg@k,
    pass@k, bootstrap intervals, lengths, and JSONL of problems and transcripts.
    """
    if model is None:
        if (
            node is not None
            and config is not None
            and follows("evaluate", Path(config), overrides or [], node)
        ):
            return
        _run_stage(
            config,
            overrides or [],
            {
                "--prompts": prompts,
                "--format": form,
                "--task": task,
                "--preset": preset,
                "--out": out,
            },
        )
        return
    given = list(overrides or [])
    if config is not None and "=" in config:
        given, config = [config, *given], None
    flags = {
        "prompts.eval.format": form,
        "task.name": task,
        "evaluate.preset": preset,
        "prompts.eval.num_prompts": num_prompts,
    }
    loaded = _configuration(
        config,
        model,
        prompts,
        out,
        [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None],
        given,
    )
    from lopd import pipeline
    from lopd.checks import CHECKS
    from lopd.stages.evaluate_checkpoint import evaluate_model

    for name in ("student", "server", "folders"):
        for finding in CHECKS[name][0](loaded):
            if isinstance(finding, LopdError):
                raise finding
    own_length = config is not None or any(key.startswith("sglang.context_length") for key in given)
    with pipeline.locked(loaded.run.dir):
        summary = evaluate_model(loaded, fit_context=not own_length, shard_size=shard_size)
    if as_json:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        for line in _lines(summary, loaded.run.dir):
            typer.echo(line)


def _run_stage(config: str | None, overrides: list[str], useless: dict[str, Any]) -> None:
    wrong = [name for name, value in useless.items() if value is not None]
    if config is None or wrong:
        what = f"{wrong[0]} goes with --model" if wrong else "missing argument 'CONFIG', or --model"
        remedy = "give a TOML file, for example: lopd evaluate examples/tiny_moe.toml; or --model FOLDER --prompts FILE --out FOLDER"
        raise ConfigError(what, where="lopd evaluate", remedy=remedy)
    loaded = load_config(Path(config), overrides)
    from lopd import checks, pipeline
    from lopd.report.console import say, show_summary
    from lopd.summary import FILE

    checks.check_all(loaded, stage="evaluate")
    pipeline.run(loaded, only=("evaluate",))
    show_summary(json.loads((loaded.run.dir / FILE).read_text(encoding="utf-8")))
    say(f"everything is in {loaded.run.dir}")


def _configuration(
    config: str | None,
    model: str,
    prompts: Path | None,
    out: Path | None,
    flags: list[str],
    overrides: list[str],
) -> Config:
    """The configuration of an evaluation: this model as teacher and student, these prompts, this
    folder.
    """
    if out is None:
        raise ConfigError(
            "--out is missing", where="lopd evaluate", remedy="give a new folder for the results"
        )
    if prompts is None and config is None:
        raise ConfigError(
            "--prompts is missing",
            where="lopd evaluate",
            remedy="give a JSONL or Parquet file with prompts and answers",
        )
    folder = _model_folder(config, model)
    settings = [
        f"run.dir={_quoted(out)}",
        f"models.student={_quoted(folder)}",
        f"models.teacher={_quoted(folder)}",
    ]
    if prompts is not None:
        settings.append(f"prompts.eval.file={_quoted(prompts)}")
    if config is not None:
        return load_config(Path(config), [*settings, *flags, *overrides])
    unused = {"num_prompts": 1}
    table: dict[str, Any] = {
        "task": {"name": "math"},
        "prompts": {"sft": dict(unused), "opd": dict(unused), "eval": {}},
    }
    return config_from(
        table,
        [*settings, *flags, *overrides],
        where="lopd evaluate",
        base=Path("lopd-evaluate.toml"),
    )


def _model_folder(config: str | None, model: str) -> Path:
    """The folder itself, or the one of a run's model."""
    if Path(model).is_dir() or config is None:
        return Path(model)
    from lopd.stages.context import StageContext
    from lopd.stages.evaluate import models_of
    from lopd.stages.order import stage_named

    context = StageContext(load_config(Path(config)), stage_named("evaluate"))
    return models_of(context).get(model, Path(model))


def _quoted(path: Path) -> str:
    return json.dumps(str(path.expanduser().absolute()), ensure_ascii=False)


def _lines(summary: dict[str, Any], folder: Path) -> list[str]:
    low, high = summary["interval"]
    samples, tokens = summary["samples_per_problem"], summary["response_len_quantiles"]
    passes = ", ".join(f"pass@{k} {100 * share:.1f}%" for k, share in summary["pass_at"].items())
    lines = [
        f"avg@{samples}  {100 * summary['mean']:.1f}%  (95%: {100 * low:.1f} to {100 * high:.1f}, over {summary['num_problems']} problems)",
        passes,
        f"tokens of a response: mean {summary['response_len']:,.0f}, median {tokens['0.5']:,.0f}, longest {tokens['1']:,.0f}; "
        f"cut off {100 * summary['truncated_share']:.1f}%",
    ]
    if summary["reasons"]:
        lines.append(
            "wrong: "
            + ", ".join(f"{count} {reason}" for reason, count in summary["reasons"].items())
        )
    return [*lines, f"everything is in {folder}"]
