"""The exception for everything a user can put right: shown in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a bad day, told in one line: what, the actual value, and the remedy."""


class NotFinite(UserError):
    """A loss or a weight became infinite or NaN."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Returns "; did you mean A or B?" for the known words closest to `word`, else ""."""
    lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), lower, n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(lower[m] for m in matches)}?" if matches else ""
