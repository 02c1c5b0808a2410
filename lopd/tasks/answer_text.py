"""Finds the answer in a response: its last box, or its last line ``Answer: ...``.

All searches here take time linear in the text, because the text was written by a model and may be
long and strange.
"""

from __future__ import annotations

import re

# A box with or without braces; \boxedtext is another command.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# An escaped character is matched as a whole, so that \{ does not count as a brace.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may follow in a box without braces. \) and \] are not in it, because they end the formula.
_BARE_PIECE = re.compile(r"\\[A-Za-z]+|\\[{}%$,;!]|[^\s$\\{}]")
_COMMAND = r"\\(?!boxed|fbox)[A-Za-z]"
# How such a box begins: a number, a command, or one letter alone. A word means that the text only
# speaks about boxes.
_BARE_START = re.compile(rf"[-+.(]*(?:\\?\$)?(?:[0-9]|{_COMMAND})|[A-Za-z](?![A-Za-z0-9])")
# Markdown around the word: emphasis, quotes, headings, list items.
_MARKUP = r"[*_`\s]*"
_LINE = re.compile(rf"[#>*_`\-\s]*(?:final\s+)?answer{_MARKUP}[:：]{_MARKUP}(.*)", re.IGNORECASE)
_HEADING = re.compile(rf"[#>*_`\s]*(?:final\s+)?answer{_MARKUP}", re.IGNORECASE)
# Many evaluations ask for "The final answer is ...", and some for "I hope it is correct." after it.
_SENTENCE = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s+is\s*:?\s*(.*)", re.IGNORECASE)
_HOPE = re.compile(r"\.?\s*I hope it is correct\.?\s*\Z")
_ONLY_MARKUP = re.compile(r"(?:\$\$|\\\[|\\\]|\\\(|\\\)|[`*_=~\-\s])*")
# The number of last characters of a response in which a line is searched.
_TAIL = 10_000


def last_box(text: str) -> str | None:
    r"""Return what the last ``\boxed`` or ``\fbox`` holds.

    A box without braces (``\boxed 5``, ``\boxed\frac{1}{2}``) holds what follows, up to the next
    white space or the end of the formula. A ``\boxed`` that a sentence only mentions is not a box.

    Returns:
        The content without white space at its ends. None if there is no box, or if it is not
        closed.
    """
    for match in reversed(list(_BOX.finditer(text))):
        position = match.end()
        while position < len(text) and text[position].isspace():
            position += 1
        if text[position : position + 1] == "{":
            # An open box at the end means that the response broke off. An earlier box is not its
            # answer.
            end = closing_brace(text, position)
            return None if end is None else text[position + 1 : end].strip()
        bare = _bare_content(text, position)
        if bare != "":
            return bare
    return None


def has_braced_box(text: str) -> bool:
    """Return whether a box is opened anywhere, closed or not."""
    return _BRACED_BOX.search(text) is not None


def closing_brace(text: str, start: int) -> int | None:
    """Return the position of the brace that closes the one at ``start``, or None. One pass."""
    # Braces of LaTeX nest, as in \boxed{\frac{1}{2}}, so the first closing one may belong inside.
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
    r"""Return the number, letter or command at ``start``, with all that is attached to it.

    TeX itself would put only the first digit of ``\boxed 12`` into the box, which nobody means. A
    word is not an answer here: it belongs to a sentence about boxes.

    Returns:
        "" if no answer begins there. None if a brace is never closed.
    """
    first = _BARE_START.match(text, start)
    if first is None:
        return ""
    position = start
    while position < len(text):
        # A group in braces belongs to the command before it, as in \frac{1}{2}.
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
    # The punctuation belongs to the sentence around the formula.
    content = text[start:position].rstrip(".,;:!?*`")
    # "\boxed a number": one letter with a word behind it is an article, not a variable.
    goes_on = re.match(r"[ \t]+[a-z]", text[position : position + 40])
    return "" if len(content) == 1 and content.isalpha() and goes_on else content


def answer_line(text: str) -> str | None:
    """Return what follows ``Answer:`` or ``Final answer:`` in the last line that begins so.

    Markdown around it does not count. If nothing follows on that line, the answer is the next line
    that is not empty. A line with nothing but the word "answer" is such a heading too.

    Returns:
        The answer, or None if there is no such line.
    """
    # From the end: a response may write several such lines, and the last one is its decision.
    lines = text[-_TAIL:].splitlines()
    for index in range(len(lines) - 1, -1, -1):
        match = _LINE.fullmatch(lines[index])
        if match is None and _HEADING.fullmatch(lines[index]) is None:
            continue
        here = _clean(match[1]) if match is not None else ""
        return here or next((_clean(line) for line in lines[index + 1 :] if _clean(line)), None)
    return None


def _clean(value: str) -> str:
    """Remove the markup, and a sentence that the prompts of many evaluations ask for."""
    # A line like "---" or "$$" holds nothing, so the next line is looked at.
    if _ONLY_MARKUP.fullmatch(value):
        return ""
    text = _HOPE.sub("", value.strip()).strip("*`").strip()
    sentence = _SENTENCE.fullmatch(text)
    return sentence[1].strip("* ") if sentence is not None else text
