"""Errors a user can fix, and how a command ends and prints: one line, an exit code, and nothing in
strangers' files that could control the terminal."""

import io
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress

STOPS = (signal.SIGINT, signal.SIGTERM)  # what ends a command early

# What a terminal obeys instead of showing it: control characters (ESC, and \x9b, which also begins
# a sequence), the marks that change the direction of text, and line ends.
OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """A mistake the user can fix: one clear line (value, file, fix) and exit code 2."""


class TextError(UserError, TypeError, ValueError):
    """What was given to `encode` is not a list of texts. It is also a TypeError and a ValueError,
    for those who use the encoder as a library."""


class LostRank(Exception):
    """Another rank has died, or has not answered within --timeout: exit code 1."""


def shown(value) -> str:
    """The beginning of a value for a message, on one line."""
    return " ".join(reprlib.repr(value).split())


def check_text(text: str, name: str):
    """TextError for anything but a str, and for half a surrogate pair or bytes that are not UTF-8,
    which no tokenizer accepts."""
    if not isinstance(text, str):
        raise TextError(f"{name} is {shown(text)}, of the type {type(text).__name__}; a text (str) "
                        f"is expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = max(0, error.start - 30)
        raise TextError(f"{name} {text[where : where + 60]!r}: not a text in UTF-8 "
                        f"({error.reason}); write it anew")


# ---------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------


def first_process() -> bool:
    """Whether this is the process that prints, among those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def print_once(text: str):
    """Print a text, once if there are several processes."""
    if first_process():
        print(text, flush=True)


def note(text: str):
    """Print a note, once if there are several processes."""
    print_once(f"note: {text}")


def printable(text: str, keep: str = "") -> str:
    r"""The text on one line, with all that a terminal would obey, except `keep`, escaped (\x1b)."""
    return OBEYED.sub(lambda match: match[0] if match[0] in keep else
                      match[0].encode("unicode_escape").decode(), str(text))


def print_error(error: Exception) -> int:
    """Print the user-facing text of a fatal error on one line; returns the command's exit code."""
    where = "" if first_process() else f" on rank {os.environ['RANK']}"
    fix = "; fix that, or name another place" if isinstance(error, OSError) else ""
    line = printable(str(error).replace("\n", " "))
    with suppress(BrokenPipeError):
        print(f"error{where}: {line}{fix}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, LostRank) else 2


class Escaping:
    """A stream that escapes whatever would control the terminal, except the characters `keep`.

    It lets `moves` pass, with which a progress bar on stderr returns to its line.
    """

    def __init__(self, stream, keep: str, moves: str = ""):
        self.stream, self.keep, self.moves = stream, keep, moves

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        parts = text.split(self.moves) if self.moves else [text]
        self.stream.write(self.moves.join(printable(part, self.keep) for part in parts))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def escape_stdout():
    """Let standard output escape what its encoding cannot express, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def terminal():
    """Let stdout and stderr escape what they must until the block ends; that their reader is gone
    by then (`| head -1`) is not an error."""
    streams = sys.stdout, sys.stderr
    os.environ.setdefault("NO_COLOR", "1")  # newer Pythons colour --help with what is escaped here
    escape_stdout()
    try:  # a stream that was closed before the start (2>&-) is None, and what is printed is lost
        out, err = (stream or open(os.devnull, "w") for stream in streams)
        sys.stdout = Escaping(out, "\n\t")
        sys.stderr = Escaping(err, "\n\t\r", moves="\x1b[A")
        yield
    finally:
        sys.stdout, sys.stderr = streams
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # or the interpreter would complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------
# How a command ends
# ---------------------------------------------------------------------------------------------


def take_signals(stop: Callable) -> dict:
    """Let Ctrl-C and SIGTERM call `stop`, unless they are ignored; returns the old handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) or signal.SIG_DFL for number in STOPS
            if signal.getsignal(number) is not signal.SIG_IGN}


def await_command():
    """End the process with one line if a signal comes while a command's modules are imported, which
    takes seconds; also expand a `~` at the beginning of a value where the shell has not done so
    (--out=~/runs)."""
    sys.argv[1:] = [re.sub(r"^((?:--[\w-]+=)?)(~(?=/|$))",
                           lambda match: match[1] + os.path.expanduser(match[2]), value)
                    for value in sys.argv[1:]]

    def stop(number: int, _):
        if first_process():
            os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    take_signals(stop)


@contextmanager
def interruptible():
    """Make SIGTERM, too, a KeyboardInterrupt with its number; a second signal ends the process."""

    def stop(number: int, _):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    before = take_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_interrupt(stop: KeyboardInterrupt, after: str = "") -> int:
    """Say that a signal has ended the command; returns its exit code, 128 + the signal's number."""
    if first_process():
        with suppress(BrokenPipeError):
            print("\ninterrupted" + f"; {after}" * bool(after), file=sys.stderr, flush=True)
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def run_command(command: Callable[[], int | None], after: str = "") -> int:
    """Run a command; returns its exit code: 0; 2 after a UserError, or for a file or folder that
    cannot be used; 1 if another rank was lost; 128 + n after signal n.

    after: what the user is told after an interruption.
    """
    with terminal(), interruptible():
        try:
            code = command() or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever read the output has had enough
            return 128 + signal.SIGPIPE
        except (UserError, LostRank, OSError) as error:
            return print_error(error)
        except KeyboardInterrupt as stop:
            return print_interrupt(stop, after)
