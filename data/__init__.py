"""Text in, lists of token ids out. This package imports nothing from the rest of the project."""


class UserError(Exception):
    """A mistake the user can mend: shown as a clear message (value, file, fix), exit code 2."""
