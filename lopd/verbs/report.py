"""``lopd report``: a run as one HTML file, and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopd.verbs.arguments import Tokenizer

EPILOG = (
    "Examples:  lopd report runs/tiny_moe   lopd report runs/a runs/b --out compare.html   "
    "lopd report runs/tiny_moe/score"
)

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN [RUN ...]",
        help="Run directories, folders of lopd evaluate, or folders of responses such as "
        "run.dir/score. Several are shown side by side.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The file to write. If absent, report.html in the first folder."),
]
Png = Annotated[
    Path | None, typer.Option(help="Also write pictures of the report into this folder.")
]
Docs = Annotated[
    str | None,
    typer.Option(
        help="Address before the pages of the documentation. If absent, that of the checkout of "
        "lopd that the file is in, as seen from the file. A file elsewhere has no links."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed for the choice of transcripts if not all fit.")
]


def report(
    runs: Runs,
    out: Out = None,
    png: Png = None,
    docs: Docs = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
) -> None:
    """Write one HTML file from which runs can be understood.

    Reads what the runs have published, also while they are in progress, and changes nothing in
    them. The file needs no network and no server: open it in a browser. It shows results with
    their errors, warnings in words, the stages and their times, curves, where teacher and student
    disagree, and transcripts in which every token has its figures. It stays below 10 MB; where not
    all transcripts fit, some are chosen, and the page says so.
    """
    from lopd.artifacts import publish_bytes
    from lopd.report.console import print_line
    from lopd.report.html.page import docs_beside, make_page
    from lopd.report.html.source import open_sources
    from lopd.report.waiting import Waiting

    # Before anything is read: a folder that holds no run is refused at once.
    sources = open_sources(runs)
    path = out if out is not None else runs[0] / "report.html"
    with Waiting() as waiting:
        waiting.begin("reading the responses")
        page, data = make_page(
            sources,
            # Relative to the file, so that links work wherever the whole checkout is moved.
            docs=docs_beside(path) if docs is None else docs,
            tokenizer=tokenizer,
            seed=seed,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # As a whole: a browser that has the file open never loads half of a page.
    publish_bytes(path, page)
    print_line(f"{path}: {len(page) / 1e6:.2f} MB")
    if png is not None:
        # matplotlib takes long to import.
        from lopd.report.html.pictures import write_pictures

        for picture in write_pictures(data, png):
            print_line(str(picture))
