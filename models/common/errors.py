"""The exception for all that a user can correct: printed in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a failure of the machine in one line: what, the actual value, the remedy."""


class NotFinite(UserError):
    """A loss or a weight became infinite or NaN."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" for the name most like a word, "" if none is."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {names[close[0]]}?" if close else ""
