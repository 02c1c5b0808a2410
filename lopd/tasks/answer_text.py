r"""Where the answer of a response stands: its last box, or its last line ``Answer: ...``."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# not \) and \], which end the formula
_BARE_PIECE = re.compile(r"\\[A-Za-z]+|\\[{}%$,;!]|[^\s$\\{}]")
_COMMAND = r"\\(?!boxed|fbox)[A-Za-z]"
_BARE_START = re.compile(rf"[-+.(]*(?:\\?\$)?(?:[0-9]|{_COMMAND})|[A-Za-z](?![A-Za-z0-9])")
_MARKUP = r"[*_`\s]*"
_LINE = re.compile(rf"[#>*_`\-\s]*(?:final\s+)?answer{_MARKUP}[:：]{_MARKUP}(.*)", re.IGNORECASE)
_HEADING = re.compile(rf"[#>*_`\s]*(?:final\s+)?answer{_MARKUP}", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s+is\s*:?\s*(.*)", re.IGNORECASE)
_HOPE = re.compile(r"\.?\s*I hope it is correct\.?\s*\Z")
_ONLY_MARKUP = re.compile(r"(?:\$\$|\\\[|\\\]|\\\(|\\\)|[`*_=~\-\s])*")
_TAIL = 10_000  # characters of a response that are searched for a line


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed`` or ``\fbox`` holds; None where there is none or it stays open.

    A box without braces (``\boxed 5``, ``\boxed\frac{1}{2}``) holds what follows up to the next
    white space or the end of the formula. A ``\boxed`` that a sentence only mentions is no box.
    """
    for match in reversed(list(_BOX.finditer(text))):
        position = match.end()
        while position < len(text) and text[position].isspace():
            position += 1
        if text[position : position + 1] == "{":
            end = closing_brace(text, position)
            return None if end is None else text[position + 1 : end].strip()
        bare = _bare_content(text, position)
        if bare != "":
            return bare
    return None


def has_braced_box(text: str) -> bool:
    """Whether a box is opened anywhere, be it closed or not."""
    return _BRACED_BOX.search(text) is not None


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that opens at ``start`` is closed; None where it never is. One pass."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _bare_content(text: str, start: int) -> str | None:
    r"""The number, single letter or command at ``start``, with all that is attached to it.

    TeX itself would box the first digit of ``\boxed 12`` alone, which nobody means. A word is no
    answer here: it is a sentence about boxes that goes on. None where a brace is never closed.
    """
    first = _BARE_START.match(text, start)
    if first is None:
        return ""
    position = start
    while position < len(text):
        if text[position] == "{":
            end = closing_brace(text, position)
            if end is None:
                return None
            position = end + 1
            continue
        piece = _BARE_PIECE.match(text, position)
        if piece is None:
            break
        position = piece.end()
    content = text[start:position].rstrip(".,;:!?*`")
    goes_on = re.match(r"[ \t]+[a-z]", text[position : position + 40])
    return "" if len(content) == 1 and content.isalpha() and goes_on else content


def answer_line(text: str) -> str | None:
    """What follows ``Answer:`` or ``Final answer:`` in the last line that begins so.

    Markdown around it does not count. Where nothing follows on the line, the next line that holds
    anything is the answer; a line that is nothing but the word is such a heading too.
    """
    lines = text[-_TAIL:].splitlines()
    for index in range(len(lines) - 1, -1, -1):
        match = _LINE.fullmatch(lines[index])
        if match is None and _HEADING.fullmatch(lines[index]) is None:
            continue
        here = _clean(match[1]) if match is not None else ""
        return here or next((_clean(line) for line in lines[index + 1 :] if _clean(line)), None)
    return None


def _clean(value: str) -> str:
    """Without markup, and without the sentence of a prompt that many evaluations share."""
    if _ONLY_MARKUP.fullmatch(value):
        return ""
    text = _HOPE.sub("", value.strip()).strip("*`").strip()
    sentence = _SENTENCE.fullmatch(text)
    return sentence[1].strip("* ") if sentence is not None else text
