"""Whatever the three commands are given: exit code 0 or 2 with one clear line, inputs untouched.

FUZZ_CASES=300 python -m pytest tests/test_fuzz.py      so many random cases per test

Without it the cases are few, and the same every time.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import SPELLINGS, TASK_FILES, write_task
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import contrastive
import evaluate
import pretrain_ctkd
from runtime.results import PUBLISHED

CASES = int(os.environ.get("FUZZ_CASES", 0))
fuzz = settings(max_examples=CASES or 80, derandomize=not CASES, database=None, deadline=None,
                phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
SECONDS = 600  # no case may take longer
COUNT: Counter = Counter()  # exit codes of all cases
SAID: list[str] = []  # what they printed


@pytest.fixture(scope="module", autouse=True)
def counted(request):
    """No reports, which take longer than the runs; at the end the number of cases is printed."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (pretrain_ctkd, contrastive):
            patch.setattr(stage, "report", lambda *_: None)
        yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{COUNT.total()} cases: {COUNT[0]} ended with 0, {COUNT[2]} with 2")


# ---------------------------------------------------------------------------------------------
# A case, and what must be true of it
# ---------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case that takes too long; nothing in the code catches it."""


def say(text: str):
    """Show the text with a failing case."""
    if currently_in_test_context():
        note(text)


def hashes(*folders: Path) -> dict[Path, str]:
    """Every path below the folders, with the sha256 of its content."""
    paths = sorted(path for folder in folders for path in (folder, *folder.rglob("*")))
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in paths}


@contextmanager
def time_limit():
    """Raise Hang in the block after so many seconds."""
    def ring(*_):
        raise Hang(f"over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(main, argv: list, *inputs: Path) -> int:
    """The exit code of main(argv), 0 or 2; any other end, and any changed input, is an error.

    Standard output refuses what is not UTF-8, as a terminal's does.
    """
    argv = list(map(str, argv))
    say(f"{main.__module__} {argv}")
    before = hashes(*inputs)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
                for errors in ("strict", "backslashreplace"))
    try:
        with time_limit(), redirect_stdout(out), redirect_stderr(err):
            code = main(argv)
    except SystemExit as end:  # argparse
        code = end.code
    finally:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
    said = err.buffer.getvalue().decode()
    say(said[-2000:])
    SAID[:] = [out.buffer.getvalue().decode() + said]
    assert code in (0, 2), code
    assert code == 0 or re.search(r"(^|[\r\n]|\.py: )error: .", said)
    assert "Traceback" not in said
    assert hashes(*inputs) == before
    COUNT[code] += 1
    return code


@contextmanager
def fresh():
    """A new folder, which is the working directory until the block ends."""
    with tempfile.TemporaryDirectory(prefix="llm2comp-fuzz-") as folder, chdir(folder):
        yield Path(folder)


# ---------------------------------------------------------------------------------------------
# Values of settings
# ---------------------------------------------------------------------------------------------

SMALL = [-(2**63), -1, 0, 1, 2, 3, 7]
HUGE = [2**31, 2**63 - 1, 2**63, 10**30, 10**400]
INTS = st.sampled_from([*SMALL, *HUGE, "", "1.5", "x"])
FLOATS = st.sampled_from(["nan", "inf", "-inf", -1, -0.0, 0, 1e-30, 1e-9, 0.5, 0.999, 1, 1.5, 1e30,
                          1e308, ""])
# no NUL, which no command line can have; \udc80 to \udcff stand for bytes that are not UTF-8
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(
    "\udc80\udcff")
ODD = ["", " ", ".", "..", "/", "a/b", "none", "auto", "nowhere/at/all", "nowhere", "{text}",
       "{text}</s>", "a: {text}", "{instruction}:{text}", "{", "%s", "-1", "x" * 300, "x\ny",
       "\u202e\u6f22\u0301\U0001f600", "\udc80", "/dev/null", "~"]
# random ones stay below the working directory
STRINGS = st.sampled_from(ODD) | st.text(LETTERS, max_size=20).filter(
    lambda s: not s.startswith("/") and ".." not in s)
# Settings by which an honest user asks for much time or memory, and the device, stay small.
BOUNDED = {
    "steps": st.sampled_from([-1, 1, 2, 3]), "lora_r": st.sampled_from([-1, 0, 1, 64]),
    "memory_tokens": st.sampled_from([-1, 0, 1, 2, 38, 64]),
    "threads": st.sampled_from([-1, 0, 1, 10**30]), "device": st.sampled_from(["cpu", "", "tpu"]),
}


