"""``lopd audit``: can these responses have come from this teacher?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.errors import EXIT_CODE, DataError
from lopd.verbs.arguments import AsJson, input_path

if TYPE_CHECKING:
    from lopd.audit import Scores
    from lopd.records import Manifest, Response


Responses = Annotated[
    Path,
    typer.Argument(
        metavar="RESPONSES",
        help="Demonstrations or rollouts: a folder with manifest.json.",
        show_default=False,
    ),
]
# With a model the responses are scored on this machine, in float32 and without a server.
Teacher = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=input_path,
        help="Hugging Face folder of the teacher. If absent, the columns teacher_logprobs and "
        "teacher_entropy of RESPONSES are used.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="The temperature at which the teacher would have sampled. If absent, that of the "
        "manifest.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1,
        help="The nucleus mass with which the teacher would have sampled. If absent, that of "
        "the manifest.",
    ),
]
# A million tokens are enough to see a drift of the default tolerance.
MaxResponses = Annotated[
    int, typer.Option(min=1, help="Test at most this number of responses, chosen at random.")
]
# A drift of this size changes a response of 200 tokens by a factor e in probability.
Tolerance = Annotated[
    float,
    typer.Option(
        min=1e-9,
        help="Mean drift in nats per token. The verdict is 'consistent' only if the test would "
        "have noticed a drift of this size.",
    ),
]
# One in a hundred true teachers is called inconsistent by chance.
Alpha = Annotated[
    float,
    typer.Option(
        min=1e-9,
        max=0.5,
        help="Probability that a true teacher is called inconsistent.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed for the choice of responses.")]
# The curves show where a foreign teacher differs, which the mean hides.
Picture = Annotated[
    Path | None,
    typer.Option(
        help="PNG file to write: the drift by position, by entropy, and by the kind of the "
        "token before."
    ),
]


def audit(
    responses: Responses,
    teacher: Teacher = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_responses: MaxResponses = 1000,
    tolerance: Tolerance = 0.005,
    alpha: Alpha = 0.01,
    seed: Seed = 0,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Test whether a teacher can have sampled these responses.

    Reads RESPONSES, and the teacher's weights if --teacher is given. Writes only the picture.

    If the teacher sampled the text, log-probability plus entropy has mean zero at every token,
    whatever the text is. The verdict is about the mean over all tokens. It is consistent,
    inconsistent (exit code 2), or cannot tell.
    """
    from lopd.artifacts import read_manifest
    from lopd.artifacts.lineage import alignment_of
    from lopd.audit import as_json as result_as_json
    from lopd.audit import audit as test_responses
    from lopd.report.audit_picture import draw_audit
    from lopd.report.audit_view import show_audit

    # The manifest says how the responses were sampled, and how many there are.
    manifest = read_manifest(responses)
    # Such scores are parts of sums over chunks, so log p + H of a single token means nothing.
    if alignment_of(manifest) is not None:
        raise DataError(
            "these responses are not in the teacher's own tokens, and the test is about tokens",
            where=str(responses),
            limit="responses that the teacher's tokenizer has made",
            remedy="compare the texts of both models instead: lopd cache inspect --sample",
        )
    conditions = _sampling_conditions(responses, manifest, temperature, top_p)
    scores = _scores(responses, manifest, teacher, conditions, max_responses, seed)
    # The conditions belong to the verdict: it holds for this temperature and top-p only.
    result: dict[str, Any] = {
        **result_as_json(test_responses(scores, tolerance=tolerance, alpha=alpha)),
        "temperature": conditions[0],
        "top_p": conditions[1],
        "teacher": str(teacher or ""),
    }
    if picture is not None:
        draw_audit(result, picture)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show_audit(result, picture)
    # "cannot tell" is no failure: too few tokens are no evidence against the teacher.
    if result["verdict"] == "inconsistent":
        raise typer.Exit(EXIT_CODE)


