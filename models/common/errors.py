"""The exception for all that a user can correct: printed in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a failure of the machine in one line: what, the actual value, the remedy."""


class NotFinite(UserError):
    """A loss or a weight became infinite or NaN."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, to quote it in another."""
    text = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
    return (str(text).splitlines() or [type(error).__name__])[0][:160]


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" for the name most like a word, "" if none is."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {names[close[0]]}?" if close else ""
