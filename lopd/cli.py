"""The command line. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lopd import __version__
from lopd.config import Config, InvalidConfig, known_keys, load_config, nearest_key
from lopd.errors import EXIT_CODE, ConfigError, LopdError
from lopd.verbs.audit import audit
from lopd.verbs.cache import app as cache_app
from lopd.verbs.evaluate import EPILOG as EVALUATE_EPILOG
from lopd.verbs.evaluate import evaluate
from lopd.verbs.launch import launch, with_place
from lopd.verbs.parity import parity
from lopd.verbs.plan import plan
from lopd.verbs.prepare import doctor, fetch, show_findings
from lopd.verbs.prompts import app as prompts_app

_EPILOG = "First steps:  lopd check CONFIG,  then  lopd run CONFIG.   An example: examples/tiny_moe.toml.   Every knob: lopd knobs"
app = typer.Typer(
    name="lopd",
    help="Distil a large reasoning teacher into a student by Lightning OPD: SGLang samples and scores, Megatron-Core learns from the cached scores.",
    epilog=_EPILOG,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="TOML file. Relative paths in it, and in overrides, are relative to its folder.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of knobs, in TOML syntax: distill.num_steps=8 task.name=register_arithmetic",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command(
    epilog="Example:  lopd run examples/tiny_moe.toml distill.num_steps=8 run.dir=/tmp/trial"
)
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run all stages: demonstrate, sft, rollout, score, distill, evaluate, export.

    Everything that lopd check looks at is checked before anything starts. Stages whose inputs have
    not changed are reused; after a kill or an error the same command goes on from what is
    published. Ends with a table of accuracies and of seconds per stage; everything is in run.dir,
    summary.json first.
    """
    loaded = load_config(config, overrides or [])
    from lopd import checks, pipeline

    checks.check_all(loaded)
    pipeline.run(loaded)
    _finish(loaded)


def _finish(config: Config) -> None:
    from lopd.report.console import say, show_summary
    from lopd.summary import FILE

    show_summary(json.loads((config.run.dir / FILE).read_text(encoding="utf-8")))
    say(f"everything is in {config.run.dir}")


def _add_stage(name: str, summary: str) -> None:
    def verb(config: ConfigFile, overrides: Overrides = None) -> None:
        loaded = load_config(config, overrides or [])
        from lopd import checks, pipeline

        checks.check_all(loaded, stage=name)
        pipeline.run(loaded, only=(name,))
        _finish(loaded)

    reads, publishes = _STAGE_DATA[name]
    verb.__doc__ = (
        f"Stage: {summary}\n\nReads {reads}. Publishes {publishes} in run.dir/{name}, with manifest.json and logs.\n\n"
        "The stages it reads from must be complete. It is reused if nothing it depends on has changed; after a kill the same command goes on."
    )
    app.command(name=name, epilog=f"Its knobs:  lopd knobs {name}")(with_place(name, verb))


# names and sentences are repeated from lopd.stages so that --help imports nothing heavy; a test
# compares the two
STAGE_SUMMARIES = {
    "demonstrate": "The teacher, on SGLang, answers the SFT prompts.",
    "sft": "The base student, on Megatron-Core, learns the demonstrations.",
    "rollout": "The SFT student, on SGLang, answers each OPD prompt once.",
    "score": "The same teacher's log-probability of every response token, once, into the cache.",
    "distill": "The Lightning OPD update on Megatron-Core, with weight syncs into a running SGLang server.",
    "evaluate": "pass@1 on held-out prompts and reverse KL to the teacher, for teacher, base, SFT, longer SFT and distilled student.",
    "export": "The distilled student as a Hugging Face checkpoint, checked by loading it with transformers.",
}
_STAGE_DATA = {  # what it reads, what it publishes
    "demonstrate": ("models.teacher and prompts.sft", "the demonstrations (Parquet shards)"),
    "sft": (
        "models.student and the demonstrations (of demonstrate, or sft.demonstrations), or takes over sft.checkpoint",
        "the SFT student (model/) and checkpoints to resume from",
    ),
    "rollout": ("the SFT student and prompts.opd", "the rollouts (Parquet shards)"),
    "score": (
        "models.teacher and the rollouts",
        "the teacher cache (Parquet shards: the rollouts with teacher_logprobs)",
    ),
    "distill": (
        "the SFT student and the teacher cache (of score, or distill.cache)",
        "the distilled student (model/) and checkpoints to resume from",
    ),
    "evaluate": (
        "the models of the run and prompts.eval",
        "answers, scores, accuracy and reverse KL of each model",
    ),
    "export": ("the distilled student", "a Hugging Face folder (model/, or export.dir)"),
}
for _name, _summary in STAGE_SUMMARIES.items():
    if _name == "evaluate":  # has a second form, for any checkpoint
        app.command(name=_name, epilog=EVALUATE_EPILOG)(evaluate)
    else:
        _add_stage(_name, _summary)


