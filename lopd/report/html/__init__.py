"""``lopd report``: one HTML file, and pictures, from which a run can be understood in a minute.

    source.py       what a folder is: a run, an evaluation of a checkpoint, a bare artifact
    outdated.py     which stages were made from an earlier artifact than the present one
    responses.py    which responses it has, with scores or verdicts
    tokens.py       where teacher and student disagree
    transcripts.py  responses with the figures of each token, and which of them are kept
    entropy.py      how sure the teacher is
    curves.py       the figures of metrics.jsonl, and of the models at the end
    fresh.py        the same of fresh responses, where the rollouts were refreshed
    timeline.py     when what was done
    stages.py       which model made what, and what it cost
    comparing.py    which of two is better, and how runs differ
    overview.py     the first screen
    checks.py       warnings in words
    page.py         the page
    pictures.py     the same as PNG
    chart_picture.py   one chart of it
    learning_curve.py  the picture that a run leaves

``assets`` has the page's own HTML, CSS and JavaScript, and ``vendor`` the library for its charts.
"""

from __future__ import annotations