def value(field: dataclasses.Field, names: list[str]):
    """Values for a setting; strings may also be one of `names`."""
    if field.name in BOUNDED:
        return BOUNDED[field.name]
    if choices := field.metadata["choices"]:
        choices = choices() if callable(choices) else choices
        return st.sampled_from([*choices, "", "nonsense"])
    strings = st.sampled_from(names) | STRINGS
    return {int: INTS, float: FLOATS, str: strings, bool: st.booleans()}[field.type]


def some_settings(config, names: list[str]):
    """A random subset of the settings of a stage, each with a random value."""
    by_name = {f.name: value(f, names) for f in dataclasses.fields(config)}
    return st.lists(st.sampled_from(sorted(by_name)), min_size=1, max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: by_name[name] for name in chosen}))


def flags(values: dict) -> list[str]:
    """The command line of these settings."""
    words = []
    for name, given_value in values.items():
        name = name.replace("_", "-")
        if isinstance(given_value, bool):
            words.append(f"--{name}" if given_value else f"--no-{name}")
        else:
            words.append(f"--{name}={given_value}")
    return words


FAST1 = {"steps": 2, "memory_tokens": 2, "max_tokens": 40, "batch_size": 2, "threads": 1,
         "dtype": "float32", "device": "cpu", "lora_r": 4, "num_texts": 20, "out": "out"}
FAST2 = {"steps": 2, "max_tokens": 40, "batch_size": 4, "threads": 1, "dtype": "float32",
         "device": "cpu", "micro_tokens": 160, "lora_r": 4, "out": "out"}


def names(home: Path, tiny: Path) -> list[str]:
    """Places that are there, most of them of the wrong kind for most settings."""
    return [str(p) for p in (home, tiny, home / "texts.txt", home / "triples.jsonl",
                             home / "folder", home / "ctkd", tiny / "config.json")] + [
        "demo-sts", "sts17, demo-sts", "wiki1m"]


def data_of(stage: str, home: Path) -> dict:
    """The settings that name a contrastive stage's data."""
    if stage == "ucl":
        return {"stage": stage, "text": home / "texts.txt"}
    return {"stage": stage, "triples": home / "triples.jsonl", "document_tokens": 40}


@fuzz
@given(data=st.data())
def test_settings_of_stage_1(data, home, ctkd, tiny):
    drawn = data.draw(some_settings(pretrain_ctkd.Config, names(home, tiny)))
    usual = {"model": tiny, "text": home / "texts.txt", **FAST1}
    with fresh():
        outcome(pretrain_ctkd.main, flags({**usual, **drawn}), home, tiny)


@fuzz
@given(data=st.data(), stage=st.sampled_from(["ucl", "scl"]), plain=st.booleans())
def test_settings_of_stages_2_and_3(data, stage, plain, home, ctkd, tiny):
    drawn = data.draw(some_settings(contrastive.Config, names(home, tiny)))
    usual = {"model": tiny if plain else ctkd, **data_of(stage, home), **FAST2}
    with fresh():
        outcome(contrastive.main, flags({**usual, **drawn}), home, tiny)


EVALUATE = {
    "task": st.sampled_from(["demo-sts", "sts17", "all", "", "nonsense"]),
    "task_dir": STRINGS, "kind": st.sampled_from([*TASK_FILES, "", "nonsense"]), "model": STRINGS,
    "method": st.sampled_from(["memory", *evaluate.METHODS, "nonsense"]),
    "max_tokens": INTS, "instruction": STRINGS, "data_dir": STRINGS, "revision": STRINGS,
    "base": STRINGS, "device": BOUNDED["device"], "dtype": st.sampled_from(["bfloat16", "half"]),
    "batch_tokens": INTS, "threads": BOUNDED["threads"], "timeout": FLOATS, "results": STRINGS,
    "compare": STRINGS,
}


@fuzz
@given(data=st.data(), plain=st.booleans())
def test_settings_of_evaluate(data, plain, home, ctkd, tiny):
    chosen = data.draw(st.lists(st.sampled_from(sorted(EVALUATE)), max_size=4, unique=True))
    usual = {"model": tiny if plain else ctkd, "task_dir": "task", "kind": "sts", "threads": 1,
             "device": "cpu"}
    drawn = {name: data.draw(EVALUATE[name]) for name in chosen}
    with fresh() as folder:
        write_task(folder / "task", "sts")
        outcome(evaluate.main, flags({**usual, **drawn}), home, tiny, folder / "task")