app.command(
    epilog="Example:  lopd launch examples/tiny_moe.toml launch.device=cpu --on slurm --render /tmp/jobs"
)(launch)
app.add_typer(cache_app, name="cache")
app.add_typer(prompts_app, name="prompts")
app.command(
    epilog="Example:  lopd audit runs/tiny_moe/demonstrate --teacher examples/tiny_models/teacher --picture audit.png"
)(audit)
app.command(epilog="Example:  lopd parity examples/tiny_moe.toml --responses 16")(parity)
app.command(
    epilog="Example:  lopd plan examples/run_qwen3_8b.toml --gpus 8 --gpu h100-80gb --suggest"
)(plan)
app.command(epilog="Then:  lopd fetch CONFIG,  lopd check CONFIG,  lopd run CONFIG")(doctor)
app.command(epilog="Example:  lopd fetch examples/run_qwen3_8b.toml")(fetch)


@app.command(
    epilog="States: done, partial (goes on where it was), outdated (made from other knobs, or from a stage that is not done), absent, damaged."
)
def status(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tell of each stage whether it is done, partial, outdated, absent or damaged. Starts and
    changes nothing.
    """
    loaded = load_config(config, overrides or [])
    from lopd import pipeline
    from lopd.report.overview import status_table

    rows = pipeline.status(loaded)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        status_table(rows, loaded.run.dir)


@app.command(epilog="What lopd run checks too, before its first stage.")
def check(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find everything that is wrong at once, without starting or writing anything; exit code 2 if
    something is.

    Keys, types and bounds first; then models, tokenizers, layouts, prompts, demonstrations, servers
    and ports, folders and disk.
    """
    rows: list[dict[str, Any]]
    try:
        loaded = load_config(config, overrides or [])
    except InvalidConfig as error:
        rows = [
            {"name": "configuration", "ok": False, "finding": str(mistake)}
            for mistake in error.mistakes
        ]
    else:
        from lopd import checks

        rows = checks.as_rows(loaded)
    show_findings(rows, as_json=as_json)


@app.command(epilog="Example:  lopd knobs distill.optimizer")
def knobs(
    prefix: Annotated[
        str,
        typer.Argument(
            metavar="PREFIX", help="Only keys that start with this.", show_default=False
        ),
    ] = "",
) -> None:
    """List every knob of a config: key, default, type, bounds and meaning."""
    from lopd.report.knobs import knob_lines

    chosen = {key: field for key, field in known_keys().items() if key.startswith(prefix)}
    if not chosen:
        raise ConfigError(
            f"no knob starts with {prefix!r:.80}",
            where="lopd knobs",
            remedy=f"the nearest known key is {nearest_key(prefix)}",
        )
    for line in knob_lines(chosen):
        typer.echo(line)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lopd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_CODE)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, which typer would answer before servers and ranks
    are ended.
    """


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted


_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    1
]  # click's UsageError, from wherever typer has its click
_CIRCUMSTANCES = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.EMFILE,
        errno.ENOMEM,
    }
)


def _explain_usage(error: Any) -> LopdError:
    """What was typed wrongly, in one line; click would draw a box."""
    command = error.ctx.command_path if error.ctx is not None else "lopd"
    what = error.format_message().rstrip(".")
    option = getattr(error, "option_name", None) or ""
    remedy = f"see: {command} --help"
    if "=" in " ".join(sys.argv) and option.lstrip("-").partition(".")[0] in {
        key.partition(".")[0] for key in known_keys()
    }:
        remedy = f"overrides have no dashes: {option.lstrip('-')}=..."
    elif "CONFIG" in what:
        remedy = f"give a TOML file, for example: {command} examples/tiny_moe.toml"
    return LopdError(what[:1].lower() + what[1:], where=command, remedy=remedy)


def _fail(error: LopdError) -> NoReturn:
    from lopd.report.console import show_error

    show_error(error)
    sys.exit(EXIT_CODE)


def main() -> None:
    """Entry point: a LopdError, wrong usage and a full or forbidden disk are one line and exit code
    2; Ctrl-C and SIGTERM end every child first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # an ASCII terminal shows ? for what it cannot; it must not end a run
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] not in (["fetch"], ["doctor"]):  # nothing else uses the network
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        sys.exit(app(standalone_mode=False))
    except LopdError as error:
        _fail(error)
    except _USAGE_ERROR as error:
        _fail(_explain_usage(error))
    except OSError as error:
        if error.errno not in _CIRCUMSTANCES:
            raise
        remedy = "mend this, then run the same command again: what is published stays and is not repeated"
        _fail(
            LopdError(
                error.strerror or type(error).__name__,
                where=str(error.filename or "operating system"),
                remedy=remedy,
            )
        )
    except Interrupted:
        sys.stderr.write(
            "lopd: interrupted; what is published stays: the same command goes on from there\n"
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
