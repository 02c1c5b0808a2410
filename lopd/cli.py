"""The command line: joins the verbs of lopd/verbs, and turns every failure into one line.

Nothing heavy is imported before a verb runs. Importing torch, SGLang or Megatron-Core takes many
seconds, and `lopd --help` must answer at once.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from lopd import __version__
from lopd.config import InvalidConfig, known_keys, load_config
from lopd.errors import EXIT_CODE, EXIT_NOT_FETCHED, LopdError, NotFetched
from lopd.interruption import INTERRUPTED_CODE, INTERRUPTION, Interrupted
from lopd.verbs.arguments import HELP_OPTIONS, AsJson, ConfigFile, Overrides, VerbGroup
from lopd.verbs.audit import audit
from lopd.verbs.cache import app as cache_app
from lopd.verbs.evaluate import EPILOG as EVALUATE_EPILOG
from lopd.verbs.evaluate import evaluate
from lopd.verbs.generate import CHAT_EPILOG, GENERATE_EPILOG, chat, generate
from lopd.verbs.init import EPILOG as INIT_EPILOG
from lopd.verbs.init import init
from lopd.verbs.knobs import knobs
from lopd.verbs.launch import launch, with_place
from lopd.verbs.parity import parity
from lopd.verbs.pipeline import run_stages
from lopd.verbs.plan import plan
from lopd.verbs.prepare import doctor, fetch, show_findings
from lopd.verbs.prompts import app as prompts_app
from lopd.verbs.report import EPILOG as REPORT_EPILOG
from lopd.verbs.report import report
from lopd.verbs.show import EPILOG as SHOW_EPILOG
from lopd.verbs.show import show
from lopd.verbs.watch import EPILOG as WATCH_EPILOG
from lopd.verbs.watch import watch

app = VerbGroup(
    name="lopd",
    # The first line is all that a list of programs shows. The rest says what the three parts do.
    help=(
        "Distil a large reasoning teacher into a student by Lightning OPD.\n\n"
        "SGLang samples the responses, and the teacher scores each response token once. "
        "Megatron-Core then trains the student on the stored scores. Training needs no teacher."
    ),
    epilog=(
        "First steps:  lopd init FOLDER,  lopd check CONFIG,  lopd run CONFIG.   "
        "An example: examples/tiny_moe.toml.   Every knob: lopd knobs"
    ),
    # `lopd` alone shows the help too (see _options), so it needs no verb.
    invoke_without_command=True,
    # typer's two options for completion would change files of the user's shell.
    add_completion=False,
    # Our own error lines replace typer's boxes and tracebacks (see main).
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


app.command(epilog=INIT_EPILOG)(init)


@app.command(
    epilog="Example:  lopd run examples/tiny_moe.toml distill.num_steps=8 run.dir=/tmp/trial"
)
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run all stages: demonstrate, sft, rollout, score, distill, evaluate, export.

    Reads CONFIG, and the models and prompts that it names. Writes everything into run.dir. Each
    stage has a folder there, and summary.json has the results.

    The command first checks everything that lopd check looks at. A stage whose inputs have not
    changed is reused. After a kill or an error, the same command continues from what is published.
    At the end it shows a table of accuracies and a table of seconds per stage.
    """
    run_stages(load_config(config, overrides or []))


