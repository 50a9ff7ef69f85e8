"""runtime/errors.py: what a command prints when it fails, and its exit code."""

import io
import subprocess
import sys

import pytest
from helpers import ROOT

from runtime.errors import LostRank, UserError, check_text, escape_stdout, print_error, run_command


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


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("a defect"),
                                   KeyboardInterrupt(), SystemExit(3)])
def test_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_command(failing(error))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank, where", [("0", ""), ("3", " on rank 3")])
def test_an_error_names_its_rank_unless_it_is_the_first(rank, where, capsys):
    assert print_error(UserError("texts differ"), rank) == 2
    assert print_error(LostRank("rank 1 is gone"), rank) == 1
    assert print_error(OSError(28, "No space left on device"), rank) == 2
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