def _sampling_conditions(
    folder: Path, manifest: Manifest, temperature: float | None, top_p: float | None
) -> tuple[float, float]:
    """Return the temperature and the nucleus mass, given or from the manifest."""
    sampling = manifest.sampling
    # What the user gives wins: a manifest of imported responses may be wrong or say nothing.
    temperature = temperature or sampling.get("temperature")
    top_p = top_p or sampling.get("top_p")
    if temperature is None or top_p is None:
        raise DataError(
            "the manifest does not give the temperature and the top-p of the sampling",
            where=str(folder),
            remedy="add --temperature and --top-p",
        )
    # The statistic needs the entropy of the very distribution that was sampled from. The scores
    # know that distribution for a temperature and a nucleus, not for the other two cuts.
    if sampling.get("top_k", -1) != -1 or sampling.get("min_p", 0.0) != 0.0:
        raise DataError(
            f"the responses were sampled with top_k {sampling.get('top_k')} and min_p "
            f"{sampling.get('min_p')}",
            where=str(folder),
            limit="only responses sampled with temperature and top-p",
            remedy="audit responses that were sampled with top_k = -1 and min_p = 0",
        )
    return float(temperature), float(top_p)


def _scores(
    folder: Path,
    manifest: Manifest,
    teacher: Path | None,
    conditions: tuple[float, float],
    max_responses: int,
    seed: int,
) -> Scores:
    """Return what the test needs of a random sample of the responses.

    Args:
        folder: The artifact with the responses.
        manifest: The manifest of that artifact.
        teacher: Hugging Face folder to score with. None takes the columns of the artifact.
        conditions: Temperature and nucleus mass.
        max_responses: The largest number of responses.
        seed: Seed for the choice of responses.

    Raises:
        DataError: There are no responses, or the artifact has no entropies for these conditions.
    """
    from lopd.audit.scores import score_from_columns, score_with_model

    # A sample is enough: the test has as many data as tokens, and responses have thousands of them.
    table = _random_rows(folder, manifest, max_responses, seed)
    if teacher is not None:
        temperature, top_p = conditions
        # A model cannot be asked about rows that another teacher made.
        records = _records(_rows_of_teacher(table, teacher), folder)
        return score_with_model(teacher, records, temperature=temperature, top_p=top_p)
    # Without a model the entropies must be there: a log-probability alone has no known mean.
    scores = score_from_columns(table)
    if scores is None:
        raise DataError(
            "the cache has no column teacher_entropy",
            where=str(folder),
            remedy="add --teacher FOLDER: lopd then scores the responses here, in float32",
        )
    # The score stage stores log-probabilities and entropies at temperature 1 with all tokens.
    if conditions != (1.0, 1.0):
        raise DataError(
            "the entropies of this folder are at temperature 1 and top-p 1",
            where=str(folder),
            remedy="add --teacher FOLDER: lopd then computes entropies at the other temperature",
        )
    return scores


def _random_rows(folder: Path, manifest: Manifest, count: int, seed: int) -> Any:
    """Return an Arrow table of at most `count` random rows of an artifact."""
    import numpy as np
    import pyarrow as pa

    from lopd.artifacts import read_shard

    if manifest.rows == 0:
        raise DataError(
            "the folder has no responses",
            where=str(folder),
            remedy="give the folder of rollouts or of a cache",
        )
    # Drawn over the whole artifact: its first responses are those of its first prompts.
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(manifest.rows, min(count, manifest.rows), replace=False))
    tables = []
    # Shard by shard, so that a cache larger than memory can be tested.
    start = 0
    for shard in manifest.shards:
        # Rows are numbered over the whole artifact. A shard knows only its own.
        in_shard = chosen[(chosen >= start) & (chosen < start + shard.rows)] - start
        start += shard.rows
        if len(in_shard):
            tables.append(read_shard(folder, shard).take(pa.array(in_shard)))
    return pa.concat_tables(tables)


def _rows_of_teacher(table: Any, teacher: Path) -> Any:
    """Return the rows of one teacher where the artifact has several teachers."""
    import pyarrow.compute

    from lopd.artifacts import identify_model

    if "teacher" not in table.column_names:
        return table
    is_own = pyarrow.compute.equal(table.column("teacher"), identify_model(teacher).weights)
    # A teacher that made no row is tested on all rows: whether it could have made them is what
    # the user asks.
    return table.filter(is_own) if pyarrow.compute.any(is_own).as_py() else table


def _records(table: Any, folder: Path) -> list[Response]:
    from lopd.cache import from_table

    # The scores of the artifact, if it has any, are not needed beside a model.
    return [response for response, _ in from_table(table, where=str(folder))]
