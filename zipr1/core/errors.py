"""The one error a user is meant to see.

A message says what came, what is allowed and what to do. The command line prints it as one line and exits
with `exit_code`: 2 for wrong input, 1 for a run that failed.
"""


class ZipError(Exception):
    """Base of all errors that are the input's or the machine's fault rather than ours."""

    exit_code = 1


class InputError(ZipError, ValueError):
    """Something given to zipr1 is wrong: a recipe key, a file, a row, an option."""

    exit_code = 2


class RunError(ZipError, RuntimeError):
    """A run that was given right input and could not go on: NaN loss, a full disk."""


class Missing(InputError):
    """A model or data that is not on this machine: a run needs it, `--dry-run` plans without."""