# ---------------------------------------------------------------------------------------------
# Texts and triples
# ---------------------------------------------------------------------------------------------

WORDS = "the quick brown fox jumps over a lazy dog and reads texts from left to right".split()
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)
TEXTS = st.text(max_size=30) | SENTENCES
EDGES = st.sampled_from([*SMALL, *HUGE, "", " ", "\0", "\ud800", 1e400, 1e308, -1e308, [], {}])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | EDGES, max_leaves=8,
    extend=lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(max_size=5), inner, max_size=4))
ROUGH = st.sampled_from([  # lines that json.dumps would not write
    "", " ", "{", "[]", "[[", '{"text": }', '{"text": "a"', '"', "NaN", "-Infinity", "1e999",
    "9" * 5000, "[" * 700 + "]" * 700, "[" * 990 + "]" * 990, "[" * 100_000,
    '{"a":' * 990 + "1" + "}" * 990, '{"text": "\\ud800"}', '{"query": "\\udfff"}', "\ufeff{}",
    '{"text": ' + "[" * 960 + "]" * 960 + "}", '{"positive": ' + "[" * 960 + "]" * 960 + "}"])


def rows(*fields: str):
    """Lines of JSON: most have the fields and texts in them, some are odd."""
    good = st.fixed_dictionaries({name: SENTENCES for name in fields})
    listed = good.flatmap(lambda row: st.lists(SENTENCES, max_size=3).map(
        lambda texts: {**row, fields[-1]: texts}))
    odd = good.flatmap(lambda row: st.tuples(st.sampled_from(fields), JSON).map(
        lambda change: {**row, change[0]: change[1]}))
    return st.one_of(good, good, good, listed, odd, JSON).map(json.dumps) | ROUGH


def content(lines):
    """Bytes of a file: lines joined, perhaps zipped, cut off or damaged."""
    joined = st.lists(lines, max_size=12).map("\n".join)
    plain = joined.map(lambda s: s.encode("utf-8", "surrogatepass")) | joined.map(
        lambda s: s.encode("utf-16", "surrogatepass")) | st.binary(max_size=60)
    zipped = plain.map(gzip.compress)
    cut = zipped.flatmap(lambda b: st.integers(0, len(b)).map(lambda n: b[:n]))
    return st.one_of(plain, plain, plain, zipped, cut, zipped.flatmap(flipped))


def flipped(content: bytes):
    """The bytes with one bit changed."""
    def flip(place: int) -> bytes:
        return content[: place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[
            place // 8 + 1 :]

    return st.integers(0, 8 * len(content) - 1).map(flip) if content else st.just(content)


ENDINGS = st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".csv", ""])


@fuzz
@given(data=st.data(), ending=ENDINGS, stage=st.sampled_from(["ctkd", "ucl"]))
def test_files_of_texts(data, ending, stage, home, ctkd, tiny):
    lines = rows("text") if "jsonl" in ending else TEXTS | SENTENCES
    with fresh() as folder:
        path = folder / "given" / f"texts{ending}"
        path.parent.mkdir()
        path.write_bytes(data.draw(content(lines)))
        if stage == "ctkd":
            argv = flags({"model": tiny, "text": path, **FAST1, "batch_size": 1})
            outcome(pretrain_ctkd.main, argv, tiny, path.parent)
        else:
            argv = flags({"model": ctkd, "text": path, **FAST2, "batch_size": 2})
            outcome(contrastive.main, argv, ctkd, tiny, path.parent)


TRIPLES = ["rows.jsonl", "rows.jsonl.gz", "allnli.jsonl", "msmarco_passage.jsonl", "rows.txt",
           "\udc80.jsonl", "allnli_split1.jsonl"]


@fuzz
@given(data=st.data(), files=st.lists(st.sampled_from(TRIPLES), min_size=1, max_size=3,
                                      unique=True), whole=st.booleans(),
       batches=st.sampled_from(["mixed", "single-dataset"]))
