"""``lopd cache judge``: the verdict of a verifier on every response of a cache, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lopd.errors import LopdError
from lopd.verbs.arguments import AsJson, Cache, ConfigFile, Overrides

EPILOG = "Example:  lopd cache judge runs/tiny_moe/score examples/tiny_moe.toml --out runs/verdicts"
_SETS = ("opd", "sft", "eval")
# What is shown of the verdicts.
_SHOWN = ("verifier", "num_right", "num_prompts", "prompts_never_right", "reasons")
Out = Annotated[
    Path, typer.Option("--out", help="Folder of the verdicts to write.", show_default=False)
]
Prompts = Annotated[
    str,
    typer.Option(help="The prompt set that was answered: opd, sft (demonstrations) or eval."),
]


def judge(
    cache: Cache,
    config: ConfigFile,
    out: Out,
    overrides: Overrides = None,
    prompts: Prompts = "opd",
    as_json: AsJson = False,
) -> None:
    """Judge every response once, by the verifier of a configuration.

    Reads a cache, rollouts, demonstrations or the answers of an evaluation, and the task, the
    prompts and the student's tokenizer of CONFIG. Writes the verdicts into --out, beside the cache,
    which does not change. After a kill, the same command continues. distill.verdicts and
    distill.teacher_verdicts take the folder.
    """
    from lopd.config import load_config
    from lopd.report.cache_view import show_line
    from lopd.stages.judge import judge as write_verdicts

    # The prompts have the right answers. The cache alone knows only which prompt was answered.
    if prompts not in _SETS:
        raise LopdError(
            f"there is no prompt set {prompts!r}",
            where="--prompts",
            limit=f"one of {', '.join(_SETS)}",
            remedy="name the set that was answered",
        )
    manifest = write_verdicts(load_config(config, overrides or []), cache, out, prompts)
    about = {name: manifest.extra[name] for name in _SHOWN}
    if as_json:
        named = {"folder": str(out), "fingerprint": manifest.fingerprint, "rows": manifest.rows}
        typer.echo(json.dumps({**named, **about}, indent=1))
        return
    show_line(
        f"{out}: {about['num_right']:,} of {manifest.rows:,} responses right by "
        f"{about['verifier']['name']}; {about['prompts_never_right']:,} of "
        f"{about['num_prompts']:,} prompts have no right response"
    )
    # The reasons tell a weak model from answers in a form that the verifier cannot read.
    for reason, count in about["reasons"].items():
        show_line(f"  {count:,} {reason}")
