"""The task ``open_ended``: prompts without an answer that could be verified."""

from __future__ import annotations

from typing import ClassVar

from lopd.tasks.answers import FilePrompts


class OpenEnded(FilePrompts):
    """The task ``open_ended``.

    It has no verifier. Evaluations report the reverse KL, the length of the responses and the share
    that was cut off, and no accuracy. An answer that a row has is read and not used.
    """

    name: ClassVar[str] = "open_ended"