# What each stage does. The names and the sentences repeat those of lopd.stages, because importing
# lopd.stages imports torch, and --help must not. A test compares the two.
STAGE_SUMMARIES = {
    "demonstrate": "The teacher, on SGLang, answers the SFT prompts.",
    "sft": "The base student, on Megatron-Core, learns the demonstrations.",
    "rollout": "The SFT student, on SGLang, answers each OPD prompt once.",
    "score": ("The same teacher's log-probability of every response token, once, into the cache."),
    "distill": (
        "The Lightning OPD update on Megatron-Core, with weight syncs into a running SGLang server."
    ),
    "evaluate": (
        "pass@1 on held-out prompts and reverse KL to the teacher, "
        "for teacher, base, SFT, distilled student and, if asked for, longer SFT."
    ),
    "export": (
        "The distilled student as a Hugging Face checkpoint, "
        "checked by loading it with transformers."
    ),
}
# What each stage reads, and what it publishes.
_STAGE_DATA = {
    "demonstrate": ("models.teacher and prompts.sft", "the demonstrations (Parquet shards)"),
    "sft": (
        "models.student and the demonstrations (of demonstrate, or sft.demonstrations), "
        "or takes over sft.checkpoint",
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


def _add_stage(name: str, summary: str) -> None:
    """Add the verb that runs one stage alone."""

    # typer reads the parameters of this function as the arguments of the verb.
    def verb(config: ConfigFile, overrides: Overrides = None) -> None:
        run_stages(load_config(config, overrides or []), stage=name)

    reads, publishes = _STAGE_DATA[name]
    # typer shows the docstring of a verb as its help.
    verb.__doc__ = (
        f"Stage: {summary}\n\n"
        f"Reads {reads}. Publishes {publishes} in run.dir/{name}, with manifest.json and logs.\n\n"
        "The stages that it reads from must be complete. The stage is reused if nothing that it "
        "depends on has changed. After a kill, the same command continues."
    )
    epilog = f"Example:  lopd {name} examples/tiny_moe.toml   Its knobs:  lopd knobs {name}"
    # Stages that several machines can share get one more option here.
    app.command(name=name, epilog=epilog)(with_place(name, verb))


for _name, _summary in STAGE_SUMMARIES.items():
    if _name == "evaluate":
        # This verb has a second form, for any checkpoint on any prompts.
        app.command(name=_name, epilog=EVALUATE_EPILOG)(evaluate)
    else:
        _add_stage(_name, _summary)


# The order of the verbs here is their order in `lopd --help`.
app.command(
    epilog="Example:  lopd launch examples/tiny_moe.toml launch.device=cpu --on slurm "
    "--render /tmp/jobs"
)(launch)
app.command(epilog=WATCH_EPILOG)(watch)
app.command(epilog=SHOW_EPILOG)(show)
app.command(epilog=REPORT_EPILOG)(report)
app.command(epilog=GENERATE_EPILOG)(generate)
app.command(epilog=CHAT_EPILOG)(chat)
app.add_typer(cache_app, name="cache")
app.add_typer(prompts_app, name="prompts")
app.command(
    epilog="Example:  lopd audit runs/tiny_moe/demonstrate --teacher examples/tiny_models/teacher "
    "--picture audit.png"
)(audit)
app.command(epilog="Example:  lopd parity examples/tiny_moe.toml --responses 16")(parity)
app.command(
    epilog="Example:  lopd plan examples/run_qwen3_8b.toml --gpus 8 --gpu h100-80gb --suggest"
)(plan)
app.command(
    epilog="Example:  lopd doctor examples/run_qwen3_8b.toml   "
    "Then:  lopd fetch CONFIG,  lopd check CONFIG,  lopd run CONFIG"
)(doctor)
app.command(epilog="Example:  lopd fetch examples/run_qwen3_8b.toml")(fetch)


@app.command(
    epilog="States: done, partial (the stage continues where it stopped), outdated (the stage was "
    "made from other knobs, or from a stage that is not done), absent, damaged.   "
    "Example:  lopd status examples/tiny_moe.toml"
)
def status(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show of each stage whether it is done, partial, outdated, absent or damaged.

    Reads CONFIG and the manifests in run.dir. The command starts nothing and changes nothing.
    """
    loaded = load_config(config, overrides or [])
    # Imports of the verbs stand below load_config: a mistake in the TOML file is said at once,
    # before anything heavy is imported.
    from lopd import pipeline
    from lopd.report.overview import status_table
    from lopd.report.run_state import holder_of

    rows = pipeline.status(loaded)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        status_table(rows, loaded.run.dir, holder_of(loaded.run.dir))


@app.command(
    epilog="lopd run makes the same checks before its first stage.   "
    "Example:  lopd check examples/tiny_moe.toml"
)
def check(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find all mistakes of a configuration at once, without starting or writing anything.

    Reads CONFIG, and the models and prompts that it names. The command first checks keys, types and
    bounds. It then checks models, tokenizers, layouts, prompts, demonstrations, servers and ports,
    folders and disk. The exit code is 2 if something is wrong, and 3 if nothing is wrong but lopd
    fetch must download something first.
    """
    try:
        loaded = load_config(config, overrides or [])
    except InvalidConfig as error:
        # Without a valid configuration there is nothing that the other checks could look at.
        mistakes = [("configuration", mistake) for mistake in error.mistakes]
        show_findings(mistakes, config, as_json=as_json)
        return
    from lopd import checks
    from lopd.report.waiting import Waiting

    with Waiting() as waiting:
        found = checks.check(loaded, begin=lambda name: waiting.begin(f"looking at: {name}"))
        show_findings(found, config, as_json=as_json)


app.command(
    epilog="Example:  lopd knobs distill.optimizer   lopd knobs --search checkpoint   "
    "lopd knobs --changed examples/tiny_moe.toml"
)(knobs)


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
        # `lopd` alone shows the help, but it did nothing: a script must see that.
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_CODE)


# typer brings its own copy of click in some versions. BadParameter is one of its classes, and the
# class above it is click's UsageError, wherever click comes from.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
# Failures of the operating system that the user can correct: a full or forbidden disk, a path that
# cannot be, no memory, no file handles. Any other OSError is a bug of ours and shows a traceback.
_CIRCUMSTANCES = frozenset(
    {
        # The disk is full, or the user's share of it is.
        errno.ENOSPC,
        errno.EDQUOT,
        # The disk or the file must not be written, or the folder must not be entered.
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        # The path cannot exist: a part of it is a file, or is too long.
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        # The limits of the process or of the machine are reached.
        errno.EMFILE,
        errno.ENOMEM,
    }
)


def _explain_usage(error: Any) -> LopdError:
    """Return click's usage error as one line with a remedy. click itself would draw a box."""
    command = error.ctx.command_path if error.ctx is not None else "lopd"
    # click writes a sentence. Our error lines are clauses without a full stop.
    what = error.format_message().rstrip(".")
    remedy = f"see: {command} --help"
    option = (getattr(error, "option_name", None) or "").lstrip("-")
    sections = {key.partition(".")[0] for key in known_keys()}
    # Most command lines write an option with dashes, so users write `--distill.num_steps=3` too.
    if "=" in " ".join(sys.argv) and option.partition(".")[0] in sections:
        remedy = f"overrides have no dashes: {option}=..."
    elif "CONFIG" in what:
        remedy = f"give a TOML file, for example: {command} examples/tiny_moe.toml"
    return LopdError(what[:1].lower() + what[1:], where=command, remedy=remedy)


def _fail(error: LopdError, code: int = EXIT_CODE) -> NoReturn:
    # rich takes a while to import, and most calls end without an error.
    from lopd.report.console import show_error

    show_error(error)
    sys.exit(code)


def _prepare_process() -> None:
    """Set signals, streams and environment before any verb runs."""
    INTERRUPTION.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An ASCII terminal shows `?` for a character that it lacks. Without this, one such
            # character would end a run of hours.
            stream.reconfigure(errors="replace")
    # The threads of Hugging Face's tokenizers do not survive a later fork of this process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Only these two verbs use the network. For all others a name on the hub is an error at once,
    # not a download in the middle of a run.
    if sys.argv[1:2] not in (["fetch"], ["doctor"]):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Run the command line.

    A LopdError, wrong usage, a full disk, and a file that may not be read or written become one
    line on stderr and exit code 2. After Ctrl-C or SIGTERM every child process is ended first,
    and the exit code is 130.
    """
    _prepare_process()
    try:
        # Without its standalone mode, click raises its errors instead of printing them in a box.
        sys.exit(app(standalone_mode=False))
    except NotFetched as error:
        _fail(error, EXIT_NOT_FETCHED)
    except LopdError as error:
        _fail(error)
    except _USAGE_ERROR as error:
        _fail(_explain_usage(error))
    except OSError as error:
        # A bug of ours must not look like a full disk, or nobody would report it.
        if error.errno not in _CIRCUMSTANCES:
            raise
        what = error.strerror or type(error).__name__
        where = str(error.filename or "operating system")
        remedy = "correct this, then run the same command again: finished work is kept"
        _fail(LopdError(what, where=where, remedy=remedy))
    except Interrupted:
        # By now the `with` blocks of servers and ranks have ended them on the way up here.
        sys.stderr.write(
            "lopd: interrupted; what is published stays: the same command continues from there\n"
        )
        sys.exit(INTERRUPTED_CODE)
    finally:
        INTERRUPTION.ends()


if __name__ == "__main__":
    main()
