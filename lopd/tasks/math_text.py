r"""Rewrites a mathematical answer where math-verify misreads what people write.

``readable`` joins groups of thousands, puts the arguments of ``\frac2\pi`` into braces, and removes
units from numbers. Every rewriting keeps the value that a reader sees. docs/tasks.md lists them.
"""

from __future__ import annotations

import re

from lopd.tasks.answer_text import closing_brace, last_box

# What stands around a formula, in LaTeX and in Markdown.
_WRAPPERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
# A space, and the spaces of typesetting: no-break, figure, thin and narrow no-break space.
_SPACE = "[ \u00a0\u2007\u2009\u202f]"
_NAMED = r"(?:thin|med|thick|en|nobreak|)space(?![A-Za-z])"
# What separates groups of digits. `\\ ` is a new row of a matrix, not a space.
_COMMAND_GAP = rf"(?<!\\)(?:\\[,;:! ]|\\{_NAMED})|\{{\\[,;: ]\}}|~|\{{~\}}"
_GAP = rf"(?:{_SPACE}?(?:{_COMMAND_GAP}){_SPACE}?|{_SPACE})"
_THOUSANDS = rf"(?:{_GAP}|\\?_)"
_DIGITS = rf"[0-9]+(?:{_THOUSANDS}[0-9]+)*"
# A number with such gaps before and after the point. It does not begin inside another number, an
# exponent or an index.
_RUN = re.compile(rf"(?<![0-9.^_])({_DIGITS})(\.{_DIGITS})?(?!\.?[0-9])")
# A mixed number: 2 1/2.
_MIXED = re.compile(rf"(?<![0-9.,^_/])([0-9]+){_GAP}([0-9]+)\s*/\s*([0-9]+)(?![0-9.])")
# A repeating decimal: 0.1\overline{6}.
_REPEATING = re.compile(
    r"(?<![0-9.,])([0-9]{0,50})\.([0-9]{0,50})"
    r"\\(?:overline|bar)(?![A-Za-z])\s*(?:\{([0-9]{1,50})\}|([0-9]))"
)
# Two digits that only a gap separates, after all gaps that have a meaning are gone.
_LEFT_APART = re.compile(rf"[0-9](?:{_GAP}|\s*\\q?quad\s*)[0-9]")
# Full-width digits, the minus sign and the typographic apostrophe.
_LOOKALIKES = str.maketrans("０１２３４５６７８９−’", "0123456789-'")
_WRAPPED_COMMA = re.compile(r"\\(?:math(?:punct|ord|inner)|text)\s*\{,\}")
# Commands with two arguments, which TeX accepts without braces.
_COMMAND = re.compile(r"\\(?:[dtc]?frac|[dt]?binom)(?![A-Za-z])")
_ONE_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9A-Za-z]")
# A number with a sign, a dollar, commas, decimals or a fraction; and the words behind it, as text
# of a formula or plain.
_PLAIN_NUMBER = r"[-+]?(?:\\?\$)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?"
_FORMAL = r"\s*\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}"
_WITH_WORDS = re.compile(rf"({_PLAIN_NUMBER})(?:{_FORMAL}|(\s*)([A-Za-z -]+))")
# Words that multiply.
_SCALES = {
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "dozen": "12",
}
# Words behind a number that change its value, or that join it to another number. They are no units.
_NO_UNITS = """
    and or not to plus minus times over by per half halves third thirds quarter quarters fourth
    fourths fifth fifths sixth sixths tenth tenths hundredth hundredths squared cubed factorial
    mod modulo choose less more base sqrt root infinity score gross pair pairs couple sin cos tan
    log exp theta alpha beta gamma delta lambda sigma omega epsilon isn wrong incorrect
"""
# Units of fewer than four letters. Other short words may be products of variables.
_SHORT_UNITS = "cm mm km kg mg ml ft lb lbs oz hr hrs min sec mph kph usd eur"
_LAST_VARIABLE = re.compile(r"(?<![A-Za-z\\])([A-Za-z]{0,2})([a-df-hj-z])$")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf|mathit)\s*\{\s*([^{}]*?)\s*\}")
# In 2e5 the letter is no variable.
_LETTERS = re.compile(r"\\[A-Za-z]+|(?<=[0-9])[eE](?=[-+]?[0-9])|[A-Za-z]+")


def bare(answer: str) -> str:
    """Remove the $ signs or TeX brackets around a formula, and a full stop at its end."""
    text = answer.strip()
    while True:
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            # In "$1$ and $2$" the outer dollars belong to two formulas.
            around = text.startswith(opening) and text.endswith(closing)
            if around and inner and opening not in inner:
                text = inner.strip()
                break
        else:
            return text.rstrip(".").strip()


def unboxed(gold: str) -> str:
    """Remove the box that some data sets leave around a prompt's answer."""
    return last_box(gold) or gold


def readable(answer: str) -> str | None:
    """Return the answer for math-verify.

    Returns:
        None if digits stand side by side and form no number. math-verify would add or multiply
        them, and so accept what nobody has written.
    """
    # Mixed numbers come before groups of digits, because both have gaps. Units come last: they are
    # removed only behind a complete number.
    text = _WRAPPED_COMMA.sub(",", bare(answer).translate(_LOOKALIKES))
    text = _MIXED.sub(_mixed, _REPEATING.sub(_fraction, text))
    text = re.sub(r"~(?=\\)", " ", _RUN.sub(_joined, text))
    text = _without_unit(braced_arguments(text))
    if _LEFT_APART.search(text):
        return None
    # math-verify would remove the h of 2h, because it takes it for hours.
    return _LAST_VARIABLE.sub(r"\1{\2}", text)


