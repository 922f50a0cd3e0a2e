"""The exception for everything a user can put right: shown in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a bad day, told in one line: what, the actual value, and the remedy."""


class NotFinite(UserError):
    """A loss or a weight became infinite or NaN."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean A?", or "A or B?" where both are about as near, else ""."""
    word = word.lower().lstrip("-")
    near = {}
    for name in known:
        ratio = difflib.SequenceMatcher(None, word, name.lower().lstrip("-")).ratio()
        if ratio >= 0.7:
            near[name] = ratio
    best = max(near.values(), default=0)
    chosen = sorted((n for n in near if near[n] > best - 0.05), key=near.__getitem__, reverse=True)
    return f"; did you mean {' or '.join(chosen[:2])}?" if chosen else ""
