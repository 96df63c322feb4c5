r"""Whether a regular expression is one that Envoy takes: of RE2's syntax, without look-around and the like.

Python's compiler finds what is malformed; what it knows and RE2 does not is looked for by name. The few
things that only RE2 knows (`\pN`, `\z`, `\Q…\E`) are refused as well.
"""

from __future__ import annotations

import re
import warnings
from typing import Final

STEPS_MAX: Final = 32768
"""As Istio's: Envoy's own hundred are a few dozen characters."""
_ESCAPE_STEPS: Final = 5
_TOKEN: Final = re.compile(
    r"\\(?s:.)|\[\^?\]?(?:\\(?s:.)|\[:\^?\w*:\]|[^]\\])*\]|\{\d+(?:,\d*)?\}|\(\?[^:)>]*[:)>]|(?s:.)"
)
_REPEAT_MAX: Final = 1000
_FOREIGN: Final = (
    (r"\(\?<?[=!]", "look-around"),
    (r"\(\?>", "an atomic group"),
    (r"\(\?\(", "a conditional group"),
    (r"\(\?P=|\\[1-9]", "a back-reference"),
    (r"\(\?#", "a comment"),
    (r"\(\?P<[^>]*[^\x00-\x7f]", "a name of other letters than RE2 takes"),
    (r"\(\?[a-zA-Z]*[aLux]", "a flag other than i, m and s"),
    (r"\(\?-?[a-z]*-?[a-z]*$", "a group without end"),
    (r"\\[^\x00-\x7f]|\\[ZuUN]", "an escape that RE2 does not have"),
    (r"(?:[*+?]|\{[0-9,]+\})\+", "a possessive repetition"),
)
_ESCAPE: Final = re.compile(r"\\(?![1-9NUuZ])[\x00-\x7f]")
"""Of those that both have."""
_NAMED_CLASS: Final = re.compile(r"\[:\^?(\w*):\]")
_NAMED_CLASSES: Final = frozenset(
    {"alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph"}
    | {"lower", "print", "punct", "space", "upper", "word", "xdigit"}
)
_BACKSPACE: Final = re.compile(r"\[[^]]*\\b")
_CLASS: Final = re.compile(r"\[\^?\]?[^]\\]*\]")
_REPEAT: Final = re.compile(r"(\))?\{(\d+)(?:,(\d*))?\}")


def error_in(pattern: str) -> str:
    """What is wrong with it; "" if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} does not compile: {error}"
    for name in _NAMED_CLASS.findall(pattern):
        if name not in _NAMED_CLASSES:
            return f"{pattern!r} does not compile: there is no class [:{name}:]"
    if _BACKSPACE.search(pattern.replace(r"\\", "x")):
        return f"{pattern!r} does not compile: \\b within brackets"
    plain = _CLASS.sub("x", _ESCAPE.sub("x", pattern.replace(r"\\", "x")))
    for foreign, what in _FOREIGN:
        if re.search(foreign, plain):
            return f"{pattern!r} does not compile: {what}"
    if _most_repeated(plain) > _REPEAT_MAX:
        return f"{pattern!r} does not compile: a repetition of more than {_REPEAT_MAX}"
    if (steps := _steps(pattern)) > STEPS_MAX:
        return f"a regular expression of {len(pattern)} characters is too large: {steps} steps of {STEPS_MAX}"
    return ""


def _steps(pattern: str) -> int:
    """Of RE2's program for it, about, and rather more: of one that compiles."""
    outer, whole, last = list[int](), 0, 0
    for part in _TOKEN.findall(pattern):
        if part.startswith("(") and not part.endswith(")"):
            outer.append(whole)
            whole = 0
            continue
        if part == ")":
            last = whole + 2
            whole = (outer.pop() if outer else 0) + last
        elif part.startswith("{") and len(part) > 1:
            more = last * (max(map(int, re.findall(r"\d+", part))) - 1)
            whole, last = whole + max(more, 0), last + max(more, 0)
        elif part in "*+?|":
            whole += 1
            last += 1
        else:
            last = _ESCAPE_STEPS * part.count("\\") + (len(part) if part.startswith("[") else 2)
            whole += last
    return whole * (2 if "(?i" in pattern else 1)


def _most_repeated(plain: str) -> int:
    """How often something may be repeated: counts of groups multiply those within, taken as the largest."""
    of_groups, largest = 1, 1
    for group, least, most in _REPEAT.findall(plain):
        count = max(int(least), int(most or 0))
        if group:
            of_groups *= max(count, 1)
        else:
            largest = max(largest, count)
    return of_groups * largest