def _fraction(match: re.Match[str]) -> str:
    r"""Return ``0.1\overline{6}`` as 15/90, exactly. math-verify reads 0.1 and ignores the rest."""
    whole = match[1] or "0"
    fixed = match[2]
    repeating = match[3] or match[4]
    # With r repeating and f other decimals: x = (all digits - digits without the repeating ones) /
    # ((10^r - 1) 10^f).
    numerator = int(whole + fixed + repeating) - int(whole + fixed)
    denominator = (10 ** len(repeating) - 1) * 10 ** len(fixed)
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _mixed(match: re.Match[str]) -> str:
    """Return ``2 1/2`` as two and a half. In ``1 234/567`` the gap separates thousands."""
    whole, numerator, denominator = match.groups()
    if len(numerator) == 3:
        return match[0]
    return f"{whole}\\frac{{{numerator}}}{{{denominator}}}"


def _joined(match: re.Match[str]) -> str:
    """Return groups of three digits as one number. Anything else stays as it is."""
    whole = re.split(_THOUSANDS, match[1])
    decimals = re.split(_THOUSANDS, (match[2] or "")[1:])
    gaps = {gap.strip() for gap in re.findall(_THOUSANDS, match[0])}
    # A number is written with one kind of gap. Two kinds mean two numbers.
    if len(gaps) > 1:
        return match[0]
    # Before the point the first group has one to three digits, the others have three.
    first, *threes = whole
    if threes and (len(first) > 3 or first[0] == "0"):
        return match[0]
    # Behind the point it is the last group that may be shorter.
    *before, last = decimals
    threes += before
    if any(len(group) != 3 for group in threes) or (before and len(last) > 3):
        return match[0]
    return "".join(whole) + ("." + "".join(decimals) if match[2] else "")


def braced_arguments(text: str) -> str:
    r"""Return ``\frac2\pi`` and ``\binom52`` as ``\frac{2}{\pi}`` and ``\binom{5}{2}``."""
    # From the end, so that the positions of the earlier commands stay right.
    for match in reversed(list(_COMMAND.finditer(text))):
        position = match.end()
        arguments = []
        # Two arguments, because the commands here are those such as \frac.
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
    """Return the argument of a command, in braces, and where it ends. None if there is none."""
    # LaTeX skips spaces before an argument.
    while start < len(text) and text[start] == " ":
        start += 1
    if text[start : start + 1] == "{":
        end = closing_brace(text, start)
        return None if end is None else (text[start : end + 1], end + 1)
    token = _ONE_TOKEN.match(text, start)
    if token is None:
        return None
    end = token.end()
    # An argument may be a command with its own arguments: \frac\sqrt{2}3.
    while token[0].startswith("\\") and text[end : end + 1] == "{":
        closed = closing_brace(text, end)
        if closed is None:
            return None
        end = closed + 1
    return f"{{{text[start:end]}}}", end


def _without_unit(text: str) -> str:
    """Return ``18 dollars`` as 18, and ``3 million people`` as 3 million.

    ``50 percent`` becomes a percentage. A word of fewer than four letters may be a product of
    variables, so only known units count.
    """
    match = _WITH_WORDS.fullmatch(text)
    if match is None:
        return text
    number, formal, space, plain = match.groups()
    words = re.findall(r"[A-Za-z]+", formal if formal is not None else plain)
    lowered = [word.lower() for word in words]
    if not words:
        return text
    # A percent sign is not a unit: it changes the number by a factor of a hundred.
    if lowered in (["percent"], ["per", "cent"]):
        return f"{number}\\%"
    if lowered[0] in _SCALES and (space or formal is not None):
        number = f"{number}\\cdot {_SCALES[lowered.pop(0)]}"
    if set(_NO_UNITS.split()) & set(lowered) or _SCALES.keys() & set(lowered):
        return text
    if formal is not None:
        # A unit as text of a formula, as in 5\text{ cm}, is left to math-verify.
        return text if number == match[1] else number
    # "5apples" is no number with a unit, but "5 apples" is.
    apart = space and len(words[0]) >= 4
    return number if apart or (lowered and lowered[0] in _SHORT_UNITS.split()) else text


def same_case(one: str, other: str) -> bool:
    r"""Return whether single letters agree in case.

    ``A`` is not ``a``, but ``\text{Yes}`` is ``\text{yes}``. math-verify ignores the case.
    """
    mine = _variables(one)
    theirs = _variables(other)
    # A letter that both sides have is no question of case.
    alone = [(letter, theirs) for letter in mine - theirs]
    alone += [(letter, mine) for letter in theirs - mine]
    return not any(letter.swapcase() in others for letter, others in alone)


def _variables(text: str) -> set[str]:
    # Text of a formula counts only if it is one letter, as in the choice \text{(A)}.
    plain = _TEXT.sub(lambda match: match[1] if len(match[1].strip("()")) == 1 else " ", text)
    words = [word for word in _LETTERS.findall(plain) if not word.startswith("\\")]
    return {letter for word in words if len(word) <= 2 for letter in word}


def is_braced_set(text: str) -> bool:
    r"""Return whether an answer is written with braces: ``\{3,4\}``, not ``3,4``."""
    return re.match(r"(?:\\left)?\s*\\(?:\{|lbrace)", text) is not None
