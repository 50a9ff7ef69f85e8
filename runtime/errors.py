"""Errors a user can fix, and how a command ends with one: a line on stderr and an exit code."""

import io
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can fix: one clear line (value, file, fix) and exit code 2."""


class LostRank(Exception):
    """Another rank has died, or has not answered within --timeout: exit code 1."""


def check_text(text: str, name: str):
    """UserError for what no tokenizer takes: half a surrogate pair, or bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {text!r}: not a text in UTF-8 ({error.reason}); write it anew")


def print_error(error: Exception, rank: str = "0") -> int:
    """Print the user-facing text of a fatal error; returns the command's exit code."""
    where = f" on rank {rank}" if rank != "0" else ""
    fix = "; fix that, or name another place" if isinstance(error, OSError) else ""
    print(f"error{where}: {error}{fix}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, LostRank) else 2


def escape_stdout():
    """Let standard output escape what its encoding has no place for, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command of one process; returns its exit code, 2 after a mistake of the user's."""
    escape_stdout()
    try:
        return command() or 0
    except (UserError, LostRank, OSError) as error:
        return print_error(error)
