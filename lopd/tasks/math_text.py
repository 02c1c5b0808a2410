r"""The text of a mathematical answer, rewritten where math-verify misreads what people write.

``readable`` joins thousands, braces the arguments of ``\frac2\pi`` and takes units from numbers.
Each rewriting keeps the value that a reader would see. docs/tasks.md lists them.
"""

from __future__ import annotations

import re

from lopd.tasks.answer_text import closing_brace, last_box

_WRAPPERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_SPACE = "[ \u00a0\u2007\u2009\u202f]"
_NAMED = r"(?:thin|med|thick|en|nobreak|)space(?![A-Za-z])"
# what sets groups of digits apart; `\\ ` is a new row of a matrix, not a space
_COMMAND_GAP = rf"(?<!\\)(?:\\[,;:! ]|\\{_NAMED})|\{{\\[,;: ]\}}|~|\{{~\}}"
_GAP = rf"(?:{_SPACE}?(?:{_COMMAND_GAP}){_SPACE}?|{_SPACE})"
_THOUSANDS = rf"(?:{_GAP}|\\?_)"
_DIGITS = rf"[0-9]+(?:{_THOUSANDS}[0-9]+)*"
_RUN = re.compile(rf"(?<![0-9.^_])({_DIGITS})(\.{_DIGITS})?(?!\.?[0-9])")
_MIXED = re.compile(rf"(?<![0-9.,^_/])([0-9]+){_GAP}([0-9]+)\s*/\s*([0-9]+)(?![0-9.])")
_REPEATING = re.compile(
    r"(?<![0-9.,])([0-9]{0,50})\.([0-9]{0,50})\\(?:overline|bar)(?![A-Za-z])\s*(?:\{([0-9]{1,50})\}|([0-9]))"
)
_LEFT_APART = re.compile(rf"[0-9](?:{_GAP}|\s*\\q?quad\s*)[0-9]")
_LOOKALIKES = str.maketrans("０１２３４５６７８９−’", "0123456789-'")
_WRAPPED_COMMA = re.compile(r"\\(?:math(?:punct|ord|inner)|text)\s*\{,\}")
_COMMAND = re.compile(r"\\(?:[dtc]?frac|[dt]?binom)(?![A-Za-z])")
_ONE_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9A-Za-z]")
_PLAIN_NUMBER = r"[-+]?(?:\\?\$)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?"
_FORMAL = r"\s*\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}"
_WITH_WORDS = re.compile(rf"({_PLAIN_NUMBER})(?:{_FORMAL}|(\s*)([A-Za-z -]+))")
_SCALES = {
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "dozen": "12",
}
# words behind a number that change its value, or join it to another: never a unit
_NO_UNITS = """
    and or not to plus minus times over by per half halves third thirds quarter quarters fourth
    fourths fifth fifths sixth sixths tenth tenths hundredth hundredths squared cubed factorial
    mod modulo choose less more base sqrt root infinity score gross pair pairs couple sin cos tan
    log exp theta alpha beta gamma delta lambda sigma omega epsilon isn wrong incorrect
"""
_SHORT_UNITS = "cm mm km kg mg ml ft lb lbs oz hr hrs min sec mph kph usd eur"
_LAST_VARIABLE = re.compile(r"(?<![A-Za-z\\])([A-Za-z]{0,2})([a-df-hj-z])$")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf|mathit)\s*\{\s*([^{}]*?)\s*\}")
_LETTERS = re.compile(r"\\[A-Za-z]+|(?<=[0-9])[eE](?=[-+]?[0-9])|[A-Za-z]+")


def bare(answer: str) -> str:
    """Without the dollars or brackets of a formula around it, and a full stop at its end."""
    text = answer.strip()
    while True:
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            around = text.startswith(opening) and text.endswith(closing)
            if around and inner and opening not in inner:
                text = inner.strip()
                break
        else:
            return text.rstrip(".").strip()


def unboxed(gold: str) -> str:
    """A prompt's answer without the box that some data sets leave around it."""
    return last_box(gold) or gold


def readable(answer: str) -> str | None:
    """The answer for math-verify; None where digits stand side by side and form no number.

    math-verify would add or multiply such numbers, and so find right what nobody has written.
    """
    text = _WRAPPED_COMMA.sub(",", bare(answer).translate(_LOOKALIKES))
    text = _MIXED.sub(_mixed, _REPEATING.sub(_fraction, text))
    text = re.sub(r"~(?=\\)", " ", _RUN.sub(_joined, text))
    text = _without_unit(braced_arguments(text))
    if _LEFT_APART.search(text):
        return None
    return _LAST_VARIABLE.sub(r"\1{\2}", text)  # math-verify would drop the h of 2h as hours