def test_files_of_triples(data, files, whole, batches, home, ctkd, tiny):
    lines = rows("query", "positive", "negative")
    with fresh() as folder:
        given_folder = folder / "given"
        given_folder.mkdir()
        for name in files:
            (given_folder / name).write_bytes(data.draw(content(lines)))
        source = given_folder if whole else given_folder / files[0]
        argv = flags({"model": ctkd, "stage": "scl", "triples": source, "batches": batches, **FAST2,
                      "document_tokens": 30, "max_tokens": 130, "batch_size": 2})
        outcome(contrastive.main, argv, ctkd, tiny, given_folder)


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def place(draw, value) -> tuple[tuple, object]:
    """The path of something inside a JSON value, or of the value itself, and what is there."""
    path = ()
    while isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        path, value = (*path, key), value[key]
    return path, value


def like(value):
    """Values that are nearly the given one: of another type, sign or size."""
    if isinstance(value, int | float) and abs(value) < 1e300:
        near = [float(value), str(value), -value, value + 1, value * 1000 + 0.5, 10**9, True]
    else:
        near = [str(value), f"{value}x"]
    return st.sampled_from([*near, [value], [], {}, {"a": value}, None, 0])


def changed(value, path: tuple, new):
    """The JSON value with what is at the path replaced, or removed if `new` is Ellipsis."""
    if not path:
        return {} if new is ... else new
    copy = value.copy()
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def damage_json(draw, path: Path):
    """Replace or remove one thing in a JSON file, or in one line of a .jsonl file."""
    whole = path.read_text()
    lines = whole.splitlines() if whole and ".jsonl" in path.name else [whole]
    i = draw(st.integers(0, len(lines) - 1))
    parsed = json.loads(lines[i])
    path_in, old = place(draw, parsed)
    new = draw(st.one_of(st.just(...), like(old), like(old), EDGES, JSON))
    lines[i] = json.dumps(changed(parsed, path_in, new))
    path.write_text("\n".join(lines))


def damage_lines(draw, path: Path):
    """Double, remove or replace a line."""
    lines = path.read_bytes().splitlines(keepends=True) or [b""]
    i = draw(st.integers(0, len(lines) - 1))
    new = draw(ROUGH | JSON.map(json.dumps)).encode() + b"\n"
    lines[i : i + 1] = draw(st.sampled_from([[lines[i]] * 2, [], [new]]))
    path.write_bytes(b"".join(lines))


def damage_tensors(draw, path: Path):
    """Write a safetensors file anew with one tensor of another type, shape, name or value."""
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    how = draw(st.sampled_from(["type", "shape", "name", "value", "none"]))
    if how == "type":
        tensor = tensor.to(draw(st.sampled_from([torch.int64, torch.bool, torch.float16,
                                                 torch.float64, torch.complex64])))
    elif how == "shape":
        tensor = draw(st.sampled_from([tensor.flatten(), tensor[:0], tensor[None], tensor[0]]))
    elif how == "name":
        name = draw(st.text(max_size=9))
    elif how == "value":
        tensor = torch.full_like(tensor, draw(st.sampled_from([0.0, 1e38, torch.inf, torch.nan])))
    if how != "none":
        tensors[name] = tensor.contiguous()
    save_file(tensors, path)


def damage(draw, path: Path):
    """Damage one file, in a way that suits it."""
    kinds = ["flip", "cut", "delete", "empty", "bytes", "json", "folder", "lines"]
    zipped = path.name.endswith(".gz")
    kinds += ["inside"] * 20 * (".json" in path.name and not zipped)
    kinds += ["tensors"] * 8 * path.name.endswith(".safetensors")
    kind = draw(st.sampled_from(kinds))
    before = path.read_bytes()
    if kind == "inside":
        try:
            return damage_json(draw, path)
        except (ValueError, RecursionError):  # it was damaged before
            kind = "bytes"
    if kind == "tensors":
        try:
            return damage_tensors(draw, path)
        except Exception:  # it was damaged before
            kind = "bytes"
    if kind == "lines":
        return damage_lines(draw, path)
    if kind in ("delete", "folder"):
        path.unlink()
        return path.mkdir() if kind == "folder" else None
    path.write_bytes({
        "flip": lambda: draw(flipped(before)), "cut": lambda: before[: draw(
            st.integers(0, max(0, len(before) - 1)))],
        "empty": lambda: b"", "bytes": lambda: draw(st.binary(min_size=1, max_size=40)),
        "json": lambda: draw(JSON.map(json.dumps) | ROUGH).encode(),
    }[kind]())


