"""``lopd report``: one HTML file, and pictures, from which a run can be understood in a minute.

    source.py       what a folder is: a run, an evaluation of a checkpoint, a bare artifact
    responses.py    which responses it has, with scores or verdicts
    tokens.py       where teacher and student disagree
    transcripts.py  responses with the figures of each token, and which of them are kept
    curves.py       the figures of metrics.jsonl
    timeline.py     when what was done
    overview.py     the first screen
    checks.py       warnings in words
    page.py         the page
    pictures.py     the same as PNG

``assets`` has the page's own HTML, CSS and JavaScript, and ``vendor`` the library for its charts.
"""

from __future__ import annotations