def _fraction(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` is 15/90, exactly. math-verify reads it as 0.1 and drops what repeats."""
    whole, fixed = match[1] or "0", match[2]
    repeating = match[3] or match[4]
    numerator = int(whole + fixed + repeating) - int(whole + fixed)
    denominator = (10 ** len(repeating) - 1) * 10 ** len(fixed)
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _mixed(match: re.Match[str]) -> str:
    r"""``2 1/2`` is two and a half; ``1 234/567`` has thousands."""
    whole, numerator, denominator = match.groups()
    if len(numerator) == 3:
        return match[0]
    return f"{whole}\\frac{{{numerator}}}{{{denominator}}}"


def _joined(match: re.Match[str]) -> str:
    """Groups of three digits as one number; anything else as it stands."""
    whole, decimals = re.split(_THOUSANDS, match[1]), re.split(_THOUSANDS, (match[2] or "")[1:])
    gaps = {gap.strip() for gap in re.findall(_THOUSANDS, match[0])}
    if len(gaps) > 1:
        return match[0]
    first, *threes = whole
    if threes and (len(first) > 3 or first[0] == "0"):
        return match[0]
    *before, last = decimals
    threes += before
    if any(len(group) != 3 for group in threes) or (before and len(last) > 3):
        return match[0]
    return "".join(whole) + ("." + "".join(decimals) if match[2] else "")


def braced_arguments(text: str) -> str:
    r"""``\frac2\pi`` and ``\binom52`` as ``\frac{2}{\pi}`` and ``\binom{5}{2}``."""
    for match in reversed(list(_COMMAND.finditer(text))):
        position = match.end()
        arguments = []
        for _ in range(2):
            found = _argument(text, position)
            if found is None:
                break
            argument, position = found
            arguments.append(argument)
        if len(arguments) == 2:
            text = f"{text[: match.end()]}{''.join(arguments)}{text[position:]}"
    return text


def _argument(text: str, start: int) -> tuple[str, int] | None:
    """The argument of a command, in braces, and where it ends; None where there is none."""
    while start < len(text) and text[start] == " ":
        start += 1
    if text[start : start + 1] == "{":
        end = closing_brace(text, start)
        return None if end is None else (text[start : end + 1], end + 1)
    token = _ONE_TOKEN.match(text, start)
    if token is None:
        return None
    end = token.end()
    while token[0].startswith("\\") and text[end : end + 1] == "{":  # \frac\sqrt{2}3
        closed = closing_brace(text, end)
        if closed is None:
            return None
        end = closed + 1
    return f"{{{text[start:end]}}}", end


def _without_unit(text: str) -> str:
    """``18 dollars`` as 18, ``3 million people`` as three million, ``50 percent`` as a percentage.

    A word of fewer than four letters may be a product of variables: only known units count.
    """
    match = _WITH_WORDS.fullmatch(text)
    if match is None:
        return text
    number, formal, space, plain = match.groups()
    words = re.findall(r"[A-Za-z]+", formal if formal is not None else plain)
    lowered = [word.lower() for word in words]
    if not words:
        return text
    if lowered in (["percent"], ["per", "cent"]):
        return f"{number}\\%"
    if lowered[0] in _SCALES and (space or formal is not None):
        number = f"{number}\\cdot {_SCALES[lowered.pop(0)]}"
    if set(_NO_UNITS.split()) & set(lowered) or _SCALES.keys() & set(lowered):
        return text
    if formal is not None:
        return text if number == match[1] else number
    apart = space and len(words[0]) >= 4
    return number if apart or (lowered and lowered[0] in _SHORT_UNITS.split()) else text


def same_case(one: str, other: str) -> bool:
    r"""Whether single letters agree in case: ``A`` is not ``a``, while ``\text{Yes}`` is yes."""
    mine, theirs = _variables(one), _variables(other)
    alone = [(letter, theirs) for letter in mine - theirs]
    alone += [(letter, mine) for letter in theirs - mine]
    return not any(letter.swapcase() in others for letter, others in alone)


def _variables(text: str) -> set[str]:
    # of words in \text only single letters, as of a choice: (A)
    plain = _TEXT.sub(lambda match: match[1] if len(match[1].strip("()")) == 1 else " ", text)
    words = [word for word in _LETTERS.findall(plain) if not word.startswith("\\")]
    return {letter for word in words if len(word) <= 2 for letter in word}


def is_braced_set(text: str) -> bool:
    r"""Whether braces are written around it: ``\{3,4\}``, not the bare list ``3,4``."""
    return re.match(r"(?:\\left)?\s*\\(?:\{|lbrace)", text) is not None