def damage_some(draw, folder: Path, most: int = 3):
    """Damage one to `most` files of a folder, or put a file in place of a folder."""
    for _ in range(draw(st.sampled_from([*[1] * 2 * most, *range(2, most + 1)]))):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            return
        path = draw(st.sampled_from(paths))
        say(f"damaged {path}")
        if path.parent != folder and draw(st.integers(0, 30)) == 30:
            shutil.rmtree(path.parent)
            path.parent.write_text("a file")
        else:
            damage(draw, path)


@fuzz
@given(data=st.data(), kind=st.sampled_from(sorted(TASK_FILES)),
       spelling=st.sampled_from(sorted(SPELLINGS)))
def test_damaged_task_folders(data, kind, spelling, tiny):
    if kind == "reranking" and re.search("sv|columns", spelling):  # its fields are lists
        spelling = "lines"
    with fresh() as folder:
        write_task(folder / "task", kind, spelling)
        damage_some(data.draw, folder / "task")
        argv = flags({"model": tiny, "task_dir": "task", "kind": kind, "threads": 1,
                      "device": "cpu", "results": "results"})
        outcome(evaluate.main, argv, tiny, folder / "task")


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory) -> Path:
    """A folder with a task, and its results by two methods."""
    folder = tmp_path_factory.mktemp("scored")
    write_task(folder / "task", "sts")
    with chdir(folder):
        for method in ("last", "mean"):
            argv = {"model": tiny, "task_dir": "task", "kind": "sts", "method": method,
                    "device": "cpu", "threads": 1}
            assert outcome(evaluate.main, flags(argv), tiny) == 0
    return folder


@fuzz
@given(data=st.data(), compared=st.booleans())
def test_damaged_results(data, compared, scored, tiny):
    with fresh() as folder:
        shutil.copytree(scored, folder, dirs_exist_ok=True)
        runs = sorted((folder / "results").iterdir())
        for path in folder.glob("results/*/*.json"):  # the task is in another place now
            path.write_text(path.read_text().replace(str(scored), str(folder.resolve())))
        damage_some(data.draw, folder / "results", most=2)
        if compared:
            argv, inputs = ["--compare", *(run.name for run in runs)], [folder / "results"]
        else:
            argv = flags({"model": tiny, "task_dir": "task", "kind": "sts", "method": "last",
                          "device": "cpu", "threads": 1})
            inputs = []
        outcome(evaluate.main, argv, tiny, folder / "task", *inputs)


# ---------------------------------------------------------------------------------------------
# Planted fields and edited files: the generator knows what has to be said
# ---------------------------------------------------------------------------------------------

FIELDS = st.text("bcdfghjkmp", min_size=4, max_size=12).map("x{}".format)  # names nobody reads
PASSAGES = SENTENCES | st.lists(SENTENCES, min_size=1, max_size=3) | st.fixed_dictionaries(
    {"title": SENTENCES, "text": SENTENCES})
few = settings(fuzz, max_examples=CASES or 25)


def plant(draw, path: Path, values) -> str:
    """Put a field of a new name into some rows of a .jsonl file; its name."""
    rows, name = [json.loads(line) for line in path.read_text().splitlines()], draw(FIELDS)
    chosen = draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    for i in chosen:
        rows[i][name] = draw(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    say(f"planted {name} in {path.name}: {[rows[i][name] for i in chosen]}")
    return name


@few
@given(data=st.data(), text=st.booleans(), stage=st.sampled_from(["ucl", "scl"]))
def test_a_planted_field_of_texts_or_triples_is_named(data, text, stage):
    good = ("query", "positive", "negative") if stage == "scl" else ("text",)
    with fresh() as folder:
        path = folder / "rows.jsonl"
        drawn = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(good, SENTENCES)),
                                   min_size=1, max_size=5))
        different = [{**row, good[-2 if stage == "scl" else 0]: f"{i}"}
                     for i, row in enumerate([*drawn, *drawn])]
        path.write_text("".join(json.dumps(row) + "\n" for row in different))
        name = plant(data.draw, path, PASSAGES if text else st.integers(0, 9))
        source = {"triples": path} if stage == "scl" else {"text": path}
        code = outcome(contrastive.main, flags({"stage": stage, **source, "dry_run": True}), folder)
        assert name in SAID[0]
        assert code == (2 if text and stage == "scl" else 0)


