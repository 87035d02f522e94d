"""Errors that the user can mend, and hints at what was meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user can put right: a setting, a file, a model. A command prints it as one line and exits with 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For error messages: " (did you mean 'x'?)" with the known name nearest to `name`, "" if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
