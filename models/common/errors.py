"""Errors that the user can correct, printed in one line without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake or a machine failure: one line with the cause, the value and the fix."""


class NotFinite(UserError):
    """A loss or a weight became infinite or NaN."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, to be quoted in another message."""
    text = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
    return (str(text).splitlines() or [type(error).__name__])[0][:160]


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" for the known name closest to a word, "" if none is close."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {names[close[0]]}?" if close else ""