@few
@given(data=st.data(), kind=st.sampled_from(sorted(TASK_FILES)))
def test_a_planted_field_of_a_task_is_named(data, kind, tiny):
    with fresh() as folder:
        write_task(folder / "task", kind)
        path = data.draw(st.sampled_from(sorted(folder.glob("task/**/*.jsonl"))))
        name = plant(data.draw, path, PASSAGES | st.integers(0, 9))
        outcome(evaluate.main, flags({"model": tiny, "task_dir": "task", "kind": kind, "threads": 1,
                                      "device": "cpu"}), tiny, folder / "task")
        assert name in SAID[0]


def edit_row(draw, folder: Path):
    """One more character in a text of the task."""
    path = draw(st.sampled_from(sorted(folder.glob("task/*.jsonl"))))  # not the judgements
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = rows[draw(st.integers(0, len(rows) - 1))]
    keys = [key for key, value in row.items() if isinstance(value, str) and key != "_id"]
    row[draw(st.sampled_from(keys))] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_weight(draw, folder: Path):
    """Another number in a weight."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors[draw(st.sampled_from(sorted(tensors)))].view(-1)
    tensor[draw(st.integers(0, len(tensor) - 1))] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(draw, folder: Path):
    """Another value of a key of config.json that is read."""
    path = folder / "model" / "config.json"
    about = json.loads(path.read_text())
    key = draw(st.sampled_from(["rms_norm_eps", "rope_theta"]))
    if key == "rope_theta":
        about["rope_parameters"] = {**about["rope_parameters"], key: draw(st.integers(500, 9000))}
    else:
        about[key] = draw(st.floats(1e-4, 1e-2))
    path.write_text(json.dumps(about))


def edit_tokenizer(draw, folder: Path):
    """Fewer merges, or another BOS."""
    path = folder / "model" / "tokenizer.json"
    about = json.loads(path.read_text())
    if draw(st.booleans()):
        merges = about["model"]["merges"]
        about["model"]["merges"] = merges[: draw(st.integers(0, len(merges) - 1))]
    else:
        about["post_processor"]["special_tokens"]["<s>"]["ids"] = [draw(st.integers(3, 9))]
    path.write_text(json.dumps(about))


def save_again(draw, folder: Path):
    """The same tensors, in another order of another file, and keys that nobody reads."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    order = draw(st.permutations(sorted(tensors)))
    save_file({name: tensors[name] for name in order}, path, metadata={"by": draw(SENTENCES)})
    about = json.loads((folder / "model" / "config.json").read_text())
    new = draw(FIELDS)
    (folder / "model" / "config.json").write_text(json.dumps({new: 1, **about}))


@few
@given(data=st.data(), kind=st.sampled_from(["sts", "retrieval", "reranking"]),
       edit=st.sampled_from([edit_row, edit_weight, edit_config, edit_tokenizer, save_again]))
def test_an_edit_is_never_scored_as_before(data, kind, edit, tiny):
    with fresh() as folder:
        shutil.copytree(tiny, folder / "model")
        write_task(folder / "task", kind)
        argv = flags({"model": "model", "task_dir": "task", "kind": kind, "threads": 1,
                      "device": "cpu"})
        assert outcome(evaluate.main, argv) == 0
        say(edit.__name__)
        edit(data.draw, folder)
        code = outcome(evaluate.main, argv)
        if edit is save_again:
            assert code == 0 and "finished before" in SAID[0]
        else:
            assert code == 2 and "--force" in SAID[0]
            assert outcome(evaluate.main, [*argv, "--force"]) == 0
            assert outcome(evaluate.main, argv) == 0 and "finished before" in SAID[0]


# ---------------------------------------------------------------------------------------------
# Damaged runs, encoders and models
# ---------------------------------------------------------------------------------------------

STAGES = ["ctkd", "ucl", "scl"]


@pytest.fixture(scope="module")
def runs(home, ctkd, tiny, tmp_path_factory) -> Path:
    """A folder with a finished run of each stage that keeps its last two checkpoints of three."""
    folder = tmp_path_factory.mktemp("runs")
    write_task(folder / "data/sts17-crosslingual-sts", "sts")
    with chdir(folder):
        for stage in STAGES:
            assert again(stage, home, ctkd, tiny, folder / "data", resume=False) == 0
    return folder


