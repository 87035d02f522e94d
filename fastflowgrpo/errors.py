"""The error for what a user can fix, and suggestions for its message."""

import difflib
import os
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix: a wrong setting or file, a missing model, a full disk, a failed push to the Hub.

    The message starts with the setting to change, if there is one. A command prints it as one line and exits with
    `exit_code`; every other error keeps its traceback.
    """

    exit_code = 2


class TemporaryError(UserError):
    """An error that may be gone when the same command is run again, such as a folder that another run still uses."""

    exit_code = os.EX_TEMPFAIL


class GuardStop(Exception):
    """`evaluation.guard` has stopped a run, which is saved. A command prints it as one line and exits with code 3."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The suggestion " (did you mean 'x'?)" with the known name that is most like `name`; "" if none is similar."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
