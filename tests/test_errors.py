"""runtime/errors.py: what a command prints when it fails, and its exit code."""

import ast
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from tqdm import tqdm

from runtime.errors import (
    LostRank,
    TextError,
    UserError,
    check_text,
    escape_stdout,
    print_error,
    printable,
    run_command,
    terminal,
)


def failing(error):
    """A command that raises `error`."""

    def command():
        raise error

    return command


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (2, 2), (130, 130)])
def test_a_command_that_returns_exits_with_what_it_returns(returned, code, capsys):
    assert run_command(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error, code, line", [
    (UserError("texts.txt: empty"), 2, "error: texts.txt: empty\n"),
    (PermissionError(13, "Permission denied", "out"), 2,
     "error: [Errno 13] Permission denied: 'out'; fix that, or name another place\n"),
    (FileNotFoundError(2, "No such file", "a.txt"), 2,
     "error: [Errno 2] No such file: 'a.txt'; fix that, or name another place\n"),
    (LostRank("another rank has died"), 1, "error: another rank has died\n"),
], ids=lambda value: type(value).__name__)
def test_a_failure_the_user_can_fix_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert run_command(failing(error)) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("a defect"), SystemExit(3)])
def test_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_command(failing(error))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank, where", [("0", ""), ("3", " on rank 3")])
def test_an_error_names_its_rank_unless_it_is_the_first(rank, where, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert print_error(UserError("texts differ")) == 2
    assert print_error(LostRank("rank 1 is gone")) == 1
    assert run_command(failing(OSError(28, "No space left on device"))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"error{where}: texts differ", f"error{where}: rank 1 is gone",
        f"error{where}: [Errno 28] No space left on device; fix that, or name another place"]


def test_the_exit_code_and_the_line_reach_the_shell():
    command = [sys.executable, str(ROOT / "evaluate.py"), "--task-dir", "nowhere", "--kind", "sts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --task-dir nowhere: no such folder\n"


@pytest.mark.parametrize("text, printed", [
    ("plain", b"plain"), ("größer", rb"gr\xf6\xdfer"), ("漢字", rb"\u6f22\u5b57"),
    ("\udc80", rb"\udc80"),  # a byte of a file's name that is not UTF-8
])
def test_stdout_escapes_what_its_encoding_lacks(text, printed, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    escape_stdout()
    print(text, end="", flush=True)
    assert raw.getvalue() == printed


def test_a_command_escapes_its_output(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    assert run_command(lambda: print("ümläut \udc80", flush=True)) == 0
    assert raw.getvalue() == "ümläut ".encode() + rb"\udc80" + b"\n"


def test_a_replaced_stdout_is_left_as_it_is(monkeypatch):
    """Notebooks and tests put objects there that cannot be reconfigured."""
    monkeypatch.setattr(sys, "stdout", replaced := io.StringIO())
    escape_stdout()
    print("漢字", end="")
    assert replaced.getvalue() == "漢字"


def test_half_a_surrogate_pair_is_not_a_text():
    check_text("ümläut 漢字 🙂", "template")
    for text in ("\ud800", "query: \udc80{text}"):
        with pytest.raises(UserError) as caught:
            check_text(text, "template")
        assert str(caught.value).startswith("template ") and "not a text in UTF-8" in str(
            caught.value)
        str(caught.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"], float("nan")], ids=repr)
def test_what_is_no_str_is_not_a_text(value):
    with pytest.raises(TypeError, match=f"template is .*, of the type {type(value).__name__}"):
        check_text(value, "template")
    assert issubclass(TextError, UserError) and issubclass(TextError, ValueError)


# ---------------------------------------------------------------------------------------------
# What strangers wrote does not steer the terminal
# ---------------------------------------------------------------------------------------------

STEERING = {  # a name, and how it is shown on a line
    "a\x1b[31mred": r"a\x1b[31mred", "a\x1b]0;title\x07": r"a\x1b]0;title\x07",
    "\x9b2J": r"\x9b2J", "a\x00b\x7f": r"a\x00b\x7f", "a\rerror: b": r"a\rerror: b",
    "a\nerror: b": r"a\nerror: b", "a\x85b\x0b\x0c": r"a\x85b\x0b\x0c", "a\x08b": r"a\x08b",
    "nur\u202eepj.exe": r"nur\u202eepj.exe", "\u2066a\u2069": r"\u2066a\u2069",
    "a\u2028b\u200f": r"a\u2028b\u200f", "größer 漢字 🙂": "größer 漢字 🙂",
    "a b": "a b",
}


@pytest.mark.parametrize("name", STEERING, ids=ascii)
def test_a_name_is_printed_on_a_line_of_its_own(name, capsys):
    assert printable(name) == STEERING[name]
    for error in (UserError(f"{name}: missing"), OSError(2, "No such file", name)):
        assert run_command(failing(error)) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
        assert printable(err.removesuffix("\n")) == err.removesuffix("\n")


@pytest.mark.parametrize("name", STEERING, ids=ascii)
def test_nothing_that_a_command_prints_steers_the_terminal(name, capsys):
    def command():
        print(f"model\t{name}\nsteps")
        print(name, file=sys.stderr)
        with tqdm(total=2, desc=name.replace("\n", "")) as bar:
            bar.update()

    streams = sys.stdout, sys.stderr
    assert run_command(command) == 0
    assert (sys.stdout, sys.stderr) == streams
    out, err = capsys.readouterr()
    shown = printable(name, keep="\n")
    assert out == f"model\t{shown}\nsteps\n"
    assert printable(err, keep="\r\n") == err and "1/2" in err and "\r" in err


def test_a_progress_bar_may_go_up_a_line(capsys):
    with terminal():
        print("a\x1b[Ab\x1b[2Ac", file=sys.stderr)
        print("a\x1b[Ab")
    assert capsys.readouterr() == ("a\\x1b[Ab\n", "a\x1b[Ab\\x1b[2Ac\n")


def test_a_command_without_streams_runs(monkeypatch):
    """Python sets them to None where a shell has closed them (>&-)."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(lambda: print("a")) == 0
    assert run_command(failing(UserError("a"))) == 2


# ---------------------------------------------------------------------------------------------
# Interruptions, and readers that go
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", ["", "the same command goes on"])
def test_a_signal_ends_a_command_with_a_line(after, number, code, capsys):
    cleaned, before = [], [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def command():
        try:
            signal.raise_signal(number)
            time.sleep(60)
        finally:
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one would end it at once
            cleaned.append(True)

    assert run_command(command, after) == code and cleaned
    assert capsys.readouterr() == ("", "\ninterrupted" + "; " * bool(after) + f"{after}\n")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGINT)) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_process_of_several_says_that_it_was_interrupted(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


COMMANDS = ("pretrain_ctkd", "contrastive", "evaluate", "collapse", "embed", "mine", "export")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_signals_before_it_imports_what_takes_seconds(name):
    body = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
    lines = [ast.unparse(node) for node in body]
    first = next(i for i, line in enumerate(lines) if "await_command()" in line)
    before = {word for line in lines[:first] if line.startswith(("import ", "from "))
              for word in line.replace(".", " ").split()}
    assert not before & {"torch", "numpy", "tokenizers", "data", "model", "runtime", "pretexts"}


def test_what_takes_the_signals_is_imported_at_once():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, runtime.errors; print('numpy' in sys.modules)"],
        capture_output=True, text=True, cwd=ROOT)
    assert loaded.stdout == "False\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_ends_a_command_with_a_line(number, code):
    script = ("from runtime.errors import await_command; await_command(); import time; "
              "print('ready', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "\ninterrupted\n")
        assert process.returncode == code


@pytest.mark.parametrize("flag", ["--list", "--help"])
def test_a_reader_that_goes_is_no_error(flag):
    """evaluate.py --list | head -1"""
    command = [sys.executable, str(ROOT / "evaluate.py"), flag]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=200)
    os.close(write)
    assert (done.returncode, done.stderr) == ({"--list": 141, "--help": 0}[flag], b"")


def test_a_full_disk_under_stdout_is_an_error():
    script = "import sys; from runtime.errors import run_command; sys.exit(run_command(lambda: " \
             "print('a')))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE,
                              cwd=ROOT, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno 28] No space left")
    assert len(done.stderr.splitlines()) == 1