def again(stage: str, home, ctkd, tiny, tasks: Path, resume=True) -> int:
    """A run of a stage into a folder of its name below the working directory."""
    common = {"out": stage, "steps": 3, "save_every": 1, "resume": resume}
    if stage == "ctkd":
        argv = {"model": tiny, "text": home / "texts.txt", **FAST1, **common}
        return outcome(pretrain_ctkd.main, flags(argv), home, tiny)
    argv = {"model": ctkd, **data_of(stage, home), **FAST2, **common, "eval_tasks": "sts17",
            "eval_every": 2, "data_dir": tasks}
    return outcome(contrastive.main, flags(argv), home, tiny, tasks)


@fuzz
@given(data=st.data(), stage=st.sampled_from(STAGES), removed=st.sampled_from(
    [(), ("encoder",), ("encoder", "checkpoints/step-0000003")]))
def test_damaged_runs(data, stage, removed, runs, home, ctkd, tiny):
    """What a damaged run ends with, if it resumes at all, is what the whole one ended with."""
    with fresh() as folder:
        run = Path(shutil.copytree(runs / stage, folder / stage))
        for name in removed:
            shutil.rmtree(run / name)
        damage_some(data.draw, run)
        if again(stage, home, ctkd, tiny, runs / "data") == 0:
            last = "checkpoints/step-0000003/weights.safetensors"
            assert (run / last).read_bytes() == (runs / stage / last).read_bytes()


@fuzz
@given(data=st.data(), reader=st.sampled_from(["ucl", "scl", "evaluate"]))
def test_damaged_encoders(data, reader, home, ctkd, tiny):
    with fresh() as folder:
        encoder = Path(shutil.copytree(ctkd / "encoder", folder / "given/encoder"))
        damage_some(data.draw, encoder)
        read(reader, encoder, home, tiny)


@fuzz
@given(data=st.data(), reader=st.sampled_from(["ctkd", "scl", "evaluate"]))
def test_damaged_models(data, reader, home, tiny):
    with fresh() as folder:
        model = Path(shutil.copytree(tiny, folder / "given"))
        damage_some(data.draw, model, most=2)
        read(reader, model, home, tiny)


def read(reader: str, model: Path, home: Path, tiny: Path) -> int:
    """A command on a model: a stage, or an evaluation."""
    if reader == "evaluate":
        write_task(Path("task"), "sts")
        argv = {"model": model, "task_dir": "task", "kind": "sts", "threads": 1, "device": "cpu"}
        return outcome(evaluate.main, flags(argv), model, tiny)
    if reader == "ctkd":
        argv = {"model": model, "text": home / "texts.txt", **FAST1}
        return outcome(pretrain_ctkd.main, flags(argv), model, home)
    argv = {"model": model, **data_of(reader, home), **FAST2}
    return outcome(contrastive.main, flags(argv), model, home, tiny)


# ---------------------------------------------------------------------------------------------
# What earlier cases found
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--lora-alpha=1e308", f"--threads={10**30}", f"--schedule-steps={10**400}",
    f"--out={'x' * 300}", f"--model={'x' * 300}", f"--text={'x' * 300}", "--template=\udc80{text}",
], ids=lambda value: repr(value)[:30])
def test_a_setting_that_once_ended_in_a_traceback(words, home, tiny):
    argv = flags({"model": tiny, "text": home / "texts.txt", **FAST2})
    with fresh():
        assert outcome(contrastive.main, [*argv, words], home, tiny) == 2


def test_a_name_that_is_not_utf_8_is_printed_escaped(home, ctkd, tiny):
    argv = flags({"model": ctkd, "text": home / "texts.txt", **FAST2, "out": "\udc80"})
    with fresh() as folder:
        assert outcome(contrastive.main, argv, home, tiny) == 0
        assert [path.name for path in folder.iterdir()] == ["\udc80"]


