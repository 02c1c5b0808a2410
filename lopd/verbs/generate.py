"""``lopd generate`` and ``lopd chat``: ask a model, and read what it answers."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopd.config import Config, SGLangSection, config_from, load_config
from lopd.verbs.arguments import input_path
from lopd.verbs.interrupts import keyboard_interrupts

if TYPE_CHECKING:
    from lopd.stages.conversation import Conversation

GENERATE_EPILOG = (
    'Example:  lopd generate runs/tiny_moe "81+06+02+07+03-10=?" --compare base --compare teacher'
)
CHAT_EPILOG = "Example:  lopd chat models/Qwen3-0.6B   Ctrl-C ends an answer, Ctrl-D the chat"

Source = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL_OR_RUN",
        parser=input_path,
        help="Hugging Face folder, run directory, or TOML file of a run.",
        show_default=False,
    ),
]
# Only knobs of the server can matter here, and only for special machines.
Knobs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Knobs of the server, for example sglang.tensor=4",
        show_default=False,
    ),
]
# Names and not folders: where the models of a run lie is a matter of the run.
Named = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Of a run: distilled, sft, sft_longer, base or teacher. If absent, distilled.",
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        help="Also ask this model: a name of the run, or a folder. May be given several times.",
    ),
]
# The defaults below are those of the paper's evaluations: temperature 0.6 and top-p 0.95.
Temperature = Annotated[
    float, typer.Option(min=0, max=10, help="Sampling temperature. 0: the likeliest token.")
]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1, help="Sample from the likeliest tokens of this share.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer in tokens. If absent, what the context has room for."),
]
Seed = Annotated[int, typer.Option(min=0, help="Another seed gives another answer.")]
Thinking = Annotated[
    bool, typer.Option(help="Whether the chat template lets the model think before it answers.")
]


def generate(
    source: Source,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="The question. - reads it from stdin.")
    ],
    overrides: Knobs = None,
    model: Named = None,
    compare: Others = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    thinking: Thinking = True,
) -> None:
    """Ask a model one question and print its answer as it comes.

    Reads the model, starts a server for it, and applies the chat template of the run or of the
    model's folder. The answer alone goes to stdout. Nothing is kept. With --compare the models are
    asked one after the other.
    """
    question = sys.stdin.read() if text == "-" else text
    others = compare or []
    # One server after the other, so that the models need not fit on the device at the same time.
    for name in (model, *others):
        place, named = _place_of(source, name)
        with _conversation(
            place, named, overrides or [], temperature, top_p, max_tokens, seed, thinking
        ) as talk:
            if others:
                typer.echo(f"--- {name or source}")
            _print_answer(talk, question)


def chat(
    source: Source,
    overrides: Knobs = None,
    model: Named = None,
    compare: Others = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    thinking: Thinking = True,
) -> None:
    """Talk to a model. Ctrl-C ends an answer, and Ctrl-D (or Ctrl-C at the prompt) ends the chat.

    Reads the model, starts a server for it, and applies the chat template of the run or of the
    model's folder. The model sees the whole conversation. Nothing is kept. With --compare every
    model answers each question, and each sees its own answers alone.
    """
    # Each model keeps its server for the whole chat. A start takes far longer than an answer.
    with contextlib.ExitStack() as servers:
        talks = []
        for name in (model, *(compare or [])):
            place, named = _place_of(source, name)
            talk = servers.enter_context(
                _conversation(
                    place, named, overrides or [], temperature, top_p, max_tokens, seed, thinking
                )
            )
            talks.append((name or str(source), talk))
        # On stderr, so that the answers alone are in a file to which stdout is written.
        typer.echo("Ask something. Ctrl-D ends.", err=True)
        with keyboard_interrupts():
            while (question := _read_line()) is not None:
                if question.strip():
                    _print_answers(talks, question)


def _print_answers(talks: Sequence[tuple[str, Conversation]], question: str) -> None:
    """Print what every model answers, or forget the question where the user presses Ctrl-C."""
    # A talk whose answer is interrupted drops its own question, but the models before it have
    # answered.
    before = [len(talk.messages) for _, talk in talks]
    try:
        for name, talk in talks:
            if len(talks) > 1:
                typer.echo(f"--- {name}")
            _print_answer(talk, question)
    except KeyboardInterrupt:
        # All forget it, or the models would no longer be in the same conversation.
        for count, (_, talk) in zip(before, talks, strict=True):
            del talk.messages[count:]
        typer.echo("\n(interrupted)", err=True)


def _place_of(source: Path, name: str | None) -> tuple[Path, str | None]:
    """Return the folder of a model and its name there: a name of the run, or else a folder."""
    # A folder goes first, so that any model can stand beside those of a run.
    return (Path(name), None) if name and Path(name).is_dir() else (source, name)


def _read_line() -> str | None:
    """Return what the user types, or None at the end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        # The shell's prompt must not stand behind ours.
        typer.echo()
        return None


def _print_answer(talk: Conversation, question: str) -> None:
    with contextlib.closing(talk.ask(question)) as pieces:
        for piece in pieces:
            # echo() flushes, so that a reader sees each token when it comes.
            typer.echo(piece, nl=False)
    typer.echo()
    if talk.was_cut:
        typer.echo("(cut off at the limit of tokens: see --max-tokens)", err=True)


@contextlib.contextmanager
def _conversation(
    source: Path,
    name: str | None,
    overrides: Sequence[str],
    temperature: float,
    top_p: float,
    max_tokens: int | None,
    seed: int,
    thinking: bool,
) -> Iterator[Conversation]:
    """Serve a model, and give a conversation with it."""
    # A TOML file names the run and its models.
    config = load_config(source, overrides) if source.is_file() else None
    place = config.run.dir if config is not None else source
    from lopd.stages import conversation as talking

    speaker = talking.speaker_of(place, name, config)
    has_gpu = shutil.which("nvidia-smi") is not None
    settings = _with_overrides(
        talking.settings_for(speaker, place, config, has_gpu=has_gpu), overrides
    )
    # Kept only where something fails: the error then names the log.
    folder = Path(tempfile.mkdtemp(prefix="lopd-conversation-"))
    line = f"starting SGLang with {speaker.folder}"
    # A start takes far longer than a look, and the answers of a run are there already.
    if (place / "evaluate").is_dir():
        line += f" (answers that are there already need no start: lopd show {place})"
    typer.echo(line, err=True)
    with talking.served(speaker, settings, folder / "sglang.log") as engine:
        yield talking.conversation_with(
            speaker,
            engine,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_tokens or settings.context_length,
            context_length=settings.context_length,
            seed=seed,
            thinking=thinking,
        )
    # Not in a `finally`: an error leaves the folder, because its message names the log in it.
    shutil.rmtree(folder, ignore_errors=True)


def _with_overrides(section: dict[str, object], overrides: Sequence[str]) -> SGLangSection:
    """Return the section [sglang] with the user's knobs."""
    # The tables that a configuration must have, and that matter to nobody here.
    unused = {"num_prompts": 1}
    table = {
        "run": {"dir": "."},
        "models": {"teacher": ".", "student": "."},
        "task": {"name": "math"},
        "prompts": {"sft": dict(unused), "opd": dict(unused), "eval": dict(unused)},
        "sglang": section,
    }
    # A whole configuration is read, so that a knob has the same checks and messages as in a run.
    made: Config = config_from(table, overrides, where="lopd generate", base=Path("lopd.toml"))
    return made.sglang