@pytest.mark.parametrize("file, path, new", [
    ("encoder.json", ("base", "name"), 5), ("encoder.json", ("base", "sha256"), 5),
    ("encoder.json", ("history",), []), ("encoder.json", ("max_tokens",), 40.0),
    ("encoder.json", ("document_template",), ["{text}"]),
    ("encoder.json", ("template",), "\ud800{text}"),
    ("ctkd/adapter_config.json", ("r",), 1e400), ("ctkd/adapter_config.json", ("r",), 10**12),
    ("ctkd/adapter_config.json", ("lora_dropout",), 1.05),
    ("config.json", ("num_hidden_layers",), 10**9), ("config.json", ("hidden_size",), 10**30),
    ("config.json", ("rms_norm_eps",), 10**400), ("config.json", ("head_dim",), 2**24),
    ("config.json", ("rope_parameters", "rope_theta"), 10**400),
    ("tokenizer.json", ("post_processor", "special_tokens", "<s>", "ids"), [9999]),
    ("tokenizer.json", ("post_processor", "special_tokens", "<s>"), ...),
    ("tokenizer.json", ("model", "continuing_subword_prefix"), "None"),  # the library panics
], ids=lambda value: repr(value)[:50])
def test_a_file_that_once_ended_in_a_traceback(file, path, new, home, ctkd, tiny):
    source = tiny if file in ("config.json", "tokenizer.json") else ctkd / "encoder"
    with fresh() as folder:
        model = Path(shutil.copytree(source, folder / "given"))
        whole = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(changed(whole, path, new)))
        assert read("evaluate", model, home, tiny) == 2


@pytest.mark.parametrize("name", ["memory_tokens", "embed_tokens"])
def test_tensors_that_are_not_floats_are_refused(name, home, ctkd, tiny):
    with fresh() as folder:
        model = Path(shutil.copytree(ctkd / "encoder", folder / "given"))
        tensors = load_file(model / "embeddings.safetensors")
        tensors[name] = tensors[name].long()
        save_file(tensors, model / "embeddings.safetensors")
        assert read("evaluate", model, home, tiny) == 2


@pytest.mark.parametrize("path, new", [
    (("scores", "test", 0, "main_score"), "0.5"), (("evaluation_time",), "1.0"),
    (("evaluation_time",), 10**400), (("settings", "paper"), ["LT"]),
], ids=lambda value: repr(value)[:50])
def test_a_result_that_once_ended_in_a_traceback(path, new, scored, tiny):
    with fresh() as folder:
        shutil.copytree(scored, folder, dirs_exist_ok=True)
        (file, *_) = sorted(folder.glob("results/*/*.json"))
        file.write_text(json.dumps(changed(json.loads(file.read_text()), path, new)))
        assert outcome(evaluate.main, ["--compare", file.parent.name], tiny) == 2


@pytest.mark.parametrize("k", ["2", [2], 10**400], ids=lambda value: repr(value)[:30])
def test_an_odd_k_in_a_result_of_format_1_is_no_traceback(k, scored, tiny):
    with fresh() as folder:
        shutil.copytree(scored, folder, dirs_exist_ok=True)
        (file,) = folder.glob("results/*@last/*.json")
        whole = json.loads(file.read_text().replace(str(scored), str(folder.resolve())))
        old = changed(whole, ("settings", "format"), ...)
        file.write_text(json.dumps(changed(old, ("settings", "num_memory_tokens"), k)))
        argv = {"model": tiny, "task_dir": "task", "kind": "sts", "method": "last",
                "device": "cpu", "threads": 1}
        outcome(evaluate.main, flags(argv), tiny)


@pytest.mark.parametrize("objective", [[], {}, None, 5], ids=str)
def test_an_odd_objective_of_the_papers_recipe_is_no_row_and_no_traceback(
    objective, home, ctkd, tiny
):
    recipe = PUBLISHED["recipes"]["ctkd"]
    with fresh() as folder:
        model = Path(shutil.copytree(ctkd / "encoder", folder / "given"))
        whole = json.loads((model / "encoder.json").read_text())
        history = [{"stage": "ctkd", **recipe, "objective": objective}]
        (model / "encoder.json").write_text(json.dumps({**whole, "history": history}))
        assert read("evaluate", model, home, tiny) == 0


@pytest.mark.parametrize("line", ['{"step": 2}', '{"step": 2, "mean": {}}', "[" * 100_000],
                         ids=lambda value: value[:30])
def test_odd_lines_among_the_scores_of_a_run_are_left_out(line, runs, home, ctkd, tiny):
    with fresh() as folder:
        run = Path(shutil.copytree(runs / "ucl", folder / "ucl"))
        shutil.rmtree(run / "checkpoints/step-0000003")
        (run / "scores.jsonl").write_text(line + "\n")
        assert again("ucl", home, ctkd, tiny, runs / "data") == 0
